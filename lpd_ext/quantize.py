"""int8 linear layers for decoding on a CPU: weights rounded per output channel, activations per row on the fly.

y = x W^T + b becomes one product of bytes, and one pass that gives it meaning again (ops.dequantize_rows); between fc1
and fc2 that pass also applies GELU and rounds again. Inputs and weights are both rotated before they are rounded
(reference.rotate_rows), which leaves their product as it is and halves the error of the inputs, whose outliers it
spreads. Where errors reach the logits almost undamped, inputs are two planes of bytes, the second of which holds what
the first leaves: twice the rows of one product, so the weights are still read once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lpd_ext import ops
from lpd_ext.linear import DecodingLinear, replace_linears, unpack
from lpd_ext.model import LPDModel
from lpd_ext.reference import ROTATION, rotate_rows

SCALE = "rotated_scale"  # of int8 weights: the name that stands beside theirs in a state dict
FINE_BLOCKS = 3  # the last ones, whose inputs are in two planes, as those of the head
_WEIGHT_LEVELS = 127
# Without VNNI, pairs of products are summed in 16 bits: 2 * 127 * 127 fits, 2 * 255 * 127 does not.
_ACTIVATION_LEVELS = 255 if torch.cpu._is_vnni_supported() else 127


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weights [N, K] as int8 in [-127, 127], and float32 scales [N]: weight[n] is about scale[n] * int8[n]."""
    scale = weight.float().abs().amax(1) / _WEIGHT_LEVELS
    scale = torch.where(scale < torch.finfo(torch.float32).tiny, 1.0, scale)
    return (weight.float() / scale[:, None]).round().to(torch.int8), scale


class Int8Linear(DecodingLinear):
    """Packed int8 weights; float32 in and out. A float weight that is loaded into it is rotated and rounded."""

    weight_names = ("weight", SCALE)
    planes = 1  # of the inputs' bytes

    @property
    def rotate(self) -> bool:
        """Whether inputs are rotated: those of any common width; the weights then hold the inverse rotation."""
        return self.in_features % ROTATION == 0

    def pack(self, **weights: Tensor) -> None:
        weight, scale = weights["weight"].detach(), weights.get(SCALE)
        if weight.is_floating_point() and scale is None:
            weight, scale = quantize_weight(rotate_rows(weight) / ROTATION if self.rotate else weight)
        if weight.dtype != torch.int8:
            beside = "" if scale is None else f" beside a {SCALE}"
            raise ValueError(f"weights must be int8 or floats of their own scale, got {weight.dtype}{beside}")
        scale = _checked_scale(weight, scale)
        self._packed: Tensor = torch.ops.onednn.qlinear_prepack(weight, None)
        self._scale = scale.detach().clone()
        self._column_sum = weight.sum(1, dtype=torch.int32) * scale
        self._no_zero_points = torch.zeros(len(weight), dtype=torch.int32)

    def check_move(self, fn: Callable[[Tensor], Tensor]) -> None:
        _checked_scale(fn(torch.empty(0, dtype=torch.int8)), fn(torch.empty(0)))

    def plain(self) -> dict[str, Tensor]:
        return {"weight": self._packed.to_dense().t().contiguous(), SCALE: self._scale.clone()}

    def forward(self, x: Tensor) -> Tensor:
        quantized = ops.quantize_rows(x[None].flatten(0, -2), _ACTIVATION_LEVELS, self.rotate, self.planes)
        return self._of_bytes(*quantized).view(*x.shape[:-1], self.out_features)

    def mlp(self, x: Tensor, fc2: nn.Module) -> Tensor:
        assert isinstance(fc2, Int8Linear)
        quantized, quantization = ops.quantize_rows(x, _ACTIVATION_LEVELS, self.rotate, self.planes)
        of_hidden = (self._product(quantized), quantization, self._column_sum, self.bias, self.planes)
        return fc2._of_bytes(*ops.gelu_quantize_rows(*of_hidden, _ACTIVATION_LEVELS, fc2.rotate, fc2.planes))

    def _of_bytes(self, quantized: Tensor, quantization: Tensor) -> Tensor:
        product = self._product(quantized)
        ops.dequantize_rows(product, quantization, self._column_sum, self.bias, self.planes)
        return product[: len(product) // self.planes]

    def _product(self, quantized: Tensor) -> Tensor:
        # Scales per row and zero points are left to the pass that follows: oneDNN's fast kernels know neither.
        unscaled = (1.0, 0)
        result: Tensor = torch.ops.onednn.qlinear_pointwise(
            quantized,
            *unscaled,
            self._packed,
            self._scale,
            self._no_zero_points,
            None,
            *unscaled,
            torch.float32,
            "none",
            [],
            "",
        )
        return result


def _checked_scale(weight: Tensor, scale: Tensor | None) -> Tensor:
    if scale is None or scale.dtype != torch.float32 or scale.shape != weight.shape[:1]:
        found = None if scale is None else f"{scale.dtype} {list(scale.shape)}"
        raise ValueError(f"{SCALE} must be float32 [{len(weight)}] beside an int8 weight, got {found}")
    if weight.device.type != "cpu":
        raise ValueError(f"int8 layers decode on the CPU, got weights on {weight.device}")
    return scale


def quantize(model: nn.Module) -> nn.Module:
    """Round every linear layer of a float32 model on the CPU to int8, in place, for inference; returns it."""
    return use_planes(replace_linears(unpack(model), nn.Linear, _int8_from))


def use_planes(model: nn.Module) -> nn.Module:
    """Let the int8 layers of an LPD model that errors matter most in take their inputs in two planes; returns it."""
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
