"""int8 linear layers for decoding on a CPU: weights rounded per output channel, activations per row on the fly.

y = x W^T + b becomes a product of bytes whose sums are scaled before they are written (ops.packed_linear_int8). Inputs
and weights are both rotated before rounding (packing.rotate_rows), which leaves their product unchanged and halves the
error of the inputs by spreading outliers. In the last layers, whose errors reach the logits almost undamped, inputs are
two planes of bytes, the second holding the rest of the first: twice the rows of one product, so the weights are still
read once.

Sums of bytes are exact, and so the same on every processor. With AVX-512 VNNI the products are 3 to 4 times as fast as
in float32; with AVX2, which multiplies pairs of 16 bits, 1.6 times.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lpd_ext import ops
from lpd_ext.linear import DecodingLinear, replace_linears, rows_of, unpack
from lpd_ext.model import LPDModel
from lpd_ext.packing import ROTATION, pack_weight, rotate_rows, unpack_weight

SCALE = "rotated_scale"  # of the scales of int8 weights, beside the weights in a state dict
FINE_BLOCKS = 3  # the last blocks, whose inputs take two planes, like those of the head
_WEIGHT_LEVELS, _ACTIVATION_LEVELS = 127, 255
_SUMMED_ROWS = 64
_MOST_INPUTS = 65536  # products of bytes are summed in 32 bits


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds weights [N, K] to int8 in [-127, 127] with float32 scales [N]: weight[n] is about scale[n] * int8[n]."""
    scale = weight.float().abs().amax(1) / _WEIGHT_LEVELS
    scale = torch.where(scale < torch.finfo(torch.float32).tiny, 1.0, scale)
    return (weight.float() / scale[:, None]).round().to(torch.int8), scale


class Int8Linear(DecodingLinear):
    """A linear layer with packed int8 weights, float32 in and out; float weights are rotated and rounded on loading."""

    weight_names = ("weight", SCALE)
    planes = 1  # planes of bytes that an input takes

    @property
    def rotate(self) -> bool:
        """Whether inputs are rotated, as those of any common width are; the weights then hold the inverse rotation."""
        return self.in_features % ROTATION == 0

    def pack(self, **weights: Tensor) -> None:
        weight, scale = weights["weight"].detach(), weights.get(SCALE)
        self.check_shape(weight)
        if self.in_features > _MOST_INPUTS:
            raise ValueError(f"int8 layers have at most {_MOST_INPUTS} inputs, got {self.in_features}")
        if weight.is_floating_point() and scale is None:
            weight, scale = quantize_weight(rotate_rows(weight) / ROTATION if self.rotate else weight)
        if weight.dtype != torch.int8:
            beside = "" if scale is None else f" beside a {SCALE}"
            raise ValueError(f"weights must be int8 or floats of their own scale, got {weight.dtype}{beside}")
        scale = _checked_scale(weight, scale)
        self._packed: Tensor = pack_weight(weight)
        self._scale = scale.detach().clone()
        # In parts: torch sums in int32 copies, which would leave holes in the heap.
        sums = [part.sum(1, dtype=torch.int32) for part in weight.split(_SUMMED_ROWS)]
        self._column_sum = torch.cat(sums) * scale

    def check_move(self, fn: Callable[[Tensor], Tensor]) -> None:
        _checked_scale(fn(torch.empty(0, dtype=torch.int8)), fn(torch.empty(0, dtype=torch.float32)))

    def plain(self) -> dict[str, Tensor]:
        return {"weight": unpack_weight(self._packed, self.out_features, self.in_features), SCALE: self._scale.clone()}

    @property
    def out_dtype(self) -> torch.dtype:
        return torch.float32

    def product(self, x: Tensor, gelu: bool = False, out: Tensor | None = None) -> Tensor:
        quantized = ops.quantize_rows(rows_of(x), _ACTIVATION_LEVELS, self.rotate, self.planes)
        of_weights = (self._packed, self._scale, self._column_sum)
        y = ops.packed_linear_int8(*quantized, *of_weights, self.bias, self.planes, gelu, out)
        return y if x.dim() == 2 else y.view(*x.shape[:-1], self.out_features)


def _checked_scale(weight: Tensor, scale: Tensor | None) -> Tensor:
    if scale is None or scale.dtype != torch.float32 or scale.shape != weight.shape[:1]:
        found = None if scale is None else f"{scale.dtype} {list(scale.shape)}"
        raise ValueError(f"{SCALE} must be float32 [{len(weight)}] beside an int8 weight, got {found}")
    if weight.device.type != "cpu":
        raise ValueError(f"int8 layers decode on the CPU, got weights on {weight.device}")
    return scale


def quantize(model: nn.Module) -> nn.Module:
    """Rounds every linear layer of a float32 model on the CPU to int8, in place, for inference; returns it."""
    return use_planes(replace_linears(unpack(model), nn.Linear, _int8_from))


def use_planes(model: nn.Module) -> nn.Module:
    """Makes the int8 layers in which errors matter most take their inputs in two planes; returns the model."""
    if isinstance(model, LPDModel):
        for part in (*model.blocks[-FINE_BLOCKS:], model.head):
            for layer in part.modules():
                if isinstance(layer, Int8Linear):
                    layer.planes = 2
    return model


def is_quantized(model: nn.Module) -> bool:
    """Whether the model has int8 layers."""
    return any(isinstance(module, Int8Linear) for module in model.modules())


def _int8_from(linear: nn.Linear) -> Int8Linear:
    if linear.weight.dtype != torch.float32:
        raise ValueError(f"a model to be rounded to int8 must be in float32, got {linear.weight.dtype}")
    layer = Int8Linear(linear.in_features, linear.out_features, linear.bias is not None)
    layer.pack(weight=linear.weight)
    layer.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)
    return layer
