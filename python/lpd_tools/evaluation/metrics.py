"""Measures of images and of their features: Fréchet and kernel distance, inception score, precision, recall.

torchmetrics computes the distances and the score, from features that are extracted once and passed through `_Given`.
Every measure refuses what is not finite: LAPACK may crash on it, and comparisons with NaN give plausible shares.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lpd_tools.checks import check_finite
from lpd_tools.evaluation.extras import train_extra
from lpd_tools.evaluation.npz import read_arrays

KERNEL_SUBSETS = 100
KERNEL_SUBSET_SIZE = 1000
SCORE_SPLITS = 10
_ROWS = 1000  # of a matrix of distances that are held at once
_LARGEST = torch.finfo(torch.float32).max  # of a feature: the products of covariances stay finite in float64


@dataclass(frozen=True)
class Statistics:
    """Mean [F] and covariance [F, F] of features, float64; ValueError for values that no float32 features have."""

    mean: Tensor
    covariance: Tensor

    def __post_init__(self) -> None:
        if not (bool((self.mean.abs() <= _LARGEST).all()) and bool((self.covariance.abs() <= _LARGEST**2).all())):
            raise ValueError("statistics must hold finite values, and none that float32 features cannot have")


class _Given(nn.Module):
    """The extractor that torchmetrics asks for, where features are all there is."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def read_statistics(path: str | Path) -> Statistics | None:
    """`mu` and `sigma` of an .npz file (ADM, pytorch-fid), None if it has neither; ValueError for a damaged file."""
    arrays = read_arrays(path, ("mu", "sigma"))
    if not arrays:
        return None
    if set(arrays) != {"mu", "sigma"}:
        raise ValueError(f"reference {str(path)!r} has {' and '.join(arrays)} but not both of mu and sigma")
    mean, covariance = (torch.from_numpy(np.asarray(arrays[name], np.float64)) for name in ("mu", "sigma"))
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise ValueError(
            f"reference {str(path)!r} must hold mu [F] and sigma [F, F], got {list(mean.shape)} and "
            f"{list(covariance.shape)}"
        )
    try:
        return Statistics(mean, covariance)
    except ValueError as error:
        raise ValueError(f"reference {str(path)!r} holds values that are not finite: {error}") from error


def frechet_distance(found: Tensor, reference: Tensor | Statistics) -> float:
    """‖m - μ‖² + tr(S + Σ - 2(SΣ)^½) of features [n, F] to others [m, F] or to their statistics (Heusel et al., 2017).

    Covariances divide by n - 1; computed in float64.
    """
    with train_extra("the Fréchet distance"):
        from torchmetrics.image.fid import FrechetInceptionDistance
    width = reference.mean.shape[0] if isinstance(reference, Statistics) else _width(reference, "reference features")
    if _width(found) != width:
        raise ValueError(f"features must be [n, F] and [m, F], got {list(found.shape)} and F = {width}")
    counts = [len(found)] if isinstance(reference, Statistics) else [len(found), len(reference)]
    if min(counts) < 2:
        raise ValueError(f"a covariance needs at least 2 samples, got {' and '.join(map(str, counts))}")
    metric = FrechetInceptionDistance(_Given(width))
    metric.update(found.double(), real=False)
    if isinstance(reference, Statistics):
        # What two samples of that mean and covariance would have left in the metric's sums.
        mean = reference.mean
        metric.real_features_sum = 2 * mean
        metric.real_features_cov_sum = reference.covariance + 2 * torch.outer(mean, mean)
        metric.real_features_num_samples = torch.tensor(2)
    else:
        metric.update(reference.double(), real=True)
    return float(metric.compute())


def kernel_distance(found: Tensor, reference: Tensor, seed: int = 0) -> tuple[float, float]:
    """Squared MMD with the kernel (x·y/F + 1)³ between features [n, F] and [m, F] (KID, Bińkowski et al., 2018).

    Mean and standard deviation over 100 pairs of subsets of 1,000 (or as many as the smaller set has), drawn by `seed`.
    """
    with train_extra("the kernel distance"):
        from torchmetrics.image.kid import KernelInceptionDistance
    if _width(found) != _width(reference, "reference features"):
        raise ValueError(f"features must be [n, F] and [m, F], got {list(found.shape)} and {list(reference.shape)}")
    size = min(KERNEL_SUBSET_SIZE, len(found), len(reference))
    if size < 2:
        raise ValueError(f"the kernel distance needs at least 2 samples, got {len(found)} and {len(reference)}")
    with _quietly(seed):
        metric = KernelInceptionDistance(_Given(_width(found)), subsets=KERNEL_SUBSETS, subset_size=size)
        metric.update(found.double(), real=False)
        metric.update(reference.double(), real=True)
        mean, deviation = metric.compute()
    return float(mean), float(deviation)


def inception_score(logits: Tensor, seed: int = 0) -> tuple[float, float]:
    """exp E KL(p(y|x) ‖ p(y)) of class logits [n, C] (Salimans et al., 2016): mean and deviation over ten splits."""
    with train_extra("the inception score"):
        from torchmetrics.image.inception import InceptionScore
    classes = _width(logits, "logits")
    if len(logits) < SCORE_SPLITS:
        raise ValueError(f"the inception score needs at least {SCORE_SPLITS} images, got {len(logits)}")
    with _quietly(seed):
        metric = InceptionScore(_Given(classes), splits=SCORE_SPLITS)
        metric.update(logits.double())
        mean, deviation = metric.compute()
    return float(mean), float(deviation)


def precision_recall(found: Tensor, reference: Tensor, k: int = 3) -> tuple[float, float]:
    """Share of found features [n, F] inside the reference's manifold, and of reference [m, F] inside the found one.

    A manifold is the union of balls around its points, each as wide as the distance to the point's k-th nearest
    neighbour in its own set (Kynkäänniemi et al., 2019). torchmetrics has none; computed in float64.
    """
    if _width(found) != _width(reference, "reference features"):
        raise ValueError(f"features must be [n, F] and [m, F], got {list(found.shape)} and {list(reference.shape)}")
    if k < 1 or min(len(found), len(reference)) <= k:
        raise ValueError(f"k must be in [1, {min(len(found), len(reference)) - 1}] for these sets, got {k}")
    found, reference = found.double(), reference.double()
    return _share_inside(found, reference, k), _share_inside(reference, found, k)


def _share_inside(points: Tensor, centres: Tensor, k: int) -> float:
    # The nearest of a set's points to one of them is itself.
    radii = torch.cat([torch.cdist(rows, centres).kthvalue(k + 1).values for rows in centres.split(_ROWS)])
    inside = [(torch.cdist(rows, centres) <= radii).any(1) for rows in points.split(_ROWS)]
    return float(torch.cat(inside).double().mean())


def _width(features: Tensor, name: str = "features") -> int:
    """F of features [n, F]; ValueError for another shape, and for numbers that no measure can be taken of."""
    if features.ndim != 2:
        raise ValueError(f"{name} must be [n, F], got {list(features.shape)}")
    check_finite(features, name)
    if features.numel() and float(features.double().abs().max()) > _LARGEST:
        raise ValueError(f"{name} must be at most {_LARGEST:.2g}, got {float(features.double().abs().max()):.2g}")
    return features.shape[1]


@contextmanager
def _quietly(seed: int) -> Iterator[None]:
    """Draws of torchmetrics follow `seed` and leave torch's generator alone; its hint about memory is not printed."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Metric `.*` will save all extracted features", category=UserWarning)
        torch.manual_seed(seed)
        yield


def over_repeats(values: list[float]) -> dict[str, Any]:
    """Mean of a measure over repeated runs, and with two or more their standard deviation and 95 % interval (t)."""
    count = len(values)
    mean = sum(values) / count
    if count < 2:
        return {"mean": mean, "values": values}
    from scipy.stats import t

    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1))
    half = float(t.ppf(0.975, count - 1)) * deviation / math.sqrt(count)
    return {"mean": mean, "sd": deviation, "interval95": [mean - half, mean + half], "values": values}
