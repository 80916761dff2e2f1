"""State on the device while images are drawn: tables with the requests' data, KV caches, work memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lpd_ext import memory, ops
from lpd_ext.model import LPDConfig, LPDModel
from lpd_ext.plan import Capacity, Places, Plan, plan_decoding
from lpd_ext.request import DecodeRequest

_SETTINGS = (
    ("seed", np.int64),
    ("condition", np.int64),
    ("temperature", np.float32),
    ("top_p", np.float32),
    ("top_k", np.int32),
    ("unused", np.int32),
)


def _record(num_tokens: int) -> np.dtype[Any]:
    """Returns the layout of an image's settings, which go to the device in one copy, guidance per token included."""
    return np.dtype([*_SETTINGS, ("guidance", np.float32, num_tokens + num_tokens % 2)])  # whole words of 8 bytes


@dataclass(frozen=True)
class Filters:
    """The filters that some image of a step uses; the others cost nothing."""

    top_k: bool
    top_p: bool

    @classmethod
    def of(cls, request: DecodeRequest) -> Filters:
        """Returns the filters of the request's images."""
        return cls(top_k=any(request.top_k), top_p=any(p < 1 for p in request.top_p))


@dataclass(frozen=True)
class Layout:
    """The layout of a batch: it determines a decode's plan and buffers and is the key of a captured graph.

    Everything else in a request is data.
    """

    group_sizes: tuple[tuple[int, ...], ...]
    prefill: tuple[tuple[int, ...], ...]
    guided: tuple[bool, ...]
    filters: Filters

    @classmethod
    def of(cls, request: DecodeRequest) -> Layout:
        """Returns the layout of the request."""
        schedules = request.schedules
        sizes, blocks = tuple(s.group_sizes for s in schedules), tuple(s.prefill for s in schedules)
        return cls(sizes, blocks, request.guided, Filters.of(request))

    def plan(self, num_tokens: int, device: torch.device) -> Plan:
        """Plans all steps on a grid of N cells."""
        return plan_decoding(self.group_sizes, self.guided, num_tokens, device, self.prefill)


def cache_bytes(config: LPDConfig, dtype: torch.dtype, images: int) -> int:
    """Size of the KV caches of so many images of any schedule, each with its unconditional twin."""
    return 2 * images * 2 * config.depth * config.dim * config.num_tokens * dtype.itemsize


class DecodeState:
    """Tables, KV caches and work memory of the images being drawn, allocated once before the first step.

    Tables by slot [S, N + 2], laid out as plan.py says: `contents`, `positions`. Tables by image [B, ...]: `grid` int64
    [B, N], the tokens in raster order, -1 where none is yet; and views of `settings`, which one copy fills: `guidance`
    float32 [B, N] by place in the order, `seeds`, `temperature`, `top_p`, `top_k` [B]. `load` writes a request's data
    at its places; other places stay as they are, so images may come and go while others are drawn.
    """

    def __init__(self, model: LPDModel, capacity: Capacity, filters: Filters) -> None:
        config, device, dtype = model.config, model.pos_embed.device, model.pos_embed.dtype
        num_tokens = config.num_tokens
        self.model, self.capacity, self.filters = model, capacity, filters

        def table(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        self.contents = table(capacity.sequences, num_tokens + 2)
        self.contents[:, -1] = config.mask_id
        self.positions = table(capacity.sequences, num_tokens + 2)
        self.positions[:, 0] = 0
        self.grid = table(capacity.images, num_tokens)
        # Views that `load` writes through, made once since each costs the host 3 us.
        self._conditions, self._tokens, self._cells = (
            self.contents[:, 0],
            self.contents[:, 1:-1],
            self.positions[:, 1:-1],
        )
        self._record = record = _record(num_tokens)
        self.settings = table(capacity.images, record.itemsize // 8)
        self.guidance = _field(self.settings, record, "guidance")[:, :num_tokens]
        self.seeds, self.temperature, self.top_p, self.top_k = (
            _field(self.settings, record, name)[:, 0] for name in ("seed", "temperature", "top_p", "top_k")
        )
        cache_shape = (config.depth, capacity.sequences, config.heads, capacity.cache_positions, config.head_dim)
        self._k_cache, self._v_cache = (memory.empty(cache_shape, dtype, device) for _ in range(2))
        self.look_up_weights()
        self.workspace = ops.group_attention_workspace(config.head_dim, device)

    def look_up_weights(self) -> None:
        """Switches to the model's present layers and weights."""
        self.parts = self.model.decoding_parts(self._k_cache, self._v_cache, self.capacity.most_rows)

    def load(self, request: DecodeRequest, places: Places, teacher: Tensor | None = None) -> None:
        """Writes a request's data to its places; nothing of it is drawn or cached yet.

        teacher int64 [B, N]: tokens in raster order, fed in place of drawn ones; do not sample then.
        """
        config, device, known = self.model.config, self.contents.device, request.known_tokens
        batch, (images, slots, sources) = len(request.labels), (places.images, places.slots, places.sources)
        settings = _settings_of(request, self._record)
        settings = settings.pin_memory() if device.type == "cuda" and batch else settings
        settings = settings.to(device, non_blocking=True)
        self.settings.index_copy_(0, images, settings)
        orders = request.orders.to(device, non_blocking=True)
        self._cells.index_copy_(0, slots, (orders + 1).index_select(0, sources))
        conditions = _field(settings, self._record, "condition")[:, 0].index_select(0, sources)
        conditions[batch:].fill_(config.unconditional_id)
        self._conditions.index_copy_(0, slots, conditions)
        # A column read before its token is drawn holds -1, for which no table has a row.
        fed = known if teacher is None else teacher
        if fed is None:
            self._tokens.index_fill_(0, slots, -1)
        else:
            self._tokens.index_copy_(0, slots, fed.to(device).gather(1, orders).index_select(0, sources))
        if known is None:
            self.grid.index_fill_(0, images, -1)
        else:
            self.grid.index_copy_(0, images, known.to(device))

    def check_drawn(self) -> None:
        """Raises RuntimeError if a token could not be drawn: CUDA kernels return -1, since raising would wait."""
        if bool((self.grid < 0).any()):
            raise RuntimeError("logits contain NaN or are -inf throughout: nothing can be drawn")


def _field(settings: Tensor, record: np.dtype[Any], name: str) -> Tensor:
    """Returns a field of each record in settings int64 [B, words], as a view [B, entries]."""
    assert record.fields is not None
    kind, offset = record.fields[name][:2]
    dtype = {np.int64: torch.int64, np.int32: torch.int32, np.float32: torch.float32}[kind.base.type]
    first = offset // dtype.itemsize
    return settings.view(dtype)[:, first : first + kind.itemsize // dtype.itemsize]


def _settings_of(request: DecodeRequest, record: np.dtype[Any]) -> Tensor:
    """Returns the records of a request's images as int64 [B, words], on the CPU."""
    config = request.config
    records = np.zeros(len(request.labels), record)
    records["seed"] = request.seeds
    records["condition"] = [
        config.unconditional_id if label is None else config.vocab_size + label for label in request.labels
    ]
    records["temperature"] = request.temperature
    records["top_p"] = request.top_p
    # Above V it means the whole vocabulary, and may not fit int32.
    records["top_k"] = [min(k, config.vocab_size) for k in request.top_k]
    # The n-th token of N has scale 1 + (scale - 1) * n / N, or the scale itself.
    scale = np.array(request.guidance_scale, np.float32)[:, None]
    n = np.arange(config.num_tokens, dtype=np.float32)
    guidance = records["guidance"][:, : config.num_tokens]
    guidance[:] = 1 + (scale - 1) * n / np.float32(config.num_tokens)
    for image, schedule in enumerate(request.guidance_schedule):
        if schedule == "constant":
            guidance[image] = scale[image]
    return torch.from_numpy(records.view(np.int64).reshape(len(records), record.itemsize // 8))
