"""Results of `lpd measure` and `lpd evaluate` as tables, and a picture of generated images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image
from rich.table import Table
from rich.text import Text

from lpd_tools.console import new_console, say
from lpd_tools.evaluation.images import ImageSet
from lpd_tools.pictures import labelled_grid

PICTURE_CLASSES, PICTURE_IMAGES = 10, 8


def show_results(results: Mapping[str, Any], out: str) -> None:
    """Prints the tables, the caveats, and where the results were written."""
    console = new_console()
    for table in result_tables(results):
        console.print(table)
    for warning in results["warnings"]:
        console.print(Text.assemble(("note:", "yellow"), " ", warning), soft_wrap=True)
    if out:
        say(f"wrote {out}")


def result_tables(results: Mapping[str, Any]) -> list[Table]:
    """The measures as tables, each beside its floor."""
    tables = [measures_table(results)]
    if "recognised" in results:
        tables.append(recognition_table(results["recognised"], "recognised by the judge (%)"))
    for name, of in results.get("probed", {}).items():
        table = recognition_table(of["recognised"], f"recognised by a linear classifier of {name} features (%)")
        near = ", ".join(f"{row} {spread(value)}" for row, value in of["nearest"].items())
        table.caption = f"1 - cosine to the nearest learned image, median: {near}"
        tables.append(table)
    titles = {
        "nats_per_reference_image": "teacher-forced nats per real image (dependency loss: what one token a step saves)",
        "nats_per_unguided_image": "nats per image drawn without guidance, scored one token a step (self-consistency)",
    }
    return tables + [nats_table(results[name], title) for name, title in titles.items() if name in results]


def measures_table(results: Mapping[str, Any]) -> Table:
    """Measures by row of images, the floor last."""
    measures = results["measures"]
    rows = list(dict.fromkeys(row for values in measures.values() for row in values))
    images = results["images"]
    title = f"{images['generated']} images x {images['repeats']} against {images['reference']} of the reference"
    if images["repeats"] > 1:
        title += f" (mean of {images['repeats']} repeats ± half of its 95 % interval)"
    table = Table("measure", *rows, title=title)
    for name, values in measures.items():
        table.add_row(name, *(spread(values[row]) if row in values else "-" for row in rows))
    if "reconstruction_psnr_db" in results:
        table.caption = f"reconstruction PSNR {results['reconstruction_psnr_db']:.2f} dB"
    if "reconstruction_psnr_centre_db" in results:
        table.caption = f"{table.caption} (28x28 centre: {results['reconstruction_psnr_centre_db']:.2f} dB)"
    return table


def recognition_table(sources: Mapping[str, Any], title: str) -> Table:
    """Share recognised by class, in percent."""
    table = Table("class", *sources, title=title)
    for name in next(iter(sources.values()), ()):
        table.add_row(name, *(spread(rates[name], 100) if name in rates else "-" for rates in sources.values()))
    return table


def nats_table(by_order: Mapping[str, Any], title: str) -> Table:
    """Nats by order and number of steps."""
    steps = list(next(iter(by_order.values())))
    table = Table("order", *(f"{count} steps" for count in steps), title=title)
    for order, row in by_order.items():
        table.add_row(order, *(f"{row[count]['mean']:.1f} ± {row[count]['standard_error']:.1f}" for count in steps))
    return table


def spread(value: Mapping[str, Any], factor: float = 1) -> str:
    """A mean, with half of its 95 % interval where there are repeats."""
    mean = number(factor * value["mean"])
    if "interval95" not in value:
        return mean
    low, high = value["interval95"]
    return f"{mean} ± {number(factor * (high - low) / 2)}"


def number(value: float) -> str:
    """Two digits after the point, of small numbers three that count."""
    return f"{value:.3g}" if 0 < abs(value) < 1 else f"{value:.2f}"


def int8_tables(results: Mapping[str, Any]) -> list[Table]:
    """Returns the tables of `lpd int8-quality`: int8 against float32."""
    forced = Table("order", "same argmax (%)", "nats", title="int8 against float32, teacher-forced")
    for order, row in results["teacher_forced"].items():
        share = f"{100 * row['agreement']:.2f} ± {100 * row['standard_error']:.2f}"
        forced.add_row(order, share, f"{row['nats']:.1e}")
    tables = [forced]
    if "drawn" in results:
        drawn = Table("seed", "weights", "recognised (%)", "Fréchet distance", title="drawn images, by the judge")
        for seed, by_weights in results["drawn"].items():
            for weights, row in by_weights.items():
                drawn.add_row(seed, weights, f"{100 * row['recognised']:.2f}", f"{row['frechet_distance']:.2f}")
        tables.append(drawn)
    if "lpd_l_random_weights" in results:
        row = results["lpd_l_random_weights"]
        blocks = Table("block", "cosine", title="lpd_l, random weights: rows that leave each block")
        for number, cosine in enumerate(row["cosine"], start=1):
            blocks.add_row(str(number), f"{cosine:.5f}")
        blocks.caption = f"logits: {row['kl']:.1e} nats, {100 * row['agreement']:.1f} % of the argmaxes the same"
        tables.append(blocks)
    return tables


def picture(images: ImageSet, class_names: Sequence[str]) -> Image.Image:
    """The first images of up to ten classes, one row a class."""
    assert images.labels is not None
    labels = images.labels.unique().tolist()[:PICTURE_CLASSES]
    chosen = [(images.labels == label).nonzero().flatten()[:PICTURE_IMAGES].tolist() for label in labels]
    per_class = min(map(len, chosen))
    pixels = images.read([i for row in chosen for i in row[:per_class]]).numpy()
    captions = [class_names[label] if class_names else str(label) for label in labels]
    return labelled_grid([Image.fromarray(image) for image in pixels], captions, per_class)
