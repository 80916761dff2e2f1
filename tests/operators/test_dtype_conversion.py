"""Conversion between fp32 and the 16-bit types, bit for bit as torch's, through operators that do little else."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lpd_ext import ops

DTYPES = [torch.bfloat16, torch.float16]


def every_value(dtype: torch.dtype) -> Tensor:
    """All 65,536 bit patterns."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit, bar the payload of NaN."""
    assert a.dtype == b.dtype
    integer = {2: torch.int16, 4: torch.int32}[a.dtype.itemsize]
    either_nan = a.isnan() | b.isnan()
    return bool(torch.where(either_nan, a.isnan() & b.isnan(), a.view(integer) == b.view(integer)).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 1024])  # rests of a vector, whole vectors
def test_to_fp32(width: int, dtype: torch.dtype, backend: torch.device) -> None:
    """x = -0 plus delta is delta."""
    delta = every_value(dtype).view(-1, width)
    x = torch.full(delta.shape, -0.0, device=backend)
    parameters = torch.ones(width, dtype=dtype, device=backend)
    ops.residual_layer_norm(x, delta.to(backend), parameters, parameters)
    assert same_bits(x.cpu(), delta.float())


def round_through_operator(addend: Tensor, factor: Tensor, bias: Tensor, device: torch.device) -> Tensor:
    """addend * factor + bias in fp32, rounded to the dtype of factor and bias, [16-column windows, E].

    Rows hold +-addend in one window of 16 columns and zeros elsewhere. Mean 0 and, with eps = 1, deviation 1 are then
    exact as long as addend^2 * 16 / E < 2^-25.
    """
    width = len(bias)
    assert addend**2 * 16 / width < 2.0**-25
    row, column = torch.meshgrid(torch.arange(width // 16), torch.arange(width), indexing="ij")
    x = torch.where(column // 16 == row, addend * (1 - 2.0 * (column % 2)), 0.0)
    normed = ops.residual_layer_norm(x.to(device), None, factor.to(device), bias.to(device), 1.0).cpu()
    exact = x.double() * factor.double() + bias.double()
    assert exact.float().double().equal(exact)  # so whatever differs is the last rounding
    assert same_bits(normed, exact.float().to(factor.dtype))
    return normed


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("part", [1.0, 1 - 2.0**-6, 1 + 2.0**-6, 2.0**-6, 1.5])
def test_from_fp32(part: float, dtype: torch.dtype, backend: torch.device) -> None:
    """Rounding of values a half (a tie), and just under and over it, above and below 16-bit values of every binade."""
    values = every_value(dtype)
    mantissa_bits, smallest_exponent = (7, -133) if dtype == torch.bfloat16 else (10, -24)
    magnitude = values.view(torch.int16) & 0x7FFF
    binade = ((magnitude >> mantissa_bits) - 1).clamp(min=0)
    factor = torch.exp2(binade.double() + smallest_exponent + 9)  # 2^9 ulp; bfloat16 has none for its largest binades
    low_bits = magnitude & 0x7F
    interesting = (low_bits < 2) | (low_bits > 0x7D) | (magnitude < 70)
    (chosen,) = (interesting & values.isfinite() & (factor <= torch.finfo(dtype).max)).nonzero(as_tuple=True)
    chosen = chosen[torch.randperm(len(chosen), generator=torch.Generator().manual_seed(1))][:1792]
    # addend * factor = part of half an ulp
    normed = round_through_operator(2.0**-10 * part, factor[chosen].to(dtype), values[chosen], backend)
    assert not same_bits(normed, values[chosen].expand_as(normed))


def test_fp16_overflow(backend: torch.device) -> None:
    """65,519.99 rounds down to 65,504, the largest; 65,520 is the tie that rounds to infinity."""
    bias = torch.full((4096,), 65504.0, dtype=torch.float16)
    bias[1::2] = -65504.0
    factor = torch.full((4096,), 2.0**14, dtype=torch.float16)
    window = torch.arange(16)
    signs = 1 - 2.0 * (window % 2)
    for addend, expected in [(16 - 2.0**-7, 65504.0), (16.0, math.inf), (16 + 2.0**-7, math.inf), (15.0, 65504.0)]:
        normed = round_through_operator(addend * 2.0**-14, factor, bias, backend)
        assert normed[0, :16].float().equal(expected * signs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinity_and_nan(dtype: torch.dtype, backend: torch.device) -> None:
    """Through the bias, of rows that are constant."""
    bias = torch.ones(21, dtype=dtype)
    bias[[0, 5, 20]] = torch.tensor([math.inf, -math.inf, math.nan], dtype=dtype)
    normed = ops.residual_layer_norm(
        torch.zeros(3, 21, device=backend), None, torch.ones(21, dtype=dtype, device=backend), bias.to(backend)
    )
    assert same_bits(normed.cpu(), bias.expand(3, 21))


def test_bf16_overflow(backend: torch.device) -> None:
    """x = [1, -1] is about its own norm; the largest bf16 plus a little over half its ulp rounds to infinity."""
    largest = torch.finfo(torch.bfloat16).max
    bias = torch.tensor([largest, -largest], dtype=torch.bfloat16, device=backend)
    x = torch.tensor([[1.0, -1.0]], device=backend)
    for half_ulps, expected in [(1.01, math.inf), (0.98, largest)]:
        factor = torch.full((2,), half_ulps * 2.0**119, dtype=torch.bfloat16, device=backend)
        normed = ops.residual_layer_norm(x, None, factor, bias, 1e-12)
        assert normed.tolist() == [[expected, -expected]]
