"""`lpd bench`: every operator against its plain-torch twin in the same run, at the shapes of a named model and step."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from lpd_ext import _C, ops, reference
from lpd_ext.plan import Step, plan_decoding
from lpd_ext.schedule import group_sizes
from lpd_tools.checks import check_output

# lpd_l at 256 px: E 1024, H 16, V 16384, 16x16 tokens in 20 steps, with guidance.
_DIM, _HEADS, _VOCAB, _GRID, _STEPS = 1024, 16, 16384, (16, 16), 20
_SHAPE_NAME = "L-256-20"


@dataclass(frozen=True)
class Case:
    """One operator at one shape: ours, its plain-torch twin, and what a call has to move or compute."""

    name: str
    ours: Callable[[], Any]
    plain: Callable[[], Any]
    gigabytes: float = 0.0
    gigaflops: float = 0.0


def bench(
    step: Annotated[int, typer.Option(min=1, max=_STEPS - 1, help="Decoding step whose shapes are used.")] = 15,
    batch: Annotated[int, typer.Option(min=1, help="Images (twice as many sequences, with guidance).")] = 1,
    repeats: Annotated[int, typer.Option(min=3, help="Timed calls of each, interleaved.")] = 30,
    output: Annotated[Path | None, typer.Option(help="JSON file to write the figures to.")] = None,
) -> None:
    """Time the operators against plain torch, interleaved in one run; medians with the middle half of the times."""
    if output is not None:
        check_output(output, ".json")
    console = Console()
    table = Table(title=f"{_SHAPE_NAME} step {step}, B = {batch}, fp32")
    for column in ("operator", "µs", "middle half", "rate", "plain torch µs", "ratio"):
        table.add_column(column, justify="left" if column == "operator" else "right")
    results = []
    with torch.inference_mode():
        for case in track(_cases(step, batch), "Timing", console=console, transient=True):
            ours, plain = _interleaved(case.ours, case.plain, repeats)
            median, twin = statistics.median(ours), statistics.median(plain)
            low, _, high = statistics.quantiles(ours, n=4)
            rate = ""
            if case.gigaflops:
                rate = f"{case.gigaflops / median:.0f} GFLOP/s"
            elif case.gigabytes:
                rate = f"{case.gigabytes / median:.1f} GB/s"
            row = (case.name, f"{median * 1e6:.0f}", f"{low * 1e6:.0f}-{high * 1e6:.0f}", rate, f"{twin * 1e6:.0f}")
            table.add_row(*row, f"{twin / median:.1f}x")
            results.append({"operator": case.name, "seconds": ours, "plain_seconds": plain, "rate": rate})
    machine = {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "isa": _C.cpu_isa(),
        "torch": torch.__version__,
        "lpd_ext": _version(),
        "shape": _SHAPE_NAME,
        "step": step,
        "batch": batch,
    }
    console.print(table)
    console.print(", ".join(f"{name} {value}" for name, value in machine.items()), style="dim")
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")
        console.print(str(output.resolve()), markup=False, soft_wrap=True)


def _cases(step_index: int, batch: int) -> list[Case]:
    torch.manual_seed(0)
    num_tokens, head_dim = _GRID[0] * _GRID[1], _DIM // _HEADS
    sizes = group_sizes(num_tokens, _STEPS)
    plan = plan_decoding([sizes] * batch, [True] * batch, num_tokens, torch.device("cpu"))
    step: Step = plan.steps[step_index]
    rows = step.num_context_rows + step.num_query_rows
    sequences = plan.num_sequences

    x, delta = torch.randn(rows, _DIM), torch.randn(rows, _DIM) * 1e-3
    weight, bias = torch.randn(_DIM), torch.randn(_DIM)
    content, positions = torch.randn(_VOCAB + 1002, _DIM), torch.randn(1 + num_tokens, _DIM)
    content_ids = torch.randint(_VOCAB, (rows,))
    position_ids = torch.randint(1 + num_tokens, (rows,))
    qkv = torch.randn(rows, 3, _HEADS, head_dim)
    k_cache = torch.randn(sequences, _HEADS, plan.cache_positions, head_dim)
    v_cache = torch.randn_like(k_cache)
    attention = (qkv, k_cache, v_cache, step.segments, step.max_rows, step.max_keys, 0, head_dim**-0.5)
    logits = torch.randn(step.num_query_rows, _VOCAB) * 3
    drawn = len(step.image)
    sampling = (logits, step.conditional_row, step.unconditional_row, torch.full((drawn,), 4.8), torch.ones(drawn))
    filters = (torch.full((drawn,), 900, dtype=torch.int32), torch.full((drawn,), 0.95))
    keys = (torch.arange(drawn), torch.arange(drawn))
    orders = (torch.tensor(sizes, dtype=torch.int32), *_GRID, 1.0, 2, torch.arange(batch))

    kv_length = step.max_keys - step.num_query_rows // sequences
    per_sequence = step.num_context_rows * kv_length + step.num_query_rows * step.max_keys
    return [
        Case(
            "group_attention",
            lambda: ops.group_attention(*attention),
            lambda: _two_calls(qkv, k_cache, v_cache, step),
            gigaflops=4e-9 * per_sequence * _DIM,
        ),
        Case(
            "residual_layer_norm",
            lambda: ops.residual_layer_norm(x, delta, weight, bias),
            lambda: reference.residual_layer_norm(x, delta, weight, bias),
            gigabytes=4e-9 * 4 * rows * _DIM,
        ),
        Case(
            "embed_rows",
            lambda: ops.embed_rows(content_ids, position_ids, content, positions, weight, bias),
            lambda: reference.embed_rows(content_ids, position_ids, content, positions, weight, bias),
            gigabytes=4e-9 * 3 * rows * _DIM,
        ),
        Case(
            "sample_tokens",
            lambda: ops.sample_tokens(*sampling, None, None, *keys),
            lambda: _sort_based(*sampling, None, None),
            gigabytes=4e-9 * logits.numel(),
        ),
        Case(
            "  k 900, p 0.95",
            lambda: ops.sample_tokens(*sampling, *filters, *keys),
            lambda: _sort_based(*sampling, 900, 0.95),
            gigabytes=4e-9 * logits.numel(),
        ),
        Case(
            "locality_order",
            lambda: ops.locality_order(*orders),
            lambda: reference.locality_order(*orders),
        ),
    ]


def _two_calls(qkv: Tensor, k_cache: Tensor, v_cache: Tensor, step: Step) -> Tensor:
    """What a user of plain torch would write for equal segments: write the cache, then one SDPA call per row class."""
    _, num_context, _, num_query, cached, _ = step.segments[0].tolist()
    sequences = len(step.segments)
    context, query = qkv.split([step.num_context_rows, step.num_query_rows])
    q1, k1, v1 = context.unflatten(0, (sequences, num_context)).permute(2, 0, 3, 1, 4)
    q2, k2, v2 = query.unflatten(0, (sequences, num_query)).permute(2, 0, 3, 1, 4)
    end = cached + num_context
    k_cache[:, :, cached:end], v_cache[:, :, cached:end] = k1, v1
    attend = torch.nn.functional.scaled_dot_product_attention
    first = attend(q1, k_cache[:, :, :end], v_cache[:, :, :end])
    second = attend(q2, torch.cat([k_cache[:, :, :end], k2], 2), torch.cat([v_cache[:, :, :end], v2], 2))
    return torch.cat([part.transpose(1, 2).flatten(0, 1).flatten(1) for part in (first, second)])


def _sort_based(
    logits: Tensor, c_row: Tensor, u_row: Tensor, guidance: Tensor, temperature: Tensor, k: int | None, p: float | None
) -> Tensor:
    """The usual chain: mix, temperature, topk threshold, sorted cumulative softmax, multinomial."""
    c, u = logits[c_row], logits[u_row]
    x = (u + guidance[:, None] * (c - u)) / temperature[:, None]
    if k is not None:
        x = x.masked_fill(x < x.topk(k).values[:, -1:], float("-inf"))
    if p is not None:
        ordered, ids = x.sort(descending=True)
        removed = ordered.softmax(-1).cumsum(-1) > p
        removed = torch.cat([torch.zeros_like(removed[:, :1]), removed[:, :-1]], dim=1)
        x = x.masked_fill(removed.scatter(1, ids, removed), float("-inf"))
    return x.softmax(-1).multinomial(1)


def _interleaved(ours: Callable[[], Any], plain: Callable[[], Any], repeats: int) -> tuple[list[float], list[float]]:
    times: tuple[list[float], list[float]] = ([], [])
    for repeat in range(repeats + 2):
        for run, record in zip((ours, plain), times, strict=True):
            start = time.perf_counter()
            run()
            if repeat >= 2:  # the first rounds warm caches and thread pools
                record.append(time.perf_counter() - start)
    return times


def _version() -> str:
    """The version, with the commit when the command belongs to a checkout or is run in one (as `make bench` does)."""
    for folder in (Path(__file__).parents[2], Path.cwd()):
        if (folder / ".git").exists() and (folder / "lpd_ext" / "_C.pyi").exists():
            command = ["git", "-C", str(folder), "describe", "--always", "--dirty"]
            try:
                commit = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
            except (OSError, subprocess.CalledProcessError):
                continue  # no git here, or it does not trust the folder
            return f"{_C.__version__} ({commit})"
    return _C.__version__


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
