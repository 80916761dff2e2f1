"""locality_order: exact equality with the plain twin, and its contracts."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from lpd_ext import _C, ops, reference
from lpd_ext.schedule import group_sizes

Arguments = tuple[Tensor, int, int, float, int, Tensor, Tensor | None]
SHAPES = [(1, 1), (1, 7), (7, 1), (2, 3), (5, 4), (8, 8), (6, 9), (3, 17), (12, 11)]


def random_split(generator: random.Random, total: int, max_parts: int) -> list[int]:
    """Positive sizes summing to total, then zeros up to max_parts entries."""
    if total == 0:
        return [0] * max_parts
    parts = generator.choice([1, min(total, max_parts), generator.randint(1, min(total, max_parts))])
    cuts = [0, *sorted(generator.sample(range(1, total), parts - 1)), total]
    return [b - a for a, b in pairwise(cuts)] + [0] * (max_parts - parts)


def random_case(index: int) -> Arguments:
    """Arguments off their defaults: odd grids, known cells, schedules per image, extreme thresholds."""
    generator = random.Random(index)
    height, width = generator.choice(SHAPES)
    cells, batch = height * width, generator.randint(1, 3)
    known = None
    if generator.random() < 0.6:
        density = generator.choice([0.0, 0.02, 0.1, 0.5, 0.9, 1.0])
        known = torch.tensor([[generator.random() < density for _ in range(cells)] for _ in range(batch)])
    steps = generator.choice([1, cells, generator.randint(1, cells)])
    free = [cells] * batch if known is None else (~known).sum(1).tolist()
    sizes = [random_split(generator, count, steps) for count in free]
    shared = known is None and generator.random() < 0.5
    return (
        torch.tensor(sizes[0] if shared else sizes, dtype=torch.int32),
        height,
        width,
        generator.choice([-1.0, 0.0, 0.5, 2**-0.5, 1.0, 1.5, 2.0, 100.0]),
        generator.choice([0, 1, 2, 3, 10**9]),
        torch.tensor([generator.randint(-(2**63), 2**63 - 1) for _ in range(batch)]),
        known,
    )


def on(device: torch.device, arguments: Arguments) -> Arguments:
    sizes, height, width, proximity, repulsion, seeds, known = arguments
    moved = None if known is None else known.to(device)
    return sizes.to(device), height, width, proximity, repulsion, seeds.to(device), moved


@pytest.fixture(scope="module")
def random_cases() -> list[tuple[Arguments, Tensor]]:
    """Arguments and what the plain twin makes of them."""
    cases = [random_case(index) for index in range(120)]
    cases.append((int_tensor(group_sizes(256, 20)), 16, 16, 1.0, 2, torch.tensor([1, 2, 3, 4]), None))
    cases.append((int_tensor(group_sizes(256, 8)), 16, 16, 1.5, 1, torch.tensor([-5]), None))
    cases.append((int_tensor([1] * 144), 12, 12, 1.0, 2, torch.tensor([-1]), None))
    cases.append((int_tensor(group_sizes(195, 12)), 13, 15, 1.0, 2, torch.tensor([6]), None))
    # Squared distances on a line take so many bits of a CUDA kernel's farthest scores that few are left to tell cells
    # apart, and among a hundred cells of one group many are equally far: ties, for one warp (256 cells) and for three.
    for height, width in [(1, 300), (300, 1), (1, 256), (256, 1)]:
        cases.append((int_tensor([100, 100, height * width - 200]), height, width, 1.0, 1, torch.tensor([11]), None))
    return [(arguments, reference.locality_order(*arguments)) for arguments in cases]


def int_tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


# ---- equality with the twin ----


def test_equals_plain_twin(backend: torch.device, random_cases: list[tuple[Arguments, Tensor]]) -> None:
    for index, (arguments, expected) in enumerate(random_cases):
        order = ops.locality_order(*on(backend, arguments)).cpu()
        assert torch.equal(order, expected), f"case {index}: {arguments}"


def test_ties_on_a_long_line(host_backend: torch.device) -> None:
    """So long that a farthest score has no room for levels: near cells that were refused are tied with far ones.
    Three free cells in every 1,024, of which the outer two are near and the middle one is far; the last cell is free.
    Not on a GPU: few have the shared memory."""
    first = torch.arange(35_997, 0, -1024)
    known = torch.ones(2, 36_000, dtype=torch.bool)
    known[:, torch.cat([first, first + 1, first + 2])] = False
    arguments = (int_tensor([[36, 36, 36]] * 2), 1, 36_000, 1.0, 3072, torch.tensor([0, 1]), known)
    assert torch.equal(ops.locality_order(*on(host_backend, arguments)), reference.locality_order(*arguments))


def test_instruction_sets_agree_on_large_grids() -> None:
    known = torch.rand(2, 60 * 40, generator=torch.Generator().manual_seed(0)) < 0.3
    edited = [group_sizes(count, 40) for count in (~known).sum(1).tolist()]
    cases: list[Arguments] = [
        (int_tensor(group_sizes(1024, 48)), 32, 32, 1.0, 4, torch.arange(20), None),
        (int_tensor(edited), 60, 40, 1.0, 3, torch.tensor([7, 8]), known),
        (int_tensor([1, 400, 800, 64335]), 256, 256, 1.0, 2, torch.tensor([9]), None),
        (int_tensor([1, 65535]), 1, 65536, 1.0, 2, torch.tensor([10]), None),
    ]
    before = _C.cpu_isa()
    try:
        for arguments in cases:
            orders = []
            for isa in _C.available_cpu_isas():
                _C.set_cpu_isa(isa)
                orders.append(ops.locality_order(*arguments))
            check_permutation(orders[0], arguments[-1])
            assert all(torch.equal(orders[0], order) for order in orders)
    finally:
        _C.set_cpu_isa(before)


PLANTED_MISTAKES = {
    "repulsion by Euclidean distance": (
        "chebyshev_distance(c, other) <= repulsion_threshold",
        "squared_distance(c, other) <= repulsion_threshold**2",
    ),
    "repulsion below, not up to, the threshold": ("<= repulsion_threshold", "< repulsion_threshold"),
    "proximity above, not from, the threshold": (
        "proximity[c] >= proximity_threshold and",
        "proximity[c] > proximity_threshold and",
    ),
    "far list not in rank order": (
        "[c for c in free if proximity[c] < proximity_threshold]",
        "[c for c in cells if not drawn[c] and proximity[c] < proximity_threshold]",
    ),
    "refused cells before the far ones": (
        "[c for c in free if proximity[c] < proximity_threshold] + refused",
        "refused + [c for c in free if proximity[c] < proximity_threshold]",
    ),
    "corners count as edges": ("corners / math.sqrt(2)", "corners"),
    "ranked by ascending proximity": ("(-proximity[c], ties[c], c)", "(proximity[c], ties[c], c)"),
    "ties by cell": ("(-proximity[c], ties[c], c)", "(-proximity[c], c)"),
    "ties not keyed by step": ("torch.arange(height * width), step,", "torch.arange(height * width), 0,"),
    "random number of the token domain": ("domain=1", "domain=0"),
    "closest instead of farthest": ("c: min(squared_distance", "c: -min(squared_distance"),
    "start at a tie key": ("words[:, 1].tolist()", "words[:, 0].tolist()"),
    "row and column swapped in distances": (
        "(a // width - b // width) ** 2",
        "(a // height - b // height) ** 2",
    ),
}


def planted(original: str, replacement: str) -> Callable[..., list[int]]:
    """reference._locality_group with one piece of its source replaced."""
    source = inspect.getsource(reference._locality_group)
    assert source.count(original) == 1
    namespace = dict(vars(reference))
    exec(source.replace(original, replacement), namespace)
    result: Callable[..., list[int]] = namespace["_locality_group"]
    return result


@pytest.mark.parametrize("mistake", PLANTED_MISTAKES)
def test_equality_notices(
    mistake: str, random_cases: list[tuple[Arguments, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "_locality_group", planted(*PLANTED_MISTAKES[mistake]))
    small = [(arguments, expected) for arguments, expected in random_cases if arguments[1] * arguments[2] <= 64]
    unequal = sum(not torch.equal(reference.locality_order(*a), expected) for a, expected in small[:40])
    assert unequal >= 2


def test_proximity_of_the_current_group_does_not_count(backend: torch.device) -> None:
    # Only the centre is known, so only its four edge neighbours are near. If the first of them counted at
    # once, cells beside it would be near too, and closer than the other three.
    known = torch.zeros(64, 25, dtype=torch.bool)
    known[:, 12] = True
    sizes = int_tensor([4, 20])
    order = ops.locality_order(*on(backend, (sizes, 5, 5, 1.0, 0, torch.arange(64), known))).cpu()
    assert torch.equal(order[:, :4].sort(dim=1).values, torch.tensor([[7, 11, 13, 17]]).expand(64, 4))


def test_worked_example(backend: torch.device) -> None:
    """3 x 3, centre known, repulsion 1: two opposite edges, the refused ones as the farthest, the corners."""
    known = torch.zeros(50, 9, dtype=torch.bool)
    known[:, 4] = True
    arguments = (int_tensor([4, 4]), 3, 3, 1.0, 1, torch.arange(50), known)
    order = ops.locality_order(*on(backend, arguments)).cpu()
    assert (order[:, 0] + order[:, 1] == 8).all()  # cells 1 and 7, or 3 and 5
    assert torch.equal(order[:, :4].sort(dim=1).values, torch.tensor([[1, 3, 5, 7]]).expand(50, 4))
    assert torch.equal(order[:, 4:8].sort(dim=1).values, torch.tensor([[0, 2, 6, 8]]).expand(50, 4))
    assert (order[:, 8] == -1).all()
    assert len(order.unique(dim=0)) > 30


# ---- contracts ----


def check_permutation(order: Tensor, known: Tensor | None) -> None:
    """Each row holds its free cells once, then -1."""
    for image, row in enumerate(order.tolist()):
        free = set(range(len(row))) if known is None else set((~known[image]).nonzero().flatten().tolist())
        assert set(row[: len(free)]) == free
        assert row[len(free) :] == [-1] * (len(row) - len(free))


def test_permutation_of_the_free_cells(random_cases: list[tuple[Arguments, Tensor]]) -> None:
    for arguments, _ in random_cases:
        check_permutation(ops.locality_order(*arguments), arguments[-1])


def test_depends_on_the_seed_alone(backend: torch.device) -> None:
    sizes = torch.stack([int_tensor(group_sizes(64, t) + [0] * (20 - t)) for t in (10, 20, 5)])
    known = torch.zeros(3, 64, dtype=torch.bool)
    seeds = torch.tensor([3, 14, 15])
    together = ops.locality_order(*on(backend, (sizes, 8, 8, 1.0, 2, seeds, known)))
    for i in (2, 0, 1):
        alone = ops.locality_order(*on(backend, (sizes[i], 8, 8, 1.0, 2, seeds[i : i + 1], None)))
        assert torch.equal(alone[0], together[i])
    five: Arguments = (
        int_tensor(group_sizes(64, 10)),
        8,
        8,
        1.0,
        2,
        torch.tensor([3, 4, 3, 3 + 2**32, -3]),
        None,
    )
    twice = ops.locality_order(*on(backend, five))
    assert torch.equal(twice[0], twice[2])
    assert len(twice.unique(dim=0)) == 4
    with_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert torch.equal(twice, ops.locality_order(*on(backend, five)))
    finally:
        torch.set_num_threads(with_threads)


def test_empty_batch_and_nothing_to_draw(backend: torch.device) -> None:
    no_seeds = torch.empty(0, dtype=torch.int64)
    none = ops.locality_order(*on(backend, (int_tensor([1, 3]), 2, 2, 1.0, 2, no_seeds, None)))
    assert none.shape == (0, 4)
    known = torch.ones(1, 4, dtype=torch.bool)
    for sizes in (int_tensor([]), int_tensor([0, 0])):
        order = ops.locality_order(*on(backend, (sizes, 2, 2, 1.0, 2, torch.tensor([5]), known)))
        assert order.tolist() == [[-1, -1, -1, -1]]


GOOD: dict[str, Any] = {
    "group_sizes": int_tensor([1, 2, 3]),
    "height": 2,
    "width": 3,
    "proximity_threshold": 1.0,
    "repulsion_threshold": 2,
    "seeds": torch.tensor([1, 2]),
    "known": torch.zeros(2, 6, dtype=torch.bool),
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group_sizes": int_tensor([1, 2, 4])}, "group_sizes of image 0 sum to 7 but it has 6 free cells"),
        ({"group_sizes": int_tensor([1, 7, -2])}, "group_sizes of image 0 contain -2; sizes must be >= 0"),
        ({"group_sizes": int_tensor([[1, 5], [1, 4]])}, "group_sizes of image 1 sum to 5 but it has 6"),
        ({"group_sizes": int_tensor([2**31 - 1, 2**31 - 1, 8])}, "group_sizes of image 0 sum to 4294967302"),
        ({"group_sizes": torch.tensor([1, 2, 3])}, "group_sizes must be int32, got int64"),
        ({"group_sizes": int_tensor([[1, 2, 3]])}, r"group_sizes must have shape \[B, T\] = \[2, any\]"),
        ({"group_sizes": int_tensor([1, 0, 2, 0, 3])[::2]}, "group_sizes must be contiguous"),
        (
            {"known": torch.eye(2, 6, dtype=torch.bool)},
            "group_sizes of image 0 sum to 6 but it has 5 free cells",
        ),
        (
            {"known": torch.zeros(2, 5, dtype=torch.bool)},
            r"known must have shape \[B, N\] = \[2, 6\], got \[2, 5\]",
        ),
        ({"known": torch.zeros(2, 6)}, "known must be bool, got float32"),
        ({"seeds": int_tensor([1, 2])}, "seeds must be int64, got int32"),
        ({"seeds": torch.tensor([[1, 2]])}, r"seeds must have shape \[B\]"),
        ({"height": 0}, "height and width must be >= 1 with at most 65536 cells, got 0 x 3"),
        ({"height": 3, "width": 6148914691236517206}, "height and width must be >= 1 with at most 65536 cells"),
        (
            {"height": 300, "width": 300},
            "height and width must be >= 1 with at most 65536 cells, got 300 x 300",
        ),
        ({"proximity_threshold": float("nan")}, "proximity_threshold must be a number, got nan"),
        ({"repulsion_threshold": -1}, "repulsion_threshold must be >= 0, got -1"),
    ],
)
def test_bad_arguments(changes: dict[str, Any], message: str) -> None:
    assert ops.locality_order(**GOOD).shape == (2, 6)
    with pytest.raises(RuntimeError, match=message):
        ops.locality_order(**{**GOOD, **changes})


def test_opcheck(backend: torch.device) -> None:
    for index in (0, 1):
        torch.library.opcheck(ops._ops.locality_order.default, on(backend, random_case(index)))


def test_compiles(backend: torch.device) -> None:
    arguments = on(backend, (int_tensor(group_sizes(64, 10)), 8, 8, 1.0, 2, torch.arange(3), None))
    compiled = torch.compile(ops.locality_order, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*arguments), ops.locality_order(*arguments))
