"""Our products of few rows against the library's and the LayerNorms between them, at a model's sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from lpd_ext import products
from lpd_ext.product_choice import remember
from lpd_ext.products import ROW_CLASSES, Product, product_calls, random_weights, step_products
from lpd_tools.bench.cases import Case, Shape
from lpd_tools.bench.result import Result

ROWS = tuple(sorted({4, *ROW_CLASSES, 40, 320, 640, 1280, 2560}))
WEIGHTS = 24  # at least, used in turn, as many as lpd_l has layers


def products_of(shape: Shape, dtype: torch.dtype) -> dict[str, Product]:
    """The products of a shape's decoding steps by the names of their layers."""
    config = shape.config
    return step_products(config.dim, config.mlp_ratio * config.dim, config.vocab_size, dtype)


def product_cases(
    name: str, product: Product, device: torch.device, numbers_of_rows: Sequence[int] = ROWS
) -> Iterator[Case]:
    """Yields the product at each number of rows: one call for each of several weights.

    residual_linear stands against a linear layer and residual_layer_norm; normed_linear against a linear layer and
    GELU, where there is one.
    """
    weights = random_weights(product, device, WEIGHTS if device.type == "cuda" else 1)
    for rows in numbers_of_rows:
        calls = product_calls(product, rows, weights)
        weight, size = calls.weights[0], product.dtype.itemsize
        moved = weight.nbytes + rows * (product.depth + product.features) * size
        if product.kind == "residual":
            moved += 2 * 4 * rows * product.features  # the residual stream, read and written
        yield Case(
            f"{name}, {rows} rows",
            _in_turn(calls.own, calls.weights),
            _in_turn(calls.library, calls.weights),
            1e-9 * moved,
            2e-9 * rows * product.features * product.depth,
            calls=len(calls.weights),
        )


def _in_turn(run: Callable[[Tensor], Any], weights: Sequence[Tensor]) -> Callable[[], Any]:
    following = cycle(weights)
    return lambda: run(next(following))


def keep(product: Product, results: list[Result], device: torch.device) -> None:
    """Writes the times at all of ROWS to where decodes look for them."""
    times = {
        rows: products.Times(result.times.median, result.plain_times.median)
        for rows, result in zip(ROWS, results, strict=True)
    }
    remember(product, times, device)
