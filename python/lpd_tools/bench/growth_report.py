"""The picture and the tables of docs/results/growth, from what `lpd growth` measured and what decode_work counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from lpd_ext.model import LPDConfig
from lpd_ext.schedule import group_sizes
from lpd_tools.bench.decode_work import BFLOAT16, FLOAT32, INT8, Peaks, bound_by_bytes, count, least_seconds
from lpd_tools.bench.growth_series import DTYPES, Measured, Point, Series, all_series
from lpd_tools.markdown import markdown_table
from lpd_tools.png_settings import save_figure

_COLOURS = {FLOAT32: "tab:blue", INT8: "tab:orange"}
_AXES = ("B", "T", "N", "parameters")
_AXIS_TITLES = {"B": "images B", "T": "steps T", "N": "tokens N", "parameters": "parameters"}

# Bandwidth of one socket: two and twelve channels of DDR5-4800.
_BYTES_OF_CORES = {8: 76.8e9, 64: 460.8e9}
# H100 SXM: HBM3, dense bfloat16 on the tensor cores; and what a kernel of a captured graph costs beyond its work.
_H100 = Peaks("H100 SXM, bfloat16", 3.35e12, 989e12, 989e12, seconds_per_launch=2e-6)


def peaks_of(machine: Mapping[str, Any], dtype: str) -> Peaks:
    """Returns the peaks of the measured machine for linear layers of dtype; attention is in float32."""
    return Peaks("measured", machine["bytes"], machine[dtype], machine[FLOAT32])


def measured_series(measured: Mapping[Point, Measured], dtype: str) -> list[Series]:
    """Returns the series of one format with at least two measured points, without the unmeasured ones."""
    kept = [
        replace(series, points=tuple(point for point in series.points if point in measured))
        for series in all_series(dtype)
    ]
    return [series for series in kept if len(series.points) > 1]


def draw(
    measured: Mapping[Point, Measured], machine: Mapping[str, Any], path: Path, settings: Mapping[str, Any]
) -> None:
    """Draws two rows, seconds and memory, a column for each of B, T, N and the parameters, and says the settings."""
    figure = Figure(figsize=(14, 6.4), layout="constrained")
    rows = figure.subplots(2, len(_AXES), sharex="col", sharey="row")
    for dtype in DTYPES:
        for series in measured_series(measured, dtype):
            column = _AXES.index(series.axis)
            at = [series.along(point) for point in series.points]
            style = {"color": _COLOURS[dtype], "marker": "o", "markersize": 4, "linewidth": 1.5}
            if series.shallow:
                style |= {"marker": "s", "markerfacecolor": "white"}
            label = f"{dtype}, {series.title}"
            taken = [measured[point].seconds for point in series.points]
            bound = [least_seconds(point.work(), peaks_of(machine, dtype)) for point in series.points]
            rows[0][column].plot(at, taken, label=label, **style)
            rows[0][column].plot(at, bound, color=_COLOURS[dtype], linestyle=":", linewidth=1)
            held = [measured[point].peak_mb for point in series.points]
            counted = [point.work().resident_bytes / 1e6 for point in series.points]
            rows[1][column].plot(at, held, label=label, **style)
            rows[1][column].plot(at, counted, color=_COLOURS[dtype], linestyle=":", linewidth=1)
    for column, axis in enumerate(_AXES):
        ticks = {one.along(point) for one in all_series(FLOAT32) if one.axis == axis for point in one.points}
        for row in rows:
            row[column].set(xscale="log", yscale="log")
            row[column].set_xticks(sorted(ticks - {16}))  # too near 20
            row[column].grid(color="0.9")
            row[column].set_axisbelow(True)
            row[column].xaxis.set_minor_locator(NullLocator())
            row[column].xaxis.set_major_formatter(FuncFormatter(_short))
            row[column].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            row[column].spines[["top", "right"]].set_visible(False)
        rows[1][column].set_xlabel(_AXIS_TITLES[axis])
        rows[0][column].legend(fontsize=8, loc="upper left", frameon=False)
        rows[0][column].tick_params(labelbottom=False)
    rows[0][0].set_ylabel("seconds per decode")
    rows[1][0].set_ylabel("MB resident beyond torch")
    low, high = rows[0][0].get_ylim()
    rows[0][0].set_ylim(low, high * 6)  # room for the legends
    figure.suptitle(
        "Solid: measured. Dotted: counted (least time at this machine's peaks; bytes that must lie in memory)"
    )
    save_figure(figure, path, settings)


def _short(value: float, _: object) -> str:
    return f"{value / 1e6:.0f} M" if value >= 1e6 else f"{value:g}"


def tables(measured: Mapping[Point, Measured], machine: Mapping[str, Any]) -> str:
    """Returns the page of all tables, in Markdown."""
    parts = {
        "Exponents": exponents_table(measured, machine),
        "What is counted, and what was measured": work_table(measured, machine),
        "Estimate for other machines": estimate_table(measured, machine),
    }
    return "\n\n".join(["# Growth: the tables", *(f"## {title}\n\n{table}" for title, table in parts.items())])


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """Fits the power of x that y follows, by least squares on logarithms."""
    slope, _ = np.polyfit(np.log(np.asarray(x)), np.log(np.asarray(y)), 1)
    return float(slope)


def exponents_table(measured: Mapping[Point, Measured], machine: Mapping[str, Any]) -> str:
    """Returns each series' exponents at its last points, measured and counted."""
    rows = []
    for dtype in DTYPES:
        for series in measured_series(measured, dtype):
            last = series.points[-series.fitted :]
            at = [series.along(point) for point in last]
            bound = [least_seconds(point.work(), peaks_of(machine, dtype)) for point in last]
            counted = [float(point.work().resident_bytes) for point in last]
            fits = (
                exponent(at, [measured[point].seconds for point in last]),
                exponent(at, bound),
                exponent(at, [measured[point].peak_mb for point in last]),
                exponent(at, counted),
            )
            values = ", ".join(_short(value, None) for value in at)
            rows.append([f"{series.title}, {dtype}", f"{series.axis} = {values}", *(f"{fit:.2f}" for fit in fits)])
    return markdown_table(["", "fitted over", "time", "least time", "memory", "counted memory"], rows)


def work_table(measured: Mapping[Point, Measured], machine: Mapping[str, Any]) -> str:
    """Returns the counted work of lpd_l in the measured decodes, and their times over the least time."""
    rows = []
    done = set()
    for series in measured_series(measured, FLOAT32):
        for point in series.points:
            if point in done or point.depth == 4:
                continue
            done.add(point)
            work, peaks = point.work(), peaks_of(machine, FLOAT32)
            linear, attention = work.total("linear_flops"), work.total("attention_flops")
            least = least_seconds(work, peaks)
            taken = measured[point].seconds
            rows.append(
                [
                    f"E = {point.dim}, L = {point.depth}, B = {point.batch}, T = {point.steps}, N = {point.num_tokens}",
                    f"{work.total('weight_bytes') / 1e9:.1f}",
                    f"{work.total('key_value_bytes') / 1e9:.2f}",
                    f"{linear / 1e9:,.0f}",
                    f"{attention / (linear + attention):.1%}",
                    f"{bound_by_bytes(work, peaks):.0%}",
                    f"{taken:.2f} s",
                    f"{least / taken:.0%}",
                ]
            )
    head = ["float32", "weights GB", "K, V GB", "linear GFLOP", "attention's share", "steps bound by bytes"]
    return markdown_table([*head, "measured", "least / measured"], rows)


def estimate_table(measured: Mapping[Point, Measured], machine: Mapping[str, Any]) -> str:
    """Estimates the least time of lpd_l, 256 px, 20 steps, on the measured machine and on others."""
    config, sizes = LPDConfig.preset("lpd_l"), group_sizes(256, 20)
    rows = []
    for dtype in DTYPES:
        here = peaks_of(machine, dtype)
        machines = [here]
        for cores, bandwidth in _BYTES_OF_CORES.items():
            times = cores / machine["threads"]
            machines.append(Peaks(f"{cores} cores", bandwidth, times * here.linear_flops, times * machine[FLOAT32]))
        for peaks in machines:
            name = f"this machine, {machine['threads']} cores" if peaks is here else peaks.name
            rows.append(_estimate_row(f"{name}, {dtype}", config, sizes, dtype, peaks))
    rows.append(_estimate_row(_H100.name, config, sizes, BFLOAT16, _H100))
    head = ["least time", "GB/s", "TFLOP/s", "weights GB / step", "GFLOP / image", "launches"]
    return markdown_table(
        [*head, "B = 1", "B = 16, per image", "B = 64, per image", "steps bound by bytes at B = 1, 64"], rows
    )


def _estimate_row(name: str, config: LPDConfig, sizes: list[int], dtype: str, peaks: Peaks) -> list[str]:
    works = {batch: count(config, batch, sizes, dtype) for batch in (1, 16, 64)}
    one = works[1]
    flops = one.total("linear_flops") + one.total("attention_flops")
    return [
        name,
        f"{peaks.bytes_per_second / 1e9:,.0f}",
        f"{peaks.linear_flops / 1e12:.3g}",
        f"{one.steps[0].weight_bytes / 1e9:.2f}",
        f"{flops / 1e9:,.0f}",
        f"{one.total('launches'):,}",
        *(_milliseconds(least_seconds(work, peaks) / batch) for batch, work in works.items()),
        ", ".join(f"{bound_by_bytes(works[batch], peaks):.0%}" for batch in (1, 64)),
    ]


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.0f} ms" if seconds >= 0.02 else f"{1e3 * seconds:.1f} ms"
