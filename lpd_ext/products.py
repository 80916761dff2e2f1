"""Linear layers of a decoding step as products of few rows: how they are called, and how long they take on a GPU.

What a layer is compared with is what it stands in for: `residual` for the library's product and the LayerNorm after it,
`normed` for the product alone, `normed_gelu` for the product and GELU.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lpd_ext import ops
from lpd_ext.cuda_graphs import Run, capture_cuda_graphs

# Of a step. Rows in between take as long as the next of these: few_row_product.h has tiles of 16 to 80 rows, and takes
# as few as can be. With more than the last the tiles of the GPU's library are full.
ROW_CLASSES = (16, 32, 48, 64, 80, 96, 128, 160, 192)
_REPLAYS = 7
_MOST_WEIGHTS = 256  # of small layers, which a cache may hold then
FOLLOWING = (("proj", "fc1"), ("fc2", "qkv"), ("fc2", "head"))  # layers with a LayerNorm between them
Kind = Literal["residual", "normed", "normed_gelu"]


@dataclass(frozen=True)
class Product:
    """A linear layer [N, K] of 16 bits, and what it does beside multiplying."""

    kind: Kind
    features: int  # N
    depth: int  # K
    dtype: torch.dtype

    @property
    def name(self) -> str:
        """The key in a table, such as "normed 3072x1024 bfloat16"."""
        return f"{self.kind} {self.features}x{self.depth} {str(self.dtype).removeprefix('torch.')}"


def step_products(width: int, hidden: int, vocab_size: int, dtype: torch.dtype) -> dict[str, Product]:
    """The products of a decoding step by the names of their layers."""
    return {
        "qkv": Product("normed", 3 * width, width, dtype),
        "proj": Product("residual", width, width, dtype),
        "fc1": Product("normed_gelu", hidden, width, dtype),
        "fc2": Product("residual", width, hidden, dtype),
        "head": Product("normed", vocab_size, width, dtype),
    }


Pair = tuple[Product, Product]  # one that adds to the residual stream, and the one after the next LayerNorm


def step_pairs(layers: Mapping[str, Product]) -> dict[str, Pair]:
    """The pairs of a decoding step by the name of the second layer."""
    return {second: (layers[first], layers[second]) for first, second in FOLLOWING}


@dataclass(frozen=True)
class Times:
    """Seconds of one call."""

    own: float
    library: float


@dataclass(frozen=True)
class ProductCalls:
    """A product of random operands by either way, for each of several weights: no cache holds all of them."""

    weights: Sequence[Tensor]
    own: Callable[[Tensor], object]
    library: Callable[[Tensor], object]


def random_weights(product: Product, device: torch.device, least: int = 1) -> list[Tensor]:
    """Makes weights of a product: at least so many, on a GPU at best twice as large together as its L2 cache."""
    features, depth, count = product.features, product.depth, least
    if device.type == "cuda":
        cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        wanted = -(-2 * cache_bytes // (features * depth * product.dtype.itemsize))
        count = max(count, min(wanted, _MOST_WEIGHTS))
    normal = _normal(device, 1)
    return [(normal(features, depth) / depth**0.5).to(product.dtype) for _ in range(count)]


def _normal(device: torch.device, seed: int) -> Callable[..., Tensor]:
    """Draws tensors of the shape it is called with; the caller's random numbers stay as they are."""
    generator = torch.Generator(device).manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=generator, device=device)


def product_calls(product: Product, rows: int, weights: Sequence[Tensor]) -> ProductCalls:
    """Makes the other operands of a product of so many rows; both ways compute the same."""
    dtype, features, depth, device = product.dtype, product.features, product.depth, weights[0].device
    normal = _normal(device, 0)
    bias, inputs = normal(features).to(dtype), normal(rows, depth).to(dtype)
    if product.kind == "residual":
        # Small, so that the residual stream stays finite however often they are added.
        inputs, bias, x = inputs * 1e-3, bias * 1e-3, normal(rows, features)
        gamma, beta = (normal(features) * 1e-3 for _ in range(2))
        gamma, beta = gamma.to(dtype), beta.to(dtype)
        return ProductCalls(
            weights,
            lambda weight: ops.residual_linear(x, inputs, weight, bias, gamma),
            lambda weight: ops.residual_layer_norm(x, F.linear(inputs, weight, bias), gamma, beta),
        )
    # Of rows that are normalised already.
    statistics_of_rows = torch.tensor([0.0, 32.0], device=device).repeat(rows, depth // 32, 1)
    slope, shift, gelu = normal(features), bias.float(), product.kind == "normed_gelu"

    def library(weight: Tensor) -> Tensor:
        y = F.linear(inputs, weight, bias)
        return F.gelu(y) if gelu else y

    return ProductCalls(
        weights,
        lambda weight: ops.normed_linear(inputs, statistics_of_rows, weight, slope, shift, 1e-6, gelu),
        library,
    )


def measure(product: Product, device: torch.device, end: float = inf) -> dict[int, Times]:
    """Times a product at every class of rows on a GPU; TimeoutError if that is not begun by time.monotonic() == end."""
    found, weights = {}, random_weights(product, device)
    for rows in ROW_CLASSES:
        if time.monotonic() > end:
            raise TimeoutError("it takes too long")
        calls = product_calls(product, rows, weights)
        own, library = time_runs([_each(calls.own, calls.weights), _each(calls.library, calls.weights)])
        found[rows] = Times(own / len(calls.weights), library / len(calls.weights))
    return found


def _each(call: Callable[[Tensor], object], weights: Sequence[Tensor]) -> Run:
    def run() -> None:
        for weight in weights:
            call(weight)

    return run


def time_runs(runs: Sequence[Run]) -> list[float]:
    """Returns the median seconds of each run as a CUDA graph on the current device, replayed in turn."""
    replays = capture_cuda_graphs(runs)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    seconds: list[list[float]] = [[] for _ in runs]
    for repeat in range(_REPLAYS + 1):
        for replay, record in zip(replays, seconds, strict=True):
            begin.record()
            replay()
            end.record()
            end.synchronize()
            if repeat > 0:  # the first one warms up
                record.append(1e-3 * begin.elapsed_time(end))
    return [statistics.median(record) for record in seconds]
