"""`lpd evaluate`: draws images, then measures them, the tokenizer and the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lpd_ext.pipeline import LPDPipeline
from lpd_ext.schedule import group_sizes
from lpd_ext.tokenizer import VQTokenizer
from lpd_tools.data.fashion_mnist import BORDER, CLASS_NAMES, centre_psnr, from_pixels
from lpd_tools.data.image_source import evenly_spaced
from lpd_tools.data.model_files import model_files
from lpd_tools.data.pixels import to_input
from lpd_tools.data.reconstruction import reconstruct
from lpd_tools.evaluation.features import Extractor
from lpd_tools.evaluation.generate import (
    drawing_processes,
    generate,
    repeat_of,
    sampling_of,
    sampling_options,
)
from lpd_tools.evaluation.images import ImageSet, in_memory, open_images
from lpd_tools.evaluation.labels import labels_among
from lpd_tools.evaluation.likelihood import dependency_loss, orders_for, self_consistency
from lpd_tools.evaluation.measure import (
    RECONSTRUCTED,
    check_judged,
    chosen_extractors,
    compare,
    manifests,
    write_results,
)
from lpd_tools.evaluation.neighbours import NEIGHBOURS_FILE
from lpd_tools.evaluation.probe import check_learned
from lpd_tools.evaluation.readable import readable_reference
from lpd_tools.evaluation.reference import Reference, balanced_sample, check_features, open_reference
from lpd_tools.evaluation.report import picture
from lpd_tools.evaluation.settings import Evaluation
from lpd_tools.models import load_pipeline
from lpd_tools.pictures import psnr
from lpd_tools.png_settings import save_png
from lpd_tools.progress import track

RESULTS_FILE = "evaluation.json"
PICTURE_FILE = "grid.png"


def evaluate(config: Evaluation) -> dict[str, Any] | None:
    """Returns all measures as a nested dict and writes them to `out`/evaluation.json, with a picture beside it.

    Returns None in the processes of a `torchrun` that only draw. Raises ValueError or FileNotFoundError with the reason
    before anything is drawn, also if the model was trained on the tokens of another tokenizer than its own.
    """
    with drawing_processes(config.device) as group:
        config = replace(config, device=str(group.device))
        files = model_files(config.model, config.tokenizer)
        pipe = load_pipeline(files.model, files.tokenizer, config.dtype, group.device)
        check_nats(config, pipe)
        extractors = chosen_extractors(config)
        stride = pipe.tokenizer.config.stride
        height, width = (cells * stride for cells in pipe.model.config.grid)
        reference = open_reference(config.reference, config.floor, (height, width))
        check_features(extractors, reference, (height, width))
        check_labels(config, pipe, reference, extractors)

        count = config.images_per_class * pipe.model.config.num_classes
        if group.is_first:  # the only one that measures
            most = max(count, config.reconstructed_images, config.learned_images)
            reference = readable_reference(reference, most, config.seed)
        runs = [repeat_of(config, repeat, count) for repeat in range(config.repeats)]
        folders = [str(generate(run)) for run in runs]
        if not group.is_first:
            return None

    generated = [open_images(folder) for folder in folders]
    rebuilt = rebuilt_images(pipe, reference, config)
    pairs = Path(config.out) / NEIGHBOURS_FILE if config.neighbours else None
    sets = generated, reference, extractors, rebuilt.others, rebuilt.of_reference
    results = compare(config, *sets, pairs=pairs, command="evaluate")
    results["sampling"] = sampling_of(pipe, sampling_options(config))
    results["generated_with"] = manifests(folders)
    results |= rebuilt.measures
    results |= likelihoods(pipe, reference, config)
    write_results(results, Path(config.out) / RESULTS_FILE)
    said = {"command": "evaluate", **asdict(config), "sampling": results["sampling"]}
    save_png(picture(generated[0], pipe.class_names), Path(config.out) / PICTURE_FILE, said)
    return results


def check_nats(config: Evaluation, pipe: LPDPipeline) -> None:
    """ValueError naming a setting of the nats that the model cannot have."""
    num_tokens = pipe.model.config.num_tokens
    for steps in config.nats_steps:
        if not 1 <= steps <= num_tokens:
            raise ValueError(f"nats_steps must be in [1, {num_tokens}], got {steps}")
    for order in config.nats_orders:
        orders_for(order, pipe.model.config.grid, num_tokens, 1, pipe.defaults)


def check_labels(config: Evaluation, pipe: LPDPipeline, reference: Reference, extractors: Sequence[Extractor]) -> None:
    """ValueError for labels of the model that the judge does not know, or of the reference that the model does not."""
    classes = pipe.model.config.num_classes
    if classes > len(CLASS_NAMES) and any(extractor.name == "judge" for extractor in extractors):
        raise ValueError(f"features: the model has {classes} classes, but the judge knows {len(CLASS_NAMES)}")
    drawn = in_memory(
        torch.empty(classes, 1, 1, 3), torch.arange(classes), "the model", dict(enumerate(pipe.class_names))
    )
    check_judged(extractors, [drawn, reference.images, reference.more])
    check_learned(config.learned_images, config.neighbours, extractors, reference, [drawn])
    real = reference.images
    if not config.nats_images or real is None or real.labels is None:
        return
    labels = labels_among(real, pipe.class_names, classes)
    if labels is None or int(labels.max()) >= classes:
        what = "classes by other names" if labels is None else f"labels up to {int(labels.max())}"
        raise ValueError(
            f"reference {config.reference!r} has {what}, but the model has {classes} classes: "
            "no nats can be taken of it (nats_images 0 takes none)"
        )


def nats_steps(config: Evaluation, num_tokens: int) -> list[int]:
    """Returns the numbers of steps at which to measure nats."""
    usual = [steps for steps in (4, 6, 10, 16) if steps < num_tokens]
    return list(config.nats_steps) or [*usual, num_tokens]


@dataclass(frozen=True)
class Rebuilt:
    """Real images after encoding and decoding, and their PSNR."""

    others: dict[str, ImageSet]
    of_reference: dict[str, ImageSet]
    measures: dict[str, Any]


def rebuilt_images(pipe: LPDPipeline, reference: Reference, config: Evaluation) -> Rebuilt:
    """Reconstructs `reconstructed_images` real images from outside the reference, or else from it.

    Their distance is the cost of the tokenizer alone; the PSNR is that of the reference.
    """
    source, count = reference.more or reference.images, config.reconstructed_images
    if source is None or not count:
        return Rebuilt({}, {}, {})
    chosen = balanced_sample(source.labels, len(source), count, config.seed).tolist()
    pixels = reconstruct_images(pipe.tokenizer, source.subset(chosen, source.name), config.batch_size)
    labels = None if source.labels is None else source.labels[chosen]
    # Against the very images they were made of they come out closer than others would.
    row = RECONSTRUCTED if reference.more else f"{RECONSTRUCTED} (of the reference)"
    others = {row: in_memory(pixels, labels, f"reconstructed {source.name}", source.class_names)}
    real = reference.images or source
    chosen = balanced_sample(real.labels, len(real), count, config.seed).tolist()
    some = real.subset(chosen, real.name)
    restored = reconstruct_images(pipe.tokenizer, some, config.batch_size)
    wanted = some.read(range(len(some)))
    measures: dict[str, Any] = {"reconstruction_psnr_db": psnr(restored, wanted)}
    if config.reference.startswith("fashion-mnist"):
        grey = wanted[:, BORDER:-BORDER, BORDER:-BORDER, 0]
        measures["reconstruction_psnr_centre_db"] = centre_psnr(from_pixels(restored), grey)
    of_reference = {
        "reconstructed reference": in_memory(restored, some.labels, f"reconstructed {real.name}", some.class_names)
    }
    return Rebuilt(others, of_reference, measures)


def reconstruct_images(tokenizer: VQTokenizer, images: ImageSet, batch_size: int = 100) -> Tensor:
    """Pixels uint8 [n, H, W, 3] of images, encoded and decoded."""
    total = -(-len(images) // batch_size)
    device = next(tokenizer.parameters()).device
    parts = []
    for pixels in track(images.batches(batch_size), f"reconstructing {images.name}", total):
        parts.append(reconstruct(tokenizer, pixels.permute(0, 3, 1, 2), device))
    return torch.cat(parts)


@torch.inference_mode()
def tokens_of(pipe: LPDPipeline, images: ImageSet, batch_size: int = 100) -> Tensor:
    """Tokens int64 [n, N] of images, in raster order."""
    device = pipe.model.pos_embed.device
    batches = images.batches(batch_size)
    return torch.cat(
        [pipe.tokenizer.encode(to_input(part.permute(0, 3, 1, 2).to(device))).flatten(1) for part in batches]
    )


def likelihoods(pipe: LPDPipeline, reference: Reference, config: Evaluation) -> dict[str, Any]:
    """Measures dependency loss of real images and self-consistency of drawn ones, by order and number of steps."""
    results: dict[str, Any] = {}
    grid, num_tokens = pipe.model.config.grid, pipe.model.config.num_tokens
    cells = [(order, steps) for order in config.nats_orders for steps in nats_steps(config, num_tokens)]
    real = reference.images
    if real is not None and config.nats_images:
        some = real.subset(evenly_spaced(config.nats_images, len(real)).tolist(), real.name)
        tokens = tokens_of(pipe, some)
        labels = labels_among(some, pipe.class_names, pipe.model.config.num_classes)
        if labels is None:
            labels = torch.full((len(some),), -1)
        table = results["nats_per_reference_image"] = empty_table(config.nats_orders)
        for order, steps in track(cells, "teacher-forced nats"):
            orders = orders_for(order, grid, steps, len(some), pipe.defaults)
            nats = dependency_loss(pipe.model, tokens, labels, orders, group_sizes(num_tokens, steps))
            table[order][str(steps)] = with_error(nats)
    if config.self_images:
        labels = torch.arange(config.self_images) % pipe.model.config.num_classes
        table = results["nats_per_unguided_image"] = empty_table(config.nats_orders)
        for order, steps in track(cells, "self-consistency"):
            drawn = draw_unguided(pipe, labels.tolist(), config, num_inference_steps=steps, order=order)
            table[order][str(steps)] = with_error(self_consistency(pipe.model, drawn, labels))
    return results


def draw_unguided(pipe: LPDPipeline, labels: Sequence[int], config: Evaluation, **options: Any) -> Tensor:
    """Draws tokens int64 [B, N] at temperature 1 without guidance and filters: plain samples of the model."""
    plain: dict[str, Any] = {"guidance_scale": 1.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0, **options}
    parts = []
    for start in range(0, len(labels), config.batch_size):
        batch = list(labels[start : start + config.batch_size])
        seeds = list(range(config.seed + start, config.seed + start + len(batch)))
        parts.append(pipe(batch, seeds=seeds, output_type="tokens", **plain).tokens.flatten(1))
    return torch.cat(parts)


def empty_table(orders: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Returns an empty table with a row for each order."""
    return {order: {} for order in orders}


def with_error(nats: Tensor) -> dict[str, float]:
    """Returns the mean of nats [n] and its standard error over the images."""
    error = float(nats.std() / len(nats) ** 0.5) if len(nats) > 1 else 0.0
    return {"mean": float(nats.mean()), "standard_error": error}
