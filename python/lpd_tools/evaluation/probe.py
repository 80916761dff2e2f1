"""A linear classifier of features: recognises labelled images that no judge knows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lpd_tools.evaluation.features import Extractor, extract
from lpd_tools.evaluation.images import ImageSet
from lpd_tools.evaluation.labels import labels_among
from lpd_tools.evaluation.reference import Reference, balanced_sample

_RIDGE = 1e-3  # weight of the squared weights beside the mean cross-entropy
_ITERATIONS = 200


class Probe:
    """Softmax regression on features [n, F], standardised, with labels int64 [n] in [0, num_classes)."""

    def __init__(self, features: Tensor, labels: Tensor, num_classes: int) -> None:
        self.mean, self.scale = features.mean(0), features.std(0, correction=0).clamp_min(1e-6)
        inputs = self._standardised(features)
        self.weight = torch.zeros(num_classes, inputs.shape[1], requires_grad=True)
        self.bias = torch.zeros(num_classes, requires_grad=True)
        optimizer = torch.optim.LBFGS([self.weight, self.bias], max_iter=_ITERATIONS, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            value = F.cross_entropy(F.linear(inputs, self.weight, self.bias), labels)
            value = value + _RIDGE * self.weight.square().sum()
            value.backward()
            return value

        with torch.enable_grad():
            optimizer.step(loss)

    @torch.no_grad()
    def logits(self, features: Tensor) -> Tensor:
        """Returns class logits [n, C] of features [n, F]."""
        return F.linear(self._standardised(features), self.weight, self.bias)

    def _standardised(self, features: Tensor) -> Tensor:
        return (features - self.mean) / self.scale


@dataclass(frozen=True)
class Learned:
    """Real images outside the reference, their features by one extractor, and a probe that learned their classes."""

    images: ImageSet
    features: Tensor
    class_names: Sequence[str]
    probe: Probe

    def labels(self, images: ImageSet) -> Tensor | None:
        """Labels int64 [n] of images as the probe numbers its classes; None where they are not known."""
        return labels_among(images, self.class_names, len(self.class_names))


def learn(extractor: Extractor, reference: Reference, count: int, batch_size: int, seed: int) -> Learned:
    """Learns from `count` of the reference's further images, as evenly as can be of each class; see `check_learned`."""
    more = reference.more
    assert more is not None
    chosen = more.subset(balanced_sample(more.labels, len(more), count, seed).tolist(), more.name)
    assert chosen.labels is not None
    names = _class_names(more)
    features = extract(extractor, chosen, batch_size).values
    return Learned(chosen, features, names, Probe(features, chosen.labels, len(names)))


def check_learned(
    count: int,
    neighbours: int,
    extractors: Sequence[Extractor],
    reference: Reference,
    generated: Sequence[ImageSet],
) -> None:
    """ValueError where classes cannot be learned from `count` images, or images have others than those."""
    if neighbours and not count:
        raise ValueError(f"neighbours must be 0 without learned_images, among which they are sought, got {neighbours}")
    if not count:
        return
    more = reference.more
    if more is None or more.labels is None:
        raise ValueError(f"learned_images must be 0 without labelled real images beside the reference, got {count}")
    if all(extractor.name == "judge" for extractor in extractors):
        raise ValueError("features must name others than the judge, which needs no learned_images")
    names = _class_names(more)
    if count < 2 * len(names):
        raise ValueError(f"learned_images must be at least {2 * len(names)}, two of each class, got {count}")
    for images in (*generated, reference.images):
        labels = None if images is None else labels_among(images, names, len(names))
        if images is not None and labels is not None and int(labels.max()) >= len(names):
            raise ValueError(
                f"images: {images.name!r} has labels up to {int(labels.max())}, but {more.name!r} has {len(names)} "
                "classes to learn"
            )


def _class_names(images: ImageSet) -> list[str]:
    assert images.labels is not None
    return [images.class_names.get(label, str(label)) for label in range(int(images.labels.max()) + 1)]
