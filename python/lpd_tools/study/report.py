"""The pictures and the tables of docs/results/quality.md, from the CSV file that `lpd study` writes."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from lpd_tools.markdown import markdown_table
from lpd_tools.png_settings import save_figure
from lpd_tools.study.points import Measured, Point, Sweeps
from lpd_tools.study.times import kind_of

_COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple")
_VISIBILITY_TITLES = {
    ("mutual", "mutual"): "queries of a group see each other",
    ("mutual", "blind"): "hidden from each other while drawing only",
    ("blind", "blind"): "hidden in training and drawing",
}


@dataclass(frozen=True)
class Instrument:
    """One of the four measures: its column in the CSV file, how to write it, and whether it looks at guided images."""

    column: str
    title: str
    write: Callable[[float], str]
    scale: float = 1.0
    guided: bool = False


INSTRUMENTS = (
    Instrument("dependency_nats", "dependency loss (nats per real image)", lambda value: f"{value:.1f}"),
    Instrument("consistency_nats", "self-consistency (nats per drawn image)", lambda value: f"{value:.1f}"),
    Instrument("frechet", "Fréchet distance, judge features", lambda value: f"{value:.2f}", guided=True),
    Instrument("recognised", "recognised (%)", lambda value: f"{value:.1f}", scale=100.0, guided=True),
)


@dataclass(frozen=True)
class Summary:
    """Mean and standard deviation (0 for a single seed) over the seeds of a point, and how many there were."""

    mean: float
    deviation: float
    seeds: int


def summarise(measured: Mapping[Point, Measured], point: Point, instrument: Instrument) -> Summary | None:
    """The instrument over all seeds of `point` (its own seed is ignored), or None if none was measured."""
    values = [
        instrument.scale * getattr(one, instrument.column)
        for one in measured.values()
        if replace(one.point, seed=point.seed) == point
    ]
    if not values:
        return None
    return Summary(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0, len(values))


def _curve(
    axes: Axes,
    measured: Mapping[Point, Measured],
    points: Sequence[tuple[float, Point]],
    instrument: Instrument,
    label: str,
    colour: str,
) -> None:
    found = [(x, summary) for x, point in points if (summary := summarise(measured, point, instrument))]
    if found:
        axes.errorbar(
            [x for x, _ in found],
            [summary.mean for _, summary in found],
            [summary.deviation for _, summary in found],
            label=label,
            color=colour,
            marker="o",
            markersize=3.5,
            linewidth=1.4,
            capsize=2,
        )


def _over_steps(figure: Figure, measured: Mapping[Point, Measured], sweeps: Sweeps, kinds: Mapping[str, Point]) -> None:
    for axes, instrument in zip(figure.subplots(1, len(INSTRUMENTS)), INSTRUMENTS, strict=True):
        for colour, (label, base) in zip(_COLOURS, kinds.items(), strict=False):
            points = [(float(steps), replace(base, steps=steps)) for steps in sweeps.steps]
            _curve(axes, measured, points, instrument, label, colour)
        axes.set(title=instrument.title, xlabel="steps T", xscale="log")
        axes.set_xticks([steps for steps in sweeps.steps if math.log2(steps).is_integer()])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        _tidy(axes)
    figure.axes[0].legend(fontsize=8, frameon=False)


def _tidy(axes: Axes) -> None:
    axes.title.set_fontsize(10)
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def draw_orders(measured: Mapping[Point, Measured], sweeps: Sweeps, path: Path, settings: Mapping[str, Any]) -> None:
    """Each instrument over the steps, a curve for each order."""
    figure = Figure(figsize=(16, 3.6), layout="constrained")
    _over_steps(figure, measured, sweeps, {order: replace(sweeps.base, order=order) for order in sweeps.orders})
    save_figure(figure, path, settings)


def draw_visibility(
    measured: Mapping[Point, Measured], sweeps: Sweeps, path: Path, settings: Mapping[str, Any]
) -> None:
    """Each instrument over the steps, a curve for each way to show or hide the queries of a group."""
    figure = Figure(figsize=(16, 3.6), layout="constrained")
    kinds = {title: replace(sweeps.base, trained=t, drawn=d) for (t, d), title in _VISIBILITY_TITLES.items()}
    _over_steps(figure, measured, sweeps, kinds)
    save_figure(figure, path, settings)


def draw_knobs(measured: Mapping[Point, Measured], sweeps: Sweeps, path: Path, settings: Mapping[str, Any]) -> None:
    """Upper row: each instrument over the repulsion threshold, by proximity threshold; lower row: over guidance, those
    that depend on it."""
    figure = Figure(figsize=(16, 6.4), layout="constrained")
    upper, lower = figure.subplots(2, len(INSTRUMENTS))
    for column, instrument in enumerate(INSTRUMENTS):
        for colour, proximity in zip(_COLOURS, sweeps.proximities, strict=False):
            base = replace(sweeps.base, proximity_threshold=proximity)
            points = [(float(r), replace(base, repulsion_threshold=r)) for r in sweeps.repulsions]
            _curve(upper[column], measured, points, instrument, f"proximity {proximity:g}", colour)
        upper[column].set(title=instrument.title, xlabel="repulsion threshold", xticks=list(sweeps.repulsions))
        _tidy(upper[column])
        if not instrument.guided:
            lower[column].remove()
            continue
        scales = [(scale, replace(sweeps.base, guidance_scale=scale)) for scale in sweeps.guidance_scales]
        _curve(lower[column], measured, scales, instrument, "", _COLOURS[0])
        lower[column].set(xlabel="guidance scale")
        _tidy(lower[column])
    upper[0].legend(fontsize=8, frameon=False)
    save_figure(figure, path, settings)


def tables(measured: Mapping[Point, Measured], sweeps: Sweeps, times: Mapping[str, float]) -> str:
    """All tables of the study in Markdown: orders, visibility, thresholds, guidance; empty ones are left out.

    times: milliseconds per image by `times.kind_of`; points that the kernels do not draw have none.
    """
    orders = {order: replace(sweeps.base, order=order) for order in sweeps.orders}
    kinds = {title: replace(sweeps.base, trained=t, drawn=d) for (t, d), title in _VISIBILITY_TITLES.items()}
    pairs = [(p, r) for p in sweeps.proximities for r in sweeps.repulsions]
    thresholds = {f"{p:g}, {r}": replace(sweeps.base, proximity_threshold=p, repulsion_threshold=r) for p, r in pairs}
    guidance = {f"{scale:g}": replace(sweeps.base, guidance_scale=scale) for scale in sweeps.guidance_scales}
    over_steps = {
        f"{name}, T = {steps}": replace(base, steps=steps) for steps in sweeps.steps for name, base in orders.items()
    }
    visibility = {
        f"{name}, T = {steps}": replace(base, steps=steps) for steps in sweeps.steps for name, base in kinds.items()
    }
    parts = (
        ("order, steps", over_steps),
        ("visibility, steps", visibility),
        ("proximity, repulsion threshold", thresholds),
    )
    found = [_table(measured, head, points, INSTRUMENTS, times) for head, points in parts]
    guided = [instrument for instrument in INSTRUMENTS if instrument.guided]
    found.append(_table(measured, "guidance scale", guidance, guided, times))
    return "\n\n".join(filter(None, found))


def _table(
    measured: Mapping[Point, Measured],
    head: str,
    points: Mapping[str, Point],
    instruments: Sequence[Instrument],
    times: Mapping[str, float],
) -> str:
    rows = []
    for name, point in points.items():
        summaries = [summarise(measured, point, instrument) for instrument in instruments]
        if summaries[0] is None:
            continue
        cells = [_cell(summary, one) for summary, one in zip(summaries, instruments, strict=True)]
        took = times.get(kind_of(point)) if point.drawn == "mutual" else None
        rows.append([name, *cells, "" if took is None else f"{took:.1f}", str(summaries[0].seeds)])
    if not rows:
        return ""
    titles = [head, *(instrument.title for instrument in instruments), "ms per image", "seeds"]
    return markdown_table(titles, rows)


def _cell(summary: Summary | None, instrument: Instrument) -> str:
    if summary is None:
        return ""
    deviation = f" ± {instrument.write(summary.deviation)}" if summary.seeds > 1 else ""
    return instrument.write(summary.mean) + deviation
