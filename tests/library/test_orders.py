"""Order policies: permutations of the free cells, batch independence, user orders."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from lpd_ext import ops
from lpd_ext.orders import (
    ORDER_POLICIES,
    default_repulsion_threshold,
    halton_order,
    known_first,
    locality_order,
    make_orders,
    random_order,
    raster_order,
    restrict_to_free,
    spiral_order,
    user_order,
)
from lpd_ext.schedule import group_sizes

GRIDS = [(1, 1), (1, 9), (9, 1), (2, 2), (4, 6), (8, 8), (7, 5), (16, 16), (13, 40)]


def known_cells(batch: int, num_cells: int) -> Tensor:
    """About a third of the cells; nothing in the last image, everything in the one before."""
    known = torch.rand(batch, num_cells, generator=torch.Generator().manual_seed(num_cells)) < 0.3
    known[-1] = False
    known[-2] = True
    return known


def schedules_for(known: Tensor) -> list[list[int]]:
    return [group_sizes(count, min(4, count)) if count else [] for count in (~known).sum(1).tolist()]


@pytest.mark.parametrize("policy", ORDER_POLICIES)
@pytest.mark.parametrize("grid", GRIDS)
def test_every_policy_orders_the_free_cells(policy: str, grid: tuple[int, int]) -> None:
    num_cells = grid[0] * grid[1]
    seeds = torch.tensor([5, -6, 7, 8])
    orders = make_orders(policy, [group_sizes(num_cells, 1)] * 4, grid, seeds)
    assert orders.dtype == torch.int64
    assert orders.is_contiguous()
    assert torch.equal(orders.sort(dim=1).values, torch.arange(num_cells).expand(4, -1))

    known = known_cells(4, num_cells)
    edited = make_orders(policy, schedules_for(known), grid, seeds, known)
    for image in range(4):
        free = (~known[image]).nonzero().flatten()
        assert torch.equal(edited[image, : len(free)].sort().values, free)
        assert (edited[image, len(free) :] == -1).all()
    if policy not in ("locality", "outward"):  # which place the free cells with regard to the known ones
        kept = [[cell for cell in row.tolist() if not known[b, cell]] for b, row in enumerate(orders)]
        assert [[cell for cell in row.tolist() if cell >= 0] for row in edited] == kept


@pytest.mark.parametrize("policy", ORDER_POLICIES)
def test_an_image_does_not_depend_on_its_batch(policy: str) -> None:
    schedules = [group_sizes(64, 10), group_sizes(64, 64), group_sizes(64, 1)]
    seeds = torch.tensor([3, 4, 5])
    together = make_orders(policy, schedules, (8, 8), seeds)
    for image in (2, 0, 1):
        alone = make_orders(policy, schedules[image : image + 1], (8, 8), seeds[image : image + 1])
        assert torch.equal(alone[0], together[image])
    assert make_orders(policy, [], (8, 8), torch.empty(0, dtype=torch.int64)).shape == (0, 64)


def test_locality_order_passes_everything_on() -> None:
    known = known_cells(4, 48)
    sizes, seeds = schedules_for(known), torch.arange(4)
    table = torch.zeros(4, 4, dtype=torch.int32)
    for image, row in enumerate(sizes):
        table[image, : len(row)] = torch.tensor(row)
    expected = ops.locality_order(table, 6, 8, 1.5, 1, seeds, known)
    assert torch.equal(locality_order(sizes, (6, 8), seeds, 1.5, 1, known), expected)
    by_name = make_orders("locality", sizes, (6, 8), seeds, known, proximity_threshold=1.5, repulsion_threshold=1)
    assert torch.equal(by_name, expected)
    shared = locality_order(group_sizes(48, 8), (6, 8), seeds)
    assert torch.equal(shared, make_orders("locality", [group_sizes(48, 8)] * 4, (6, 8), seeds))


def test_default_repulsion_is_the_published_one() -> None:
    assert default_repulsion_threshold((16, 16)) == 2
    assert default_repulsion_threshold((32, 32)) == 4
    assert default_repulsion_threshold((8, 8)) == 2
    sizes, seeds = group_sizes(1024, 48), torch.arange(2)
    assert torch.equal(locality_order(sizes, (32, 32), seeds), locality_order(sizes, (32, 32), seeds, 1.0, 4))


def test_random_order_is_uniform() -> None:
    orders = random_order((2, 3), torch.arange(12000)).numpy()
    for place in range(6):
        assert stats.chisquare(np.bincount(orders[:, place], minlength=6)).pvalue > 1e-4
    permutations = np.unique(orders, axis=0, return_counts=True)[1]
    assert len(permutations) == 720
    assert stats.chisquare(permutations).pvalue > 1e-4


def test_raster() -> None:
    assert raster_order((2, 3)).tolist() == [0, 1, 2, 3, 4, 5]


def test_spiral() -> None:
    assert spiral_order((3, 3)).tolist() == [4, 5, 8, 7, 6, 3, 0, 1, 2]
    assert spiral_order((2, 2)).tolist() == [0, 1, 3, 2]
    assert spiral_order((1, 5)).tolist() == [2, 3, 1, 4, 0]
    for side in (4, 5, 16):  # on a square, each cell lies beside the one before
        row, column = np.divmod(spiral_order((side, side)).numpy(), side)
        assert (np.abs(np.diff(row)) + np.abs(np.diff(column)) == 1).all()


def test_halton() -> None:
    def van_der_corput(index: int, base: int) -> float:
        result, weight = 0.0, 1 / base
        while index:
            index, digit = divmod(index, base)
            result += digit * weight
            weight /= base
        return result

    for height, width in ((8, 8), (5, 7), (1, 6), (6, 1), (16, 16)):
        met: list[int] = []
        index = 0
        while len(met) < height * width:
            index += 1
            # The tiny shift keeps sums of thirds on the right side of a cell border.
            row = int(van_der_corput(index, 2) * height + 1e-9)
            column = int(van_der_corput(index, 3) * width + 1e-9)
            if row * width + column not in met:
                met.append(row * width + column)
        assert halton_order((height, width)).tolist() == met
    quarter = halton_order((16, 16))[:64]  # spread out: every quadrant has its share of the first cells
    quadrants = torch.bincount(quarter // 16 // 8 * 2 + quarter % 16 // 8, minlength=4)
    assert quadrants.min() >= 13


def test_user_orders() -> None:
    one = [3, 1, 0, 2]
    expected = torch.tensor([one, one])
    per_image = [one, [0, 1, 2, 3]]
    assert torch.equal(user_order(one, (2, 2), 2), expected)
    assert torch.equal(user_order(torch.tensor(one), (2, 2), 2), expected)
    assert torch.equal(user_order(np.array(one, dtype=np.int16), (2, 2), 2), expected)
    assert torch.equal(user_order(per_image, (2, 2), 2), torch.tensor(per_image))
    assert torch.equal(user_order(torch.tensor(per_image), (2, 2), 2), torch.tensor(per_image))
    known = torch.tensor([[True, False, False, False], [True, True, True, True]])
    wanted = torch.tensor([[3, 1, 2, -1], [-1, -1, -1, -1]])
    assert torch.equal(user_order([[3, 1, 2], []], (2, 2), 2, known), wanted)
    assert torch.equal(user_order(wanted, (2, 2), 2, known), wanted)
    assert torch.equal(make_orders(wanted, [[1, 2], []], (2, 2), torch.tensor([1, 2]), known), wanted)


@pytest.mark.parametrize(
    ("order", "error", "message"),
    [
        ([0, 1, 2, 2], ValueError, "order[0] contains cell 2 more than once"),
        ([[0, 1, 2, 3], [0, 1, 2, 4]], ValueError, "order[1] contains 4, but cells are 0 to 3"),
        ([0, -1, 2, 3], ValueError, "order[0] contains -1, but cells are 0 to 3, -1 at the end"),
        ([0, 1, -2, 3], ValueError, "order[0] contains -2"),
        ([0, 1, 2], ValueError, "order[0] must hold all 4 free cells, got 3"),
        ([0, 1, 2, 3, 3], ValueError, "order[0] contains cell 3 more than once"),
        ([[0, 1, 2, 3]] * 3, ValueError, "one permutation, or one for each of 2 images, got 3"),
        ([0.0, 1.0, 2.0, 3.0], TypeError, "order[0] must be a list of integers, got torch.float32 [4]"),
        (torch.zeros(2, 1, 4, dtype=torch.int64), TypeError, "order[0] must be a list of integers"),
        (5, TypeError, "order must be a policy name, or the cells as integers, got 5"),
        (["locality", "zigzag"], ValueError, "permutation of the free cells or one of locality, random"),
        (["locality"], ValueError, "order must be one value or one per label (2), got 1"),
        (["raster", [0, 1, 2, 2]], ValueError, "order[1] contains cell 2 more than once"),
        (["raster", [0.5]], TypeError, "order[1] must be a list of integers, got torch.float32 [1]"),
        ("zigzag", ValueError, "permutation of the free cells or one of locality, random"),
    ],
)  # fmt: skip
def test_bad_user_orders(order: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        make_orders(order, [[1, 3], [4]], (2, 2), torch.tensor([1, 2]))


def test_user_order_with_a_known_cell() -> None:
    known = torch.tensor([[False, True, False, False]])
    with pytest.raises(ValueError, match=re.escape("order[0] contains cell 1, which is known already")):
        user_order([3, 1, 0, 2], (2, 2), 1, known)


def test_every_image_may_have_an_order_and_thresholds_of_its_own() -> None:
    known = known_cells(5, 64)
    sizes, seeds = schedules_for(known), torch.tensor([5, -6, 7, 8, 9])
    own = torch.randperm(64, generator=torch.Generator().manual_seed(3))
    policies = ["locality", own[~known[1][own]].tolist(), "locality", "halton", "locality"]
    proximity, repulsion = [1.0, 1.0, 2.0, 1.0, 1.0], [None, 1, 1, None, 2]
    thresholds = {"proximity_threshold": proximity, "repulsion_threshold": repulsion}
    together = make_orders(policies, sizes, (8, 8), seeds, known, **thresholds)
    for b, policy in enumerate(policies):
        one = slice(b, b + 1)
        alone = make_orders(
            policy,
            sizes[one],
            (8, 8),
            seeds[one],
            known[one],
            proximity_threshold=proximity[b],
            repulsion_threshold=repulsion[b],
        )
        assert torch.equal(together[b], alone[0]), b
    plain = make_orders("locality", sizes, (8, 8), seeds, known)
    assert torch.equal(together[0], plain[0])
    assert not torch.equal(together[2], plain[2])  # thresholds of its own


def test_known_cells_come_first() -> None:
    known = known_cells(4, 48)
    sizes, seeds = schedules_for(known), torch.arange(4)
    free = make_orders("locality", sizes, (6, 8), seeds, known)
    orders = known_first(free, known)
    for b in range(4):
        cells = known[b].nonzero().flatten()
        assert torch.equal(orders[b, : len(cells)], cells)
        assert torch.equal(orders[b, len(cells) :], free[b, : 48 - len(cells)])


GOOD: dict[str, Any] = {
    "order": "raster",
    "group_sizes": [[1, 3], [4]],
    "grid": (2, 2),
    "seeds": torch.tensor([1, 2]),
}


@pytest.mark.parametrize("policy", ["locality", "random", "raster", [3, 2, 1, 0]])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group_sizes": [[1, 3], [5]]}, "group_sizes[1] must sum to 4"),
        ({"group_sizes": [[1, 3], [4, 0]]}, "group_sizes[1][1] = 0 must be >= 1"),
        ({"group_sizes": [[1, 3]]}, "seeds must hold one seed for each of 1 images, got 2"),
        ({"grid": (0, 4)}, "grid must be two integers (height, width) >= 1, got (0, 4)"),
        ({"grid": (-2, -2)}, "grid must be two integers (height, width) >= 1, got (-2, -2)"),
        ({"grid": 4}, "grid must be two integers (height, width) >= 1, got 4"),
        ({"grid": (2.0, 2)}, "grid must be two integers (height, width) >= 1, got (2.0, 2)"),
        ({"grid": (300, 300)}, "grid must have at most 65536 cells, got 300 x 300"),
        ({"seeds": torch.tensor([1.0, 2.0])}, "seeds must be int64 of shape [B], got torch.float32 [2]"),
        ({"known": torch.zeros(2, 4)}, "known must be bool of shape [2, 4], got torch.float32 [2, 4]"),
        ({"known": torch.zeros(2, 2, 2, dtype=torch.bool)}, "known must be bool of shape [2, 4]"),
        ({"known": torch.eye(2, 4, dtype=torch.bool)}, "group_sizes[0] must sum to 3"),
    ],
)
def test_bad_arguments(policy: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make_orders(**{**GOOD, "order": policy, **changes})


@pytest.mark.parametrize("policy", ["locality", "random", "raster", [3, 2, 1, 0]])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group_sizes": [[1, 3], 4]}, "group_sizes[1] must be a list of integers, got 4"),
        ({"group_sizes": [4, [1, 3]]}, "group_sizes[0] must be a list of integers, got 4"),
        ({"group_sizes": 4}, "group_sizes must be a list of integers"),
        ({"seeds": [1, 2]}, "seeds must be an int64 tensor of shape [B], got list"),
        ({"known": [[True] * 4] * 2}, "known must be a bool tensor of shape [2, 4], got list"),
        ({"repulsion_threshold": 1.5}, "repulsion_threshold must be an integer, got 1.5"),
        ({"proximity_threshold": "1"}, "proximity_threshold must be a number, got '1'"),
    ],
)
def test_wrong_types(policy: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=re.escape(message)):
        make_orders(**{**GOOD, "order": policy, **changes})


def test_group_sizes_may_be_numpys_and_repulsion_any_size() -> None:
    seeds = torch.arange(2)
    wanted = locality_order([6, 10], (4, 4), seeds, 1.0, 4)
    for sizes in ([np.int64(6), np.int64(10)], np.array([6, 10]), torch.tensor([6, 10]), np.array([[6, 10]] * 2)):
        assert torch.equal(locality_order(sizes, (4, 4), seeds, 1.0, 2**70), wanted)


def test_bad_thresholds_and_masks() -> None:
    seeds = torch.tensor([1])
    with pytest.raises(ValueError, match="proximity_threshold must be a number, got nan"):
        locality_order([1, 3], (2, 2), seeds, float("nan"))
    with pytest.raises(ValueError, match="repulsion_threshold must be >= 0, got -1"):
        locality_order([1, 3], (2, 2), seeds, 1.0, -1)
    with pytest.raises(ValueError, match=re.escape("known must be bool of shape [1, 4], got torch.bool [2, 4]")):
        restrict_to_free(torch.arange(4)[None], torch.zeros(2, 4, dtype=torch.bool))


@pytest.mark.parametrize("policy", ["locality", "random", "raster", "outward"])
def test_known_cells_and_seeds_may_be_views(policy: str) -> None:
    """Known cells by `expand` and seeds by a slice, whose memory is not contiguous."""
    known = torch.zeros(1, 32, dtype=torch.bool)
    known[0, :8] = True
    known, seeds = known[:, ::2].expand(3, -1), torch.tensor([1, 7, 2, 7, 3])[::2]
    arguments = (policy, [4, 8], (4, 4))
    wanted = make_orders(*arguments, seeds.contiguous(), known=known.contiguous())
    assert torch.equal(make_orders(*arguments, seeds, known=known), wanted)
