"""Makes the tables and the pictures of the study of editing from its CSV file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from lpd_ext.tokenizer import VQTokenizer
from lpd_tools.data.fashion_mnist import CLASS_NAMES
from lpd_tools.markdown import markdown_table
from lpd_tools.png_settings import save_figure
from lpd_tools.study.editing_measure import EditInstruments
from lpd_tools.study.editing_points import (
    EDITED,
    FILLED,
    RECONSTRUCTION,
    UNEDITED,
    Edited,
    EditPoint,
    hidden_pixels,
    in_blocks,
)
from lpd_tools.study.settings import EditingStudy

Results = Mapping[EditPoint, Edited]
_COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown")
_SHOWN = 2  # images of each mask in the picture


@dataclass(frozen=True)
class Measure:
    """One of the measures: its title, its value with a standard error, and how to write them."""

    title: str
    of: Callable[[Edited], tuple[float, float]]
    digits: int

    def cell(self, result: Edited | None) -> str:
        """Formats the measure for a table."""
        if result is None:
            return ""
        value, error = self.of(result)
        return f"{value:.{self.digits}f} ± {error:.{self.digits}f}"


def _share(share: float, images: int) -> tuple[float, float]:
    return 100 * share, 100 * (share * (1 - share) / images) ** 0.5


RECOGNISED = Measure("recognised (%)", lambda one: _share(one.recognised, one.images), 1)
PLAIN_RECOGNISED = Measure("recognised (%)", lambda one: _share(one.plain_recognised, one.images), 1)
FRECHET = Measure("Fréchet distance", lambda one: (one.frechet, one.frechet_error), 2)
NATS = Measure("nats of the hole", lambda one: (one.nats, one.nats_error), 1)
EXCESS = Measure("nats beyond one token a step", lambda one: (one.excess_nats, one.excess_error), 2)


def tables(results: Results, config: EditingStudy) -> str:
    """Returns all tables in Markdown: comparisons, each measure by order, pasting, blocks of prefill."""
    ways = [(mask, steps) for mask in config.masks for steps in config.steps]
    parts = [_compared(results, config)]
    for measure in (RECOGNISED, FRECHET, EXCESS, NATS):
        rows = [[_name(*way), *(measure.cell(_at(results, *way, order)) for order in config.orders)] for way in ways]
        parts.append(markdown_table([f"{measure.title}: hidden, T", *config.orders], rows))
    return "\n\n".join([*parts, _pasting(results, config), _blocks(results, config)])


def _at(results: Results, mask: str, steps: int, order: str) -> Edited | None:
    return results.get(EditPoint(EDITED, mask, order, steps))


def _name(mask: str, steps: int) -> str:
    return f"{mask}, {steps}"


def _compared(results: Results, config: EditingStudy) -> str:
    pictures = {"as they are": EditPoint(UNEDITED), "as the tokenizer gives them back": EditPoint(RECONSTRUCTION)}
    pictures |= {f"{mask} filled smoothly, nothing drawn": EditPoint(FILLED, mask) for mask in config.masks}
    rows = [
        [name, *(measure.cell(results.get(point)) for measure in (RECOGNISED, FRECHET))]
        for name, point in pictures.items()
    ]
    return markdown_table(["the same images", RECOGNISED.title, FRECHET.title], rows)


def _pasting(results: Results, config: EditingStudy) -> str:
    """Compares edits in the first order with the known pixels pasted and as the tokenizer reconstructs them."""
    rows = []
    for mask in config.masks:
        for steps in config.steps:
            one = _at(results, mask, steps, config.orders[0])
            if one is not None:
                cells = [f"{one.known_difference:.0f}", f"{one.plain_known_difference:.2f}"]
                cells += [RECOGNISED.cell(one), PLAIN_RECOGNISED.cell(one)]
                rows.append([_name(mask, steps), *cells, f"{one.frechet:.2f}", f"{one.plain_frechet:.2f}"])
    head = ["largest difference in what is known, of 255, pasted", "mean difference, not pasted"]
    head += [f"{title}, {how}" for title in (RECOGNISED.title, FRECHET.title) for how in ("pasted", "not pasted")]
    return markdown_table([f"{config.orders[0]}: hidden, T", *head], rows)


def _blocks(results: Results, config: EditingStudy) -> str:
    """Tabulates the cost of known cells that enter in several blocks."""
    rows = []
    for mask in config.masks:
        found = [results.get(in_blocks(config, mask, block)) for block in (0, *config.prefill_blocks)]
        nats = [NATS.cell(found[0]), *(EXCESS.cell(one) for one in found[1:])]
        rows.append([mask, *nats, *(RECOGNISED.cell(one) for one in found)])
    several = [f"blocks of {block}" for block in config.prefill_blocks]
    head = [f"{NATS.title}, one block", *(f"beyond it, {kind}" for kind in several)]
    head += [f"{RECOGNISED.title}, {kind}" for kind in ("one block", *several)]
    return markdown_table([f"{config.orders[0]}, T = {max(config.steps)}: hidden", *head], rows)


def draw_chart(results: Results, config: EditingStudy, path: Path) -> None:
    """Draws a row per measure and a column per mask: a curve over the steps for each order, with errors."""
    measures = (EXCESS, RECOGNISED, FRECHET)
    figure = Figure(figsize=(3.6 * len(config.masks), 2.6 * len(measures)), layout="constrained")
    rows = figure.subplots(len(measures), len(config.masks), sharex=True, sharey="row", squeeze=False)
    for measure, row in zip(measures, rows, strict=True):
        for mask, axes in zip(config.masks, row, strict=True):
            for colour, order in zip(_COLOURS, config.orders, strict=False):
                _curve(axes, results, config, measure, mask, order, colour)
            unedited = results.get(EditPoint(UNEDITED))
            if unedited is not None and measure is not EXCESS:
                axes.axhline(measure.of(unedited)[0], color="0.5", linestyle=":", label="unedited")
            axes.grid(color="0.92")
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
        row[0].set_ylabel(measure.title)
    for mask, top, bottom in zip(config.masks, rows[0], rows[-1], strict=True):
        top.set_title(mask, fontsize=10)
        bottom.set(xlabel="steps T", xticks=sorted(config.steps))
    rows[1, 0].legend(fontsize=8, frameon=False)
    save_figure(figure, path, figure_settings(config))


def _curve(
    axes: Axes, results: Results, config: EditingStudy, measure: Measure, mask: str, order: str, colour: str
) -> None:
    found = [(steps, measure.of(one)) for steps in sorted(config.steps) if (one := _at(results, mask, steps, order))]
    if found:
        at, (values, errors) = [steps for steps, _ in found], zip(*(pair for _, pair in found), strict=True)
        axes.errorbar(
            at, values, errors, label=order, color=colour, marker="o", markersize=3.5, linewidth=1.4, capsize=2
        )


def draw_pictures(instruments: EditInstruments, config: EditingStudy, path: Path) -> None:
    """Draws images of different classes, their hidden parts, and the edits with the fewest and the most steps."""
    firsts = [int((instruments.labels == label).nonzero()[0]) for label in instruments.labels.unique()]
    chosen = [firsts[i % len(firsts)] for i in range(_SHOWN * len(config.masks))]
    ways = [
        (order, steps) for order in config.orders for steps in dict.fromkeys((min(config.steps), max(config.steps)))
    ]
    titles = ["image", "hidden", *(f"{order}\nT = {steps}" for order, steps in ways)]
    figure = Figure(figsize=(0.95 * len(titles), 1.0 * len(chosen) + 0.4), layout="constrained")
    for i, (row, all_axes) in enumerate(
        zip(chosen, figure.subplots(len(chosen), len(titles), squeeze=False), strict=True)
    ):
        mask = config.masks[i // _SHOWN]
        points = [EditPoint(EDITED, mask, order, steps) for order, steps in ways]
        edits = [instruments.draw(instruments.plan(point, torch.tensor([row])))[0][0] for point in points]
        image = VQTokenizer.to_pixels(instruments.pictures[row][None])[0]
        for axes, pixels in zip(all_axes, [image, _hatched(image, hidden_pixels(mask)), *edits], strict=True):
            axes.imshow(pixels.numpy(), interpolation="lanczos")
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
        all_axes[0].set_ylabel(CLASS_NAMES[int(instruments.labels[row])], fontsize=8)
        if i == 0:
            for axes, title in zip(all_axes, titles, strict=True):
                axes.set_title(title, fontsize=8)
    save_figure(figure, path, figure_settings(config))


def _hatched(pixels: Tensor, hidden: Tensor) -> Tensor:
    y, x = torch.meshgrid(*map(torch.arange, hidden.shape), indexing="ij")
    stripes = torch.where((y + x) % 4 < 2, 192, 128).to(torch.uint8)
    return torch.where(hidden[..., None], stripes[..., None], pixels)


def figure_settings(config: EditingStudy) -> dict[str, Any]:
    """Returns the settings that a picture of the study carries."""
    return {"command": "study-editing", **asdict(config)}
