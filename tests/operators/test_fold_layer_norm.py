"""fold_layer_norm: two matrix-vector products in float32 of weights in 16 bits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from few_rows import DTYPES
from steps import clone
from torch import Tensor

from lpd_ext import ops, reference

EPS = torch.finfo(torch.float32).eps
Arguments = tuple[Tensor, Tensor, Tensor, Tensor]


def random_arguments(features: int, depth: int, dtype: torch.dtype) -> Arguments:
    generator = torch.Generator().manual_seed(features + depth)
    shapes = (features, depth), (depth,), (depth,), (features,)
    weight, gamma, beta, bias = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return weight, gamma, beta, bias


def assert_right(results: tuple[Tensor, Tensor], args: Arguments) -> None:
    """Every sum within the rounding of a float32 sum of products of that size."""
    weight, gamma, beta, bias = (t.double() for t in args)
    exact = reference.fold_layer_norm(weight, gamma, beta, bias)
    for found, wanted, factor in zip(results, exact, (gamma, beta), strict=True):
        assert found.dtype == torch.float32
        size = weight.abs() @ factor.abs() + bias.abs()
        assert ((found.double() - wanted).abs() <= 8 * EPS * size).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("features", "depth"), [(0, 32), (1, 32), (7, 96), (8, 256), (129, 1344)])
def test_sums_are_those_of_float32(features: int, depth: int, dtype: torch.dtype, backend: torch.device) -> None:
    args = random_arguments(features, depth, dtype)
    weight, gamma, beta, bias = (t.to(backend) for t in args)
    slope, shift = ops.fold_layer_norm(weight, gamma, beta, bias)
    assert_right((slope.cpu(), shift.cpu()), args)
    unbiased = ops.fold_layer_norm(weight, gamma, beta, None)
    assert_right((unbiased[0].cpu(), unbiased[1].cpu()), (*args[:3], torch.zeros_like(args[3])))


def test_strided_weights(backend: torch.device) -> None:
    weight, gamma, beta, bias = (t.to(backend) for t in random_arguments(7, 64, torch.bfloat16))
    buffer = torch.full((7, 128), 3.0, dtype=weight.dtype, device=backend)
    buffer[:, 32:96] = weight
    expected = ops.fold_layer_norm(weight, gamma, beta, bias)
    found = ops.fold_layer_norm(buffer[:, 32:96], gamma, beta, bias)
    assert all(a.equal(b) for a, b in zip(found, expected, strict=True))


MISTAKES: dict[str, Callable[[Arguments], tuple[Tensor, Tensor]]] = {
    "rounded to bfloat16": lambda a: (
        reference.fold_layer_norm(*a)[0].bfloat16().float(),
        reference.fold_layer_norm(*a)[1],
    ),
    "bias left out": lambda a: reference.fold_layer_norm(*a[:3], None),
    "gamma for beta": lambda a: reference.fold_layer_norm(a[0], a[2], a[1], a[3]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_the_rule_rejects(name: str) -> None:
    args = random_arguments(40, 96, torch.bfloat16)
    with pytest.raises(AssertionError):
        assert_right(MISTAKES[name](args), args)


WRONG: dict[str, tuple[Callable[[Arguments], tuple[Tensor, ...]], str]] = {
    "weight dtype": (lambda a: (a[0].float(), *a[1:]), "weight must be bfloat16 or float16, got float32"),
    "K": (lambda a: (a[0][:, :40], a[1][:40], a[2][:40], a[3]), "weight: K must be a multiple of 32, got 40"),
    "gamma shape": (lambda a: (a[0], a[1][:32], *a[2:]), r"gamma must have shape \[K\] = \[64\], got \[32\]"),
    "beta dtype": (lambda a: (*a[:2], a[2].half(), a[3]), "beta must be bfloat16, got float16"),
    "bias shape": (lambda a: (*a[:3], a[3][:2]), r"bias must have shape \[N\] = \[7\], got \[2\]"),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_name_the_argument(name: str, backend: torch.device) -> None:
    spoil, message = WRONG[name]
    with pytest.raises(RuntimeError, match=message):
        ops.fold_layer_norm(*(clone(t, backend) for t in spoil(random_arguments(7, 64, torch.bfloat16))))


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: torch.dtype, backend: torch.device) -> None:
    weight, gamma, beta, bias = (t.to(backend) for t in random_arguments(7, 64, dtype))
    for given in (bias, None):
        torch.library.opcheck(ops._ops.fold_layer_norm.default, (weight, gamma, beta, given))
