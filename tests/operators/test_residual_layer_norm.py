"""residual_layer_norm: x += delta bit for bit, and LayerNorm as accurate as torch's, against float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from steps import clone
from torch import Tensor

from lpd_ext import ops, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
Arguments = tuple[Tensor, Tensor | None, Tensor, Tensor, float]


def random_arguments(rows: int, width: int, dtype: torch.dtype, offset: float = 0.0, eps: float = 1e-6) -> Arguments:
    generator = torch.Generator().manual_seed(rows + width)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    x = offset + 2 * normal(rows, width)
    return x, normal(rows, width).to(dtype), (1 + normal(width) / 2).to(dtype), normal(width).to(dtype), eps


def assert_as_accurate(normed: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> None:
    """Error against float64 at most twice that of torch's layer_norm of the same fp32 rows, plus a floor."""
    exact = reference.residual_layer_norm(x.double(), None, weight.double(), bias.double(), eps)
    torchs = reference.residual_layer_norm(x, None, weight, bias, eps)
    assert normed.dtype == torchs.dtype == weight.dtype
    assert normed.shape == x.shape
    if normed.numel() > 0:
        floor = 4 * torch.finfo(torch.float32).eps * (1 + exact.abs().max())
        assert (normed.double() - exact).abs().max() <= 2 * (torchs.double() - exact).abs().max() + floor


def run(args: Arguments, device: torch.device) -> tuple[Tensor, Tensor]:
    """The result and x afterwards; the arguments stay as they are."""
    x, delta, weight, bias, eps = args
    x = x.clone().to(device)
    normed = ops.residual_layer_norm(
        x, None if delta is None else delta.to(device), weight.to(device), bias.to(device), eps
    )
    return normed.cpu(), x.cpu()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 7, 8, 96, 129, 1024])
@pytest.mark.parametrize("rows", [0, 1, 7])
def test_adds_exactly_and_normalises_accurately(
    rows: int, width: int, dtype: torch.dtype, backend: torch.device
) -> None:
    args = random_arguments(rows, width, dtype)
    x, delta, weight, bias, eps = args
    assert delta is not None
    normed, after = run(args, backend)
    assert after.equal(x + delta.float())
    assert_as_accurate(normed, after, weight, bias, eps)

    normed, after = run((x, None, weight, bias, eps), backend)
    assert after.equal(x)
    assert_as_accurate(normed, x, weight, bias, eps)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [-3e2, 1e4])
def test_mean_much_larger_than_deviation(offset: float, dtype: torch.dtype, backend: torch.device) -> None:
    """One pass over sums of squares would lose all digits here."""
    for width in (96, 1024):
        args = random_arguments(5, width, dtype, offset)
        normed, after = run(args, backend)
        assert_as_accurate(normed, after, *args[2:])


@pytest.mark.parametrize("eps", [1e-12, 0.3, 50.0])
def test_eps(eps: float, backend: torch.device) -> None:
    args = random_arguments(5, 129, torch.float32, eps=eps)
    normed, after = run(args, backend)
    assert_as_accurate(normed, after, *args[2:])


def test_constant_rows_give_the_bias(backend: torch.device) -> None:
    _, _, weight, bias, eps = random_arguments(1, 96, torch.float32)
    normed, _ = run((torch.full((2, 96), 4.25), None, weight, bias, eps), backend)
    assert normed.equal(bias.expand(2, 96))


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_rows(dtype: torch.dtype, backend: torch.device) -> None:
    """Rows of larger buffers: same bits as contiguous ones, and nothing around them is touched."""
    args = random_arguments(7, 129, dtype)
    x, delta, weight, bias, eps = args
    assert delta is not None
    expected, expected_x = run(args, backend)
    buffer = torch.full((14, 140), 77.0, device=backend)
    deltas = torch.full((21, 131), 55.0, dtype=dtype, device=backend)
    buffer[::2, 3:132], deltas[::3, 1:130] = x.to(backend), delta.to(backend)
    normed = ops.residual_layer_norm(buffer[::2, 3:132], deltas[::3, 1:130], weight.to(backend), bias.to(backend), eps)
    assert normed.is_contiguous()
    assert normed.cpu().equal(expected)
    assert buffer[::2, 3:132].cpu().equal(expected_x)
    buffer[::2, 3:132] = 77.0
    assert buffer.eq(77.0).all()


# On CUDA rows of 16 n aligned elements are moved 16 bytes at a time, which one that is not aligned forbids.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("which", range(4))
def test_one_argument_between_16_bytes(which: int, dtype: torch.dtype, backend: torch.device) -> None:
    args = random_arguments(5, 96, dtype)
    tensors = [argument.to(backend, copy=True) for argument in args[:4]]
    buffer = torch.full((*tensors[which].shape[:-1], 112), 99.0, dtype=tensors[which].dtype, device=backend)
    buffer[..., 1:97] = tensors[which]
    tensors[which] = buffer[..., 1:97]
    normed = ops.residual_layer_norm(*tensors, args[4])
    assert_as_accurate(normed.cpu(), tensors[0].cpu(), *args[2:])


def test_the_widest_row_of_the_cuda_kernel(backend: torch.device) -> None:
    args = random_arguments(2, 6144, torch.bfloat16)
    normed, after = run(args, backend)
    assert_as_accurate(normed, after, *args[2:])


@pytest.mark.parametrize("width", [129, 1024])
def test_the_mean_is_as_good_as_exact(width: int, backend: torch.device) -> None:
    """Deviations from a mean of 2^20 are exact, but the mean itself is rounded to a sixteenth of the deviation."""
    x = 2.0**20 + 2 * torch.randn(5, width, generator=torch.Generator().manual_seed(0))
    args = x, None, torch.ones(width), torch.zeros(width), 1e-6
    normed, _ = run(args, backend)
    exact = reference.residual_layer_norm(x.double(), None, args[2].double(), args[3].double(), args[4])
    assert (normed.double() - exact).abs().max() <= 4 * torch.finfo(torch.float32).eps * exact.abs().max()


def test_rows_and_threads_do_not_matter(backend: torch.device) -> None:
    args = random_arguments(300, 1024, torch.float32)
    expected, _ = run(args, backend)
    x, delta, weight, bias, eps = args
    assert delta is not None
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            assert run(args, backend)[0].equal(expected)
    finally:
        torch.set_num_threads(threads)
    assert run((x[123:124], delta[123:124], weight, bias, eps), backend)[0].equal(expected[123:124])


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_not_a_number_stays_in_its_row(value: float, backend: torch.device) -> None:
    args = random_arguments(3, 129, torch.float32)
    expected, _ = run(args, backend)
    args[0][1, 128] = value
    normed, _ = run(args, backend)
    assert normed[1].isnan().all()
    assert normed[::2].equal(expected[::2])


# Wrong twins: what the rule above must not let through.
MISTAKES: dict[str, Callable[[Tensor, Tensor, Tensor, float], Tensor]] = {
    "variance over E - 1": lambda x, w, b, eps: (
        (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + eps).sqrt() * w + b
    ),
    "eps outside the root": lambda x, w, b, eps: (
        (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0).sqrt() + eps) * w + b
    ),
    "bias left out": lambda x, w, b, eps: reference.residual_layer_norm(x, None, w, torch.zeros_like(b), eps),
    "weight left out": lambda x, w, b, eps: reference.residual_layer_norm(x, None, torch.ones_like(w), b, eps),
    "one-pass variance": lambda x, w, b, eps: (
        (x - x.mean(-1, keepdim=True))
        / ((x * x).mean(-1, keepdim=True) - x.mean(-1, keepdim=True) ** 2 + eps).sqrt()
        * w
        + b
    ),
    "computed in bfloat16": lambda x, w, b, eps: reference.residual_layer_norm(
        x.bfloat16(), None, w.bfloat16(), b.bfloat16(), eps
    ).float(),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_the_rule_rejects(name: str) -> None:
    offset, eps = (300.0, 1e-6) if name == "one-pass variance" else (0.0, 1e-2)
    x, _, weight, bias, _ = random_arguments(7, 1024, torch.float32, offset)
    with pytest.raises(AssertionError):
        assert_as_accurate(MISTAKES[name](x, weight, bias, eps), x, weight, bias, eps)


def example() -> Arguments:
    return random_arguments(4, 24, torch.bfloat16)


WRONG: dict[str, tuple[Callable[[Arguments], tuple[object, ...]], str]] = {
    "x dtype": (lambda a: (a[0].half(), *a[1:]), "x must be float32, got float16"),
    "x shape": (lambda a: (a[0][0], *a[1:]), r"x must have shape \[R, E\] = \[any, any\], got \[24\]"),
    "x columns apart": (
        lambda a: (a[0].repeat(1, 2)[:, ::2], *a[1:]),
        "x must be contiguous in its last dimension, got",
    ),
    "x rows overlap": (lambda a: (a[0][:1].expand(4, -1), *a[1:]), "x is written, so its elements must not overlap"),
    "delta shape": (lambda a: (a[0], a[1][:3], *a[2:]), r"delta must have shape \[R, E\] = \[4, 24\], got \[3, 24\]"),
    "delta dtype": (lambda a: (a[0], a[1].float(), *a[2:]), "delta must be bfloat16, got float32"),
    "delta columns apart": (
        lambda a: (a[0], a[1].repeat(1, 2)[:, ::2], *a[2:]),
        "delta must be contiguous in its last",
    ),
    "weight shape": (lambda a: (*a[:2], a[2][:8], *a[3:]), r"weight must have shape \[E\] = \[24\], got \[8\]"),
    "weight dtype": (
        lambda a: (*a[:2], a[2].double(), *a[3:]),
        "weight must be float32, bfloat16 or float16, got float64",
    ),
    "weight stride": (lambda a: (*a[:2], a[2].repeat_interleave(2)[::2], *a[3:]), "weight must be contiguous"),
    "bias dtype": (lambda a: (*a[:3], a[3].half(), a[4]), "bias must be bfloat16, got float16"),
    "bias shape": (lambda a: (*a[:3], a[3][None], a[4]), r"bias must have shape \[E\] = \[24\], got \[1, 24\]"),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_name_the_argument_and_write_nothing(name: str, backend: torch.device) -> None:
    spoil, message = WRONG[name]
    args = tuple(clone(a, backend) if isinstance(a, Tensor) else a for a in spoil(example()))
    before = args[0].clone()
    with pytest.raises(RuntimeError, match=message):
        ops.residual_layer_norm(*args)
    assert args[0].equal(before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: torch.dtype, backend: torch.device) -> None:
    x, delta, weight, bias, eps = random_arguments(4, 24, dtype)
    for given in (delta, None):
        args = tuple(a if a is None or isinstance(a, float) else a.to(backend) for a in (x, given, weight, bias, eps))
        torch.library.opcheck(ops._ops.residual_layer_norm.default, args)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")  # of inductor's own imports
def test_compiles_without_a_graph_break(backend: torch.device) -> None:
    args = random_arguments(4, 24, torch.float32)
    expected, expected_x = run(args, backend)
    x, *rest = (a.to(backend) if isinstance(a, Tensor) else a for a in args)
    normed = torch.compile(ops.residual_layer_norm, fullgraph=True)(x, *rest)
    assert normed.cpu().equal(expected)
    assert x.cpu().equal(expected_x)
