"""The real images that generated ones are compared with, and the real-versus-real floor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lpd_tools.data.sources import open_data
from lpd_tools.evaluation.features import Extractor, Features, extract
from lpd_tools.evaluation.images import ImageSet, data_images, open_images
from lpd_tools.evaluation.metrics import Statistics, read_statistics
from lpd_tools.evaluation.npz import read_names

DATA_SETS = ("fashion-mnist", "folder", "hf")


@dataclass(frozen=True)
class Reference:
    """Real images, or only statistics of their Inception features; `more`: further real images, none of them the same.

    Without `more` the floor is a distance between two halves of the images. skipped: why images were left out.
    """

    images: ImageSet | None
    statistics: Statistics | None = None
    more: ImageSet | None = None
    skipped: tuple[str, ...] = ()


@dataclass(frozen=True)
class ReferenceFeatures:
    """Features of real images by one extractor; statistics instead of, or beside, features.

    floor and floor_target: two disjoint sets of real features, their distance being the floor, if there are enough.
    """

    values: Tensor | None
    logits: Tensor | None
    statistics: Statistics | None
    floor: Features | None
    floor_target: Tensor | Statistics | None


def open_reference(source: str, more: str, size: tuple[int, int]) -> Reference:
    """Real images brought to `size`: a data set's test split, a folder, or an .npz file, which may hold mu and sigma.

    `more` names the further real images in the same way; for a data set they are its training split, unless `more`
    says otherwise. Raises FileNotFoundError, or ValueError naming what cannot be read.
    """
    others = _real_images(more, size, "train") if more else None
    if is_data_set(source):
        data = open_data(source)
        return Reference(
            data_images(data.test, size, f"{source} (test)"),
            more=others or data_images(data.train, size, f"{source} (train)"),
        )
    if Path(source).suffix != ".npz" or not Path(source).is_file():
        return Reference(open_images(source, size), more=others)
    statistics = read_statistics(source)
    has_images = statistics is None or "arr_0" in read_names(source)
    return Reference(open_images(source, size) if has_images else None, statistics, others)


def is_data_set(source: str) -> bool:
    """Whether the name is a data set of `open_data`, rather than a path."""
    return source.partition(":")[0] in DATA_SETS


def _real_images(source: str, size: tuple[int, int], split: str) -> ImageSet:
    if is_data_set(source):
        return data_images(open_data(source).split(split), size, f"{source} ({split})")
    return open_images(source, size)


def balanced_sample(labels: Tensor | None, total: int, count: int, seed: int = 0) -> Tensor:
    """Indices of `count` random images of `total`, as evenly as can be of each class where labels [total] are known."""
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    if labels is None:
        return order[:count]
    # The images in rounds, one of each class to a round; the first `count` of them.
    drawn = labels[order]
    rounds = torch.empty(total, dtype=torch.int64)
    for label in drawn.unique():
        of_class = (drawn == label).nonzero().flatten()
        rounds[of_class] = torch.arange(len(of_class))
    return order[rounds.argsort(stable=True)][:count]


def check_features(extractors: Sequence[Extractor], reference: Reference, size: tuple[int, int]) -> None:
    """ValueError unless every extractor reads images of `size` (h, w) and has something in the reference to meet."""
    for extractor in extractors:
        width = extractor(torch.zeros(1, *size, 3, dtype=torch.uint8)).values.shape[1]
        statistics = _statistics_for(extractor, reference)
        if statistics is not None and len(statistics.mean) != width:
            raise ValueError(
                f"reference holds statistics of another network: mu has {len(statistics.mean)} features, "
                f"{extractor.name} gives {width}"
            )
        if statistics is None and reference.images is None:
            raise ValueError(
                f"reference holds statistics of Inception features alone, and {extractor.name} needs real images"
            )


def _statistics_for(extractor: Extractor, reference: Reference) -> Statistics | None:
    return reference.statistics if extractor.name == "inception" else None


def reference_features(
    reference: Reference, extractor: Extractor, count: int, batch_size: int, seed: int = 0
) -> ReferenceFeatures:
    """Extracts the features of the real images; the floor is that of `count` images, or as many as there are."""
    statistics = _statistics_for(extractor, reference)
    seen = extract(extractor, reference.images, batch_size) if reference.images is not None else None
    values = None if seen is None else seen.values
    logits = None if seen is None else seen.logits
    floor, target = None, None
    if reference.more is not None:
        chosen = balanced_sample(reference.more.labels, len(reference.more), count, seed).tolist()
        floor = extract(extractor, reference.more.subset(chosen, reference.more.name), batch_size)
        target = statistics if statistics is not None else values
    elif values is not None and reference.images is not None and len(values) >= 4:
        half = min(count, len(values) // 2)
        order = balanced_sample(reference.images.labels, len(values), len(values), seed)
        floor = Features(values[order[:half]], None if logits is None else logits[order[:half]])
        target = values[order[half:]]
    return ReferenceFeatures(values, logits, statistics, floor, target)
