"""Drop-in for the published LPD model object: the same `sample_tokens`, decoded by this library."""

from __future__ import annotations

from collections.abc import Sequence
from types import MethodType
from typing import TypeVar

import torch
from torch import Tensor, nn

from lpd_ext.checkpoint import infer_config, model_from_state_dict
from lpd_ext.checks import as_int
from lpd_ext.cuda_graphs import DecodeGraphs
from lpd_ext.request import GUIDANCE_SCHEDULES, make_request
from lpd_ext.sampler import generate
from lpd_ext.schedule import check_group_sizes, parse_group_sizes

AnyModule = TypeVar("AnyModule", bound=nn.Module)


def accelerate(model: AnyModule, *, heads: int | None = None) -> AnyModule:
    """Replace `model.sample_tokens` by this library's decoder, under the published signature; returns the same model.

    model is any module with the published state-dict layout; heads is needed where the head dimension is not 64. The
    weights are taken as they are now (most are shared, the embedding tables are copied): after changing them, call
    accelerate again. Shared weights cannot be packed: on a CPU, `LPDPipeline` decodes faster. Raises ValueError if the
    layout does not fit.
    """
    state = {name: value.detach() for name, value in model.state_dict().items()}
    if heads is None:
        heads = _published_heads(model)
    # Decoding needs the number of cells only: orders come from the caller.
    positions = state.get("pos_embed")
    row = None if positions is None or positions.ndim != 3 else (1, positions.shape[1] - 1)
    decoder = model_from_state_dict(state, infer_config(state, heads, row)).eval()
    graphs = DecodeGraphs()

    def sample_tokens(
        self: nn.Module,
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
        """Draw bsz images; int64 [bsz, N] in raster order. Random numbers follow torch's global generator."""
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
            guidance_scale=float(cfg),
            guidance_schedule=cfg_schedule,
            temperature=float(temperature),
            top_k=top_k,
            top_p=float(top_p),
        )
        return generate(decoder, request, graphs)

    # nn.Module declares its attributes to be tensors or modules; this one is a method.
    model.sample_tokens = MethodType(sample_tokens, model)  # type: ignore[assignment]
    return model


def _check_integers(name: str, value: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor of integers, got {type(value).__name__}")
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{name} must be a tensor of integers, got one of {value.dtype}")


def _published_heads(model: nn.Module) -> int | None:
    blocks = getattr(model, "blocks", None)
    heads = getattr(getattr(blocks[0], "attn", None), "num_heads", None) if blocks else None
    return heads if isinstance(heads, int) else None


def _check_attention_mask(mask: Tensor | None, group_sizes: Sequence[int]) -> None:
    """Published callers pass the block-causal mask over [condition, groups]; here it is implied, so only checked."""
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
