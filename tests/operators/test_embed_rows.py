"""embed_rows: gather, add and LayerNorm, as accurate as torch's layer_norm, against float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from steps import clone
from torch import Tensor

from lpd_ext import ops, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class Arguments(NamedTuple):
    """Returns the arguments of embed_rows, in its order."""

    content_ids: Tensor
    positions: Tensor
    content: Tensor
    position_embedding: Tensor
    weight: Tensor
    bias: Tensor
    eps: float

    def embed(self, device: torch.device) -> Tensor:
        return ops.embed_rows(*(clone(a, device) if isinstance(a, Tensor) else a for a in self)).cpu()

    def in_dtype(self, dtype: torch.dtype) -> Arguments:
        return Arguments(*self[:2], *(a.to(dtype) for a in self[2:6]), self.eps)


def random_arguments(rows: int, width: int, dtype: torch.dtype, offset: float = 0.0, eps: float = 1e-6) -> Arguments:
    generator = torch.Generator().manual_seed(rows + width)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return Arguments(
        torch.randint(0, 11, (rows,), generator=generator),
        torch.randint(0, 17, (rows,), generator=generator),
        offset + normal(11, width),
        normal(17, width),
        1 + normal(width) / 2,
        normal(width),
        eps,
    ).in_dtype(dtype)


def assert_as_accurate(x: Tensor, args: Arguments) -> None:
    """Error against float64 at most twice that of torch's layer_norm of the sum in fp32, plus a floor."""
    exact = reference.embed_rows(*args.in_dtype(torch.float64))
    torchs = reference.embed_rows(*args)
    assert x.dtype == torchs.dtype == torch.float32
    assert x.shape == exact.shape
    if x.numel() > 0:
        floor = 4 * torch.finfo(torch.float32).eps * (1 + exact.abs().max())
        assert (x.double() - exact).abs().max() <= 2 * (torchs.double() - exact).abs().max() + floor


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 7, 8, 96, 129, 1024])
@pytest.mark.parametrize("rows", [0, 1, 7])
def test_rows(rows: int, width: int, dtype: torch.dtype, backend: torch.device) -> None:
    args = random_arguments(rows, width, dtype)
    assert_as_accurate(args.embed(backend), args)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("offset", "eps"), [(100.0, 1e-6), (0.0, 0.3), (0.0, 50.0)])
def test_offset_and_eps(offset: float, eps: float, dtype: torch.dtype, backend: torch.device) -> None:
    args = random_arguments(9, 1024, dtype, offset, eps)
    assert_as_accurate(args.embed(backend), args)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_row_of_both_tables(dtype: torch.dtype, backend: torch.device) -> None:
    """First and last rows included, repeated ids allowed, each the same bits wherever it stands."""
    args = random_arguments(1, 96, dtype)._replace(
        content_ids=torch.arange(11).repeat(17), positions=torch.arange(17).repeat_interleave(11)
    )
    x = args.embed(backend)
    assert_as_accurate(x, args)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    shuffled = args._replace(content_ids=args.content_ids[order], positions=args.positions[order])
    assert shuffled.embed(backend).equal(x[order])


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_tables(dtype: torch.dtype, backend: torch.device) -> None:
    args = random_arguments(7, 129, dtype)
    content = torch.full((22, 140), 99.0, dtype=dtype)
    position_embedding = torch.full((51, 131), 99.0, dtype=dtype)
    content[::2, 5:134], position_embedding[::3, 1:130] = args.content, args.position_embedding
    strided = args._replace(content=content[::2, 5:134], position_embedding=position_embedding[::3, 1:130])
    assert strided.embed(backend).equal(args.embed(backend))


# On CUDA rows of 16 n aligned elements are moved 16 bytes at a time, which one that is not aligned forbids.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["content", "position_embedding", "weight", "bias"])
def test_one_argument_between_16_bytes(name: str, dtype: torch.dtype, backend: torch.device) -> None:
    args = random_arguments(5, 96, dtype)
    table = getattr(args, name)
    buffer = torch.full((*table.shape[:-1], 112), 99.0, dtype=dtype, device=backend)
    buffer[..., 1:97] = table.to(backend)
    on_device = {k: v.to(backend) for k, v in args._asdict().items() if isinstance(v, Tensor)}
    x = ops.embed_rows(*args._replace(**{**on_device, name: buffer[..., 1:97]}))
    assert_as_accurate(x.cpu(), args)


def test_the_widest_row_of_the_cuda_kernel(backend: torch.device) -> None:
    args = random_arguments(2, 6144, torch.bfloat16)
    assert_as_accurate(args.embed(backend), args)


def test_threads_do_not_matter(backend: torch.device) -> None:
    args = random_arguments(500, 1024, torch.float32)
    expected = args.embed(backend)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            assert args.embed(backend).equal(expected)
    finally:
        torch.set_num_threads(threads)


MISTAKES: dict[str, Callable[[Arguments], Tensor]] = {
    "next position": lambda a: reference.embed_rows(*a._replace(positions=(a.positions + 1) % 17)),
    "next content": lambda a: reference.embed_rows(*a._replace(content_ids=(a.content_ids + 1) % 11)),
    "no position": lambda a: reference.embed_rows(*a._replace(position_embedding=a.position_embedding * 0)),
    "sum rounded to bfloat16": lambda a: reference.residual_layer_norm(
        (a.content[a.content_ids] + a.position_embedding[a.positions]).bfloat16().float(), None, *a[4:]
    ),
    "weight and bias swapped": lambda a: reference.embed_rows(*a._replace(weight=a.bias, bias=a.weight)),
    "eps ignored": lambda a: reference.embed_rows(*a._replace(eps=1e-6)),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_the_rule_rejects(name: str) -> None:
    args = random_arguments(7, 96, torch.float32, eps=1e-2)
    with pytest.raises(AssertionError):
        assert_as_accurate(MISTAKES[name](args), args)


def ids(*values: int) -> Tensor:
    return torch.tensor(values)


WRONG: dict[str, tuple[Callable[[Arguments], Arguments], str]] = {
    "lengths": (lambda a: a._replace(positions=ids(0, 1)), r"positions must have shape \[R\] = \[3\], got \[2\]"),
    "id dtype": (lambda a: a._replace(content_ids=a.content_ids.int()), "content_ids must be int64, got int32"),
    "id stride": (lambda a: a._replace(positions=ids(0, 1, 2, 3, 4)[::2]), "positions must be contiguous"),
    "table dtypes": (
        lambda a: a._replace(position_embedding=a.position_embedding.half()),
        "position_embedding must be bfloat16, got float16",
    ),
    "float64": (lambda a: a.in_dtype(torch.float64), "content must be float32, bfloat16 or float16, got float64"),
    "widths": (
        lambda a: a._replace(position_embedding=a.position_embedding[:, :8]),
        r"position_embedding must have shape \[1 \+ N, E\] = \[any, 24\], got \[17, 8\]",
    ),
    "columns apart": (
        lambda a: a._replace(content=a.content.repeat(1, 2)[:, ::2]),
        "content must be contiguous in its last dimension, got stride 2",
    ),
    "weight": (lambda a: a._replace(weight=a.weight[:8]), r"weight must have shape \[E\] = \[24\], got \[8\]"),
    "bias": (lambda a: a._replace(bias=a.bias.float()), "bias must be bfloat16, got float32"),
}


def test_ids_are_looked_up(backend: torch.device) -> None:
    """The same rows, bit for bit, as of the ids themselves; an index outside is refused, or on CUDA gives NaN."""
    args = random_arguments(7, 96, torch.float32)
    generator = torch.Generator().manual_seed(1)
    content_index, position_index = (torch.randint(0, 7, (5,), generator=generator) for _ in range(2))
    picked = args._replace(content_ids=args.content_ids[content_index], positions=args.positions[position_index])
    on_device = [clone(a, backend) if isinstance(a, Tensor) else a for a in args]

    def looked_up(content_index: Tensor | None, position_index: Tensor | None) -> Tensor:
        indices = (None if index is None else index.to(backend) for index in (content_index, position_index))
        return ops.embed_rows(*on_device, *indices).cpu()

    wanted = picked.embed(backend)
    assert looked_up(content_index, position_index).equal(wanted)
    plain = args._replace(content_ids=args.content_ids[content_index], positions=args.positions[:5])
    on_device[1] = args.positions[:5].to(backend)
    assert looked_up(content_index, None).equal(plain.embed(backend))
    on_device[1] = args.positions.to(backend)
    content_index[2], position_index[4] = 7, -1
    if ops._ops is torch.ops.lpd_ext and backend.type == "cpu":
        with pytest.raises(RuntimeError, match=r"content_index\[2\] = 7 must be in \[0, 7\)"):
            looked_up(content_index, position_index)
        content_index[2] = 0
        with pytest.raises(RuntimeError, match=r"position_index\[4\] = -1 must be in \[0, 7\)"):
            looked_up(content_index, position_index)
        with pytest.raises(RuntimeError, match=r"position_index must have shape \[R\] = \[5\], got \[2\]"):
            looked_up(content_index, position_index[:2])
        return
    found = looked_up(content_index, position_index)
    assert found[[0, 1, 3]].equal(wanted[[0, 1, 3]])
    assert found[[2, 4]].isnan().all()


@pytest.mark.parametrize("name", WRONG)
def test_errors_name_argument_and_value(name: str, backend: torch.device) -> None:
    spoil, message = WRONG[name]
    with pytest.raises(RuntimeError, match=message):
        spoil(random_arguments(3, 24, torch.bfloat16)).embed(backend)


OUTSIDE: dict[str, tuple[Callable[[Arguments], Arguments], str]] = {
    "content id": (lambda a: a._replace(content_ids=ids(0, 11, 2)), r"content_ids\[1\] = 11 must be in \[0, 11\)"),
    "negative id": (lambda a: a._replace(content_ids=ids(0, -1, 2)), r"content_ids\[1\] = -1 must be in \[0, 11\)"),
    "position": (lambda a: a._replace(positions=ids(0, 17, 0)), r"positions\[1\] = 17 must be in \[0, 17\)"),
    "negative position": (lambda a: a._replace(positions=ids(0, -5, 0)), r"positions\[1\] = -5 must be in \[0, 17\)"),
    "huge": (lambda a: a._replace(content_ids=ids(0, 2**62, 2)), r"content_ids\[1\] = 4611686018427387904 must be"),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_ids_outside_their_table(name: str, backend: torch.device, on_cuda_kernels: bool) -> None:
    """An error on the CPU; CUDA kernels, which would have to wait to raise it, make that row NaN."""
    spoil, message = OUTSIDE[name]
    args = random_arguments(3, 24, torch.bfloat16)
    if on_cuda_kernels:
        spoiled = spoil(args)
        x, valid = spoiled.embed(backend), torch.tensor([0, 2])
        kept = spoiled._replace(content_ids=spoiled.content_ids[valid], positions=spoiled.positions[valid])
        assert x[1].isnan().all()
        assert x[valid].equal(kept.embed(backend))
    else:
        with pytest.raises(RuntimeError, match=message):
            spoil(args).embed(backend)


@pytest.mark.parametrize("table", ["content", "position_embedding"])
def test_an_empty_table_is_refused(table: str, backend: torch.device) -> None:
    """Kernels read its first row in place of one that is not there."""
    args = random_arguments(3, 24, torch.bfloat16)
    empty = args._replace(**{table: getattr(args, table)[:0].clone()})
    with pytest.raises(RuntimeError, match=f"{table} must have rows, got an empty table"):
        empty.embed(backend)
    none = empty._replace(content_ids=args.content_ids[:0], positions=args.positions[:0])
    assert none.embed(backend).shape == (0, 24)


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: torch.dtype, backend: torch.device) -> None:
    args = random_arguments(5, 24, dtype)
    torch.library.opcheck(
        ops._ops.embed_rows.default,
        tuple(a.to(backend) if isinstance(a, Tensor) else a for a in args),
    )


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")  # of inductor's own imports
def test_compiles_without_a_graph_break(backend: torch.device) -> None:
    args = random_arguments(5, 24, torch.float32)
    on_device = [a.to(backend) if isinstance(a, Tensor) else a for a in args]
    compiled = torch.compile(ops.embed_rows, fullgraph=True)
    assert compiled(*on_device).cpu().equal(args.embed(backend))
