"""Linear layers for decoding steps of few rows: LayerNorms are folded into the products around them.

Between two layers goes what ops.residual_linear makes of the residual stream, and ops.normed_linear takes. The
environment variable LPD_PRODUCTS says which products a decode uses; product_choice.py decides for `auto`. The library's
are the default as long as no GPU has run our own.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lpd_ext import _C, ops, product_table
from lpd_ext.linear import ResultRows, is_plain, linear_step
from lpd_ext.product_choice import known_own_rows, own_rows, row_class
from lpd_ext.products import ROW_CLASSES, Product, step_pairs

OwnRows = Mapping[str, frozenset[int]]  # classes of rows, by the second layer of a pair: fc1, qkv, head
_MULTIPLES = {"residual": 32, "normed": 8, "normed_gelu": 8}  # that N must be of
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


def may_be_own(layers: Mapping[str, Product], device: torch.device) -> bool:
    """Whether decodes with these products may take our own; where times are known, that is decided here."""
    choice = chosen_products()
    if choice == "cublaslt" or not can_multiply(layers.values(), device):
        return False
    if choice == "own":
        return True
    if product_table.card_of(device) is None:  # which nothing can be timed on
        return False
    known = known_own_rows(list(step_pairs(layers).values()), device)
    return any(rows is None or rows for rows in known)


def chosen_rows(layers: Mapping[str, Product], device: torch.device) -> OwnRows:
    """Returns which rows take our own products, after timing what is not known if LPD_PRODUCTS is `auto`."""
    pairs = step_pairs(layers)
    if chosen_products() == "own":
        return dict.fromkeys(pairs, frozenset(ROW_CLASSES))
    return dict(zip(pairs, own_rows(list(pairs.values()), device), strict=True))


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

    def __call__(self, x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        return ops.residual_linear(x, rows, self._weight, self._bias, self._gamma)

    def by_library(self, x: Tensor, rows: Tensor) -> Tensor:
        """Adds to the residual stream too, and returns its rows normalised."""
        return ops.residual_layer_norm(x, self._linear(rows), self._gamma, self._beta, self._eps)


class LayerPair:
    """A layer that adds to the residual stream, and the one after the next LayerNorm: own products, or the library's.

    own_rows: the classes of rows (product_choice.row_class) that take our own.
    """

    def __init__(self, residual: ResidualLayer, normed: NormedLayer, own_rows: frozenset[int]) -> None:
        self.residual, self.normed, self.own_rows = residual, normed, own_rows

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
    """The first block's qkv, which `own` has as those of the others, the blocks, and memory for what is folded."""

    def __init__(self, first: NormedLayer, blocks: Sequence[FewRowBlock], own: OwnRows, device: torch.device) -> None:
        self.first, self.blocks = first, blocks
        self._first_rows, self._all_rows = own["qkv"], frozenset[int]().union(*own.values())
        pairs = [pair for block in blocks for pair in (block.proj_fc1, block.fc2_next)]
        layers = [(first, self._first_rows), *((pair.normed, pair.own_rows) for pair in pairs)]
        self._layers = [layer for layer, rows in layers if rows]
        sizes = [layer.out_features for layer in self._layers for _ in range(2)]
        self._vectors = torch.empty(sum(sizes), device=device)
        vectors = iter(self._vectors.split(sizes))
        for layer in self._layers:
            layer.keep(next(vectors), next(vectors))

    def takes_first(self, rows: int) -> bool:
        """Whether the first block's qkv is our own product for so many rows."""
        return row_class(rows) in self._first_rows

    def takes(self, rows: int) -> bool:
        """Whether some layer is our own product for so many rows."""
        return row_class(rows) in self._all_rows

    def fold(self) -> None:
        """Folds the weights as they are now, which the first step of a decode needs; it may be recorded in a graph."""
        torch.cat([vector for layer in self._layers for vector in layer.folded()], out=self._vectors)


def can_multiply(products: Iterable[Product], device: torch.device) -> bool:
    """Whether our own products are there on a device, and take these sizes and dtypes."""
    return _has_kernels(device) and all(
        p.dtype in (torch.bfloat16, torch.float16) and p.depth % 32 == 0 and p.features % _MULTIPLES[p.kind] == 0
        for p in products
    )


def are_plain(linears: Sequence[nn.Module], norms: Sequence[nn.Module], layers: Mapping[str, Product]) -> bool:
    """Whether these layers multiply and nothing else, all on one device and as `layers` says."""
    weights = [layer.weight for layer in (*linears, *norms) if isinstance(layer, nn.Linear | nn.LayerNorm)]
    plain = all(type(layer) is nn.Linear and is_plain(layer) for layer in linears)
    if not plain or len(weights) < len(linears) + len(norms) or not all(type(norm) is nn.LayerNorm for norm in norms):
        return False
    if any(norm._forward_hooks or norm._forward_pre_hooks or norm.bias is None for norm in norms):
        return False
    device, dtype = weights[0].device, layers["qkv"].dtype
    if any((weight.device, weight.dtype) != (device, dtype) for weight in weights):
        return False
    shapes = {(product.features, product.depth) for product in layers.values()}
    return all(tuple(weight.shape) in shapes for weight in weights[: len(linears)])


def _has_kernels(device: torch.device) -> bool:
    """On a CPU they are there to be tested: packed layers are faster."""
    if device.type != "cuda":
        return device.type == "cpu"
    properties = torch.cuda.get_device_properties(device)
    shared_bytes = getattr(properties, "shared_memory_per_block_optin", 0)  # of all torchs; its stubs lack it
    return bool(_C.build_config()["cuda_architectures"]) and properties.major >= 9 and shared_bytes >= _SHARED_BYTES
