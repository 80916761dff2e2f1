"""The steps of `make gpu-report` that compute: each adds what it finds at once, for a later one may fail."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterable
from typing import Any

import torch
from few_rows import Layers
from lpd_tools.bench.decode import Decode
from lpd_tools.bench.products import ROWS, product_cases, products_of
from lpd_tools.bench.timing import interleaved
from report_machine import Card, microseconds, products
from torch.profiler import profile

from lpd_ext import ops
from lpd_ext.cuda_graphs import CapturedDecode, DecodeGraphs
from lpd_ext.sampler import generate

Add = Callable[..., None]  # (what, **values)
DTYPE = torch.bfloat16
CHOICES = ("own", "cublaslt", "auto")


def ceilings(card: Card, add: Add) -> None:
    """Runs lpd_gpu_ceilings, whose lines are records: the card at its best, and blocks with and without overlap."""
    with subprocess.Popen([card.program], stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None
        for line in program.stdout:
            found = json.loads(line)
            add("ceiling", name=found["name"], value=found["value"], unit=found["unit"])
    if program.returncode:
        raise RuntimeError(f"{card.program.name} ended with {program.returncode}")


def decodes(card: Card, add: Add) -> None:
    """Times decodes by clock and replays by events, and compares the tokens of graphs with those of eager decodes."""
    add("model", name=card.model)
    for batch in card.batches:
        decode = Decode.at_random(card.shape, batch, card.device, DTYPE)
        tokens = {choice: time_decode(card, decode, choice, add) for choice in CHOICES}
        same = tokens["own"].eq(tokens["cublaslt"]).double().mean().item()
        add("tokens", batch=batch, products="own and cublaslt", same=round(same, 4))


def time_decode(card: Card, decode: Decode, choice: str, add: Add) -> torch.Tensor:
    """Adds the times of a decode by one choice of products, and returns its tokens."""
    graphs, request, which = card.graphs(), decode.request(), {"batch": decode.batch, "products": choice}
    with products(choice):
        in_graph, eager = generate(decode.model, request, graphs), generate(decode.model, request)
        add("tokens", **which, graph_equals_eager=in_graph.equal(eager))
        clock = card.by_clock(lambda: generate(decode.model, request, graphs))
        add("decode", **which, by="clock, generate", **microseconds(clock))
        events = card.by_events(captured(graphs).replay)
        add("decode", **which, by="events, replay", **microseconds(events))
        alone = card.by_clock(lambda: generate(decode.model, request))
        add("decode", **which, by="clock, no graph", **microseconds(alone))
    return in_graph


def captured(graphs: DecodeGraphs) -> CapturedDecode[Any]:
    """Returns the only decode in graphs."""
    (found,) = graphs._captured.values()
    return found


def time_products(card: Card, add: Add) -> None:
    """Times every product by both ways over weights that no cache holds."""
    rows = ROWS if card.product_rows is None else card.product_rows
    with torch.inference_mode():
        for name, product in products_of(card.shape, DTYPE).items():
            for count, case in zip(rows, product_cases(name, product, card.device, rows), strict=True):
                pair = [case.ours, case.plain]
                own, library = interleaved(pair, max(card.repeats // 2, 2), card.device, calls=case.calls)
                add(
                    "product",
                    product=name,
                    rows=count,
                    weights=case.calls,
                    own=microseconds(own),
                    cublaslt=microseconds(library),
                    gigabytes_per_second=round(case.gigabytes / own.median, 1),
                )


PAIRS = {"proj, fc1": ("proj", "fc1"), "fc2, qkv": ("fc2", "qkv"), "fc2, head": ("fc2", "head")}


def check_products(card: Card, add: Add) -> None:
    """Compares pairs of layers with float64, and a row's bits alone and among others."""
    layers = products_of(card.shape, DTYPE)
    for name, (residual, normed) in PAIRS.items():
        first, second = layers[residual], layers[normed]
        most = max(card.checked_rows)
        inputs = Layers.random(most, first.features, first.depth, second.features, DTYPE).to(card.device)
        whole = own_pair(inputs.slice(slice(most)), normed == "fc1")
        exact = in_float64(inputs, normed == "fc1")
        torchs = inputs.normed(inputs.added(), normed == "fc1")
        for rows in card.checked_rows:
            ours = own_pair(inputs.slice(slice(rows)), normed == "fc1")
            errors = [(result[:rows].double() - exact[:rows]).abs().max().item() for result in (ours, torchs)]
            add(
                "check",
                pair=name,
                rows=rows,
                error=errors[0],
                torchs_error=errors[1],
                within_twice=errors[0] <= 2 * errors[1],
                bits_equal=ours.equal(whole[:rows]),
            )


def own_pair(layers: Layers, gelu: bool) -> torch.Tensor:
    """Adds to the residual stream of layers, and returns the layer after it, by own products."""
    scaled, statistics = ops.residual_linear(*layers.residual())
    slope, shift = ops.fold_layer_norm(layers.next_weight, layers.gamma, layers.beta, layers.next_bias)
    return ops.normed_linear(scaled, statistics, layers.next_weight, slope, shift, 1e-6, gelu)


def in_float64(layers: Layers, gelu: bool) -> torch.Tensor:
    """Returns the same of exact arithmetic."""
    exact = layers.to(torch.float64)
    return exact.normed(exact.added(), gelu)


def profile_decode(card: Card, add: Add) -> None:
    """Names the kernels of a replayed decode, how long they run, and the gaps between them."""
    decode = Decode.at_random(card.shape, 1, card.device, DTYPE)
    activity, kind = card.kernels
    for choice in ("cublaslt", "own"):
        with products(choice):
            graphs = card.graphs()
            generate(decode.model, decode.request(), graphs)
            card.wait()
            with profile(activities=[activity]) as found:
                captured(graphs).replay()
                card.wait()
        kernels = [event for event in found.events() or [] if event.device_type == kind]
        spans = [(event.name, event.time_range.start, event.time_range.end) for event in kernels]
        summary = summary_of(spans)
        add("profile", products=choice, **summary)


def summary_of(spans: Iterable[tuple[str, float, float]], most: int = 12) -> dict[str, Any]:
    """Returns what kernels take, by name, and the idle time between them; of names, begins and ends in us."""
    in_order = sorted(spans, key=lambda span: span[1])
    by_name: dict[str, list[float]] = {}
    gaps, last = [], None
    for name, begin, end in in_order:
        by_name.setdefault(name, []).append(end - begin)
        if last is not None and begin > last:
            gaps.append(begin - last)
        last = end if last is None else max(last, end)
    if not in_order or last is None:
        raise RuntimeError("the profiler saw no kernel")
    kernels = sorted(by_name.items(), key=lambda item: -sum(item[1]))
    return {
        "span": round(last - in_order[0][1], 1),
        "idle": round(sum(gaps), 1),
        "launches": len(in_order),
        "kernels": [[name[:80], len(times), round(sum(times), 1)] for name, times in kernels[:most]],
    }


MEASURES: dict[str, Callable[[Card, Add], None]] = {
    "ceilings": ceilings,
    "decodes": decodes,
    "products": time_products,
    "checks": check_products,
    "profile": profile_decode,
}


def run(name: str, card: Card, add: Add) -> None:
    """Runs a step of MEASURES."""
    with card.running(), torch.no_grad():
        MEASURES[name](card, add)
