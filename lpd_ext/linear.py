"""Linear layers made ready for decoding on a CPU: weights laid out for ops.packed_linear, and never trained.

A decoding step multiplies few rows by large matrices; kernels that find the matrix in its plain order read it at a
fraction of the memory's speed.
"""

from __future__ import annotations

import pickle
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lpd_ext import memory, ops
from lpd_ext.packing import pack_weight, unpack_weight


class DecodingLinear(nn.Module, ABC):
    """A linear layer whose weights are packed, on the CPU.

    The state dict (and so copies and pickles) holds the weights in their plain order, under the names of nn.Linear.
    """

    weight_names: tuple[str, ...] = ("weight",)  # of what `pack` takes

    def __init__(self, in_features: int, out_features: int, bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        with torch.device("meta"):
            self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None

    @abstractmethod
    def pack(self, **weights: Tensor) -> None:
        """Take over weights, as `plain` returns them or as nn.Linear has them; ValueError if they cannot be packed."""

    def check_shape(self, weight: Tensor) -> None:
        """ValueError unless the weight is [out_features, in_features]."""
        if weight.shape != (self.out_features, self.in_features):
            wanted = [self.out_features, self.in_features]
            raise ValueError(f"weight must have shape {wanted}, got {list(weight.shape)}")

    @abstractmethod
    def check_move(self, fn: Callable[[Tensor], Tensor]) -> None:
        """ValueError unless the weights could be packed after fn, which moves or casts them."""

    @abstractmethod
    def plain(self) -> dict[str, Tensor]:
        """Copies of what was packed, by the names of the state dict."""

    @property
    @abstractmethod
    def out_dtype(self) -> torch.dtype:
        """Of results."""

    @abstractmethod
    def product(self, x: Tensor, gelu: bool = False, out: Tensor | None = None) -> Tensor:
        """The layer's result [..., N] for x [..., K], or GELU of it; in out [R, N], if given.

        It has no gradient: outside torch.no_grad(), an x that requires grad is refused.
        """

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DecodingLinear:
        self.pack(**{name: fn(weight) for name, weight in self.plain().items()})
        super()._apply(fn, recurse)
        return self

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        destination.update((prefix + name, weight) for name, weight in self.plain().items())
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self,
        state: dict[str, Tensor],
        prefix: str,
        metadata: dict[str, Any],
        strict: bool,
        missing: list[str],
        unexpected: list[str],
        errors: list[str],
    ) -> None:
        shape = (self.out_features, self.in_features)
        weights = {name: state.pop(prefix + name) for name in self.weight_names if prefix + name in state}
        if "weight" not in weights:
            missing.append(prefix + "weight")
        elif weights["weight"].shape != shape:
            errors.append(f"{prefix}weight: expected shape {list(shape)}, got {list(weights['weight'].shape)}")
        else:
            try:
                self.pack(**weights)
            except ValueError as error:
                errors.append(f"{prefix}weight: {error}")
        super()._load_from_state_dict(state, prefix, metadata, strict, missing, unexpected, errors)

    def __getstate__(self) -> dict[str, Any]:
        packed = {name for name, value in self.__dict__.items() if isinstance(value, Tensor)}
        state = {name: value for name, value in self.__dict__.items() if name not in packed}
        # As bytes: torch.multiprocessing would share the memory of tensors, and these live no longer than the call.
        return {"module": state, "plain": pickle.dumps(self.plain())}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state["module"])
        self.pack(**pickle.loads(state["plain"]))


class PackedLinear(DecodingLinear):
    """Packed weights in float32, or in bfloat16 where the processor computes with it."""

    def pack(self, **weights: Tensor) -> None:
        weight = weights["weight"]
        _check_can_pack(weight)
        self.check_shape(weight)
        # Neither a parameter nor a buffer: .to() and its like cannot move or cast what is packed.
        self._packed: Tensor = pack_weight(weight.detach())

    def check_move(self, fn: Callable[[Tensor], Tensor]) -> None:
        _check_can_pack(fn(torch.empty(0, dtype=self._packed.dtype)))

    @property
    def weight(self) -> Tensor:
        """A copy of the weights [N, K] in their plain order: `load_state_dict` changes them, writing to it does not."""
        return unpack_weight(self._packed, self.out_features, self.in_features)

    def plain(self) -> dict[str, Tensor]:
        return {"weight": self.weight}

    @property
    def out_dtype(self) -> torch.dtype:
        return self._packed.dtype

    def product(self, x: Tensor, gelu: bool = False, out: Tensor | None = None) -> Tensor:
        y = ops.packed_linear(rows_of(x), self._packed, self.bias, self.out_features, gelu, out)
        return y if x.dim() == 2 else y.view(*x.shape[:-1], self.out_features)


def rows_of(x: Tensor) -> Tensor:
    """x [..., K] as [R, K] whose rows are contiguous, a view where it can be."""
    rows = x if x.dim() == 2 else x[None].flatten(0, -2)
    return rows if rows.stride(1) == 1 else rows.contiguous()


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether PackedLinear takes weights of this kind, on this processor."""
    if device.type != "cpu":
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and has_fast_arithmetic(dtype))


def _check_can_pack(weight: Tensor) -> None:
    if not can_pack(weight.device, weight.dtype):
        raise ValueError(f"cannot pack weights of {weight.dtype} on {weight.device}: unpack the model first")


def has_fast_arithmetic(dtype: torch.dtype) -> bool:
    """Whether this processor multiplies matrices in dtype itself, rather than by way of float32."""
    if dtype == torch.bfloat16:
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if dtype == torch.float16:
        return torch.cpu._is_amx_fp16_supported()
    return True


def count_parameters(model: nn.Module) -> int:
    """How many numbers the weights of a model are, those of packed layers among them, which are no parameters."""
    packed = [layer for layer in model.modules() if isinstance(layer, DecodingLinear)]
    weights = sum(layer.in_features * layer.out_features for layer in packed)
    return weights + sum(parameter.numel() for parameter in model.parameters())


def pack(model: nn.Module) -> nn.Module:
    """Pack every linear layer of the model, in place, for inference; returns it. Nothing to do where none can be."""
    return replace_linears(model, nn.Linear, _packed_from)


def unpack(model: nn.Module) -> nn.Module:
    """Give every packed layer of the model back as nn.Linear, in place; returns the model."""
    return replace_linears(model, PackedLinear, _linear_from)


def replace_linears(module: nn.Module, kind: type[nn.Module], replacement: Callable[[Any], nn.Module]) -> nn.Module:
    """Put replacement(layer) in the place of every layer of exactly that kind below module; returns module.

    What computes the weights of another layer (torch.nn.utils.parametrize) stays as it is.
    """
    for name, child in list(module.named_children()):
        if name == "parametrizations":
            continue
        if type(child) is kind:
            setattr(module, name, replacement(child))
        else:
            replace_linears(child, kind, replacement)
    return module


def is_plain(layer: nn.Module) -> bool:
    """Whether a layer is x W^T + b and no more: an adapter or a layer with hooks does something else when called.

    A module that cannot be called, and only holds the weights, is plain.
    """
    if type(layer).forward not in (nn.Linear.forward, nn.Module.forward) or "forward" in vars(layer):
        return False
    return not (layer._forward_hooks or layer._forward_pre_hooks)


def _packed_from(linear: nn.Linear) -> nn.Module:
    if not is_plain(linear) or not can_pack(linear.weight.device, linear.weight.dtype):
        return linear
    packed = PackedLinear(linear.in_features, linear.out_features, linear.bias is not None)
    packed.pack(weight=linear.weight)
    packed.bias = _frozen(linear.bias)
    return packed


def _linear_from(packed: PackedLinear) -> nn.Linear:
    with torch.device("meta"):
        linear = nn.Linear(packed.in_features, packed.out_features, bias=packed.bias is not None)
    linear.weight = nn.Parameter(packed.weight)
    if packed.bias is not None:
        linear.bias = nn.Parameter(packed.bias.detach())
    return linear


def _frozen(parameter: Tensor | None) -> nn.Parameter | None:
    return None if parameter is None else nn.Parameter(parameter.detach(), requires_grad=False)


class ResultRows:
    """Memory for the results of a layer, kept from step to step: one that is written, read and then written again.

    Memory of this size that is given back and taken again comes from the system each time, page by page zeroed.
    most_rows is the most that a step is expected to have; a step of more rows takes new memory.
    """

    def __init__(self, most_rows: int) -> None:
        self._most_rows = most_rows
        self._memory: Tensor | None = None
        self._rows: Tensor | None = None  # the part of it that the last product took: the next ones are as large

    def product(self, linear: DecodingLinear, x: Tensor, gelu: bool = False) -> Tensor:
        """linear.product(x, gelu) of rows x [R, K], in this memory, which the next product overwrites."""
        count = x.shape[0]
        if self._rows is None or self._rows.shape[0] != count:
            if self._memory is None or self._memory.shape[0] < count:
                shape = max(self._most_rows, count), linear.out_features
                self._memory = memory.empty(shape, linear.out_dtype, x.device)
            self._rows = self._memory[:count]
        return linear.product(x, gelu, self._rows)


def linear_step(linear: nn.Module, results: ResultRows) -> Callable[[Tensor], Tensor]:
    """A linear layer as the decoding steps call it: looked up, and its weight transposed for addmm, once per decode.

    A packed layer writes to results, torch's own to new memory. A layer that is more than a product, as an adapter
    around one, is called as it is.
    """
    if isinstance(linear, DecodingLinear):
        return lambda x: results.product(linear, x)
    if not isinstance(linear, nn.Linear) or not is_plain(linear):
        return linear
    bias, transposed = linear.bias, linear.weight.detach().t()
    return (lambda x: x @ transposed) if bias is None else (lambda x: torch.addmm(bias, x, transposed))


def mlp_step(fc1: nn.Module, fc2: nn.Module, hidden: ResultRows, results: ResultRows) -> Callable[[Tensor], Tensor]:
    """fc2(gelu(fc1(x))) as the decoding steps call it; see `linear_step`."""
    second = linear_step(fc2, results)
    if isinstance(fc1, DecodingLinear):
        return lambda x: second(hidden.product(fc1, x, gelu=True))
    first = linear_step(fc1, hidden)
    return lambda x: second(F.gelu(first(x)))
