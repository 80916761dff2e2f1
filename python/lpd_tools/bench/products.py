"""Our products of few rows against the library's and the LayerNorms between them, at a model's sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import cycle
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lpd_ext import ops
from lpd_tools.bench.cases import Case, Shape

ROWS = (4, 16, 40, 80, 160, 320)
_CACHE_BYTES = 128 << 20  # weights of so many bytes are used in turn, so that none is found in a cache


def product_cases(shape: Shape, device: torch.device, dtype: torch.dtype, rows: int) -> Iterator[Case]:
    """Yields qkv, proj, fc1, fc2 and head of a decoding step of so many rows.

    residual_linear stands against a linear layer and residual_layer_norm; normed_linear against a linear layer and
    GELU, where there is one.
    """
    config = shape.config
    width, hidden = config.dim, config.mlp_ratio * config.dim
    yield from (
        _normed("qkv", rows, 3 * width, width, False, device, dtype),
        _residual("proj", rows, width, width, device, dtype),
        _normed("fc1", rows, hidden, width, True, device, dtype),
        _residual("fc2", rows, width, hidden, device, dtype),
        _normed("head", rows, config.vocab_size, width, False, device, dtype),
    )


def _random(*shape: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, device=device).to(dtype)


def _weights(features: int, depth: int, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    on_cuda = device.type == "cuda"
    copies = max(_CACHE_BYTES // (features * depth * dtype.itemsize), 2) if on_cuda else 1
    return [_random(features, depth, device=device, dtype=dtype) / depth**0.5 for _ in range(copies)]


def _in_turn(run: Callable[[Tensor], Any], weights: list[Tensor]) -> Callable[[], Any]:
    following = cycle(weights)
    return lambda: run(next(following))


def _gigabytes(*tensors: Tensor) -> float:
    return sum(tensor.nbytes for tensor in tensors) * 1e-9


def _normed(
    name: str, rows: int, features: int, depth: int, gelu: bool, device: torch.device, dtype: torch.dtype
) -> Case:
    weights = _weights(features, depth, device, dtype)
    scaled, bias = _random(rows, depth, device=device, dtype=dtype), _random(features, device=device, dtype=dtype)
    # Of rows that are normalised already, so that both have the same results.
    statistics = torch.stack([torch.zeros(rows, depth // 32), torch.full((rows, depth // 32), 32.0)], 2).to(device)
    slope, shift = torch.randn(features, device=device), bias.float()

    def ours(weight: Tensor) -> Tensor:
        return ops.normed_linear(scaled, statistics, weight, slope, shift, 1e-6, gelu)

    def library(weight: Tensor) -> Tensor:
        y = F.linear(scaled, weight, bias)
        return F.gelu(y) if gelu else y

    moved = _gigabytes(weights[0], scaled, statistics) + 1e-9 * rows * features * dtype.itemsize
    flops = 2e-9 * rows * features * depth
    return Case(f"{name}, {rows} rows", _in_turn(ours, weights), _in_turn(library, weights), moved, flops)


def _residual(name: str, rows: int, features: int, depth: int, device: torch.device, dtype: torch.dtype) -> Case:
    weights = _weights(features, depth, device, dtype)
    inputs, x = _random(rows, depth, device=device, dtype=dtype), torch.randn(rows, features, device=device)
    # So small that the residual stream stays finite however often they are added.
    inputs *= 1e-3
    bias, gamma, beta = 1e-3 * _random(3, features, device=device, dtype=dtype)

    def ours(weight: Tensor) -> tuple[Tensor, Tensor]:
        return ops.residual_linear(x, inputs, weight, bias, gamma)

    def library(weight: Tensor) -> Tensor:
        return ops.residual_layer_norm(x, F.linear(inputs, weight, bias), gamma, beta)

    moved = _gigabytes(weights[0], inputs, x, x) + 1e-9 * rows * features * dtype.itemsize
    flops = 2e-9 * rows * features * depth
    return Case(f"{name}, {rows} rows", _in_turn(ours, weights), _in_turn(library, weights), moved, flops)
