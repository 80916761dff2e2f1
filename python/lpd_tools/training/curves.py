"""Draws the logs of the training programs."""

from __future__ import annotations

import csv
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from lpd_ext.content import content_of, read_text
from lpd_ext.state_files import complete_file
from lpd_tools.png_settings import png_info
from lpd_tools.training.settings import Curves


def read_log(path: str | Path) -> dict[str, list[float]]:
    """The columns of a CSV log; NaN where a row has no value."""
    with content_of(path, "is no log"):
        rows = list(csv.DictReader(read_text(path).splitlines()))
        if not rows:
            raise ValueError("it has no rows")
        return {name: [float(row[name] or math.nan) for row in rows] for name in rows[0]}


def draw_curves(config: Curves) -> Path:
    """Writes a picture of reconstruction quality and of nats per token over the steps; returns its path."""
    tokenizer, transformer = read_log(config.tokenizer_log), read_log(config.train_log)
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    quality, nats = figure.subplots(1, 2)
    # Of Fashion-MNIST the centre is measured, without the black border.
    psnr = next(name for name in ("test_psnr_centre", "test_psnr") if name in tokenizer)
    quality.plot(tokenizer["step"], tokenizer[psnr], color="tab:blue")
    quality.set(title="tokenizer", xlabel="step", ylabel=f"{psnr.replace('_', ' ')} (dB)")
    if "test_recognised" in tokenizer:  # a tokenizer may be trained without a judge
        recognised = quality.twinx()
        recognised.plot(tokenizer["step"], [100 * r for r in tokenizer["test_recognised"]], color="tab:orange")
        recognised.set_ylabel("recognised by the judge (%)", color="tab:orange")
    for name in ("train_loss", "train_nats", "test_nats_10_steps", "test_nats_64_steps"):
        if name in transformer:
            nats.plot(transformer["step"], transformer[name], label=name.replace("_", " "))
    nats.set(title="transformer", xlabel="step", ylabel="nats per token")
    nats.legend()
    kind = Path(config.out).suffix[1:] or "png"
    options: dict[str, Any] = {"dpi": 120, "format": kind}
    if kind == "png":
        options["pil_kwargs"] = {"pnginfo": png_info({"command": "curves", **asdict(config)})}
    with complete_file(config.out) as temporary:
        figure.savefig(temporary, **options)
    return Path(config.out)
