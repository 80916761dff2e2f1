"""Tests of priority maps: numbers, images, and outward from a place, for each image of a batch."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from lpd_ext.orders import locality_order, make_orders
from lpd_ext.pipeline import LPDPipeline
from lpd_ext.priority import outward, outward_map
from lpd_ext.schedule import group_sizes

GRID = (4, 6)
SEEDS = torch.tensor([1, 2])


def orders_of(order: Any, known: Tensor | None = None, seeds: Tensor = SEEDS) -> Tensor:
    free = [24] * len(seeds) if known is None else (~known).sum(1).tolist()
    return make_orders(order, [group_sizes(count, 4) for count in free], GRID, seeds, known)


@pytest.mark.parametrize("kind", [torch.tensor, np.array])
def test_the_highest_comes_first(kind: Any) -> None:
    values = np.random.default_rng(0).permutation(24).reshape(GRID).astype(float) - 7
    orders = orders_of(kind(values))
    assert orders.tolist() == [np.argsort(-values.flatten()).tolist()] * 2
    known = torch.zeros(2, 24, dtype=torch.bool)
    known[0, 3] = known[1, :8] = True
    edited = orders_of(kind(values), known)
    for b in range(2):
        wanted = [cell for cell in orders[b].tolist() if not known[b, cell]]
        assert edited[b].tolist() == wanted + [-1] * int(known[b].sum())


def test_cells_of_one_priority_come_in_the_locality_order() -> None:
    level = torch.zeros(GRID)
    assert torch.equal(orders_of(level), locality_order([group_sizes(24, 4)] * 2, GRID, SEEDS))
    level[:, 3:] = 1.0
    near = locality_order([group_sizes(24, 4)] * 2, GRID, SEEDS)
    for order, row in zip(orders_of(level), near, strict=True):
        right = row % 6 >= 3
        assert torch.equal(order, torch.cat([row[right], row[~right]]))


def test_an_image_is_averaged_over_the_cells(tmp_path: Path) -> None:
    ranks = np.random.default_rng(1).permutation(24).reshape(GRID)
    large = np.kron(ranks * 10, np.ones((8, 5))).astype(np.uint8)
    large[::2] += 4  # within a cell the mean counts
    image = Image.fromarray(large)
    image.save(tmp_path / "map.png")
    wanted = [np.argsort(-ranks.flatten()).tolist()] * 2
    for order in (image, image.convert("RGB"), tmp_path / "map.png"):
        assert orders_of(order).tolist() == wanted


def test_every_image_may_have_its_own() -> None:
    values = torch.rand(2, *GRID, generator=torch.Generator().manual_seed(0))
    both = orders_of(values)
    for b in range(2):
        alone = orders_of(values[b], seeds=SEEDS[b : b + 1])
        assert torch.equal(both[b], alone[0])
        assert alone[0].tolist() == values[b].flatten().argsort(descending=True).tolist()
    mixed = orders_of(["raster", values[1], list(range(23, -1, -1)), "outward", values[0]], seeds=torch.arange(5))
    assert mixed[0].tolist() == list(range(24))
    assert torch.equal(mixed[1], both[1])
    assert mixed[2].tolist() == list(range(23, -1, -1))
    assert torch.equal(mixed[3], orders_of("outward", seeds=torch.tensor([3]))[0])
    assert torch.equal(mixed[4], both[0])


def test_distances_are_exact() -> None:
    generator = torch.Generator().manual_seed(0)
    for grid in ((1, 1), (5, 7), (1, 9), (8, 3)):
        start = torch.rand(3, grid[0] * grid[1], generator=generator) < 0.2
        start[0] = False
        found = outward(start, grid)
        cells = [divmod(cell, grid[1]) for cell in range(start.shape[1])]
        middle = (grid[0] - 1) / 2, (grid[1] - 1) / 2
        nearest = min(math.dist(cell, middle) for cell in cells)
        for b in range(3):
            begin = [cell for cell, is_start in zip(cells, start[b].tolist(), strict=True) if is_start]
            begin = begin or [cell for cell in cells if math.dist(cell, middle) == nearest]
            wanted = [-min(math.dist(cell, one) for one in begin) for cell in cells]
            assert found[b].tolist() == pytest.approx(wanted)


def test_outward_goes_from_what_is_known_or_from_the_centre() -> None:
    order = orders_of("outward")[0].tolist()
    assert set(order[:4]) == {8, 9, 14, 15}
    known = torch.zeros(2, 24, dtype=torch.bool)
    known[:, ::6] = True  # the left column
    for order in orders_of("outward", known):
        assert (order[:20] % 6).tolist() == [1] * 4 + [2] * 4 + [3] * 4 + [4] * 4 + [5] * 4
        assert order[20:].tolist() == [-1] * 4


def test_outward_from_a_mask_of_pixels() -> None:
    mask = np.zeros((40, 60), np.uint8)
    mask[39, 59] = 255  # in the last cell
    found = outward_map(mask, GRID)
    assert found[3, 5] == 0
    assert found[0, 0] == -math.hypot(3, 5)
    order = orders_of(found)[0]
    assert order[0] == 23
    assert order[-1] == 0
    with pytest.raises(ValueError, match="mask is empty"):
        outward_map(np.zeros((4, 6)), GRID)


def test_the_pipeline_and_edits_take_maps() -> None:
    pipe = LPDPipeline.from_pretrained("fashion_mnist")
    ramp = torch.arange(64.0).view(8, 8)
    request = pipe.prepare([1, 2], order=ramp, seeds=1)
    assert request.orders.tolist() == [list(range(63, -1, -1))] * 2
    previews = pipe.stream(1, order=ramp, seeds=1, num_inference_steps=4)
    assert next(previews).tokens[0, 7, 7] >= 0
    picture, mask = torch.zeros(3, 32, 32), torch.zeros(32, 32)
    mask[:, 16:] = 1
    wanted = pipe.inpaint(picture, mask, 1, seeds=1, order=[cell for cell in range(64) if cell % 8 >= 4][::-1])
    assert torch.equal(pipe.inpaint(picture, mask, 1, seeds=1, order=ramp).tokens, wanted.tokens)
    assert pipe.inpaint(picture, mask, 1, seeds=1, order="outward").tokens.min() >= 0


@pytest.mark.parametrize(
    ("order", "error", "message"),
    [
        (torch.zeros(6, 4), ValueError, "order[0] must have the [4, 6] cells of the grid, got [6, 4]"),
        (torch.zeros(3, 4, 6), ValueError, "order must hold one map, or one for each of 2 images, got 3"),
        (torch.full((4, 6), float("nan")), ValueError, "order[0] must be finite numbers"),
        (["raster", np.full((4, 6), np.inf)], ValueError, "order[1] must be finite numbers"),
        ([torch.zeros(4, 6)], ValueError, "order must be one value or one per label (2), got 1"),
        (Path("no_such.png"), FileNotFoundError, "order[0] is 'no_such.png', where there is no file"),
        (torch.zeros(24), TypeError, "order[0] must be a list of integers, got torch.float32 [24]"),
    ],
)
def test_bad_maps(order: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        orders_of(order)
