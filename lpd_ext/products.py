"""Linear layers of a decoding step as products of few rows: how they are called, and how long they take on a GPU.

What a layer is compared with is what it stands in for: `residual` for the library's product and the LayerNorm after it,
`normed` for the product alone, `normed_gelu` for the product and GELU.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
_ROUNDING = 0.03  # of the largest result; of bfloat16 a hundredth
Kind = Literal["residual", "normed", "normed_gelu"]


@dataclass(frozen=True)
class Product:
    """A linear layer [N, K] of 16 bits, and what it does beside multiplying."""

    kind: Kind
    features: int  # N
    depth: int  # K
    dtype: torch.dtype

    @classmethod
    def of(cls, kind: Kind, weight: Tensor) -> Product:
        """Returns the product of a layer with this weight [N, K]."""
        features, depth = weight.shape
        return cls(kind, features, depth, weight.dtype)

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


@dataclass(frozen=True)
class Times:
    """Seconds of one call."""

    own: float
    library: float


@dataclass(frozen=True)
class ProductCalls:
    """A product of random operands by either way, for each of several weights: no cache holds all of them."""

    weights: list[Tensor]
    own: Callable[[Tensor], object]
    library: Callable[[Tensor], object]
    added_to: Tensor | None = None  # the residual stream


def product_calls(product: Product, rows: int, device: torch.device, least_weights: int = 1) -> ProductCalls:
    """Makes the operands of a product of so many rows; both ways compute the same.

    On a GPU its weights are so many that together they are twice as large as its L2 cache, and at least least_weights.
    """
    dtype, features, depth = product.dtype, product.features, product.depth
    generator = torch.Generator(device).manual_seed(0)  # the caller's numbers stay as they are

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    count = least_weights
    if device.type == "cuda":
        cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        count = max(count, -(-2 * cache_bytes // (features * depth * dtype.itemsize)))
    weights = [(normal(features, depth) / depth**0.5).to(dtype) for _ in range(count)]
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
            x,
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


def checked_calls(product: Product, rows: int, device: torch.device) -> ProductCalls:
    """Makes operands as `product_calls` does; RuntimeError if our own product computes anything else on this device."""
    calls = product_calls(product, rows, device)
    if not _agree(calls):  # kernels are new on a GPU that nobody has tried
        raise RuntimeError(f"{product.name} of {rows} rows is not what the library computes")
    return calls


def measure(product: Product, device: torch.device) -> dict[int, Times]:
    """Times a product at every class of rows on a GPU; errors as those of `checked_calls`."""
    found = {}
    for rows in ROW_CLASSES:
        calls = checked_calls(product, rows, device)
        own, library = time_runs([_each(calls.own, calls.weights), _each(calls.library, calls.weights)])
        found[rows] = Times(own / len(calls.weights), library / len(calls.weights))
    return found


def _agree(calls: ProductCalls) -> bool:
    """Whether both ways compute the same, but for rounding."""
    weight, x = calls.weights[0], calls.added_to
    if x is None:
        return _is_near(calls.own(weight), calls.library(weight))
    before = x.clone()
    calls.own(weight)
    own = x - before
    x.copy_(before)
    calls.library(weight)
    return _is_near(own, x - before)


def _is_near(own: object, library: object) -> bool:
    assert isinstance(own, Tensor)
    assert isinstance(library, Tensor)
    difference, largest = (own - library).abs().max(), library.abs().max()
    return bool(difference <= _ROUNDING * largest)  # false for NaN


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
