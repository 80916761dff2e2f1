"""Drop-in for the published LPD model object: `sample_tokens` with the same signature, decoded by this library."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from threading import Lock
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from lpd_ext import memory
from lpd_ext.checks import as_int, as_real
from lpd_ext.cuda_graphs import DecodeGraphs
from lpd_ext.linear import PackedLinear, can_pack, is_plain
from lpd_ext.mirror import Mirror
from lpd_ext.model import LPDModel
from lpd_ext.published_modules import config_of, linear_paths, module_at, owner_of, unwrapped
from lpd_ext.request import GUIDANCE_SCHEDULES, make_request
from lpd_ext.sampler import generate
from lpd_ext.schedule import check_group_sizes, parse_group_sizes

AnyModule = TypeVar("AnyModule", bound=nn.Module)
Packing = bool | Literal["inplace"] | None
_NAME = "sample_tokens"
_LEAST_TEMPERATURE = 1e-5  # of the published sampler, which takes it for anything below
_LEAST_TOP_P = torch.finfo(torch.float32).tiny


def accelerate(model: AnyModule, *, heads: int | None = None, packed: Packing = None) -> AnyModule:
    """Replaces `model.sample_tokens` by this library's decoder, with the published signature; returns the same model.

    model is built like the published one, or is such a model wrapped by DDP, torch.compile or PEFT. heads is required
    unless the model has it or its head dimension is 64.

    packed, on a CPU: decoding is faster from packed linear weights. True packs a second copy of them (1.3 GB for
    lpd_l), False none; None, the default, packs a copy if that takes at most half of the free memory. "inplace" packs
    the model's own layers, which then have no parameters and can be called but not trained until `restore`. All other
    weights are shared, except the embedding tables, which are copied.

    Each call first picks up changed weights; docs/guide/drop_in.md has details, also on adapters. Raises ValueError for
    a model that cannot be decoded, TypeError for a name or an `LPDModel`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be the published model object, got {model!r}: LPDPipeline.from_pretrained loads models by name"
        )
    if isinstance(model, LPDModel):
        raise TypeError("model must be the published model object, got an LPDModel: `generate` decodes it as it is")
    if packed not in (None, True, False, "inplace"):
        raise ValueError(f"packed must be True, False, None or 'inplace', got {packed!r}")
    models = unwrapped(model)
    config_of(models[-1], heads)
    restore(model)
    drop_in = SampleTokens(models[-1], heads, packed)
    try:
        drop_in.decoder()
    except Exception:
        drop_in.give_back()
        raise
    for module in reversed(models):
        if getattr(module, _NAME, None) is not drop_in:  # torch.compile's wrapper shows inner attributes
            vars(module)[_NAME] = drop_in
    return model


def restore(model: AnyModule) -> AnyModule:
    """Undoes `accelerate`: puts back the model's `sample_tokens` and, after "inplace", its linear layers; returns it.

    Weights keep their present values. Does nothing to a model that was not accelerated.
    """
    for module in unwrapped(model):
        if isinstance(vars(module).get(_NAME), SampleTokens):
            vars(module).pop(_NAME).give_back()
    return model


class SampleTokens:
    """`sample_tokens` of an accelerated model; copies and pickles of the model get their own."""

    def __init__(self, model: nn.Module, heads: int | None, packed: Packing) -> None:
        self._model, self._heads, self._packed = model, heads, packed
        self._taken: list[tuple[PackedLinear, nn.Module]] = []  # packed in place, and the original layer
        self._forget()

    def _forget(self) -> None:
        self._mirror: Mirror | None = None
        self._graphs = DecodeGraphs()
        self._lock = Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("_model", "_heads", "_packed", "_taken")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def decoder(self) -> LPDModel:
        """Returns the decoder with the model's present weights."""
        with self._lock:
            if self._mirror is None or not self._mirror.up_to_date():
                self._mirror, self._graphs = None, DecodeGraphs()  # frees their memory before new is taken
                if self._packed == "inplace":
                    self._take_layers()
                self._mirror = Mirror(self._model, self._heads, self._shall_pack())
            return self._mirror.decoder

    def _shall_pack(self) -> bool:
        if self._packed is not None:
            return bool(self._packed)
        free, needed = memory.available(), sum(weight.nbytes for _, weight in self._packable())
        return free is None or needed <= free // 2

    def _packable(self) -> list[tuple[str, Tensor]]:
        """Returns paths and weights of the plain linear layers that can be packed."""
        depth = len(self._model.get_submodule("blocks")._modules)
        layers = [(path, module_at(self._model, path)) for path in linear_paths(depth)]
        weights = [(path, layer._parameters.get("weight")) for path, layer in layers if is_plain(layer)]
        return [(path, w) for path, w in weights if w is not None and can_pack(w.device, w.dtype)]

    def _take_layers(self) -> None:
        """Replaces the model's linear layers by packed ones and frees their weights."""
        uses = Counter(id(w) for module in self._model.modules() for w in module._parameters.values())
        for path, weight in self._packable():
            parent, name = owner_of(self._model, path)
            layer = parent.get_submodule(name)
            if uses[id(weight)] > 1 or layer._modules:  # weights shared with other layers, or a computed bias
                continue
            bias = layer._parameters.get("bias")
            packed = PackedLinear(weight.shape[1], weight.shape[0], bias is not None)
            packed.pack(weight=weight)
            packed.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
            weight.data = weight.new_empty(0)
            parent._modules[name] = packed
            self._taken.append((packed, layer))

    def give_back(self) -> None:
        """Puts the model's own linear layers back, with their present weights."""
        self._forget()  # the decoder uses the packed layers
        while self._taken:
            packed, layer = self._taken.pop()
            for parent in self._model.modules():
                for name, child in parent._modules.items():
                    if child is packed:
                        layer.get_parameter("weight").data = packed.weight
                        if packed.bias is not None:
                            layer.get_parameter("bias").data = packed.bias.data
                        parent._modules[name] = layer

    def __call__(
        self,
        bsz: int,
        cfg: float = 1.0,
        cfg_schedule: str = "linear",
        labels: Tensor | None = None,
        temperature: float = 1.0,
        attn_mask: Tensor | None = None,
        top_k: int = 0,
        top_p: float = 1.0,
        group_sizes: str | Sequence[int] | None = None,
        orders: Tensor | None = None,
    ) -> Tensor:
        """Draws bsz images: int64 [bsz, N] in raster order. Random numbers come from torch's global generator.

        As published: cfg is any number, and 1 leaves out the unconditional branch; temperature is at least 1e-5; top_k
        < 1 and top_p >= 1 switch the filters off; top_p <= 0 keeps the most likely token alone.
        """
        decoder = self.decoder()
        num_tokens = decoder.config.num_tokens
        bsz = as_int(bsz, "bsz")
        if bsz < 0:
            raise ValueError(f"bsz must be >= 0, got {bsz}")
        if cfg_schedule not in GUIDANCE_SCHEDULES:
            raise ValueError(f"cfg_schedule must be one of {GUIDANCE_SCHEDULES}, got {cfg_schedule!r}")
        if group_sizes is None or orders is None:
            raise ValueError("group_sizes and orders must be given")
        _check_integers("orders", orders)
        if labels is not None:
            _check_integers("labels", labels)
            if tuple(labels.shape) != (bsz,):
                raise ValueError(f"labels must have bsz = {bsz} entries, got {list(labels.shape)}")
        sizes = parse_group_sizes(group_sizes) if isinstance(group_sizes, str) else group_sizes
        sizes = check_group_sizes(sizes, num_tokens)
        _check_attention_mask(attn_mask, sizes)
        request = make_request(
            decoder.config,
            [None] * bsz if labels is None else [None if y == -1 else y for y in labels.tolist()],
            group_sizes=[sizes] * bsz,
            order=orders.to(torch.int64),
            guidance_scale=as_real(cfg, "cfg"),
            guidance_schedule=cfg_schedule,
            temperature=max(as_real(temperature, "temperature"), _LEAST_TEMPERATURE),
            top_k=max(as_int(top_k, "top_k"), 0),
            top_p=min(max(as_real(top_p, "top_p"), _LEAST_TOP_P), 1.0),
        )
        return generate(decoder, request, self._graphs)


def _check_integers(name: str, value: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor of integers, got {type(value).__name__}")
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{name} must be a tensor of integers, got one of {value.dtype}")


def _check_attention_mask(mask: Tensor | None, group_sizes: Sequence[int]) -> None:
    """Checks the block-causal mask over [condition, groups] that published callers pass; decoding implies it."""
    if mask is None:
        return
    if not isinstance(mask, Tensor):
        raise TypeError(f"attn_mask must be None or a tensor, got {type(mask).__name__}")
    sizes = torch.tensor([1, *group_sizes])
    block = torch.arange(len(sizes)).repeat_interleave(sizes)
    expected = block[:, None] >= block[None, :]
    allowed = mask.cpu() if mask.dtype == torch.bool else mask.cpu() == 0
    is_additive = mask.is_floating_point() and bool((mask.cpu()[~allowed] == float("-inf")).all())
    if mask.dtype != torch.bool and not is_additive:
        raise ValueError("attn_mask must be bool, or float with 0 where a row may see a column and -inf elsewhere")
    if allowed.shape != expected.shape or not torch.equal(allowed, expected):
        raise ValueError(
            f"attn_mask must be None or the block-causal mask {list(expected.shape)} of the group sizes, got another "
            f"one of shape {list(mask.shape)}"
        )
