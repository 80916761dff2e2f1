"""Linear layers for decoding steps of few rows: LayerNorms are folded into the products around them.

Between two layers goes what ops.residual_linear makes of the residual stream, and ops.normed_linear takes. Which
products a decode uses says the environment variable LPD_PRODUCTS.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lpd_ext import _C, ops
from lpd_ext.linear import is_plain

MOST_ROWS = 192  # of a step; with more, the tiles of the GPU's library are full
_CHOICES = ("auto", "own", "cublaslt")
_SHARED_BYTES = 200 * 1024  # per block: fewer hold no product of four times the width of a large model


def chosen_products() -> str:
    """Reads LPD_PRODUCTS: 'own', used where possible; 'cublaslt'; or 'auto', which is the same as 'cublaslt' for now.

    Raises ValueError for anything else.
    """
    choice = os.environ.get("LPD_PRODUCTS", "auto")
    if choice not in _CHOICES:
        raise ValueError(f"LPD_PRODUCTS must be one of {', '.join(_CHOICES)}, got {choice!r}")
    # 'auto' is to be what was faster on the card at hand, as soon as that has been measured.
    return "own" if choice == "own" else "cublaslt"


class NormedLayer:
    """A linear layer of LayerNorm(x), or GELU of it, with the slope and shift that it was last told to keep.

    Weights are looked up once, as linear.linear_step does it; what is written to them later is seen.
    """

    def __init__(self, norm: nn.LayerNorm, linear: nn.Linear, gelu: bool = False) -> None:
        self._weight, self._bias = linear.weight.detach(), None if linear.bias is None else linear.bias.detach()
        self._gamma, self._beta, self._eps = norm.weight.detach(), norm.bias.detach(), norm.eps
        self._gelu = gelu
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


class ResidualLayer:
    """A linear layer whose result is added to the residual stream, before the LayerNorm `norm`."""

    def __init__(self, linear: nn.Linear, norm: nn.LayerNorm) -> None:
        self._weight, self._bias = linear.weight.detach(), None if linear.bias is None else linear.bias.detach()
        self._gamma = norm.weight.detach()

    def __call__(self, x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        return ops.residual_linear(x, rows, self._weight, self._bias, self._gamma)


@dataclass(frozen=True)
class FewRowBlock:
    """From the attention of a block to the layer after it: the next block's qkv, or the head."""

    proj: ResidualLayer
    fc1: NormedLayer
    fc2: ResidualLayer
    following: NormedLayer


class FewRows:
    """The first block's qkv and the blocks of a model, and memory for what is folded."""

    def __init__(self, first: NormedLayer, blocks: Sequence[FewRowBlock], device: torch.device) -> None:
        self.first, self.blocks = first, blocks
        self._layers = [first] + [layer for block in blocks for layer in (block.fc1, block.following)]
        sizes = [layer.out_features for layer in self._layers for _ in range(2)]
        self._vectors = torch.empty(sum(sizes), device=device)
        vectors = iter(self._vectors.split(sizes))
        for layer in self._layers:
            layer.keep(next(vectors), next(vectors))

    def fold(self) -> None:
        """Fold the weights as they are now, which the first step of a decode needs; it may be recorded in a graph."""
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
