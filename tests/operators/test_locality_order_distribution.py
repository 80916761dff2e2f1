"""locality_order: the orders are distributed as those of the published generator (which is unseeded)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats

from lpd_ext import ops
from lpd_ext.schedule import group_sizes


@dataclass(frozen=True)
class Setting:
    side: int
    steps: int
    proximity_threshold: float
    repulsion_threshold: int

    @property
    def sizes(self) -> list[int]:
        return group_sizes(self.side**2, self.steps)

    def draw(self, count: int, **changes: Any) -> NDArray[np.int64]:
        arguments = {
            "proximity_threshold": self.proximity_threshold,
            "repulsion_threshold": self.repulsion_threshold,
            **changes,
        }
        sizes = torch.tensor(self.sizes, dtype=torch.int32)
        order = ops.locality_order(sizes, self.side, self.side, seeds=torch.arange(count), **arguments)
        return np.asarray(order.numpy())


SETTINGS = {
    "g16_s20_r2": Setting(16, 20, 1.0, 2),
    "g16_s32_r2": Setting(16, 32, 1.0, 2),
    "g16_s20_r3": Setting(16, 20, 1.0, 3),
    "g32_s48_r4": Setting(32, 48, 1.0, 4),
    "g16_s8_r1_p15": Setting(16, 8, 1.5, 1),
}


@pytest.fixture(scope="module")
def golden() -> Iterator[dict[str, NDArray[np.int64]]]:
    with np.load(Path(__file__).parents[1] / "data" / "orders_golden.npz") as file:
        yield {name: file[name].astype(np.int64) for name in SETTINGS}


def group_statistics(orders: NDArray[np.int64], setting: Setting) -> NDArray[np.float64]:
    """Mean proximity when taken, mean and minimum pairwise distance, per group and order: [T, 3, S]."""
    images = np.arange(len(orders))[:, None]
    generated = np.zeros((len(orders), setting.side + 2, setting.side + 2), np.float32)
    result, begin = [], 0
    for size in setting.sizes:
        y, x = np.divmod(orders[:, begin : begin + size], setting.side)
        begin += size

        def neighbour(dy: int, dx: int, y: Any = y, x: Any = x) -> NDArray[np.float64]:
            return np.asarray(generated[images, y + 1 + dy, x + 1 + dx])

        edges = neighbour(-1, 0) + neighbour(1, 0) + neighbour(0, -1) + neighbour(0, 1)
        corners = neighbour(-1, -1) + neighbour(-1, 1) + neighbour(1, -1) + neighbour(1, 1)
        mean = minimum = np.zeros(len(orders), np.float32)
        if size > 1:
            i, j = np.triu_indices(size, 1)
            distance = np.sqrt(((y[:, i] - y[:, j]) ** 2 + (x[:, i] - x[:, j]) ** 2).astype(np.float32))
            mean, minimum = distance.mean(1), distance.min(1)
        result.append((np.mean(edges + corners / np.sqrt(2), axis=1), mean, minimum))
        generated[images, y + 1, x + 1] = 1
    return np.asarray(result)


def smallest_p_value(golden: NDArray[np.int64], own: NDArray[np.int64], setting: Setting) -> float:
    """Two-sample chi-square of where each group's cells lie, pooled until about 5 are expected in a bin."""
    p_values, begin = [], 0
    for size in setting.sizes:
        pool = next(p for p in (1, 2, 4, 8, 16) if len(golden) * size * p**2 >= 5 * setting.side**2)
        bins = setting.side // pool
        counts = []
        for orders in (golden, own):
            y, x = np.divmod(orders[:, begin : begin + size].ravel(), setting.side)
            counts.append(np.bincount(y // pool * bins + x // pool, minlength=bins**2))
        begin += size
        table = np.asarray(counts)
        p_values.append(stats.chi2_contingency(table[:, table.sum(0) > 0]).pvalue)
    return float(min(p_values))


def distribution_faults(golden: NDArray[np.int64], own: NDArray[np.int64], setting: Setting) -> list[str]:
    """Returns what distinguishes two samples of orders."""
    theirs, ours = group_statistics(golden, setting), group_statistics(own, setting)
    faults = []
    for k, name in enumerate(("proximity", "mean distance", "minimum distance")):
        # Over the whole order, weighted by group size: within 4 standard errors of golden's mean.
        weighted = [np.average(values[:, k], axis=0, weights=setting.sizes) for values in (theirs, ours)]
        error = weighted[0].std(ddof=1) / np.sqrt(len(golden))
        if abs(weighted[1].mean() - weighted[0].mean()) > 4 * error:
            faults.append(f"{name}: {weighted[1].mean()} for {weighted[0].mean()} +- {error}")
        # Per group, with the spread of the larger sample (a few hundred orders miss rare values).
        spread = ours[:, k].std(1, ddof=1) * np.sqrt(1 / len(golden) + 1 / len(own))
        difference = np.abs(ours[:, k].mean(1) - theirs[:, k].mean(1))
        faults += [f"{name} in group {t}" for t in np.flatnonzero(difference > 4 * spread + 1e-5)]
    if (p_value := smallest_p_value(golden, own, setting)) <= 1e-4:
        faults.append(f"cell frequencies: p = {p_value}")
    return faults


@pytest.mark.parametrize("name", SETTINGS)
def test_distribution_is_the_published_one(name: str, golden: dict[str, NDArray[np.int64]]) -> None:
    setting = SETTINGS[name]
    own = setting.draw(2000 if setting.side > 16 else 4000)
    assert distribution_faults(golden[name], own, setting) == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"repulsion_threshold": 1}, "mean distance"),
        ({"repulsion_threshold": 3}, "minimum distance"),
        ({"proximity_threshold": 1.5}, "proximity"),
        ({"proximity_threshold": 0.7}, "proximity"),
    ],
)
def test_distribution_notices_other_thresholds(
    changes: dict[str, Any], expected: str, golden: dict[str, NDArray[np.int64]]
) -> None:
    setting = SETTINGS["g16_s20_r2"]
    faults = distribution_faults(golden["g16_s20_r2"], setting.draw(2000, **changes), setting)
    assert any(fault.startswith(expected) for fault in faults)


def test_distribution_notices_shifted_cells(golden: dict[str, NDArray[np.int64]]) -> None:
    setting = SETTINGS["g16_s20_r2"]
    own = setting.draw(2000)
    shifted = own // 16 * 16 + (own % 16 + 1) % 16  # one column to the right, around the edge
    assert smallest_p_value(golden["g16_s20_r2"], own, setting) > 1e-4
    assert smallest_p_value(golden["g16_s20_r2"], shifted, setting) < 1e-8


def test_first_cell_is_uniform() -> None:
    order = ops.locality_order(torch.tensor([1, 34], dtype=torch.int32), 5, 7, 1.0, 2, torch.arange(20000))
    assert stats.chisquare(np.bincount(order[:, 0].numpy(), minlength=35)).pvalue > 1e-4
