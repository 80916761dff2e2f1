"""Linear layers for decoding steps of few rows: LayerNorms are folded into the products around them.

Between two layers goes what ops.residual_linear makes of the residual stream, and ops.normed_linear takes. The
environment variable LPD_PRODUCTS says which products a decode uses; product_choice.py decides for `auto`. The library's
are the default as long as no GPU has run our own.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lpd_ext import _C, ops, product_table
from lpd_ext.linear import ResultRows, is_plain, linear_step
from lpd_ext.product_choice import own_rows, row_class
from lpd_ext.products import ROW_CLASSES, Pair, Product

_CHOICES = ("auto", "own", "cublaslt")
_UNUSED = ResultRows(0)  # plain layers write to memory of their own
_SHARED_BYTES = 200 * 1024  # per block: fewer hold no product of four times the width of a large model


def chosen_products() -> str:
    """Reads LPD_PRODUCTS: 'cublaslt', also if unset; 'own', used where possible; 'auto', what is faster on this GPU.

    Raises ValueError for anything else.
    """
    choice = os.environ.get("LPD_PRODUCTS", "cublaslt")
    if choice not in _CHOICES:
        raise ValueError(f"LPD_PRODUCTS must be one of {', '.join(_CHOICES)}, got {choice!r}")
    return choice


def are_wanted(device: torch.device) -> bool:
    """Whether our own products may be used on a device: with `own` on any, with `auto` on GPUs, which can time them."""
    choice = chosen_products()
    return choice == "own" or (choice == "auto" and product_table.card_of(device) is not None)


class NormedLayer:
    """A linear layer of LayerNorm(x), or GELU of it, with the slope and shift that it was last told to keep.

    Weights are looked up once, as linear.linear_step does it; what is written to them later is seen.
    """

    def __init__(self, norm: nn.LayerNorm, linear: nn.Linear, gelu: bool = False) -> None:
        self._weight, self._bias = linear.weight.detach(), None if linear.bias is None else linear.bias.detach()
        self._gamma, self._beta, self._eps = norm.weight.detach(), norm.bias.detach(), norm.eps
        self._gelu = gelu
        self._linear = linear_step(linear, _UNUSED)
        self._slope = self._shift = torch.empty(0)

    @property
    def out_features(self) -> int:
        """N."""
        return len(self._weight)

    @property
    def product(self) -> Product:
        """Returns the product as it is timed."""
        return Product.of("normed_gelu" if self._gelu else "normed", self._weight)

    @property
    def scale(self) -> Tensor:
        """The weight [K] of the LayerNorm."""
        return self._gamma

    def folded(self) -> tuple[Tensor, Tensor]:
        """Computes the slope and the shift [N] of the present weights."""
        return ops.fold_layer_norm(self._weight, self._gamma, self._beta, self._bias)

    def keep(self, slope: Tensor, shift: Tensor) -> None:
        """Sets the slope and the shift to use from now on."""
        self._slope, self._shift = slope, shift

    def __call__(self, scaled: Tensor, statistics: Tensor) -> Tensor:
        return ops.normed_linear(scaled, statistics, self._weight, self._slope, self._shift, self._eps, self._gelu)

    def by_library(self, normed: Tensor) -> Tensor:
        """The same of rows that are normalised already."""
        y = self._linear(normed)
        return F.gelu(y) if self._gelu else y


class ResidualLayer:
    """A linear layer whose result is added to the residual stream, before the LayerNorm `norm`."""

    def __init__(self, linear: nn.Linear, norm: nn.LayerNorm) -> None:
        self._weight, self._bias = linear.weight.detach(), None if linear.bias is None else linear.bias.detach()
        self._gamma, self._beta, self._eps = norm.weight.detach(), norm.bias.detach(), norm.eps
        self._linear = linear_step(linear, _UNUSED)

    @property
    def product(self) -> Product:
        """Returns the product as it is timed."""
        return Product.of("residual", self._weight)

    def __call__(self, x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        return ops.residual_linear(x, rows, self._weight, self._bias, self._gamma)

    def by_library(self, x: Tensor, rows: Tensor) -> Tensor:
        """Adds to the residual stream too, and returns its rows normalised."""
        return ops.residual_layer_norm(x, self._linear(rows), self._gamma, self._beta, self._eps)


class LayerPair:
    """A layer that adds to the residual stream, and the one after the next LayerNorm: own products, or the library's.

    own_rows: the classes of rows (product_choice.row_class) that take our own.
    """

    def __init__(self, residual: ResidualLayer, normed: NormedLayer) -> None:
        self.residual, self.normed = residual, normed
        self.own_rows = frozenset(ROW_CLASSES)

    @property
    def products(self) -> Pair:
        """Returns both products as they are timed."""
        return self.residual.product, self.normed.product

    def __call__(self, x: Tensor, rows: Tensor) -> Tensor:
        if row_class(len(rows)) in self.own_rows:
            return self.normed(*self.residual(x, rows))
        return self.normed.by_library(self.residual.by_library(x, rows))


@dataclass(frozen=True)
class FewRowBlock:
    """From the attention of a block to the layer after it: the next block's qkv, or the head."""

    proj_fc1: LayerPair
    fc2_next: LayerPair


class FewRows:
    """The first block's qkv and the blocks of a model, and memory for what is folded."""

    def __init__(self, first: NormedLayer, blocks: Sequence[FewRowBlock], device: torch.device) -> None:
        self.first, self.blocks = first, blocks
        self._first_rows = frozenset(ROW_CLASSES)
        pairs = [pair for block in blocks for pair in (block.proj_fc1, block.fc2_next)]
        if chosen_products() == "auto":
            as_others = (pairs[1].residual.product, first.product)  # the next blocks' qkv
            distinct = list(dict.fromkeys([as_others, *(pair.products for pair in pairs)]))
            chosen = dict(zip(distinct, own_rows(distinct, device), strict=True))
            self._first_rows = chosen[as_others]
            for pair in pairs:
                pair.own_rows = chosen[pair.products]
        layers = [(first, self._first_rows), *((pair.normed, pair.own_rows) for pair in pairs)]
        self._layers = [layer for layer, rows in layers if rows]
        sizes = [layer.out_features for layer in self._layers for _ in range(2)]
        self._vectors = torch.empty(sum(sizes), device=device)
        vectors = iter(self._vectors.split(sizes))
        for layer in self._layers:
            layer.keep(next(vectors), next(vectors))

    @property
    def are_any(self) -> bool:
        """Whether some layer is our own product for some number of rows."""
        return bool(self._layers)

    def takes_first(self, rows: int) -> bool:
        """Whether the first block's qkv is our own product for so many rows."""
        return row_class(rows) in self._first_rows

    def fold(self) -> None:
        """Folds the weights as they are now, which the first step of a decode needs; it may be recorded in a graph."""
        torch.cat([vector for layer in self._layers for vector in layer.folded()], out=self._vectors)


def can_multiply_few_rows(linears: Sequence[nn.Module], norms: Sequence[nn.Module], width: int) -> bool:
    """Whether our own products take these layers on their device: all plain, of one 16-bit dtype."""
    weights = [layer.weight for layer in (*linears, *norms) if isinstance(layer, nn.Linear | nn.LayerNorm)]
    plain = all(type(layer) is nn.Linear and is_plain(layer) for layer in linears)
    if not plain or len(weights) < len(linears) + len(norms) or not all(type(norm) is nn.LayerNorm for norm in norms):
        return False
    if any(norm._forward_hooks or norm._forward_pre_hooks or norm.bias is None for norm in norms):
        return False
    device, dtype = weights[0].device, weights[0].dtype
    if any((weight.device, weight.dtype) != (device, dtype) for weight in weights):
        return False
    sizes_fit = width % 32 == 0 and all(weight.shape[0] % 8 == 0 and weight.shape[-1] % 32 == 0 for weight in weights)
    return sizes_fit and dtype in (torch.bfloat16, torch.float16) and _has_kernels(device)


def _has_kernels(device: torch.device) -> bool:
    """On a CPU they are there to be tested: packed layers are faster."""
    if device.type != "cuda":
        return device.type == "cpu"
    properties = torch.cuda.get_device_properties(device)
    shared_bytes = getattr(properties, "shared_memory_per_block_optin", 0)  # of all torchs; its stubs lack it
    return bool(_C.build_config()["cuda_architectures"]) and properties.major >= 9 and shared_bytes >= _SHARED_BYTES
