"""Measures of features: against formulas in float64 by hand, points on paper, and files as users have them."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("torchmetrics")
pytest.importorskip("scipy")

from lpd_tools.evaluation.metrics import (
    Statistics,
    frechet_distance,
    inception_score,
    kernel_distance,
    over_repeats,
    precision_recall,
    read_statistics,
)
from scipy.linalg import sqrtm


def features(count: int, width: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator, dtype=torch.float64)
    return torch.randn(count, width, generator=generator, dtype=torch.float64) @ mix + seed


def statistics(values: Tensor) -> tuple[np.ndarray, np.ndarray]:
    return values.numpy().mean(0), np.cov(values.numpy(), rowvar=False)


def test_frechet_distance_by_hand() -> None:
    """Against the formula with scipy's matrix root, from features and from statistics of a file."""
    a, b = features(60, 7, seed=1), features(41, 7, seed=2)
    (mean_a, cov_a), (mean_b, cov_b) = statistics(a), statistics(b)
    wanted = ((mean_a - mean_b) ** 2).sum() + np.trace(cov_a + cov_b - 2 * sqrtm(cov_a @ cov_b).real)
    assert frechet_distance(a, b) == pytest.approx(wanted, rel=1e-9)
    assert frechet_distance(a, Statistics(torch.tensor(mean_b), torch.tensor(cov_b))) == pytest.approx(wanted, rel=1e-9)
    # Half of the features, or float32 sums far from zero, would be seen.
    assert frechet_distance(a[:, :4], b[:, :4]) != pytest.approx(wanted, rel=1e-3)
    assert frechet_distance(a + 1e4, b + 1e4) == pytest.approx(wanted, rel=1e-6)


def test_frechet_distance_with_fewer_images_than_features() -> None:
    """Singular covariances have a distance, and that of a set to itself is zero."""
    a = features(5, 30, seed=3)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-3)
    assert frechet_distance(a, a + 2) == pytest.approx(4 * 30, rel=1e-4)


def test_frechet_distance_refuses() -> None:
    a = features(5, 3, seed=0)
    with pytest.raises(ValueError, match="at least 2 samples, got 1 and 5"):
        frechet_distance(a[:1], a)
    with pytest.raises(ValueError, match=r"\[n, F\] and \[m, F\], got \[5, 3\] and F = 2"):
        frechet_distance(a, a[:, :2])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e300])
def test_no_measure_is_taken_of_features_that_are_not_finite(value: float) -> None:
    """LAPACK crashes on NaN, and on covariances that overflow; comparisons with NaN make plausible shares."""
    good, bad = features(12, 3, seed=1), features(12, 3, seed=2)
    bad[5, 1] = value
    which = "5 of 12 has NaN or inf" if value != 1e300 else r"at most 3.4e\+38, got 1e\+300"
    for measure in (frechet_distance, kernel_distance, precision_recall):
        with pytest.raises(ValueError, match=f"^features must be .*{which}"):
            measure(bad, good)
        with pytest.raises(ValueError, match=f"reference features must be .*{which}"):
            measure(good, bad)
    with pytest.raises(ValueError, match=f"logits must be .*{which}"):
        inception_score(bad)
    for mean, covariance in ((bad[5], torch.eye(3)), (good[5], value * torch.eye(3))):
        with pytest.raises(ValueError, match="statistics must hold finite values"):
            frechet_distance(good, Statistics(mean, covariance))


def test_the_largest_features_still_have_distances() -> None:
    """The bound is float32's: what networks give never meets it."""
    large = features(12, 3, seed=1) * 1e37
    assert np.isfinite(frechet_distance(large, large.flip(1)))


def test_kernel_distance_by_hand() -> None:
    """All of both sets fit one subset: the unbiased estimate with the cubic kernel, summed in plain loops."""
    a, b = features(9, 4, seed=4) / 5, features(9, 4, seed=5) / 5

    def mean_kernel(x: Tensor, y: Tensor, same: bool) -> float:
        values = [float(p @ q / 4 + 1) ** 3 for i, p in enumerate(x) for j, q in enumerate(y) if not (same and i == j)]
        return sum(values) / len(values)

    wanted = mean_kernel(a, a, True) + mean_kernel(b, b, True) - 2 * mean_kernel(a, b, False)
    mean, deviation = kernel_distance(a, b)
    assert mean == pytest.approx(wanted, rel=1e-9)
    assert deviation == pytest.approx(0, abs=1e-9)


def test_kernel_distance_draws_by_its_seed_alone() -> None:
    a, b = features(40, 3, seed=6), features(1200, 3, seed=7)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = kernel_distance(a, b, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert first == kernel_distance(a, b, seed=1)
    assert first != kernel_distance(a, b, seed=2)


def test_inception_score_of_known_predictions() -> None:
    """Certain predictions of C equally frequent classes score C, predictions that are all alike score 1."""
    certain = 100 * torch.eye(4).repeat(500, 1)
    assert inception_score(certain)[0] == pytest.approx(4, rel=0.02)
    assert inception_score(torch.zeros(40, 4))[0] == pytest.approx(1)
    with pytest.raises(ValueError, match="at least 10 images, got 9"):
        inception_score(certain[:9])


def test_precision_and_recall_on_a_line() -> None:
    """Points whose balls can be drawn on paper; k = 2 and k = 3 differ."""
    real = torch.tensor([[0.0], [1.0], [2.0], [3.0], [20.0]])
    # Distances to the 3rd neighbour: 3, 2, 2, 3, 19. So real covers [-3, 39]; without the last, [-3, 6].
    found = torch.tensor([[-2.5], [5.5], [6.5], [40.0], [-3.5]])
    # Found: 3rd neighbours 9, 9, 10, 43.5 - 0.0 -> its balls reach everything.
    assert precision_recall(found, real, k=3) == (3 / 5, 1.0)
    # 2nd neighbours of real: 2, 1, 1, 2, 18: [-2, 5] and [2, 38].
    assert precision_recall(found, real, k=2)[0] == 2 / 5
    near, far = torch.arange(5.0)[:, None], 100 + torch.arange(5.0)[:, None]
    assert precision_recall(near, far) == (0, 0)
    assert precision_recall(near, near) == (1, 1)
    # All that is found is real, but only one of two modes: precision without recall.
    assert precision_recall(near, torch.cat([near, far])) == (1, 1 / 2)
    assert precision_recall(torch.cat([near, far]), near) == (1 / 2, 1)
    with pytest.raises(ValueError, match=r"k must be in \[1, 4\] for these sets, got 5"):
        precision_recall(near, far, k=5)


def test_precision_and_recall_of_many_points() -> None:
    """Rows are taken in slices: the result is that of the whole matrix of distances."""
    found, real = features(1100, 3, seed=8), features(1300, 3, seed=9)
    found = found - found.mean(0) + real.mean(0)

    def share(points: Tensor, centres: Tensor) -> float:
        radii = torch.cdist(centres, centres).sort(1).values[:, 3]
        return float((torch.cdist(points, centres) <= radii).any(1).double().mean())

    assert precision_recall(found, real) == pytest.approx((share(found, real), share(real, found)))


def test_statistics_of_a_file(tmp_path: Path) -> None:
    mean, covariance = statistics(features(20, 3, seed=1))
    np.savez(tmp_path / "adm.npz", mu=mean, sigma=covariance, mu_s=mean[:1], sigma_s=covariance[:1, :1])
    read = read_statistics(tmp_path / "adm.npz")
    assert read is not None
    np.testing.assert_array_equal(read.mean.numpy(), mean)
    np.testing.assert_array_equal(read.covariance.numpy(), covariance)
    np.savez(tmp_path / "images.npz", arr_0=np.zeros((1, 2, 2, 3), np.uint8))
    assert read_statistics(tmp_path / "images.npz") is None
    np.savez(tmp_path / "half.npz", mu=mean)
    with pytest.raises(ValueError, match=r"half\.npz' has mu but not both"):
        read_statistics(tmp_path / "half.npz")
    np.savez(tmp_path / "odd.npz", mu=mean, sigma=covariance[:2])
    with pytest.raises(ValueError, match=r"mu \[F\] and sigma \[F, F\], got \[3\] and \[2, 3\]"):
        read_statistics(tmp_path / "odd.npz")
    np.savez(tmp_path / "nan.npz", mu=mean * np.nan, sigma=covariance)
    with pytest.raises(ValueError, match="not finite"):
        read_statistics(tmp_path / "nan.npz")
    np.savez(tmp_path / "code.npz", mu=np.array([print], object), sigma=covariance)
    (tmp_path / "text.npz").write_text("mu")
    for name in ("code.npz", "text.npz"):
        with pytest.raises(ValueError, match=rf"{name}' is no readable \.npz file"):
            read_statistics(tmp_path / name)


def test_interval_over_repeats() -> None:
    """Student's t with 2 degrees of freedom is 4.303 at 97.5 %."""
    summary = over_repeats([1.0, 2.0, 6.0])
    deviation = 7**0.5
    assert summary["mean"] == 3
    assert summary["sd"] == pytest.approx(deviation)
    low, high = summary["interval95"]
    assert (low, high) == pytest.approx((3 - 4.30265 * deviation / 3**0.5, 3 + 4.30265 * deviation / 3**0.5), rel=1e-5)
    assert over_repeats([2.5]) == {"mean": 2.5, "values": [2.5]}


def test_a_missing_library_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", None)
    with pytest.raises(ModuleNotFoundError, match=r"Fréchet distance needs torchmetrics.*'lpd-ext\[train\]'"):
        frechet_distance(torch.zeros(3, 2), torch.zeros(3, 2))
