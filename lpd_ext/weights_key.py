"""Keys that tell whether a capture or copy of a model is still valid: addresses and sources of its weights."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from functools import cache
from itertools import chain
from operator import attrgetter
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

_dtype = attrgetter("dtype")


def weights_of(model: nn.Module) -> Hashable:
    """Returns a key of everything in the model that a captured decode depends on: equal while the capture is valid.

    It holds the addresses of weights, not their values; the values that weights are computed from
    (torch.nn.utils.parametrize); plain attributes of foreign modules such as adapters; and torch's TF32 setting.
    """
    walk = _walks.get(model)
    if walk is None or not walk.is_current():
        walk = _walks[model] = _Walk.through(model)
    tensors = _tensors(walk.tensors)
    return (
        torch.backends.cuda.matmul.fp32_precision,
        tuple(map(Tensor.data_ptr, tensors)),
        tuple(map(_dtype, tensors)),
        tuple(map(_Contents.of, _tensors(walk.sources))),
        tuple(map(_plain, walk.of_others)),
    )


def _tensors(dicts: list[dict[str, Any]]) -> list[Tensor]:
    return [tensor for tensor in chain.from_iterable(map(dict.values, dicts)) if tensor is not None]


@dataclass(frozen=True)
class _Walk:
    """A model's modules by their dicts, which torch changes in place; walking again would cost a decode 0.1 ms."""

    children: list[dict[str, Any]]
    seen: tuple[nn.Module | None, ...]  # what `children` held
    tensors: list[dict[str, Any]]  # parameters and buffers
    sources: list[dict[str, Any]]  # of these, what weights are computed from
    of_others: list[dict[str, Any]]  # the attributes of modules of which nothing is known

    @classmethod
    def through(cls, model: nn.Module) -> _Walk:
        found: list[tuple[nn.Module, bool]] = [(model, False)]  # and whether weights are computed from it
        for module, computes in found:  # which grows
            for name, child in module._modules.items():
                if child is not None:
                    found.append((child, computes or name == "parametrizations"))
        children: list[dict[str, Any]] = [module._modules for module, _ in found]
        walk = cls(children, tuple(chain.from_iterable(map(dict.values, children))), [], [], [])
        for module, computes in found:
            foreign = computes or not _is_known(type(module).__module__)
            dicts = (module._parameters, module._buffers)
            walk.tensors.extend(tensors for tensors in dicts if tensors or foreign)  # a GELU comes to have none
            walk.sources.extend(dicts if computes else ())
            walk.of_others.extend([vars(module)] if foreign else ())
        return walk

    def is_current(self) -> bool:
        return tuple(chain.from_iterable(map(dict.values, self.children))) == self.seen


_walks: WeakKeyDictionary[nn.Module, _Walk] = WeakKeyDictionary()  # a walk refers to no module but by its parent


@dataclass(frozen=True)
class _Contents:
    """A key of a tensor's content, equal until it is written to; misses writes to its `.data`."""

    address: int
    version: int
    memory: Tensor = field(compare=False)  # kept, so that no other tensor comes to lie there

    @classmethod
    def of(cls, tensor: Tensor) -> _Contents:
        return cls(tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version, tensor.detach())


@cache
def _is_known(home: str) -> bool:
    """Whether modules of types defined there are known to have no attributes that a decode depends on."""
    return home.startswith(("torch.nn.modules.", "lpd_ext."))


def plain_settings(module: nn.Module) -> Hashable:
    """Returns the attributes of a module that are numbers, strings, or lists and dicts of them, such as a scale."""
    return _plain(vars(module))


def _plain(value: object) -> Hashable:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return tuple(map(_plain, value))
    if isinstance(value, dict):
        return tuple((key, _plain(entry)) for key, entry in value.items())
    return ...
