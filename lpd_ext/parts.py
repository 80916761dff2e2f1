"""Splits a batch that does not fit in memory into parts, drawn one after the other; each image stays the same."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from lpd_ext import memory
from lpd_ext.cuda_graphs import DecodeGraphs
from lpd_ext.decode_state import Layout
from lpd_ext.model import LPDModel
from lpd_ext.plan import Schedule
from lpd_ext.request import DecodeRequest

log = logging.getLogger(__name__)
_SHARE = 0.75  # share of the free memory for the caches and work memory of a part; pixels and the rest need some too
_ALWAYS_THERE = 64e6  # bytes, below which free memory is not looked up
_TEMPORARIES = 8  # vectors of the model's width alive per row, beside the results of the linear layers


@dataclass(frozen=True)
class Part:
    """Consecutive images of a request."""

    rows: slice
    request: DecodeRequest


def parts_of(
    model: LPDModel, request: DecodeRequest, graphs: DecodeGraphs | None = None, max_images: int | None = None
) -> list[Part]:
    """Splits the request into equal parts of at most max_images that fit into the free memory.

    A single image is never split, whether it fits or not. Logs a warning if memory requires several parts.
    """
    batch = len(request.labels)
    most = batch if max_images is None else min(batch, max_images)
    needed = bytes_of_images(model, request)
    worst = max(needed, default=0)
    if most * worst > _ALWAYS_THERE and not _is_captured(model, request, graphs):
        free = available(model.pos_embed.device)
        if graphs is not None and len(graphs) and most * worst > _SHARE * free:
            with graphs.lock:
                graphs.clear()  # frees the caches of other batches before splitting this one
            free = available(model.pos_embed.device)
        most = min(most, max(1, int(min(_SHARE * free / worst, batch))))
        if most < batch:
            log.warning(
                "%d images need about %.1f GB at once, and %.1f GB are available: they are drawn %d at a time",
                batch,
                sum(needed) / 1e9,
                free / 1e9,
                most,
            )
    if most >= batch:
        return [Part(slice(0, batch), request)]
    count = -(-batch // most)
    size = -(-batch // count)
    return [Part(rows, request.images(rows)) for rows in _slices(batch, size)]


def bytes_of_images(model: LPDModel, request: DecodeRequest) -> list[int]:
    """Estimates the memory of each image while it is drawn beside others: KV cache, tables, and rows of a step."""
    config, size = model.config, model.pos_embed.element_size()
    results = (3 + 1 + config.mlp_ratio + _TEMPORARIES) * config.dim + 2 * config.vocab_size  # of a row
    by_schedule: dict[Schedule, int] = {}
    for schedule in request.schedules:
        if schedule not in by_schedule:
            rows = max((sum(schedule.rows(t)[1:]) for t in range(schedule.num_steps)), default=0)
            cache = 2 * config.depth * config.dim * schedule.cache_positions
            tables = 2 * 8 * (config.num_tokens + 2)
            by_schedule[schedule] = size * cache + tables + max(4, size) * rows * results
    pairs = zip(request.schedules, request.guided, strict=True)
    return [(1 + guided) * by_schedule[schedule] for schedule, guided in pairs]


def _slices(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def _is_captured(model: LPDModel, request: DecodeRequest, graphs: DecodeGraphs | None) -> bool:
    """Whether a captured decode already holds the memory."""
    return graphs is not None and graphs.supports(model.pos_embed.device) and graphs.has(Layout.of(request))


def available(device: torch.device) -> float:
    """Returns the bytes that decodes may take on the device; infinite if unknown."""
    if device.type == "cpu":
        free = memory.available()
        return math.inf if free is None else free
    if device.type != "cuda":
        return math.inf
    free, _ = torch.cuda.mem_get_info(device)
    return float(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
