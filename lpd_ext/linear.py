"""Linear layers packed for decoding on a CPU, for inference only.

A decoding step multiplies few rows by large matrices, and kernels read a matrix in its plain order at a fraction of the
memory's bandwidth; ops.packed_linear reads it packed.
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
    """A linear layer with packed weights, on the CPU.

    Its state dict, and so its copies and pickles, holds the weights in plain order under the names of nn.Linear.
    """

    weight_names: tuple[str, ...] = ("weight",)  # names of the arguments of `pack`

    def __init__(self, in_features: int, out_features: int, bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        with torch.device("meta"):
            self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None

    @abstractmethod
    def pack(self, **weights: Tensor) -> None:
        """Packs weights as `plain` returns them or as nn.Linear has them; ValueError if they cannot be packed."""

    def check_shape(self, weight: Tensor) -> None:
        """Raises ValueError unless the weight is [out_features, in_features]."""
        if weight.shape != (self.out_features, self.in_features):
            wanted = [self.out_features, self.in_features]
            raise ValueError(f"weight must have shape {wanted}, got {list(weight.shape)}")

    @abstractmethod
    def check_move(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Raises ValueError unless the weights could be packed after fn, which moves or casts them."""

    @abstractmethod
    def plain(self) -> dict[str, Tensor]:
        """Returns copies of the packed tensors in plain order, by their names in the state dict."""

    @property
    @abstractmethod
    def out_dtype(self) -> torch.dtype:
        """The dtype of results."""

    @abstractmethod
    def product(self, x: Tensor, gelu: bool = False, out: Tensor | None = None) -> Tensor:
        """Returns the layer's result [..., N] for x [..., K], or GELU of it; written to out [R, N] if given.

        Has no gradient: refuses an x that requires grad outside torch.no_grad().
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
        # As bytes: torch.multiprocessing would share the memory of tensors, and these die with the call.
        return {"module": state, "plain": pickle.dumps(self.plain())}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state["module"])
        self.pack(**pickle.loads(state["plain"]))


class PackedLinear(DecodingLinear):
    """A linear layer with packed float32 weights, or bfloat16 where the processor computes in it."""

    def pack(self, **weights: Tensor) -> None:
        weight = weights["weight"]
        _check_can_pack(weight)
        self.check_shape(weight)
        # Neither a parameter nor a buffer: .to() and its like cannot move or cast packed weights.
        self._packed: Tensor = pack_weight(weight.detach())

    def check_move(self, fn: Callable[[Tensor], Tensor]) -> None:
        _check_can_pack(fn(torch.empty(0, dtype=self._packed.dtype)))

    @property
    def weight(self) -> Tensor:
        """A copy of the weights [N, K] in plain order; writing to it changes nothing, `load_state_dict` does."""
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
    """Returns x [..., K] as [R, K] with contiguous rows, as a view where possible."""
    rows = x if x.dim() == 2 else x[None].flatten(0, -2)
    return rows if rows.stride(1) == 1 else rows.contiguous()


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether PackedLinear takes weights of this dtype on this processor."""
    if device.type != "cpu":
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and has_fast_arithmetic(dtype))


def _check_can_pack(weight: Tensor) -> None:
    if not can_pack(weight.device, weight.dtype):
        raise ValueError(f"cannot pack weights of {weight.dtype} on {weight.device}: unpack the model first")


def has_fast_arithmetic(dtype: torch.dtype) -> bool:
    """Whether this processor multiplies matrices natively in dtype, without converting to float32."""
    if dtype == torch.bfloat16:
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if dtype == torch.float16:
        return torch.cpu._is_amx_fp16_supported()
    return True


def count_parameters(model: nn.Module) -> int:
    """Counts the weights of a model, including those of packed layers, which are not parameters."""
    packed = [layer for layer in model.modules() if isinstance(layer, DecodingLinear)]
    weights = sum(layer.in_features * layer.out_features for layer in packed)
    return weights + sum(parameter.numel() for parameter in model.parameters())


def pack(model: nn.Module) -> nn.Module:
    """Packs every linear layer of the model that can be packed, in place, for inference; returns the model."""
    return replace_linears(model, nn.Linear, _packed_from)


def unpack(model: nn.Module) -> nn.Module:
    """Turns every packed layer of the model back into nn.Linear, in place; returns the model."""
    return replace_linears(model, PackedLinear, _linear_from)


def replace_linears(module: nn.Module, kind: type[nn.Module], replacement: Callable[[Any], nn.Module]) -> nn.Module:
    """Replaces every layer of exactly that kind below module by replacement(layer); returns module.

    Leaves alone the modules that compute another layer's weights (torch.nn.utils.parametrize).
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
    """Whether the layer computes x W^T + b and nothing more, unlike an adapter or a layer with hooks.

    A module without a forward that only holds the weights is plain.
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
    """Memory for a layer's results, reused from step to step.

    Blocks of this size would be returned to the system and zeroed page by page each time they are allocated again.
    most_rows is the most that a step is expected to have; a step of more rows allocates anew.
    """

    def __init__(self, most_rows: int) -> None:
        self._most_rows = most_rows
        self._memory: Tensor | None = None
        self._rows: Tensor | None = None  # the part of it that the last product took: the next ones are as large

    def product(self, linear: DecodingLinear, x: Tensor, gelu: bool = False) -> Tensor:
        """Computes linear.product(x, gelu) of rows x [R, K] into this memory, which the next product overwrites."""
        count = x.shape[0]
        if self._rows is None or self._rows.shape[0] != count:
            if self._memory is None or self._memory.shape[0] < count:
                shape = max(self._most_rows, count), linear.out_features
                self._memory = memory.empty(shape, linear.out_dtype, x.device)
            self._rows = self._memory[:count]
        return linear.product(x, gelu, self._rows)


def linear_step(linear: nn.Module, results: ResultRows) -> Callable[[Tensor], Tensor]:
    """Returns a linear layer as a function for the decoding steps: looked up and transposed for addmm once per decode.

    A packed layer writes to results, torch's own layer to new memory. A layer that does more than a product, such as an
    adapter, is called as it is.
    """
    if isinstance(linear, DecodingLinear):
        return lambda x: results.product(linear, x)
    if not isinstance(linear, nn.Linear) or not is_plain(linear):
        return linear
    bias, transposed = linear.bias, linear.weight.detach().t()
    return (lambda x: x @ transposed) if bias is None else (lambda x: torch.addmm(bias, x, transposed))


def mlp_step(fc1: nn.Module, fc2: nn.Module, hidden: ResultRows, results: ResultRows) -> Callable[[Tensor], Tensor]:
    """Returns fc2(gelu(fc1(x))) as a function for the decoding steps; see `linear_step`."""
    second = linear_step(fc2, results)
    if isinstance(fc1, DecodingLinear):
        return lambda x: second(hidden.product(fc1, x, gelu=True))
    first = linear_step(fc1, hidden)
    return lambda x: second(F.gelu(first(x)))
