"""group_attention against its twin in float64: numerics, what each row sees, and the errors it raises."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from backends import all_backends, operators_on
from steps import (
    BAD_ARGUMENTS,
    BAD_SEGMENTS,
    RAGGED,
    Layout,
    Row,
    Step,
    assert_same_caches,
    check_group_attention,
    check_refused,
    make_step,
    random_layouts,
)
from torch import Tensor

from lpd_ext import _C, ops, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


# From 9.0 on the blocks that share keys form clusters.
@pytest.fixture(params=[*all_backends(), *(["emulated-sm90"] if "emulated" in all_backends() else [])])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """As everywhere, and a GPU with clusters, where every test that does not say otherwise has its keys split."""
    with operators_on(request.param, request.node.nodeid) as device:
        if request.param == "emulated-sm90":
            workspace = torch.zeros(16, dtype=torch.uint8)  # clusters need none but do as if
            monkeypatch.setattr(ops, "group_attention", partial(ops.group_attention, workspace=workspace))
        yield device


# ---- numerics ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "head_dim"), [(1, 8), (3, 24), (3, 32), (2, 64), (1, 128), (1, 200), (1, 256)])
def test_ragged_batch(
    backend: torch.device, on_cuda_kernels: bool, heads: int, head_dim: int, dtype: torch.dtype
) -> None:
    step = make_step(RAGGED, heads, head_dim, dtype, seed=head_dim, cuda=on_cuda_kernels)
    check_group_attention(step, ops.group_attention, backend)


@pytest.mark.parametrize("seed", range(20))
def test_random_ragged_batches(backend: torch.device, on_cuda_kernels: bool, seed: int) -> None:
    generator = random.Random(seed)
    layouts = random_layouts(seed)
    step = make_step(
        layouts,
        heads=generator.choice([1, 3]),
        head_dim=generator.choice([8, 24, 32, 40, 64]),
        dtype=generator.choice(DTYPES),
        seed=seed,
        strided=generator.random() < 0.5,
        cuda=on_cuda_kernels,
    )
    step = replace(step, scale=generator.choice([None, 0.05, 1.0]))
    check_group_attention(step, ops.group_attention, backend)
    check_group_attention(replace(step, first_output_row=step.num_context), ops.group_attention, backend)


# 48 rows and 256 keys are the kernel's passes and tiles.
@pytest.mark.parametrize(
    "layout",
    [
        Layout(1, 0, 0),
        Layout(0, 1, 0),
        Layout(0, 0, 3),
        Layout(47, 2, 0),
        Layout(49, 96, 3),
        Layout(2, 3, 253),
        Layout(1, 3, 255),
        Layout(2, 60, 255),
        Layout(3, 2, 600),
        Layout(0, 130, 200),
        Layout(300, 0, 0),
    ],
)
def test_one_sequence(backend: torch.device, on_cuda_kernels: bool, layout: Layout) -> None:
    step = make_step([layout], heads=1, head_dim=16, seed=sum(layout), cuda=on_cuda_kernels)
    check_group_attention(step, ops.group_attention, backend)


# What is cached ends one key before, at and one behind the edge of a tile (64 keys in 16 bits, 32 in fp32) or of a
# product's 16 keys, for one block and, with a workspace, for the blocks that share the keys.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cached", [15, 63, 64, 65, 127, 128, 159, 160, 161])
def test_the_cache_ends_at_the_edge_of_a_tile(backend: torch.device, cached: int, dtype: torch.dtype) -> None:
    step = make_step([Layout(3, 2, cached), Layout(0, 1, cached), Layout(1, 40, cached)], 1, 32, dtype, seed=cached)
    for workspace in (None, workspace_on(backend, step)):
        check_group_attention(step, partial(ops.group_attention, workspace=workspace), backend)


@pytest.mark.parametrize("dtype", DTYPES)
def test_slices_of_larger_buffers(backend: torch.device, on_cuda_kernels: bool, dtype: torch.dtype) -> None:
    step = make_step(RAGGED, head_dim=64, dtype=dtype, strided=True, cuda=on_cuda_kernels)
    assert not step.qkv.is_contiguous()
    assert not step.k_cache.is_contiguous()
    check_group_attention(step, ops.group_attention, backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spread", [30.0, 1e4])
def test_scores_of_large_magnitude(backend: torch.device, spread: float, dtype: torch.dtype) -> None:
    layouts = [*RAGGED, Layout(5, 9, 600)]  # two of three tiles of keys raise the maximum
    check_group_attention(make_step(layouts, head_dim=32, dtype=dtype, spread=spread), ops.group_attention, backend)


def test_scores_that_overflow_to_minus_infinity(backend: torch.device, on_cuda_kernels: bool) -> None:
    step = make_step([Layout(2, 2, 300)], heads=1, head_dim=8, cuda=on_cuda_kernels)
    step.qkv[:, 0] = 1e20
    step.k_cache[:, :, :290] = -1e20  # a whole tile of -inf before the first finite score
    step.qkv[:, 1] = 0.0
    step.k_cache[:, :, 290:300] = 0.0
    check_group_attention(step, ops.group_attention, backend)


@pytest.mark.parametrize("first_output_row", [0, 1, 5, 29, 30, 59])
def test_rows_before_first_output_row_are_appended_only(backend: torch.device, first_output_row: int) -> None:
    step = make_step(RAGGED, head_dim=32)
    assert step.num_context == 29
    assert len(step.qkv) == 60
    check_group_attention(replace(step, first_output_row=first_output_row), ops.group_attention, backend)


@pytest.mark.parametrize("layouts", [[], [Layout(0, 0, 0)], [Layout(0, 0, 4)] * 3])
def test_empty_step(backend: torch.device, layouts: list[Layout]) -> None:
    step = make_step(layouts).copy(backend)
    assert ops.group_attention(*step.arguments()).shape == (0, 96)
    check_group_attention(make_step(layouts), ops.group_attention, backend)


def test_result_depends_neither_on_the_batch_nor_on_threads(backend: torch.device) -> None:
    attend = partial(ops.group_attention, workspace=None)  # with one, keys are split as the batch has blocks
    step = make_step(RAGGED, head_dim=64)
    done = step.copy(backend)
    together = attend(*done.arguments())
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        again = step.copy(backend)
        assert torch.equal(attend(*again.arguments()), together)
    finally:
        torch.set_num_threads(threads)
    for row in step.rows():
        own_rows = rows_of(row)
        alone = replace(
            step,
            qkv=step.qkv[own_rows],
            segments=torch.tensor([row._replace(context_start=0, query_start=row.num_context)], dtype=torch.int32),
        ).copy(backend)
        assert torch.equal(attend(*alone.arguments()), together[own_rows])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(4))
def test_sizes_of_a_decode(backend: torch.device, on_cuda_kernels: bool, seed: int, dtype: torch.dtype) -> None:
    generator = random.Random(seed)
    layouts = [
        Layout(generator.randint(0, 40), generator.randint(0, 64), generator.choice([0, generator.randint(1, 1100)]))
        for _ in range(2)
    ]
    head_dim = (32, 64, 128, 64)[seed]
    step = make_step(layouts, heads=1, head_dim=head_dim, dtype=dtype, seed=seed, cuda=on_cuda_kernels)
    check_group_attention(step, ops.group_attention, backend)
    with_workspace = partial(ops.group_attention, workspace=workspace_on(backend, step))
    check_group_attention(step, with_workspace, backend)


def workspace_on(device: torch.device, step: Step) -> Tensor:
    """For many more multiprocessors than the blocks of a small step: its keys are split over several blocks."""
    head_dim = step.qkv.shape[-1]
    given = ops.group_attention_workspace(head_dim, device)  # None on the CPU, where the emulated device has 108
    return torch.zeros(_C.group_attention_workspace_bytes(head_dim, 108), dtype=torch.uint8) if given is None else given


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "layouts",
    [
        RAGGED,
        [Layout(18, 19, 141)],
        [Layout(70, 9, 40), Layout(3, 64, 700)],
        [Layout(17, 39, 120), Layout(1, 2, 3)],  # 56 rows, which need a second tile: 17 and 39 fill five slabs of 16
    ],
)
def test_a_workspace_serves_call_after_call(backend: torch.device, layouts: list[Layout], dtype: torch.dtype) -> None:
    step = make_step(layouts, heads=2, head_dim=64, dtype=dtype)
    workspace = workspace_on(backend, step)
    with_workspace = partial(ops.group_attention, workspace=workspace)
    for first_output_row in (0, step.num_context):
        part = replace(step, first_output_row=first_output_row)
        check_group_attention(part, with_workspace, backend)
        outputs = [with_workspace(*part.copy(backend).arguments()) for _ in range(2)]
        assert torch.equal(*outputs)


def test_bounds_above_what_is_there(backend: torch.device) -> None:
    """Blocks without rows, and blocks without keys."""
    step = replace(make_step(RAGGED, heads=1, head_dim=64), max_rows=150, max_keys=3000)
    check_group_attention(step, partial(ops.group_attention, workspace=workspace_on(backend, step)), backend)


def test_a_workspace_that_is_too_small_is_left_alone(backend: torch.device) -> None:
    step = make_step([Layout(18, 19, 141)], heads=2, head_dim=64)
    workspace = torch.full((500,), 7, dtype=torch.uint8, device=backend)
    check_group_attention(step, partial(ops.group_attention, workspace=workspace), backend)
    assert workspace.eq(7).all()
    with pytest.raises(RuntimeError, match="workspace must be uint8, got float32"):
        ops.group_attention(*step.copy(backend).arguments(), workspace=workspace.float())
    with pytest.raises(RuntimeError, match="workspace must begin at a multiple of 16 bytes"):
        ops.group_attention(*step.copy(backend).arguments(), workspace=workspace[1:])


def test_nothing_is_written_behind_a_workspace(backend: torch.device) -> None:
    """Tries workspaces of any size, also where the partial results alone would fit."""
    step = make_step([Layout(3, 5, 700)], heads=1, head_dim=32)
    partial_bytes = 4 * (64 * 32 + 2 * 64)
    for size in range(partial_bytes, 40 * partial_bytes, partial_bytes):
        buffer = torch.zeros(size + 4096, dtype=torch.uint8, device=backend)
        buffer[size:] = 7
        check_group_attention(step, partial(ops.group_attention, workspace=buffer[:size]), backend)
        assert buffer[size:].eq(7).all()


def rows_of(row: Row) -> list[int]:
    return [
        *range(row.context_start, row.context_start + row.num_context),
        *range(row.query_start, row.query_start + row.num_query),
    ]


# ---- what each row sees ----


# In the last two, keys that context rows see fill groups of 16, so the first group of query rows follows at once.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30])
def test_query_rows_do_not_reach_context_rows(backend: torch.device, poison: float, dtype: torch.dtype) -> None:
    step = make_step([*RAGGED, Layout(3, 5, 13), Layout(16, 20, 48)], head_dim=64, dtype=dtype)
    clean, poisoned = step.copy(backend), step.copy(backend)
    poisoned.qkv[step.num_context :, 1:] = poison
    expected, output = (ops.group_attention(*each.arguments()) for each in (clean, poisoned))
    assert torch.equal(output[: step.num_context], expected[: step.num_context])
    assert_same_caches(poisoned, clean)
    assert not torch.equal(output[step.num_context :], expected[step.num_context :])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30])
def test_sequences_do_not_reach_each_other(backend: torch.device, poison: float, dtype: torch.dtype) -> None:
    step = make_step(RAGGED, head_dim=64, dtype=dtype)
    expected = ops.group_attention(*step.copy(backend).arguments())
    for row in step.rows():
        poisoned = step.copy(backend)
        poisoned.qkv[rows_of(row)] = poison
        poisoned.k_cache[row.cache_slot] = poisoned.v_cache[row.cache_slot] = poison
        output = ops.group_attention(*poisoned.arguments())
        others = [index for index in range(len(step.qkv)) if index not in rows_of(row)]
        assert torch.equal(output[others], expected[others])


@pytest.mark.parametrize("part", [0, 1, 2])
def test_nan_stays_in_the_rows_that_see_it(backend: torch.device, part: int) -> None:
    step = make_step([Layout(3, 20, 20), Layout(2, 2, 2)], head_dim=64).copy(backend)
    row = 3 + 2 + 7  # a query row of the first sequence
    step.qkv[row, part, :, 5] = float("nan")
    is_nan = ops.group_attention(*step.arguments()).isnan().any(dim=1)
    sees = torch.zeros(len(step.qkv), dtype=torch.bool)
    sees[row if part == 0 else slice(5, 25)] = True
    assert torch.equal(is_nan.cpu(), sees)


@pytest.mark.parametrize("at", [0, 255, 256, 299])
def test_nan_in_the_cache_is_not_dropped(backend: torch.device, at: int) -> None:
    for cache in ("k_cache", "v_cache"):
        step = make_step([Layout(1, 2, 300)], heads=1, head_dim=32).copy(backend)
        getattr(step, cache)[:, :, at] = float("nan")
        assert ops.group_attention(*step.arguments()).isnan().any(dim=1).all()


# ---- the comparison can fail ----


def mistaken(**changes: Any) -> Callable[..., Tensor]:
    """The plain-torch twin with one mistake in what it attends to; the caches are right."""

    def group_attention(
        qkv: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        segments: Tensor,
        max_rows: int,
        max_keys: int,
        first_output_row: int,
        scale: float | None,
    ) -> Tensor:
        reference.append_kv(qkv, k_cache, v_cache, segments, max_rows)
        scale = changes.get("scale", lambda x: x)(scale or qkv.shape[-1] ** -0.5)
        output = torch.zeros_like(qkv[:, 0])
        for row in (Row(*values) for values in segments.tolist()):
            rows = rows_of(row)
            length = max(0, row.cache_length + changes.get("cache_length", 0))
            slot = changes.get("slot", row.cache_slot)
            q, k, v = qkv[rows].permute(1, 2, 0, 3)
            k = torch.cat([k_cache[slot, :, :length], k], dim=1).nan_to_num()
            v = torch.cat([v_cache[slot, :, :length], v], dim=1).nan_to_num()
            if changes.get("swap"):
                k, v = v, k
            index = torch.arange(len(rows))
            is_context = index < row.num_context
            visible = changes.get("visible", right_visible)(is_context[:, None], is_context, index[:, None], index)
            mask = torch.cat([torch.ones(len(rows), length, dtype=torch.bool), visible], dim=1)
            scores = (scale * q @ k.transpose(1, 2)).masked_fill(~mask, -torch.inf)
            output[rows] = (scores.softmax(-1) @ v).transpose(0, 1)
        start = changes.get("start", lambda x: x)(first_output_row)
        return output.flatten(1)[start : start + len(output) - first_output_row]

    return group_attention


def right_visible(row_context: Tensor, key_context: Tensor, row: Tensor, key: Tensor) -> Tensor:
    return key_context | ~row_context


MISTAKES = {
    "context rows see query rows": mistaken(visible=lambda rc, kc, r, k: torch.ones_like(rc | kc)),
    "query rows do not see each other": mistaken(visible=lambda rc, kc, r, k: kc | (r == k)),
    "query rows see earlier query rows only": mistaken(visible=lambda rc, kc, r, k: kc | (~rc & (k <= r))),
    "query rows do not see themselves": mistaken(visible=lambda rc, kc, r, k: kc | (~rc & (k != r))),
    "context rows are causal": mistaken(visible=lambda rc, kc, r, k: (kc & (k <= r)) | ~rc),
    "context rows see only themselves": mistaken(visible=lambda rc, kc, r, k: (r == k) | ~rc),
    "cache length too short": mistaken(cache_length=-1),
    "cache length too long": mistaken(cache_length=1),
    "keys and values swapped": mistaken(swap=True),
    "no scale": mistaken(scale=lambda scale: 1.0),
    "scale a little off": mistaken(scale=lambda scale: 1.0001 * scale),
    "first cache slot for all": mistaken(slot=0),
    "output of the first rows": mistaken(start=lambda first: 0),
}


def planted_step(dtype: torch.dtype) -> Step:
    step = make_step([Layout(3, 4, 5), Layout(2, 3, 9)], head_dim=32, dtype=dtype, seed=1)
    return replace(step, first_output_row=2)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_planted_mistakes_are_rejected(mistake: str) -> None:
    with pytest.raises(AssertionError, match=r"error .*, allowed"):
        check_group_attention(planted_step(torch.float32), MISTAKES[mistake], torch.device("cpu"))


@pytest.mark.parametrize("mistake", [mistake for mistake in MISTAKES if mistake != "scale a little off"])
def test_planted_mistakes_are_rejected_in_16_bits(mistake: str) -> None:
    with pytest.raises(AssertionError, match=r"error .*, allowed"):
        check_group_attention(planted_step(torch.bfloat16), MISTAKES[mistake], torch.device("cpu"))


def test_planting_alone_changes_nothing() -> None:
    check_group_attention(planted_step(torch.float32), mistaken(), torch.device("cpu"))
    check_group_attention(planted_step(torch.float32), reference.group_attention, torch.device("cpu"))


# ---- wrong arguments ----


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_wrong_arguments_raise_and_write_nothing(backend: torch.device, name: str) -> None:
    check_refused(lambda step: ops.group_attention(*step.arguments()), *BAD_ARGUMENTS[name], backend)


@pytest.mark.parametrize("name", BAD_SEGMENTS)
def test_wrong_segments_raise_and_write_nothing(host_backend: torch.device, name: str) -> None:
    check_refused(lambda step: ops.group_attention(*step.arguments()), *BAD_SEGMENTS[name], host_backend)


@pytest.mark.parametrize("head_dim", [4, 12, 264])
def test_head_dimension_out_of_range(backend: torch.device, head_dim: int) -> None:
    step = make_step([Layout(1, 1, 1)], head_dim=head_dim).copy(backend)
    with pytest.raises(RuntimeError, match=rf"qkv: head dimension D .*\[8, 256\], got {head_dim}"):
        ops.group_attention(*step.arguments())


@pytest.mark.parametrize("head_dim", [8, 40, 96, 256])
def test_head_dimensions_without_a_cuda_kernel(backend: torch.device, on_cuda_kernels: bool, head_dim: int) -> None:
    step = make_step([Layout(1, 1, 1)], head_dim=head_dim).copy(backend)
    if not on_cuda_kernels:
        assert ops.group_attention(*step.arguments()).shape == (2, 3 * head_dim)
        return
    with pytest.raises(RuntimeError, match=rf"qkv: on CUDA head dimension D must be 32, 64 or 128, got {head_dim}"):
        ops.group_attention(*step.arguments())


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_begin_between_16_bytes(backend: torch.device, on_cuda_kernels: bool, dtype: torch.dtype) -> None:
    step = make_step(RAGGED, dtype=dtype, strided=True)
    if not on_cuda_kernels:
        check_group_attention(step, ops.group_attention, backend)
        return
    for name, aligned in (("qkv", {}), ("k_cache", {"qkv": step.qkv.contiguous()})):
        wrong = replace(step, **aligned).copy(backend)
        with pytest.raises(RuntimeError, match=f"^{name}: on CUDA every row must begin at a multiple of 16 bytes"):
            ops.group_attention(*wrong.arguments())


# ---- as a torch operator ----


def test_opcheck(backend: torch.device) -> None:
    for layouts, first_output_row in ((RAGGED, 0), (RAGGED, 29), ([Layout(2, 0, 3)], 2)):
        step = replace(make_step(layouts, dtype=torch.bfloat16), first_output_row=first_output_row, scale=0.2)
        finite = step.copy(backend)
        finite.k_cache.nan_to_num_()  # opcheck compares caches with themselves
        finite.v_cache.nan_to_num_()
        torch.library.opcheck(ops._ops.group_attention.default, finite.arguments())


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is:DeprecationWarning")  # torch's own
def test_compiles_in_one_graph(backend: torch.device) -> None:
    def layer(step_tensors: tuple[Tensor, Tensor, Tensor, Tensor], first_output_row: int) -> Tensor:
        qkv, k_cache, v_cache, segments = step_tensors
        return ops.group_attention(2 * qkv, k_cache, v_cache, segments, 33, 203, first_output_row).float() + 1

    compiled = torch.compile(layer, fullgraph=True)
    for first_output_row in (0, 29):
        steps = [make_step(RAGGED, head_dim=32).copy(backend) for _ in range(2)]
        eager, graph = (
            function((s.qkv, s.k_cache, s.v_cache, s.segments), first_output_row)
            for function, s in zip((layer, compiled), steps, strict=True)
        )
        assert torch.equal(graph, eager)
        assert_same_caches(*steps)
