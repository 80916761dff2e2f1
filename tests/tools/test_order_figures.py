"""Orders in figures, on grids small enough to count by hand."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("matplotlib")

from lpd_tools.order_figures import apart_and_near


def test_distances_within_groups_and_neighbours_before() -> None:
    # Steps 0 1    cell 0 has no neighbour before it; 1 and 2 have one of three, cell 3 all three.
    #       1 2
    apart, near = apart_and_near(torch.tensor([[0, 1, 2, 3]]), [1, 2, 1], (2, 2))
    assert apart == pytest.approx(math.sqrt(2))
    assert near == pytest.approx((0 + 1 / 3 + 1 / 3 + 1) / 4)


def test_known_cells_are_there_before() -> None:
    apart, near = apart_and_near(torch.tensor([[0, 3, -1, -1]]), [2], (1, 4))
    assert apart == 3
    assert near == 1  # cells 1 and 2 are known


def test_groups_of_one_have_no_distance() -> None:
    apart, _ = apart_and_near(torch.tensor([[0, 1], [1, 0]]), [1, 1], (1, 2))
    assert math.isnan(apart)
