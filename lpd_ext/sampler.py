"""The decode loop: groups of tokens from orders, schedules and a KV cache; it never waits for the device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from numbers import Real
from typing import Literal

import torch
from torch import Tensor

from lpd_ext import memory, ops
from lpd_ext.cuda_graphs import CapturedDecode, DecodeGraphs
from lpd_ext.model import LPDModel
from lpd_ext.plan import Step, plan_decoding
from lpd_ext.schedule import check_group_sizes

GuidanceSchedule = Literal["linear", "constant"]
GUIDANCE_SCHEDULES: tuple[GuidanceSchedule, ...] = ("linear", "constant")
# The kernels compute in float32: beyond these, a value or its product with n or a logit would become inf or 0.
_LARGEST, _SMALLEST = 1e30, torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class DecodeRequest:
    """What to draw for B images; every list has B entries, one per image.

    labels in [0, C) or None; group_sizes sum to N; orders int64 [B, N], a permutation of the cells each; guidance_scale
    >= 1 (1: no unconditional branch); temperature >= 0 (0: argmax); top_k >= 0 (0: off); top_p in (0, 1] (1: off);
    seeds are 64-bit integers.
    """

    labels: Sequence[int | None]
    group_sizes: Sequence[Sequence[int]]
    orders: Tensor
    guidance_scale: Sequence[float]
    temperature: Sequence[float]
    top_k: Sequence[int]
    top_p: Sequence[float]
    seeds: Sequence[int]
    guidance_schedule: GuidanceSchedule = "linear"

    def with_orders(self, orders: Tensor) -> DecodeRequest:
        """The same request with other orders."""
        return replace(self, orders=orders)

    def check(self, num_tokens: int, num_classes: int) -> None:
        """Raise ValueError or TypeError naming the first argument that is wrong."""
        self.check_values(num_tokens, num_classes)
        check_orders(self.orders, len(self.labels), num_tokens)

    def check_values(self, num_tokens: int, num_classes: int) -> None:
        """`check`, but for the orders, which may depend on the rest."""
        batch = len(self.labels)
        for name in ("group_sizes", "orders", "guidance_scale", "temperature", "top_k", "top_p", "seeds"):
            if len(getattr(self, name)) != batch:
                raise ValueError(f"{name} must have one entry per label ({batch}), got {len(getattr(self, name))}")
        for b, label in enumerate(self.labels):
            if label is not None and not _is_int_in(label, 0, num_classes):
                raise ValueError(f"labels[{b}] must be None or an integer in [0, {num_classes}), got {label!r}")
        for b, sizes in enumerate(self.group_sizes):
            check_group_sizes(sizes, num_tokens, f"group_sizes[{b}]")
        for b in range(batch):
            if not _is_real_in(self.guidance_scale[b], 1, _LARGEST):
                raise ValueError(f"guidance_scale[{b}] must be in [1, {_LARGEST}], got {self.guidance_scale[b]!r}")
            if not _is_real_in(self.temperature[b], 0, _LARGEST):
                raise ValueError(f"temperature[{b}] must be in [0, {_LARGEST}], got {self.temperature[b]!r}")
            if not _is_int_in(self.top_k[b], 0):
                raise ValueError(f"top_k[{b}] must be an integer >= 0, got {self.top_k[b]!r}")
            if not _is_real_in(self.top_p[b], _SMALLEST, 1):
                raise ValueError(f"top_p[{b}] must be in (0, 1] and >= {_SMALLEST:.2g}, got {self.top_p[b]!r}")
            if not _is_int_in(self.seeds[b], -(2**63), 2**63):
                raise ValueError(f"seeds[{b}] must be a signed 64-bit integer, got {self.seeds[b]!r}")
        if self.guidance_schedule not in GUIDANCE_SCHEDULES:
            raise ValueError(f"guidance_schedule must be one of {GUIDANCE_SCHEDULES}, got {self.guidance_schedule!r}")


def check_orders(orders: Tensor, batch: int, num_tokens: int) -> None:
    """Raise unless orders is int64 [B, N] with a permutation of 0..N-1 in each row."""
    if not isinstance(orders, Tensor):
        raise TypeError(f"orders must be an int64 tensor of shape [{batch}, {num_tokens}], got {type(orders).__name__}")
    if orders.dtype != torch.int64 or tuple(orders.shape) != (batch, num_tokens):
        raise ValueError(
            f"orders must be int64 of shape [{batch}, {num_tokens}], got {orders.dtype} {list(orders.shape)}"
        )
    cells = torch.arange(num_tokens, device=orders.device)
    wrong = (orders.sort(dim=1).values != cells).any(dim=1).nonzero()
    if len(wrong):
        raise ValueError(f"orders[{int(wrong[0])}] must be a permutation of 0..{num_tokens - 1}")


def _is_int_in(value: object, low: int, high: float = float("inf")) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value < high


def _is_real_in(value: object, low: float, high: float) -> bool:
    return not isinstance(value, bool) and isinstance(value, Real) and low <= float(value) <= high


def decode(model: LPDModel, request: DecodeRequest) -> Iterator[Tensor]:
    """Draw images step by step; yields the grids int64 [B, N] (raster order, -1 not yet drawn) after each group.

    The yielded tensor is the same one each time, updated in place. Raises ValueError or TypeError for a bad request at
    once, and RuntimeError when logits are NaN. No gradients, and the model's own dtypes even under torch.autocast.
    """
    request.check(model.config.num_tokens, model.config.num_classes)
    return _decode(model, request)


def _decode(model: LPDModel, request: DecodeRequest) -> Iterator[Tensor]:
    # Left at each yield: between two steps the caller's own modes hold.
    with _decoding_modes(model.pos_embed.device):
        state = _DecodeState(model, _Layout.of(request))
        state.load(request)
        state.plan.record_stream()
    for t, step in enumerate(state.plan.steps):
        with _decoding_modes(model.pos_embed.device):
            state.advance(step)
            if t + 1 == len(state.plan.steps):
                state.check_drawn()
        yield state.grid


@contextmanager
def _decoding_modes(device: torch.device) -> Iterator[None]:
    """No gradients and no autocast; no inference mode either, so that the tokens are ordinary tensors.

    A GPU is made the current one: streams and graphs belong to that.
    """
    on_gpu = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with on_gpu, torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


def generate(model: LPDModel, request: DecodeRequest, graphs: DecodeGraphs | None = None) -> Tensor:
    """Draw images and return their tokens int64 [B, N] in raster order; errors as in `decode`.

    graphs: on CUDA, captured decodes of this model to replay and to add to.
    """
    request.check(model.config.num_tokens, model.config.num_classes)
    if graphs is not None and graphs.supports(model.pos_embed.device) and request.labels:
        try:
            return _replay(model, request, graphs)
        except torch.OutOfMemoryError:
            graphs.clear()  # they hold the caches of several batches; one alone may fit
    grid = torch.empty(0, model.config.num_tokens, dtype=torch.int64, device=model.pos_embed.device)
    for drawn_so_far in _decode(model, request):
        grid = drawn_so_far
    return grid


def _replay(model: LPDModel, request: DecodeRequest, graphs: DecodeGraphs) -> Tensor:
    layout, device = _Layout.of(request), model.pos_embed.device
    # A graph reads the weights where they lay when it was captured.
    weights = tuple(parameter.data_ptr() for parameter in model.parameters())

    def capture() -> CapturedDecode[_DecodeState]:
        state = _DecodeState(model, layout)
        state.load(request)
        return graphs.capture(state, [partial(state.advance, step) for step in state.plan.steps])

    with _decoding_modes(device), graphs.lock:
        state = (captured := graphs.find(weights, layout, capture)).state
        try:
            state.load(request)
            captured.replay()
            tokens = state.grid.clone()
        finally:
            if device.type == "cuda":  # the next caller may use these buffers on another stream
                torch.cuda.current_stream().synchronize()
        state.check_drawn()
        return tokens


@dataclass(frozen=True)
class _Layout:
    """What a decode's plan and buffers follow from; all else of a request is data in them."""

    group_sizes: tuple[tuple[int, ...], ...]
    guided: tuple[bool, ...]
    top_k: bool
    top_p: bool

    @classmethod
    def of(cls, request: DecodeRequest) -> _Layout:
        return cls(
            group_sizes=tuple(map(tuple, request.group_sizes)),
            # Without a label both branches are the same, so guidance would only cost time.
            guided=tuple(
                scale != 1 and label is not None
                for scale, label in zip(request.guidance_scale, request.labels, strict=True)
            ),
            top_k=any(request.top_k),
            top_p=any(p < 1 for p in request.top_p),
        )


class _DecodeState:
    """Tables and caches of one batch while it is drawn; allocated once, before the first step."""

    def __init__(self, model: LPDModel, layout: _Layout) -> None:
        config, device = model.config, model.pos_embed.device
        batch, num_tokens = len(layout.group_sizes), config.num_tokens
        self.model = model
        self.plan = plan = plan_decoding(layout.group_sizes, layout.guided, num_tokens, device)
        sequences = plan.num_sequences

        def empty(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        # Layout of plan.py: condition, tokens in decoding order, mask token.
        self.contents, self.positions = empty(sequences, num_tokens + 2), empty(sequences, num_tokens + 2)
        self.grid = empty(batch, num_tokens)
        self.guidance = empty(batch, num_tokens, dtype=torch.float32)
        self.temperature = empty(batch, dtype=torch.float32)
        self.top_k = empty(batch, dtype=torch.int32) if layout.top_k else None
        self.top_p = empty(batch, dtype=torch.float32) if layout.top_p else None
        self.seeds = empty(batch)

        cache_shape = (config.depth, sequences, config.heads, plan.cache_positions, config.head_dim)
        k_cache, v_cache = (memory.empty(cache_shape, model.pos_embed.dtype, device) for _ in range(2))
        self.parts = model.decoding_parts(k_cache, v_cache, plan.most_rows)
        self.workspace = ops.group_attention_workspace(config.head_dim, device)

    def load(self, request: DecodeRequest) -> None:
        """Take over a request's data, of the same layout; nothing is drawn yet."""
        config, device, plan = self.model.config, self.contents.device, self.plan
        batch, num_tokens = self.grid.shape

        def per_image(values: Sequence[float], dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        labels = per_image([-1 if label is None else label for label in request.labels], torch.int64)
        conditions = self.model.condition_ids(labels)[plan.sequence_image]
        conditions[batch:] = config.unconditional_id
        self.contents.fill_(config.mask_id)
        self.contents[:, 0] = conditions
        self.positions.zero_()
        self.positions[:, 1:-1] = request.orders.to(device)[plan.sequence_image] + 1
        self.grid.fill_(-1)

        scale = per_image(request.guidance_scale, torch.float32)[:, None]
        if request.guidance_schedule == "linear":
            scale = 1 + (scale - 1) * torch.arange(num_tokens, device=device) / num_tokens
        self.guidance.copy_(scale.expand(batch, num_tokens))
        self.temperature.copy_(per_image(request.temperature, torch.float32))
        if self.top_k is not None:
            # More than V is the whole vocabulary, and may not fit int32.
            self.top_k.copy_(per_image([min(k, config.vocab_size) for k in request.top_k], torch.int32))
        if self.top_p is not None:
            self.top_p.copy_(per_image(request.top_p, torch.float32))
        self.seeds.copy_(per_image(request.seeds, torch.int64))

    def advance(self, step: Step) -> None:
        """Feed one step and write the tokens it draws; waits for nothing, allocates by torch only."""
        content_ids = self.contents.view(-1)[step.content_index]
        positions = self.positions.view(-1)[step.position_index]
        logits = self.model.decode_step(content_ids, positions, self.parts, step, self.workspace)
        if logits is None:
            return
        cells = self.positions[step.image, step.token_index + 1] - 1
        tokens = ops.sample_tokens(
            logits,
            step.conditional_row,
            step.unconditional_row,
            self.guidance[step.image, step.token_index],
            self.temperature[step.image],
            None if self.top_k is None else self.top_k[step.image],
            None if self.top_p is None else self.top_p[step.image],
            self.seeds[step.image],
            cells,
        )
        self.contents.view(-1).index_copy_(0, step.write_index, tokens[step.write_source])
        self.grid.index_put_((step.image, cells), tokens)

    def check_drawn(self) -> None:
        """Raise RuntimeError if a token could not be drawn: CUDA kernels do not raise, which would wait, but say -1."""
        if bool((self.grid < 0).any()):
            raise RuntimeError("logits contain NaN or are -inf throughout: nothing can be drawn")
