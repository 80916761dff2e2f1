"""Times the host's work before the first step of a decode, in which a GPU waits: request, graph key, tables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from lpd_ext.decode_state import DecodeState, Layout
from lpd_ext.model import LPDModel
from lpd_ext.orders import make_orders
from lpd_ext.request import DecodeRequest, OrderPolicy, make_request
from lpd_ext.weights_key import weights_of
from lpd_tools.bench.cases import Shape
from lpd_tools.bench.result import Result
from lpd_tools.bench.timing import interleaved

ALL, REQUEST, ORDERS, KEY, LOAD = "all of it", "request", "of that, the order kernel", "graph key", "load"
_CPU = torch.device("cpu")


def time_host(shape: Shape, batch: int, repeats: int) -> list[Result]:
    """Times a guided batch's request, which makes its orders, the key of its graph, and its loading."""
    torch.manual_seed(0)
    model = LPDModel(replace(shape.config, dim=64, heads=1)).eval()  # widths do not matter to the host
    num_tokens, labels = model.config.num_tokens, list(range(batch))

    def request() -> DecodeRequest:
        policy = OrderPolicy("locality", repulsion_threshold=shape.repulsion_threshold)
        return make_request(
            model.config,
            labels,
            num_inference_steps=shape.steps,
            order=policy,
            guidance_scale=shape.guidance_scale,
            seeds=0,
        )

    made = request()
    layout = Layout.of(made)
    plan = layout.plan(num_tokens, _CPU)
    state = DecodeState(model, plan.capacity, layout.filters)
    seeds = torch.arange(batch)

    def everything() -> None:
        fresh = request()
        hash((Layout.of(fresh), weights_of(model)))
        state.load(fresh, plan.places)

    runs: dict[str, Callable[[], Any]] = {
        ALL: everything,
        REQUEST: request,
        ORDERS: lambda: make_orders(
            "locality", made.group_sizes, shape.grid, seeds, repulsion_threshold=shape.repulsion_threshold
        ),
        KEY: lambda: hash((Layout.of(made), weights_of(model))),
        LOAD: lambda: state.load(made, plan.places),
    }
    with torch.no_grad():
        timed = interleaved(list(runs.values()), repeats, _CPU, warm_up=5)
    return [Result.against(name, times, {}) for name, times in zip(runs, timed, strict=True)]
