"""conv3x3 against interpolation, GroupNorm's application, swish and convolution in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lpd_ext import ops, reference


@dataclass(frozen=True)
class Case:
    """Sizes of the input; which of the operator's options are on."""

    batch: int
    height: int
    width: int
    channels: int
    out_channels: int
    norm: bool = False
    upsample: bool = False
    accumulate: bool = False

    def arguments(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
        generator = torch.Generator().manual_seed(hash(self) % 2**31)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(dtype)

        scale = 2 if self.upsample else 1
        return (
            normal(self.batch, self.height, self.width, self.channels),
            normal(3, 3, self.channels, self.out_channels) / (9 * self.channels) ** 0.5,
            normal(self.out_channels),
            normal(self.batch, 2, self.channels) + 1 if self.norm else None,
            normal(self.batch, self.height * scale, self.width * scale, self.out_channels),
        )

    def run(self, bfloat16: bool = False) -> Tensor:
        x, weight, bias, scale_shift, out = self.arguments()
        ops.conv3x3(x, weight, bias, scale_shift, out, self.upsample, self.accumulate, bfloat16)
        return out


Function = Callable[[Case, Tensor, Tensor, Tensor, "Tensor | None", Tensor], Tensor]


def exact(case: Case) -> Tensor:
    x, weight, bias, scale_shift, out = (None if t is None else t.double() for t in case.arguments())
    reference.conv3x3(x, weight, bias, scale_shift, out, case.upsample, case.accumulate)
    return out


def relative_error(result: Tensor, expected: Tensor) -> float:
    assert result.shape == expected.shape
    return float((result - expected).square().mean().sqrt() / expected.square().mean().sqrt())


def assert_accurate(case: Case, result: Tensor) -> None:
    """Winograd's transforms cost digits, so torch's direct convolution is no measure: 1e-6 was found, 2e-6 may be."""
    assert relative_error(result, exact(case)) <= 2e-6


CASES = [
    Case(1, 16, 16, 32, 32),
    Case(1, 1, 1, 16, 3, norm=True),
    Case(2, 5, 7, 32, 40, norm=True, accumulate=True),
    Case(5, 3, 2, 48, 33, accumulate=True),
    Case(3, 8, 12, 64, 64, upsample=True),
    Case(1, 7, 9, 16, 129, norm=True, upsample=True, accumulate=True),
    Case(2, 3, 129, 32, 7),  # several blocks side by side
    Case(1, 70, 66, 16, 96, norm=True),  # several blocks down, the last one not full
    Case(9, 4, 68, 16, 32, accumulate=True),  # blocks of several images
    Case(1, 4, 4, 256, 100),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("threads", [1, 2, 5])  # blocks are shared out, or split by output channels
def test_accurate(case: Case, threads: int, cpu_backend: torch.device) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert_accurate(case, case.run())
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bfloat16_products(case: Case, cpu_backend: torch.device) -> None:
    case = replace(case, accumulate=False)
    error = relative_error(case.run(bfloat16=True), exact(case))
    assert 1e-4 <= error <= 1.5e-2


def test_bfloat16_is_the_same_with_and_without_instructions() -> None:
    """Only the rounding of sums may differ."""
    results = []
    for isa in ops._C.available_cpu_isas():
        before = ops._C.cpu_isa()
        ops._C.set_cpu_isa(isa)
        results.append(Case(1, 9, 9, 64, 32).run(bfloat16=True))
        ops._C.set_cpu_isa(before)
    for result in results[1:]:
        assert relative_error(result, results[0].double()) <= 2e-4


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (6, 3)])
def test_upsampling_is_interpolation_before_padding(size: tuple[int, int], cpu_backend: torch.device) -> None:
    case = Case(2, *size, 32, 32, upsample=True)
    x, weight, bias, _, _ = case.arguments(torch.float64)
    doubled = F.interpolate(x.permute(0, 3, 1, 2), scale_factor=2.0, mode="nearest")
    expected = F.conv2d(doubled, weight.permute(3, 2, 0, 1), bias, padding=1).permute(0, 2, 3, 1)
    assert relative_error(case.run(), expected) <= 2e-6


def test_batch_does_not_matter(cpu_backend: torch.device) -> None:
    case = Case(5, 6, 7, 32, 40, norm=True)
    x, weight, bias, scale_shift, out = case.arguments()
    assert scale_shift is not None
    alone = out[3:4].clone()
    ops.conv3x3(x, weight, bias, scale_shift, out)
    ops.conv3x3(x[3:4], weight, bias, scale_shift[3:4], alone)
    assert alone.equal(out[3:4])


def test_nothing_else_is_written(cpu_backend: torch.device) -> None:
    case = Case(1, 5, 6, 16, 35)
    x, weight, bias, _, out = case.arguments()
    buffer = torch.full((out.numel() + 200,), 77.0)
    inside = buffer[100:-100].view_as(out)
    ops.conv3x3(x, weight, bias, None, inside)
    assert_accurate(case, inside)
    assert buffer[:100].eq(77).all()
    assert buffer[-100:].eq(77).all()


def test_empty_batch(cpu_backend: torch.device) -> None:
    assert Case(0, 4, 4, 16, 8, norm=True).run().shape == (0, 4, 4, 8)


def test_large_values_do_not_overflow_swish(cpu_backend: torch.device) -> None:
    x, weight, bias, _, out = Case(1, 4, 4, 16, 8).arguments()
    scale_shift = torch.tensor([1e3, 0.0]).view(1, 2, 1).repeat(1, 1, 16)
    expected = out.double()
    ops.conv3x3(x, weight, bias, scale_shift, out)
    reference.conv3x3(x.double(), weight.double(), bias.double(), scale_shift.double(), expected)
    assert relative_error(out, expected) <= 2e-6


def twin(case: Case, mistake: str) -> Tensor:
    """The result with a mistake in it, in float64."""
    x, weight, bias, scale_shift, out = (None if t is None else t.double() for t in case.arguments())
    right = exact(case)
    if mistake == "padded before swish":
        scale, shift = scale_shift[:, :, None, None].unbind(1)
        padded = F.pad(x, (0, 0, 1, 1, 1, 1)) * scale + shift
        result = F.conv2d(F.silu(padded).permute(0, 3, 1, 2), weight.permute(3, 2, 0, 1), bias).permute(0, 2, 3, 1)
        return out + result
    if mistake == "kernel transposed":
        weight = weight.transpose(0, 1)
    elif mistake == "kernel turned round":
        weight = weight.flip(0, 1)
    elif mistake == "scale and shift swapped":
        scale_shift = scale_shift.flip(1)
    elif mistake == "no swish":
        scale, shift = scale_shift[:, :, None, None].unbind(1)
        x, scale_shift = x * scale + shift, None
    elif mistake == "first image's statistics":
        scale_shift = scale_shift[:1].expand_as(scale_shift)
    elif mistake == "bias left out":
        bias = torch.zeros_like(bias)
    elif mistake == "not added":
        return right - out
    elif mistake == "pixels in bfloat16":
        x = x.bfloat16().double()
    elif mistake == "one pixel wrong":
        right[0, -1, -1, -1] += 1e-3
        return right
    reference.conv3x3(x, weight, bias, scale_shift, out, case.upsample, case.accumulate)
    return out


MISTAKES = [
    "padded before swish",
    "kernel transposed",
    "kernel turned round",
    "scale and shift swapped",
    "no swish",
    "first image's statistics",
    "bias left out",
    "not added",
    "pixels in bfloat16",
    "one pixel wrong",
]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_rule_rejects(mistake: str) -> None:
    case = Case(2, 5, 7, 32, 40, norm=True, accumulate=True)
    assert_accurate(case, exact(case))
    with pytest.raises(AssertionError):
        assert_accurate(case, twin(case, mistake))


WRONG: dict[str, tuple[dict[str, Callable[[Tensor], Tensor]], str]] = {
    "x dtype": ({"x": lambda t: t.bfloat16()}, "x must be float32, got bfloat16"),
    "x shape": ({"x": lambda t: t[0]}, r"x must have shape \[B, H, W, C\]"),
    "x stride": ({"x": lambda t: t.transpose(1, 2)}, "x must be contiguous"),
    "channels": ({"x": lambda t: t[..., :24].contiguous()}, "x: C must be a multiple of 16, got 24"),
    "weight shape": ({"weight": lambda t: t[:2]}, r"weight must have shape \[3, 3, C, K\] = \[3, 3, 32, 40\]"),
    "weight stride": ({"weight": lambda t: t.transpose(0, 1)}, "weight must be contiguous"),
    "bias dtype": ({"bias": lambda t: t.half()}, "bias must be float32, got float16"),
    "scale_shift shape": ({"scale_shift": lambda t: t[:1]}, r"scale_shift must have shape \[B, 2, C\] = \[2, 2, 32\]"),
    "out shape": ({"out": lambda t: t[:, 1:].contiguous()}, r"out must have shape \[B, H, W, K\] = \[2, 5, 7, 40\]"),
    "out stride": ({"out": lambda t: t.repeat(1, 1, 1, 2)[..., ::2]}, "out must be contiguous"),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_name_the_argument_and_write_nothing(name: str) -> None:
    spoil, message = WRONG[name]
    names = ("x", "weight", "bias", "scale_shift", "out")
    values = dict(zip(names, Case(2, 5, 7, 32, 40, norm=True).arguments(), strict=True))
    values = {key: spoil.get(key, lambda t: t)(value) for key, value in values.items()}
    before = values["out"].clone()
    with pytest.raises(RuntimeError, match=message):
        ops.conv3x3(**values)
    assert values["out"].equal(before)


def test_out_must_not_be_the_input() -> None:
    x, weight, bias, _, _ = Case(1, 4, 4, 16, 16).arguments()
    with pytest.raises(RuntimeError, match="out is written, so it must not share memory with x"):
        ops.conv3x3(x, weight, bias, None, x)


def test_upsampling_needs_a_doubled_result() -> None:
    x, weight, bias, _, out = Case(1, 4, 5, 16, 16).arguments()
    with pytest.raises(RuntimeError, match=r"out must have shape \[B, 2 H, 2 W, K\] = \[1, 8, 10, 16\]"):
        ops.conv3x3(x, weight, bias, None, out, upsample=True)


@pytest.mark.parametrize("norm", [False, True])
def test_opcheck(norm: bool, cpu_backend: torch.device) -> None:
    torch.library.opcheck(ops._ops.conv3x3.default, (*Case(1, 4, 5, 16, 8, norm).arguments(), False, True, False))


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")  # of inductor's own imports
def test_compiles_without_a_graph_break() -> None:
    case = Case(2, 5, 7, 32, 40, norm=True, accumulate=True)
    x, weight, bias, scale_shift, out = case.arguments()
    torch.compile(ops.conv3x3, fullgraph=True)(x, weight, bias, scale_shift, out, accumulate=True)
    assert out.equal(case.run())
