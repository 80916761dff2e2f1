"""Requests to decode: complete and checked once they exist, so that nothing later checks again."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lpd_ext.checks import as_int, as_real, as_scalar, check_tensor, per_image
from lpd_ext.model import LPDConfig
from lpd_ext.modes import own_modes
from lpd_ext.orders import Order, known_first, make_checked_orders
from lpd_ext.plan import Schedule
from lpd_ext.schedule import check_group_sizes, sizes_per_image
from lpd_ext.schedule import group_sizes as default_group_sizes

GuidanceSchedule = Literal["linear", "constant"]
GUIDANCE_SCHEDULES: tuple[GuidanceSchedule, ...] = ("linear", "constant")
# The kernels compute in float32: beyond these limits a value or its product with n or a logit would be inf or 0.
_LARGEST, _SMALLEST = 1e30, torch.finfo(torch.float32).tiny
# Seeds drawn here pass through JSON in any language unchanged: its numbers are float64 in browsers.
_DRAWN_SEEDS = 2**53


@dataclass(frozen=True, eq=False)
class OrderPolicy:
    """The policy and the device for making the orders of a request; arguments as in `orders.make_orders`."""

    order: Order = "locality"
    proximity_threshold: float | Sequence[float] = 1.0
    repulsion_threshold: int | Sequence[int | None] | None = None
    device: torch.device | str = "cpu"


@dataclass(frozen=True, eq=False)
class DecodeRequest:
    """A checked request to draw B images by a model of these sizes; sequences have one entry per image.

    labels in [0, C) or None; group_sizes sum to the cells to draw; guidance_scale is finite (1: no unconditional
    branch); temperature >= 0 (0: argmax); top_k >= 0 (0: off); top_p in (0, 1] (1: off); seeds are 64-bit integers.
    guidance_schedule: one, or one per image. order: a policy, or the orders themselves, int64 [B, N], each a
    permutation of the cells: known ones, then those to draw.

    Known cells: known_tokens int64 [B, N] in raster order, -1 where a token is to be drawn. prefill: the sizes of the
    blocks in which an image's known cells enter the KV cache, after its condition; None: all in one.

    Raises ValueError or TypeError with the name of the first wrong argument. Checking given orders waits for their
    device.
    """

    config: LPDConfig
    labels: Sequence[int | None]
    group_sizes: Sequence[Sequence[int]]
    order: OrderPolicy | Tensor
    guidance_scale: Sequence[float]
    temperature: Sequence[float]
    top_k: Sequence[int]
    top_p: Sequence[float]
    seeds: Sequence[int]
    guidance_schedule: GuidanceSchedule | Sequence[GuidanceSchedule] = "linear"
    known_tokens: Tensor | None = None
    prefill: Sequence[Sequence[int]] | None = None
    orders: Tensor = field(init=False)  # int64 [B, N]
    schedules: tuple[Schedule, ...] = field(init=False)

    def __post_init__(self) -> None:
        batch, num_tokens = len(self.labels), self.config.num_tokens
        if isinstance(self.guidance_schedule, str):
            self._set("guidance_schedule", (self.guidance_schedule,) * batch)
        for name in _PER_IMAGE:
            if len(getattr(self, name)) != batch:
                raise ValueError(f"{name} must have one entry per label ({batch}), got {len(getattr(self, name))}")
            self._set(name, tuple(getattr(self, name)))
        self._set("labels", tuple(self._check_label(b, label) for b, label in enumerate(self.labels)))
        blocks = self._check_known_cells()
        num_free = [num_tokens - sum(sizes) for sizes in blocks]
        self._set("group_sizes", _check_rows(self.group_sizes, num_free))
        self._set("schedules", tuple(map(_schedule, self.group_sizes, blocks)))
        self._check_reals("guidance_scale", -_LARGEST, _LARGEST, f"in [-{_LARGEST}, {_LARGEST}]")
        self._check_reals("temperature", 0, _LARGEST, f"in [0, {_LARGEST}]")
        self._check_ints("top_k", 0, None, "an integer >= 0")
        self._check_reals("top_p", _SMALLEST, 1, f"in (0, 1] and >= {_SMALLEST:.2g}")
        self._check_ints("seeds", -(2**63), 2**63, "a signed 64-bit integer")
        for schedule in self.guidance_schedule:
            if schedule not in GUIDANCE_SCHEDULES:
                raise ValueError(f"guidance_schedule must be one of {GUIDANCE_SCHEDULES}, got {schedule!r}")
        self._set("orders", self._checked_orders([sum(sizes) for sizes in blocks]))

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _check_label(self, b: int, label: object) -> int | None:
        if label is None:
            return None
        number, classes = label if type(label) is int else as_int(label, f"labels[{b}]"), self.config.num_classes
        if not 0 <= number < classes:
            raise ValueError(f"labels[{b}] must be None or an integer in [0, {classes}), got {number}")
        return number

    def _check_ints(self, name: str, low: int, end: int | None, allowed: str) -> None:
        given = enumerate(getattr(self, name))
        values = tuple(value if type(value) is int else as_int(value, f"{name}[{b}]") for b, value in given)
        for b, value in enumerate(values):
            if value < low or (end is not None and value >= end):
                raise ValueError(f"{name}[{b}] must be {allowed}, got {value}")
        self._set(name, values)

    def _check_reals(self, name: str, low: float, high: float, allowed: str) -> None:
        given = enumerate(getattr(self, name))
        values = tuple(value if type(value) is float else as_real(value, f"{name}[{b}]") for b, value in given)
        for b, value in enumerate(values):
            if not low <= value <= high:  # nor NaN
                raise ValueError(f"{name}[{b}] must be {allowed}, got {value}")
        self._set(name, values)

    def _check_known_cells(self) -> list[tuple[int, ...]]:
        """Returns the blocks of prefill of each image, checked."""
        batch, tokens = len(self.labels), self.known_tokens
        if tokens is None:
            if self.prefill is not None:
                raise ValueError("prefill must be None without known_tokens")
            return [()] * batch
        check_tensor(tokens, "known_tokens", torch.int64, (batch, self.config.num_tokens))
        wrong = ((tokens < -1) | (tokens >= self.config.vocab_size)).any(dim=1).nonzero()
        if len(wrong):
            raise ValueError(f"known_tokens[{int(wrong[0])}] must lie in [0, {self.config.vocab_size}), or be -1")
        num_known = (tokens >= 0).sum(dim=1).tolist()
        if self.prefill is None:
            return [(count,) if count else () for count in num_known]
        if len(self.prefill) != batch:
            raise ValueError(f"prefill must have one entry per label ({batch}), got {len(self.prefill)}")
        return list(_check_rows(self.prefill, num_known, "prefill", "the number of known cells"))

    def _checked_orders(self, num_known: list[int]) -> Tensor:
        order, known = self.order, None if self.known_tokens is None else self.known_tokens >= 0
        if isinstance(order, OrderPolicy):
            seeds = torch.from_numpy(np.array(self.seeds, np.int64)).to(order.device)
            known = None if known is None else known.to(order.device)
            thresholds = order.proximity_threshold, order.repulsion_threshold
            orders = make_checked_orders(order.order, self.group_sizes, self.config.grid, seeds, known, *thresholds)
            return orders if known is None else known_first(orders, known)
        check_orders(order, len(self.labels), self.config.num_tokens)
        if known is not None:
            in_order = known.to(order.device).gather(1, order)
            for b, count in enumerate(num_known):
                if not bool(in_order[b, :count].all()):
                    raise ValueError(f"order[{b}] must begin with the {count} cells that known_tokens[{b}] gives")
        return order

    def images(self, rows: slice) -> DecodeRequest:
        """Returns the request of some of the images, with their orders, without checking again."""
        some = object.__new__(DecodeRequest)
        for name, value in vars(self).items():
            some._set(name, value[rows] if isinstance(value, (Sequence, Tensor)) else value)
        some._set("order", some.orders)
        return some

    @property
    def guided(self) -> tuple[bool, ...]:
        """Whether each image has an unconditional branch; without a label both branches would be the same."""
        pairs = zip(self.guidance_scale, self.labels, strict=True)
        return tuple(scale != 1 and label is not None for scale, label in pairs)

    @property
    def num_groups(self) -> int:
        """Number of steps that draw tokens."""
        return len({t for schedule in self.schedules for t in range(len(schedule.prefill), schedule.num_steps)})


_PER_IMAGE = ("group_sizes", "guidance_scale", "temperature", "top_k", "top_p", "seeds", "guidance_schedule")


@lru_cache(maxsize=256)
def _schedule(group_sizes: tuple[int, ...], prefill: tuple[int, ...]) -> Schedule:
    return Schedule(group_sizes, prefill)


def _check_rows(
    rows: Sequence[Sequence[int]],
    totals: Sequence[int],
    name: str = "group_sizes",
    of: str = "the number of tokens to draw",
) -> tuple[tuple[int, ...], ...]:
    """Checks each image's sizes; a list that several images share is checked once."""
    checked: dict[tuple[int, int], tuple[int, ...]] = {}
    for b, (row, total) in enumerate(zip(rows, totals, strict=True)):
        if (id(row), total) not in checked:
            checked[id(row), total] = tuple(check_group_sizes(row, total, f"{name}[{b}]", of))
    return tuple(checked[id(row), total] for row, total in zip(rows, totals, strict=True))


def check_orders(orders: Tensor, batch: int, num_tokens: int) -> None:
    """Raises unless orders is int64 [B, N] with a permutation of 0..N-1 in each row; waits for the device."""
    check_tensor(orders, "orders", torch.int64, (batch, num_tokens))
    cells = torch.arange(num_tokens, device=orders.device)
    wrong = (orders.sort(dim=1).values != cells).any(dim=1).nonzero()
    if len(wrong):
        raise ValueError(f"orders[{int(wrong[0])}] must be a permutation of 0..{num_tokens - 1}")


def make_request(
    config: LPDConfig,
    labels: Sequence[int | None],
    *,
    num_inference_steps: int | Sequence[int] | None = None,
    group_sizes: Sequence[int] | Sequence[Sequence[int]] | None = None,
    order: OrderPolicy | Tensor | None = None,
    guidance_scale: float | Sequence[float] = 1.0,
    guidance_schedule: GuidanceSchedule | Sequence[GuidanceSchedule] = "linear",
    temperature: float | Sequence[float] = 1.0,
    top_k: int | Sequence[int] = 0,
    top_p: float | Sequence[float] = 1.0,
    seeds: int | Sequence[int] | None = None,
    known_tokens: Tensor | None = None,
    prefill: Sequence[Sequence[int]] | None = None,
) -> DecodeRequest:
    """Makes a request from settings that are one value for all images, or a list with one entry per label.

    num_inference_steps, in [1, N] or with known_tokens in [1, cells to draw], selects the published or cosine group
    sizes; group_sizes replaces it. order: None is the locality order. One seed s means s, s + 1, ...; None draws seeds
    from torch's generator. known_tokens and prefill are as in DecodeRequest. Raises ValueError or TypeError with the
    name of a wrong argument.
    """
    with own_modes():
        batch = len(labels)
        return DecodeRequest(
            config=config,
            labels=labels,
            group_sizes=_group_sizes_of(_num_free(config, batch, known_tokens), num_inference_steps, group_sizes),
            order=OrderPolicy() if order is None else order,
            guidance_scale=_reals(guidance_scale, "guidance_scale", batch),
            temperature=_reals(temperature, "temperature", batch),
            top_k=_ints(top_k, "top_k", batch),
            top_p=_reals(top_p, "top_p", batch),
            seeds=seeds_for(seeds, batch),
            guidance_schedule=per_image(guidance_schedule, "guidance_schedule", batch),
            known_tokens=known_tokens,
            prefill=prefill,
        )


def seeds_for(seeds: int | Sequence[int] | None, batch: int) -> list[int]:
    """Returns the given seeds, s, s + 1, ... for one seed s, or for None seeds of torch's generator; unchecked."""
    if seeds is None:
        drawn: list[int] = torch.randint(_DRAWN_SEEDS, (batch,), device="cpu").tolist()
        return drawn
    if isinstance(seeds := as_scalar(seeds), Iterable):
        return list(seeds)
    first = as_int(seeds, "seeds")
    return list(range(first, first + batch))


def _num_free(config: LPDConfig, batch: int, known_tokens: Tensor | None) -> list[int]:
    """Returns the number of cells to draw in each image."""
    if known_tokens is None:
        return [config.num_tokens] * batch
    check_tensor(known_tokens, "known_tokens", torch.int64, (batch, config.num_tokens))
    num_free: list[int] = (known_tokens < 0).sum(dim=1).tolist()
    return num_free


def _group_sizes_of(num_free: Sequence[int], steps: Any, group_sizes: Any) -> list[Any]:
    batch = len(num_free)
    if (steps is None) == (group_sizes is None):
        raise ValueError("num_inference_steps and group_sizes exclude each other: give one of them")
    if group_sizes is not None:
        rows = sizes_per_image(group_sizes, batch)
        if len(rows) != batch:
            raise ValueError(f"group_sizes must be one schedule or one per label ({batch}), got {len(rows)}")
        return rows
    counts = _ints(steps, "num_inference_steps", batch)
    for count, most in zip(counts, num_free, strict=True):
        if not 1 <= count <= max(1, most):
            raise ValueError(f"num_inference_steps must be in [1, {most}], got {count}")
    return [_default_group_sizes(most, count) if most else () for count, most in zip(counts, num_free, strict=True)]


@lru_cache(maxsize=256)
def _default_group_sizes(num_tokens: int, steps: int) -> tuple[int, ...]:
    return tuple(default_group_sizes(num_tokens, steps))


def _ints(value: Any, name: str, batch: int) -> list[int]:
    return [as_int(item, name) for item in per_image(value, name, batch)]


def _reals(value: Any, name: str, batch: int) -> list[float]:
    return [as_real(item, name) for item in per_image(value, name, batch)]
