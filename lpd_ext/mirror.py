"""A decoder that mirrors the weights of a published model object and notices when they change.

Parameters share the model's memory where they can, and adapters are called in place. Copied are the table of contents,
packed layers, and computed weights (torch.nn.utils.parametrize).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor, nn

from lpd_ext.linear import DecodingLinear, PackedLinear, can_pack, is_plain
from lpd_ext.model import LPDModel
from lpd_ext.published_modules import (
    TABLES,
    config_of,
    linear_paths,
    module_at,
    owner_of,
    plain_module_at,
    tensor_at,
    width_of_result,
)
from lpd_ext.weights_key import plain_settings

_SAMPLE = 16  # values compared in each tensor
_version = attrgetter("_version")


@dataclass
class _Copy:
    """A part of the decoder copied from tensors of the model, and the modules whose attributes it also depends on."""

    load: Callable[[], None]
    tensors: tuple[Tensor, ...]
    modules: tuple[nn.Module, ...]
    made_from: object = None  # values when last copied

    def state(self) -> object:
        versions = [tensor._version for tensor in self.tensors if not tensor.is_inference()]
        values = [_some_values(tensor.detach()).tolist() for tensor in self.tensors if tensor.numel()]
        return versions, values, list(map(plain_settings, self.modules))


class Mirror:
    """A decoder that has the weights of `source` as long as `up_to_date` returns True.

    pack: packs a second copy of the linear weights that can be packed. Raises ValueError for a model that cannot be
    decoded.
    """

    def __init__(self, source: nn.Module, heads: int | None, pack: bool) -> None:
        self._source, self._pack = source, pack
        self._copies: list[_Copy] = []
        self._used: list[nn.Module] = []
        self._loaded: tuple[list[int], list[Any]]
        self._sample: Tensor
        with _ordinary_tensors():
            config = config_of(source, heads)
            with torch.device("meta"):  # nothing is initialised
                self.decoder = LPDModel(config).eval().requires_grad_(False)
            self._mirror_tables()
            for path, module in list(self.decoder.named_modules()):
                if isinstance(module, nn.LayerNorm):
                    self._mirror_norm(path, module)
            for path in linear_paths(config.depth):
                self._mirror_linear(path)
            self._refuse_the_rest()
            self._note()

    def up_to_date(self) -> bool:
        """Refreshes copies whose source has changed; returns False if only a new mirror can follow.

        Notices replaced modules, hooks and parameters, moves, casts, loads and in-place writes. Of writes that torch
        does not count (to `.data`, through NumPy), notices those that touch one of 16 values in each copied tensor.
        """
        with _ordinary_tensors():
            values = list(chain.from_iterable(map(dict.values, self._dicts)))
            if len(values) != len(self._values) or not all(map(is_, values, self._values)):
                return False
            if list(map(Tensor.data_ptr, self._tensors)) != self._addresses:
                return False
            state, sample = self._state(), torch.cat(self._samples)
            if state != self._loaded or not torch.equal(sample, self._sample):
                for copy in self._copies:
                    if (made_from := copy.state()) != copy.made_from:
                        copy.load()
                        copy.made_from = made_from
                self._loaded, self._sample = state, sample
            return True

    def _note(self) -> None:
        """Records the tensors that the copies were made from."""
        modules = list(self._source.modules())
        self._dicts: list[dict[Any, Any]] = [
            entries for m in modules for entries in (m._modules, m._parameters, m._buffers) if entries
        ]
        self._dicts += [hooks for m in self._used for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        # The objects and their memory are kept, so that nothing else can come to lie where they were.
        self._values = list(chain.from_iterable(map(dict.values, self._dicts)))
        self._tensors = [value for value in self._values if isinstance(value, Tensor)]
        self._memory = [tensor.detach() for tensor in self._tensors]
        self._addresses = [tensor.data_ptr() for tensor in self._tensors]
        copied = [tensor for copy in self._copies for tensor in copy.tensors]
        self._counted = [tensor for tensor in copied if not tensor.is_inference()]
        self._computing = [module for copy in self._copies for module in copy.modules]
        self._samples = [_some_values(tensor.detach()) for tensor in copied if tensor.numel()]
        self._loaded, self._sample = self._state(), torch.cat(self._samples)
        for copy in self._copies:
            copy.made_from = copy.state()

    def _state(self) -> tuple[list[int], list[Any]]:
        return list(map(_version, self._counted)), list(map(plain_settings, self._computing))

    def _copy(self, path: str, load: Callable[[], None]) -> None:
        owner, name = owner_of(self._source, path)
        if name in owner._parameters:
            self._copies.append(_Copy(load, (owner.get_parameter(name),), ()))
        else:
            computing = module_at(owner, f"parametrizations.{name}")
            tensors = (*computing.parameters(), *computing.buffers())
            self._copies.append(_Copy(load, tensors, tuple(computing.modules())))

    def _mirror_tables(self) -> None:
        source, decoder = self._source, self.decoder
        self._used += [plain_module_at(source, name, nn.Embedding) for name in ("token_emb", "class_emb")]
        tables = [tensor_at(source, path).reshape(-1, decoder.config.dim) for path in TABLES]
        content = torch.cat(tables)
        _check_shape(content, decoder.content, " + ".join(TABLES))
        decoder.content = nn.Parameter(content, requires_grad=False)
        for path, rows in zip(TABLES, content.split([len(table) for table in tables]), strict=True):
            self._copy(path, partial(_load, rows, source, path))
        self._mirror_parameter(decoder, "pos_embed", "pos_embed")

    def _mirror_norm(self, path: str, norm: nn.LayerNorm) -> None:
        source = plain_module_at(self._source, path, nn.LayerNorm)
        self._used.append(source)
        norm.eps = getattr(source, "eps", norm.eps)
        for name in ("weight", "bias"):
            self._mirror_parameter(norm, name, f"{path}.{name}")

    def _mirror_linear(self, path: str) -> None:
        source, linear = module_at(self._source, path), self.decoder.get_submodule(path)
        assert isinstance(linear, nn.Linear)
        self._used.append(source)
        found = width_of_result(self._source, path, self.decoder.pos_embed.new_zeros(1, linear.in_features))
        if found != linear.out_features:
            raise ValueError(f"{path} must give rows of {linear.out_features} numbers, got {found}")
        parent, _, name = path.rpartition(".")
        if isinstance(source, DecodingLinear) or not is_plain(source):
            setattr(self.decoder.get_submodule(parent), name, source)
            return
        weight, has_bias = tensor_at(self._source, f"{path}.weight"), getattr(source, "bias", None) is not None
        layer: nn.Linear | PackedLinear = linear
        if self._pack and can_pack(weight.device, weight.dtype):
            _check_shape(weight, linear.weight, f"{path}.weight")
            layer = PackedLinear(linear.in_features, linear.out_features, has_bias)
            layer.pack(weight=weight)
            setattr(self.decoder.get_submodule(parent), name, layer)
            self._copy(f"{path}.weight", partial(_load_packed, layer, source))
        else:
            self._mirror_parameter(layer, "weight", f"{path}.weight")
        layer.bias = nn.Parameter(weight.new_empty(found, device="meta"), requires_grad=False) if has_bias else None
        if has_bias:
            self._mirror_parameter(layer, "bias", f"{path}.bias")

    def _mirror_parameter(self, module: nn.Module, name: str, path: str) -> None:
        """Makes a parameter of the decoder share the model's memory, or copies it if the model computes it."""
        value, (owner, own_name) = tensor_at(self._source, path), owner_of(self._source, path)
        value = value.flatten(0, 1) if path == "pos_embed" else value
        _check_shape(value, getattr(module, name), path)
        if own_name not in owner._parameters:
            value = value.clone()
            self._copy(path, partial(_load, value, self._source, path))
        setattr(module, name, nn.Parameter(value, requires_grad=False))

    def _refuse_the_rest(self) -> None:
        parameters = dict(self._source.named_parameters())
        used = {id(p) for module in self._used for p in module.parameters()}
        used |= {id(p) for copy in self._copies for p in copy.tensors} | {id(self._source._parameters.get("pos_embed"))}
        rest = [name for name, parameter in parameters.items() if id(parameter) not in used]
        if rest:
            raise ValueError(f"the model does not fit {self.decoder.config}: nothing is made of {', '.join(rest)}")
        device = self.decoder.pos_embed.device
        elsewhere = [f"{name} on {p.device}" for name, p in parameters.items() if p.device != device]
        if elsewhere:
            raise ValueError(f"the model must lie on one device, got pos_embed on {device} and {elsewhere[0]}")


@contextmanager
def _ordinary_tensors() -> Iterator[None]:
    with torch.inference_mode(False), torch.no_grad():
        yield


def _load(memory: Tensor, source: nn.Module, path: str) -> None:
    memory.copy_(tensor_at(source, path).reshape(memory.shape))


def _load_packed(layer: PackedLinear, source: nn.Module) -> None:
    layer.pack(weight=tensor_at(source, "weight"))


def _check_shape(found: Tensor, wanted: Tensor, name: str) -> None:
    if found.shape != wanted.shape:
        raise ValueError(f"{name} must have shape {list(wanted.shape)}, got {list(found.shape)}")


def _some_values(tensor: Tensor) -> Tensor:
    """Returns a view of a few values in the middle of the tensor."""
    row = tensor[tuple(size // 2 for size in tensor.shape[:-1])] if tensor.ndim else tensor[None]
    start = max(0, len(row) // 2 - _SAMPLE // 2)
    return row[start : start + _SAMPLE]
