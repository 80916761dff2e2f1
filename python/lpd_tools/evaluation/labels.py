"""Maps the labels of a set of images to the classes of a model or judge, by name first, then by number."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lpd_tools.data.image_source import few
from lpd_tools.data.names import whole_numbers
from lpd_tools.evaluation.images import ImageSet


def labels_among(images: ImageSet, class_names: Sequence[str], num_classes: int) -> Tensor | None:
    """Returns labels int64 [n] of the images in the numbering of `num_classes` classes with these names, if any.

    Maps by name if a class of the images has one of the names; then all must, else ValueError. Names that are numbers,
    and labels without names, are used as labels; at least as many names as classes are taken in their order. Returns
    None if none of this applies.
    """
    labels, names = images.labels, images.class_names
    if labels is None:
        return None
    present = labels.unique().tolist()
    if not all(label in names for label in present):
        return labels
    # A folder cannot be called T-shirt/top.
    known = {name.replace("/", "_"): number for number, name in reversed(list(enumerate(class_names)))}
    known |= {name: number for number, name in reversed(list(enumerate(class_names)))}
    unknown = [names[label] for label in present if names[label] not in known]
    if not unknown:
        return _renumbered(labels, {label: known[names[label]] for label in present})
    if len(unknown) < len(present):
        raise ValueError(
            f"images: {images.name!r} has the classes {few(unknown)}, which are not of {few(list(class_names))}"
        )
    if (numbers := whole_numbers(unknown)) is not None:
        return _renumbered(labels, dict(zip(present, numbers, strict=True)))
    return labels if len(names) >= num_classes else None


def _renumbered(labels: Tensor, numbers: dict[int, int]) -> Tensor:
    return torch.tensor([numbers[label] for label in labels.tolist()], dtype=torch.int64)
