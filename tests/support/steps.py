"""Ragged decoding steps for the tests of group_attention and append_kv, and the comparison both of them use."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lpd_ext import reference

FLOOR = 1e-6  # of the largest output: what rounding alone may cost where torch happens to be exact


class Row(NamedTuple):
    """One row of the int32 [Q, 6] segments tensor."""

    context_start: int
    num_context: int
    query_start: int
    num_query: int
    cache_length: int
    cache_slot: int


class Layout(NamedTuple):
    """One sequence's share of a step."""

    num_context: int
    num_query: int
    cache_length: int


RAGGED = [Layout(3, 5, 7), Layout(4, 0, 0), Layout(0, 6, 9), Layout(1, 1, 0), Layout(16, 17, 170), Layout(5, 2, 31)]


@dataclass(frozen=True)
class Step:
    """Arguments of group_attention. Cache positions that hold nothing yet are NaN, so that reading one shows."""

    qkv: Tensor
    k_cache: Tensor
    v_cache: Tensor
    segments: Tensor
    max_rows: int
    max_keys: int
    first_output_row: int = 0
    scale: float | None = None

    @property
    def num_context(self) -> int:
        return int(self.segments[:, 1].sum())

    def rows(self) -> list[Row]:
        return [Row(*values) for values in self.segments.tolist()]

    def copy(self, device: torch.device | None = None) -> Step:
        """The same step, with the same strides, in memory of its own."""
        tensors = ("qkv", "k_cache", "v_cache", "segments")
        return replace(self, **{name: clone(getattr(self, name), device) for name in tensors})

    def double(self) -> Step:
        return replace(self, qkv=self.qkv.double(), k_cache=self.k_cache.double(), v_cache=self.v_cache.double())

    def append_arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
        return self.qkv, self.k_cache, self.v_cache, self.segments, self.max_rows

    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor, int, int, int, float | None]:
        return (*self.append_arguments(), self.max_keys, self.first_output_row, self.scale)


def make_step(
    layouts: Sequence[Layout],
    heads: int = 3,
    head_dim: int = 32,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    spread: float = 1.0,
    strided: bool = False,
    cuda: bool = False,
) -> Step:
    """A random step; cache slots are permuted, with slots and positions to spare. `spread` scales q and k.

    strided: qkv and the caches are slices of larger buffers. cuda: for CUDA kernels, so head_dim becomes the next one
    they have, and every row of a slice begins at a multiple of 16 bytes.
    """
    if cuda:
        head_dim = next((size for size in (32, 64, 128) if size >= head_dim), 128)
    align = 16 // dtype.itemsize if cuda else 1
    generator = torch.Generator().manual_seed(seed)
    shuffled = random.Random(seed).sample(range(len(layouts) + 2), len(layouts))
    rows, context, query = [], 0, sum(layout.num_context for layout in layouts)
    for slot, layout in zip(shuffled, layouts, strict=True):
        rows.append(Row(context, layout.num_context, query, layout.num_query, layout.cache_length, slot))
        context, query = context + layout.num_context, query + layout.num_query
    positions = max((layout.cache_length + layout.num_context for layout in layouts), default=0) + 2

    qkv = torch.randn(query, 3, heads, head_dim, generator=generator)
    qkv[:, :2] *= spread
    k_cache, v_cache = (torch.full((len(layouts) + 2, heads, positions, head_dim), float("nan")) for _ in range(2))
    for row in rows:
        cached = (heads, row.cache_length, head_dim)
        k_cache[row.cache_slot, :, : row.cache_length] = spread * torch.randn(cached, generator=generator)
        v_cache[row.cache_slot, :, : row.cache_length] = torch.randn(cached, generator=generator)
    qkv, k_cache, v_cache = (tensor.to(dtype) for tensor in (qkv, k_cache, v_cache))
    if strided:
        qkv = widened(qkv, align)
        k_cache, v_cache = (widened(cache.transpose(1, 2), align).transpose(1, 2) for cache in (k_cache, v_cache))
    return Step(
        qkv=qkv,
        k_cache=k_cache,
        v_cache=v_cache,
        segments=torch.tensor(rows, dtype=torch.int32).reshape(-1, 6),
        max_rows=max((layout.num_context + layout.num_query for layout in layouts), default=0),
        max_keys=max((sum(layout) for layout in layouts), default=0),
    )


def random_layouts(seed: int) -> list[Layout]:
    """Sequences of all sizes, among them prefills, queries alone and rows in several passes and key tiles."""
    generator = random.Random(seed)
    sizes = [0, 1, 2, 7, 13, 16, 33]
    lengths = [0, 1, 15, 16, 31, 64, 129]
    layouts = []
    for _ in range(generator.randint(1, 4)):
        num_context, num_query = generator.choice(sizes), generator.choice(sizes)
        layouts.append(Layout(num_context, num_query, generator.choice(lengths)))
    return layouts


def widened(tensor: Tensor, align: int = 1) -> Tensor:
    """Equal to `tensor`, but a slice of a buffer that is larger in every dimension and NaN elsewhere.

    In the last dimension the slice starts, and the buffer ends, at a multiple of `align` elements.
    """
    sizes = [size + 5 for size in tensor.shape]
    starts = [2] * tensor.dim()
    if align > 1:
        starts[-1], sizes[-1] = align, tensor.shape[-1] + 3 * align
    buffer = torch.full(sizes, float("nan"), dtype=tensor.dtype)
    slices = (slice(start, start + size) for start, size in zip(starts, tensor.shape, strict=True))
    return buffer[tuple(slices)].copy_(tensor)


def clone(tensor: Tensor, device: torch.device | None = None) -> Tensor:
    """A copy of the tensor's whole buffer, and the same slice of it: Tensor.to() would make a slice contiguous."""
    buffer = tensor.untyped_storage().clone().to(device=device or tensor.device)
    empty = torch.empty(0, dtype=tensor.dtype, device=buffer.device)
    return empty.set_(buffer, tensor.storage_offset(), tensor.shape, tensor.stride())


def buffer_bytes(tensor: Tensor) -> Tensor:
    """Every byte of the buffer that the tensor is a slice of; NaN equals NaN."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage()).cpu()


def sdpa(step: Step) -> Tensor:
    """group_attention by torch's attention with an explicit mask, a sequence at a time [R - first_output_row, H*D]."""
    output = torch.empty_like(step.qkv[:, 0])  # [R, H, D]
    for row in step.rows():
        of_rows = [
            *range(row.context_start, row.context_start + row.num_context),
            *range(row.query_start, row.query_start + row.num_query),
        ]
        q, k, v = step.qkv[of_rows].permute(1, 2, 0, 3)  # [H, rows, D] each
        k = torch.cat([step.k_cache[row.cache_slot, :, : row.cache_length], k], dim=1)
        v = torch.cat([step.v_cache[row.cache_slot, :, : row.cache_length], v], dim=1)
        mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool)
        mask[: row.num_context, row.cache_length + row.num_context :] = False
        attended = F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask, scale=step.scale)
        output[of_rows] = attended[0].transpose(0, 1)
    return output.flatten(1)[step.first_output_row :]


def check_append_kv(step: Step, append_kv: Callable[..., None], device: torch.device) -> None:
    """Caches and what surrounds them, bit for bit as the twin leaves them."""
    expected, done = step.copy(), step.copy(device)
    reference.append_kv(*expected.append_arguments())
    append_kv(*done.append_arguments())
    assert_same_caches(done, expected)


def assert_same_caches(done: Step, expected: Step) -> None:
    assert torch.equal(buffer_bytes(done.k_cache), buffer_bytes(expected.k_cache))
    assert torch.equal(buffer_bytes(done.v_cache), buffer_bytes(expected.v_cache))


def check_group_attention(step: Step, group_attention: Callable[..., Tensor], device: torch.device) -> None:
    """Caches bit for bit as append_kv's twin leaves them; output within twice the error of torch's attention."""
    exact = reference.group_attention(*step.double().arguments())
    expected, done = step.copy(), step.copy(device)
    reference.append_kv(*expected.append_arguments())

    output = group_attention(*done.arguments())

    assert_same_caches(done, expected)
    assert output.dtype == step.qkv.dtype
    assert output.shape == exact.shape
    if output.numel() == 0:
        return
    assert torch.isfinite(exact).all()
    error = (output.cpu().double() - exact).abs().max()
    allowed = 2 * (sdpa(step).double() - exact).abs().max() + FLOOR * exact.abs().max()
    assert error <= allowed, f"error {error:.3e}, allowed {allowed:.3e}"


def check_refused(
    call: Callable[[Step], object], change: Callable[[Step], Step], message: str, device: torch.device
) -> None:
    """A change of BAD_ARGUMENTS or BAD_SEGMENTS raises its message before anything is written."""
    step = change(make_step([Layout(3, 4, 5), Layout(2, 3, 9)])).copy(device)
    before = step.copy()
    with pytest.raises(RuntimeError, match=message):
        call(step)
    assert_same_caches(step, before)
    assert torch.equal(buffer_bytes(step.qkv), buffer_bytes(before.qkv))


# ---- wrong arguments: what to change in a step of [Layout(3, 4, 5), Layout(2, 3, 9)], and what is then said ----


def with_segment(step: Step, index: int, **values: int) -> Step:
    segments = step.segments.clone()
    segments[index] = torch.tensor(step.rows()[index]._replace(**values), dtype=torch.int32)
    return replace(step, segments=segments)


def is_sliced(tensor: Tensor) -> Tensor:
    """Equal values, but not contiguous in the last dimension."""
    return torch.stack([tensor, tensor], dim=-1)[..., 0]


BAD_ARGUMENTS: dict[str, tuple[Callable[[Step], Step], str]] = {
    "qkv dtype": (lambda s: replace(s, qkv=s.qkv.double()), "qkv must be float32, bfloat16 or float16, got float64"),
    "qkv dims": (lambda s: replace(s, qkv=s.qkv[0]), r"qkv must have shape \[R, 3, H, D\]"),
    "qkv parts": (lambda s: replace(s, qkv=s.qkv[:, :2]), r"qkv must have shape .*got \[12, 2, 3, 32\]"),
    "qkv stride": (lambda s: replace(s, qkv=is_sliced(s.qkv)), "qkv must be contiguous in its last dimension"),
    "k_cache dtype": (lambda s: replace(s, k_cache=s.k_cache.half()), "k_cache must be float32, got float16"),
    "v_cache dtype": (lambda s: replace(s, v_cache=s.v_cache.bfloat16()), "v_cache must be float32, got bfloat16"),
    "k_cache heads": (lambda s: replace(s, k_cache=s.k_cache[:, :2]), r"k_cache must have shape \[S, H, P, D\]"),
    "v_cache positions": (lambda s: replace(s, v_cache=s.v_cache[:, :, 1:]), "v_cache must have shape"),
    "v_cache slots": (lambda s: replace(s, v_cache=s.v_cache[1:]), "v_cache must have shape"),
    "k_cache stride": (lambda s: replace(s, k_cache=is_sliced(s.k_cache)), "k_cache must be contiguous in its last"),
    "caches overlap": (
        lambda s: replace(s, k_cache=s.k_cache[:1].expand_as(s.k_cache), v_cache=s.v_cache[:1].expand_as(s.v_cache)),
        r"k_cache is written, so its elements must not overlap, got shape .* and strides \[0, ",
    ),
    "max_rows huge": (lambda s: replace(s, max_rows=2**31), r"max_rows must be in \[0, 2\^31\), got 2147483648"),
    "v_cache stride": (lambda s: replace(s, v_cache=is_sliced(s.v_cache)), "v_cache must be contiguous in its last"),
    "cache strides": (
        lambda s: replace(s, v_cache=s.v_cache.transpose(1, 2).contiguous().transpose(1, 2)),
        "v_cache must have the strides of k_cache",
    ),
    "segments dtype": (lambda s: replace(s, segments=s.segments.long()), "segments must be int32, got int64"),
    "segments columns": (lambda s: replace(s, segments=s.segments[:, :5].contiguous()), r"segments must .*\[Q, 6\]"),
    "segments stride": (lambda s: replace(s, segments=s.segments.T.contiguous().T), "segments must be contiguous"),
    "first_output_row < 0": (lambda s: replace(s, first_output_row=-1), r"first_output_row .*\[0, 12\], got -1"),
    "first_output_row > R": (lambda s: replace(s, first_output_row=13), r"first_output_row .*\[0, 12\], got 13"),
    "scale": (lambda s: replace(s, scale=float("nan")), "scale must be finite, got nan"),
}

# Values inside `segments`, which are not looked at on a GPU.
BAD_SEGMENTS: dict[str, tuple[Callable[[Step], Step], str]] = {
    "num_context < 0": (lambda s: with_segment(s, 0, num_context=-1), r"segments\[0\]: num_context -1"),
    "num_query < 0": (lambda s: with_segment(s, 1, num_query=-3), r"segments\[1\]: .*num_query -3"),
    "cache_length < 0": (lambda s: with_segment(s, 1, cache_length=-1), r"segments\[1\]: .*cache_length -1"),
    "cache_slot < 0": (lambda s: with_segment(s, 0, cache_slot=-1), r"segments\[0\]: cache_slot -1"),
    "cache_slot >= S": (lambda s: with_segment(s, 0, cache_slot=4), r"cache_slot 4 must be in \[0, 4\)"),
    "cache_slot twice": (
        lambda s: with_segment(s, 1, cache_slot=s.rows()[0].cache_slot),
        r"segments\[1\]: cache_slot . is used by an earlier segment",
    ),
    "positions": (
        lambda s: with_segment(s, 1, cache_length=12),
        r"segments\[1\]: .*14 exceeds the cache's 13 positions",
    ),
    "max_rows": (lambda s: replace(s, max_rows=6), r"segments\[0\]: num_context \+ num_query = 7 exceeds max_rows 6"),
    "max_keys": (lambda s: replace(s, max_keys=13), r"segments\[1\]: .* = 14 exceeds max_keys 13"),
    "context_start < 0": (
        lambda s: with_segment(s, 0, context_start=-1),
        r"context rows \[-1, 2\) must lie in",
    ),
    "query_start too large": (lambda s: with_segment(s, 1, query_start=10), r"query rows \[10, 13\) must lie in"),
    "rows shared": (lambda s: with_segment(s, 1, context_start=2), "row 2 belongs to more than one segment"),
    "rows left out": (lambda s: with_segment(s, 1, num_query=2), "row 11 belongs to no segment"),
}
