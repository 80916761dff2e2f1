"""`lpd measure`: compares generated images with real ones by the chosen features."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from lpd_ext.state_files import complete_file
from lpd_tools.checks import check_device
from lpd_tools.data.fashion_mnist import CLASS_NAMES
from lpd_tools.data.token_cache import file_hash
from lpd_tools.evaluation.features import Extractor, Features, extract, make_extractor
from lpd_tools.evaluation.images import MANIFEST_FILE, ImageSet, open_images, read_manifest
from lpd_tools.evaluation.labels import labels_among
from lpd_tools.evaluation.metrics import (
    Statistics,
    frechet_distance,
    inception_score,
    kernel_distance,
    over_repeats,
    precision_recall,
)
from lpd_tools.evaluation.neighbours import NEIGHBOURS_FILE, nearest, neighbours_picture
from lpd_tools.evaluation.probe import Learned, check_learned, learn
from lpd_tools.evaluation.provenance import provenance
from lpd_tools.evaluation.readable import check_readable, readable_reference
from lpd_tools.evaluation.reference import (
    Reference,
    ReferenceFeatures,
    check_features,
    open_reference,
    reference_features,
)
from lpd_tools.evaluation.settings import Measurement
from lpd_tools.png_settings import save_png

ENOUGH_IMAGES = 2000
GENERATED, FLOOR, RECONSTRUCTED = "generated", "real (the floor)", "reconstructed"


def measure(config: Measurement) -> dict[str, Any]:
    """Returns all measures as a nested dict; also writes them to `config.out` (JSON) if given.

    Raises ValueError or FileNotFoundError with the name of what cannot be read, before anything is written.
    """
    wanted = (config.size, config.size) if config.size else None
    generated = [open_images(source, wanted) for source in config.images]
    if not generated:
        raise ValueError("images must name at least one folder or .npz file of generated images")
    for images in generated[1:]:
        if (images.size, len(images)) != (generated[0].size, len(generated[0])):
            raise ValueError(
                f"images: repeats must have one size and number, but {images.name!r} has {len(images)} of "
                f"{images.size} and {generated[0].name!r} {len(generated[0])} of {generated[0].size}"
            )
    extractors = chosen_extractors(config)
    reference = open_reference(config.reference, config.floor, generated[0].size)
    check_features(extractors, reference, generated[0].size)
    check_judged(extractors, [*generated, reference.images, reference.more])
    check_learned(config.learned_images, config.neighbours, extractors, reference, generated)
    if config.neighbours and not config.out:
        raise ValueError("out must be given for neighbours, whose picture goes beside it")
    pairs = Path(config.out).with_name(NEIGHBOURS_FILE) if config.neighbours else None
    reference = readable_reference(reference, max(len(generated[0]), config.learned_images), config.seed)
    for images in generated:
        check_readable(images)  # a set with gaps is not what was to be measured
    results = compare(config, generated, reference, extractors, pairs=pairs)
    results["generated_with"] = manifests(config.images)
    write_results(results, config.out)
    return results


def chosen_extractors(config: Any) -> list[Extractor]:
    """The extractors that `features`, or else the given files, ask for; ValueError naming what is missing."""
    given = [kind for kind in ("judge", "inception") if getattr(config, kind)]
    kinds = list(config.features) or given or ["efficientnet"]
    device = check_device(config.device)
    return [make_extractor(kind, config.judge, config.inception, device) for kind in dict.fromkeys(kinds)]


def compare(
    config: Any,
    generated: Sequence[ImageSet],
    reference: Reference,
    extractors: Sequence[Extractor],
    others: Mapping[str, ImageSet] | None = None,
    shown_to_judge: Mapping[str, ImageSet] | None = None,
    pairs: Path | None = None,
    command: str = "measure",
) -> dict[str, Any]:
    """Measures repeats of generated images, the floor, and `others` (by name), and records their provenance.

    shown_to_judge: images that are only recognised, such as the reference's own in another form, whose distance to it
    means nothing. config: a `Measurement`, or an object with its fields `batch_size`, `device`, `seed`, `k`,
    `learned_images` and `neighbours`. pairs: a PNG to write, of drawn images above their nearest learned ones, by the
    first features that are not the judge's, with the `command` and the settings in it.
    """
    count = len(generated[0])
    measures: dict[str, dict[str, Any]] = {}
    recognised: dict[str, dict[str, Any]] = {}
    probed: dict[str, dict[str, Any]] = {}
    for extractor in extractors:
        real = reference_features(reference, extractor, count, config.batch_size, config.seed)
        seen = [extract(extractor, images, config.batch_size) for images in generated]
        rows: dict[str, list[Features]] = {GENERATED: seen}
        for name, images in (others or {}).items():
            rows[name] = [extract(extractor, images, config.batch_size)]
        for row, sets in rows.items():
            _collect(measures, row, [image_measures(extractor.name, found, real, config) for found in sets])
        if real.floor is not None and real.floor_target is not None:
            floor = _against(extractor.name, real.floor, real.floor_target, config)
            _collect(measures, FLOOR, [floor])
        if extractor.name == "judge":
            _recognise(recognised, GENERATED, seen, generated)
            for name, images in {**(others or {}), **(shown_to_judge or {})}.items():
                again = rows.get(name) or [extract(extractor, images, config.batch_size)]
                _recognise(recognised, name, again, [images])
            if reference.images is not None and real.values is not None:
                _recognise(recognised, "real reference", [Features(real.values, real.logits)], [reference.images])
        elif config.learned_images:
            learned = learn(extractor, reference, config.learned_images, config.batch_size, config.seed)
            probed[extractor.name] = _probe(learned, seen, generated, reference.images, real.values)
            if pairs is not None and len(probed) == 1:
                drawn_and_real = generated[0], seen[0].values, learned.images, learned.features
                picture = neighbours_picture(*drawn_and_real, config.neighbours)
                save_png(picture, pairs, {"command": command, **asdict(config)})
    results: dict[str, Any] = {"measures": measures}
    if recognised:
        results["recognised"] = recognised
    if probed:
        results["probed"] = probed
    results["images"] = {
        GENERATED: count,
        "repeats": len(generated),
        "size": list(generated[0].size),
        "reference": len(reference.images) if reference.images is not None else "statistics",
    }
    results["skipped"] = list(reference.skipped)
    results["warnings"] = warnings_for(count, len(generated), reference)
    if any(extractor.name == "judge" for extractor in extractors):
        results["warnings"] += [
            f"the judge knows none of the classes of {images.name}: nothing there is recognised"
            for images in (*generated, reference.images)
            if images is not None and images.labels is not None and judged_labels(images) is None
        ]
    results["settings"] = asdict(config)
    results["sha256"] = {
        kind: file_hash(path) for kind in ("judge", "inception") if (path := getattr(config, kind, ""))
    }
    results["made_with"] = provenance(check_device(config.device))
    return results


def image_measures(name: str, found: Features, real: ReferenceFeatures, config: Any) -> dict[str, float]:
    """The measures of one set of images by one extractor, by their names."""
    target = real.statistics if real.statistics is not None else real.values
    assert target is not None
    result = _against(name, found, target, config)
    if real.statistics is not None and real.values is not None:
        # The distance is to the given statistics; what needs single images takes those of the reference.
        result = _against(name, found, real.values, config) | result
    if name == "inception" and found.logits is not None and len(found.logits) >= 10:
        result["IS"] = inception_score(found.logits, config.seed)[0]
    return result


def _against(name: str, found: Features, target: Tensor | Statistics, config: Any) -> dict[str, float]:
    standard = name == "inception"

    def named(measure: str) -> str:
        return measure if standard else f"{measure}-{name}"

    result = {"FID" if standard else f"FD-{name}": frechet_distance(found.values, target)}
    if isinstance(target, Statistics):
        return result
    result[named("KID")] = kernel_distance(found.values, target, config.seed)[0]
    if min(len(found.values), len(target)) > config.k:
        precision, recall = precision_recall(found.values, target, config.k)
        result |= {named("precision"): precision, named("recall"): recall}
    return result


def _collect(measures: dict[str, dict[str, Any]], row: str, repeats: Sequence[Mapping[str, float]]) -> None:
    for name in repeats[0]:
        measures.setdefault(name, {})[row] = over_repeats([repeat[name] for repeat in repeats])


def check_judged(extractors: Sequence[Extractor], sets: Sequence[ImageSet | None]) -> None:
    """ValueError for images of classes that the judge does not know, if it is one of the extractors."""
    if any(extractor.name == "judge" for extractor in extractors):
        for images in sets:
            labels = None if images is None else judged_labels(images)
            if labels is not None:
                _check_known(labels)


def judged_labels(images: ImageSet) -> Tensor | None:
    """Labels int64 [n] as the judge numbers its classes; None where they are not known."""
    return labels_among(images, CLASS_NAMES, len(CLASS_NAMES))


def _check_known(labels: Tensor, class_names: Sequence[str] = CLASS_NAMES) -> None:
    if int(labels.max()) >= len(class_names):
        raise ValueError(f"images have labels up to {int(labels.max())}, but {len(class_names)} classes are known")


def _recognise(
    recognised: dict[str, dict[str, Any]], row: str, seen: Sequence[Features], images: Sequence[ImageSet]
) -> None:
    """Adds the row of these images, repeats of each other, if their labels are known."""
    labels = [found for set_ in images if (found := judged_labels(set_)) is not None]
    logits = [features.logits for features in seen if features.logits is not None]
    if len(labels) == len(images):
        recognised[row] = recognition_of(logits, labels)


def _probe(
    learned: Learned,
    seen: Sequence[Features],
    generated: Sequence[ImageSet],
    real: ImageSet | None,
    real_features: Tensor | None,
) -> dict[str, Any]:
    """By row of images: the share that the classifier recognises, and the median distance to the nearest learned one.

    Not of reconstructed images: those may be of the learned ones.
    """
    rows = {GENERATED: (seen, generated)}
    if real is not None and real_features is not None:
        rows["real reference"] = [Features(real_features)], [real]
    result: dict[str, Any] = {"recognised": {}, "nearest": {}}
    for row, (features, sets) in rows.items():
        distances = [nearest(found.values, learned.features)[1] for found in features]
        result["nearest"][row] = over_repeats([float(found.median()) for found in distances])
        labels = [found for images in sets if (found := learned.labels(images)) is not None]
        if len(labels) == len(sets):
            logits = [learned.probe.logits(found.values) for found in features]
            result["recognised"][row] = recognition_of(logits, labels, learned.class_names)
    return result


def recognition_of(
    logits: Sequence[Tensor], labels: Sequence[Tensor], class_names: Sequence[str] = CLASS_NAMES
) -> dict[str, Any]:
    """Share of images whose greatest logit is that of their label, over all ("all") and by class, over the repeats.

    logits [n, C] and labels int64 [n] of each repeat; ValueError for a label that is none of the classes.
    """
    rates: dict[str, list[float]] = {}
    for found, wanted in zip(logits, labels, strict=True):
        _check_known(wanted, class_names)
        right = (found.argmax(1) == wanted).double()
        rates.setdefault("all", []).append(float(right.mean()))
        for label, name in enumerate(class_names):
            if (wanted == label).any():
                rates.setdefault(name, []).append(float(right[wanted == label].mean()))
    return {name: over_repeats(values) for name, values in rates.items()}


def warnings_for(count: int, repeats: int, reference: Reference) -> list[str]:
    """Returns caveats about the figures."""
    found = []
    if count < ENOUGH_IMAGES:
        found.append(
            f"only {count} images: distances of fewer than {ENOUGH_IMAGES} are dominated by their bias; compare them "
            "with the floor, and with nothing else"
        )
    if repeats == 1:
        found.append("one run alone has no spread: --repeats 3 gives intervals")
    if reference.images is not None and len(reference.images) < ENOUGH_IMAGES:
        found.append(f"only {len(reference.images)} real images in the reference")
    if reference.skipped:
        others = f" and {len(reference.skipped) - 1} more" if len(reference.skipped) > 1 else ""
        found.append(f"skipped real images that cannot be read: {reference.skipped[0]}{others}")
    return found


def manifests(sources: Sequence[str]) -> list[dict[str, Any]]:
    """The manifests of those sources that `lpd generate` wrote."""
    return [read_manifest(Path(source)) for source in sources if (Path(source) / MANIFEST_FILE).is_file()]


def write_results(results: Mapping[str, Any], path: str | Path) -> None:
    """Results as JSON, if a path is given."""
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with complete_file(path) as temporary:
            temporary.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
