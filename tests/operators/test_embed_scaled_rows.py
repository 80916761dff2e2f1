"""embed_scaled_rows: the rows of embed_rows bit for bit, and what normed_linear takes of them as accurate as torch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from few_rows import DTYPES, assert_as_accurate
from steps import clone
from torch import Tensor

from lpd_ext import ops, reference

EPS = torch.finfo(torch.float32).eps
TABLES = ("content", "position_embedding", "weight", "bias", "scale")
Results = tuple[Tensor, Tensor, Tensor]


def random_arguments(rows: int, width: int, dtype: torch.dtype, offset: float = 0.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(rows + width)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "content_ids": torch.randint(0, 11, (rows,), generator=generator),
        "positions": torch.randint(0, 17, (rows,), generator=generator),
        "content": normal(11, width).to(dtype),
        "position_embedding": normal(17, width).to(dtype),
        "weight": (1 + normal(width) / 2).to(dtype),
        "bias": (offset + normal(width)).to(dtype),
        "scale": (1 + normal(width) / 4).to(dtype),
    }


def run(arguments: dict[str, Tensor], device: torch.device, **more: Tensor) -> Results:
    x, scaled, statistics = ops.embed_scaled_rows(**{name: t.to(device) for name, t in {**arguments, **more}.items()})
    return x.cpu(), scaled.cpu(), statistics.cpu()


def assert_right(results: Results, x_alone: Tensor, scale: Tensor) -> None:
    x, scaled, statistics = results
    assert x.equal(x_alone)
    assert (scaled.dtype, statistics.dtype) == (scale.dtype, torch.float32)
    assert scaled.equal((x * scale.float()).to(scale.dtype))
    groups, of_torch = x.double().unflatten(1, (-1, 32)), x.unflatten(1, (-1, 32))
    assert_as_accurate(statistics[..., 0], groups.mean(2), of_torch.mean(2), 2 * EPS)
    squares = [((v - v.mean(2, keepdim=True)) ** 2).sum(2) for v in (groups, of_torch)]
    assert_as_accurate(statistics[..., 1], squares[0], squares[1], 4 * EPS)


def alone(arguments: dict[str, Tensor], device: torch.device, **more: Tensor) -> Tensor:
    given = {name: t.to(device) for name, t in {**arguments, **more}.items() if name != "scale"}
    return ops.embed_rows(**given).cpu()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0.0, 100.0])
@pytest.mark.parametrize("width", [32, 96, 288, 1024])
@pytest.mark.parametrize("rows", [0, 1, 7])
def test_rows(rows: int, width: int, offset: float, dtype: torch.dtype, backend: torch.device) -> None:
    arguments = random_arguments(rows, width, dtype, offset)
    assert_right(run(arguments, backend), alone(arguments, backend), arguments["scale"])


def test_ids_are_looked_up(backend: torch.device) -> None:
    arguments = random_arguments(7, 96, torch.bfloat16)
    index = {"content_index": torch.tensor([3, 3, 0, 6]), "position_index": torch.tensor([6, 1, 5, 0])}
    assert_right(run(arguments, backend, **index), alone(arguments, backend, **index), arguments["scale"])


def test_they_are_what_residual_linear_leaves(cpu_backend: torch.device) -> None:
    """Compares with residual_linear of the same stream, to which the layer adds nothing."""
    arguments = random_arguments(9, 96, torch.bfloat16, 3.0)
    x, *results = run(arguments, cpu_backend)
    rows, weight = torch.zeros(9, 32, dtype=torch.bfloat16), torch.zeros(96, 32, dtype=torch.bfloat16)
    for found, wanted in zip(results, ops.residual_linear(x, rows, weight, None, arguments["scale"]), strict=True):
        assert found.equal(wanted)


def test_a_row_of_no_content_is_not_a_number(backend: torch.device, on_cuda_kernels: bool) -> None:
    arguments = random_arguments(3, 64, torch.bfloat16)
    expected = run(arguments, backend)
    arguments["content_ids"][1] = 11
    if not on_cuda_kernels:
        with pytest.raises(RuntimeError, match=r"content_ids\[1\] = 11 must be in \[0, 11\)"):
            run(arguments, backend)
        return
    for found, wanted in zip(run(arguments, backend), expected, strict=True):
        assert found[1].isnan().all()
        assert found[::2].equal(wanted[::2])


MISTAKES: dict[str, Callable[[Tensor, Tensor, Tensor], Results]] = {
    "unscaled": lambda x, scaled, statistics: (x, x.to(scaled.dtype), statistics),
    "the next columns' statistics": lambda x, scaled, statistics: (x, scaled, statistics.roll(1, 1)),
    "variance for squares": lambda x, scaled, statistics: (x, scaled, statistics * torch.tensor([1.0, 1 / 32])),
    "a rounded stream": lambda x, scaled, statistics: (x.bfloat16().float(), scaled, statistics),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_the_rule_rejects(name: str) -> None:
    arguments = random_arguments(7, 96, torch.bfloat16)
    results = reference.embed_scaled_rows(**arguments)
    assert_right(results, results[0], arguments["scale"])
    with pytest.raises(AssertionError):
        assert_right(MISTAKES[name](*results), results[0], arguments["scale"])


def _columns(arguments: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    return arguments | {name: arguments[name][..., :count] for name in TABLES}


WRONG: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "float32": (
        lambda a: a | {name: a[name].float() for name in TABLES},
        "content must be bfloat16 or float16 where rows are scaled, got float32",
    ),
    "E": (lambda a: _columns(a, 40), "content: E must be a multiple of 32 where rows are scaled, got 40"),
    "no E": (lambda a: _columns(a, 0), "content: E must be a multiple of 32 where rows are scaled, got 0"),
    "scale shape": (lambda a: a | {"scale": a["scale"][:32]}, r"scale must have shape \[E\] = \[64\], got \[32\]"),
    "scale dtype": (lambda a: a | {"scale": a["scale"].float()}, "scale must be bfloat16, got float32"),
    "scale stride": (lambda a: a | {"scale": a["scale"].repeat_interleave(2)[::2]}, "scale must be contiguous"),
    "rows": (lambda a: a | {"positions": a["positions"][:2]}, r"positions must have shape \[R\] = \[3\], got \[2\]"),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_name_the_argument(name: str, backend: torch.device) -> None:
    spoil, message = WRONG[name]
    spoiled = {key: clone(t, backend) for key, t in spoil(random_arguments(3, 64, torch.bfloat16)).items()}
    with pytest.raises(RuntimeError, match=message):
        ops.embed_scaled_rows(**spoiled)


@pytest.mark.parametrize("name", TABLES)
def test_an_argument_between_16_bytes(name: str, backend: torch.device, on_cuda_kernels: bool) -> None:
    arguments = {key: t.to(backend) for key, t in random_arguments(3, 64, torch.bfloat16).items()}
    buffer = torch.zeros((*arguments[name].shape[:-1], 72), dtype=torch.bfloat16, device=backend)
    if name in ("weight", "bias", "scale"):
        buffer = buffer[:65]
    shifted = buffer[..., 1:65]
    shifted.copy_(arguments[name])
    if not on_cuda_kernels:
        ops.embed_scaled_rows(**arguments | {name: shifted})
        return
    with pytest.raises(RuntimeError, match=f"{name}: on CUDA every row must begin at a multiple of 16 bytes"):
        ops.embed_scaled_rows(**arguments | {name: shifted})


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: torch.dtype, backend: torch.device) -> None:
    *tables, scale = (t.to(backend) for t in random_arguments(5, 64, dtype).values())
    torch.library.opcheck(ops._ops.embed_scaled_rows.default, (*tables, scale, 1e-6))
