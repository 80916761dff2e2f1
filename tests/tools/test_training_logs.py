"""Tests of a training's output: CSV tables, TensorBoard, pictures, curves, and how far it is."""

from __future__ import annotations

import builtins
import dataclasses
import io
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from lpd_tools import progress
from lpd_tools.pictures import tiled
from lpd_tools.progress import track
from lpd_tools.training.curves import Curves, draw_curves, read_log
from lpd_tools.training.logs import append_csv, drop_rows_after, summary_writer
from lpd_tools.training.transformer import train
from rich.console import Console
from training_runs import column, lpd_config, make_cache


@pytest.fixture(scope="module")
def cache_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cache(tmp_path_factory.mktemp("tokens"))


def test_csv_log(tmp_path: Path) -> None:
    for step in (1, 2):
        append_csv(tmp_path / "log.csv", {"step": step, "loss": step / 3})
    assert (tmp_path / "log.csv").read_text().split() == ["step,loss", "1,0.333333333", "2,0.666666667"]
    drop_rows_after(tmp_path / "log.csv", 1)
    append_csv(tmp_path / "log.csv", {"step": 2, "loss": 0.5})
    drop_rows_after(tmp_path / "none.csv", 1)
    assert (tmp_path / "log.csv").read_text().split() == ["step,loss", "1,0.333333333", "2,0.5"]
    drop_rows_after(tmp_path / "log.csv", 0)
    append_csv(tmp_path / "log.csv", {"step": 1, "loss": 0.25})
    assert (tmp_path / "log.csv").read_text().split() == ["step,loss", "1,0.25"]


def test_a_row_that_was_cut_short_goes(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("step,loss\n1,0.5\n2")
    drop_rows_after(tmp_path / "log.csv", 2)
    assert (tmp_path / "log.csv").read_text().split() == ["step,loss", "1,0.5"]


def test_a_resumed_training_may_log_more_or_less_than_before(tmp_path: Path) -> None:
    log = tmp_path / "log.csv"
    append_csv(log, {"step": 1, "loss": 0.5})
    append_csv(log, {"step": 2, "loss": 0.25, "test": 0.75})
    append_csv(log, {"step": 3, "loss": 0.125})
    assert log.read_text().split() == ["step,loss,test", "1,0.5,", "2,0.25,0.75", "3,0.125,"]
    drop_rows_after(log, 2)
    assert log.read_text().split() == ["step,loss,test", "1,0.5,", "2,0.25,0.75"]
    assert read_log(log)["test"] == pytest.approx([math.nan, 0.75], nan_ok=True)


def test_log_survives_a_crash_while_rows_are_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2):
        append_csv(tmp_path / "log.csv", {"step": step})
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", lambda file: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            drop_rows_after(tmp_path / "log.csv", 1)
    assert (tmp_path / "log.csv").read_text().split() == ["step", "1", "2"]


def test_tensorboard_shows_what_the_tables_hold(cache_path: Path, tmp_path: Path) -> None:
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = lpd_config(cache_path, tmp_path, tensorboard=True, sample_every=4, sample_images=5)
    config = dataclasses.replace(config, tokenizer=str(cache_path.with_name("tokenizer.safetensors")))
    train(dataclasses.replace(config, steps=6, decay_steps=1))
    # Steps 5 and 6 go away with this checkpoint; the resumed training writes them again.
    (tmp_path / "checkpoints" / "step_000000006.pt").unlink()
    train(config)
    events = accumulators.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    shown = {event.step: event.value for event in events.Scalars("steps/loss")}
    losses = [float(value) for value in column(tmp_path / "steps.csv", "loss")]
    assert shown == pytest.approx(dict(enumerate(losses, start=1)), rel=1e-6)
    assert len(events.Scalars("log/test_nats_10_steps")) == 2
    assert [event.step for event in events.Images("samples")] == [4, 8]
    with Image.open(tmp_path / "samples" / "step_000000008.png") as image:
        assert image.size == (3 * 32, 2 * 32)
        assert np.asarray(image).std() > 0
        said = {name: json.loads(image.text[f"lpd:{name}"]) for name in ("command", "step", "sample_guidance", "dim")}
    assert said == {"command": "train", "step": 8, "sample_guidance": config.sample_guidance, "dim": 32}


def test_another_tokenizer_draws_no_pictures(cache_path: Path, tmp_path: Path) -> None:
    other = make_cache(tmp_path / "other", codes=32).with_name("tokenizer.safetensors")
    with pytest.raises(ValueError, match="is not the one that made the tokens"):
        train(lpd_config(cache_path, tmp_path / "run", tokenizer=str(other)))
    assert not (tmp_path / "run").exists()


def test_missing_tensorboard_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *arguments: Any, **options: Any) -> Any:
        if name.startswith("torch.utils.tensorboard"):
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install 'lpd-ext\[train\]', or train with --no-tensorboard"):
        summary_writer(tmp_path, 0)


def test_pictures_are_tiled_row_by_row() -> None:
    images = np.arange(1, 6, dtype=np.uint8)[:, None, None, None].repeat(2, 1).repeat(3, 2).repeat(3, 3)
    grid = tiled(images)
    assert grid.shape == (4, 9, 3)
    assert grid[::2, ::3, 0].tolist() == [[1, 2, 3], [4, 5, 0]]


def test_curves_are_drawn(cache_path: Path, tmp_path: Path) -> None:
    train(lpd_config(cache_path, tmp_path))
    rows = "step,test_psnr_centre,test_recognised\n1,20,0.5\n2,22,0.75\n"
    (tmp_path / "tokenizer.csv").write_text(rows)
    picture = draw_curves(Curves(str(tmp_path / "tokenizer.csv"), str(tmp_path / "log.csv"), str(tmp_path / "x.png")))
    with Image.open(picture) as image:
        assert image.size == (1320, 432)
        assert json.loads(image.text["lpd:command"]) == "curves"
        assert json.loads(image.text["lpd:tokenizer_log"]) == str(tmp_path / "tokenizer.csv")
    drawing = draw_curves(Curves(str(tmp_path / "tokenizer.csv"), str(tmp_path / "log.csv"), str(tmp_path / "x.svg")))
    assert drawing.read_text().startswith("<?xml")


class Clock:
    """Seconds that pass when the test says so."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


def said_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """Collects what is printed from here on to a file."""
    output = io.StringIO()
    monkeypatch.setattr(progress, "new_console", lambda: Console(file=output, width=40, markup=False))
    return output


def said_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """Collects what is printed from here on to a terminal."""
    output = io.StringIO()
    monkeypatch.setattr(progress, "new_console", lambda: Console(file=output, width=120, force_terminal=True))
    return output


def test_without_a_terminal_a_line_every_half_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    output, clock = said_without_a_terminal(monkeypatch), Clock()
    monkeypatch.setattr(progress, "time", clock)
    figures: dict[str, float] = {}
    for i in track(range(10), "measuring [b] points of a long name", figures=figures):
        clock.now += 12.0
        figures["loss"] = 1 / (i + 1)
    assert output.getvalue().splitlines() == [
        "measuring [b] points of a long name: 3 of 10, 0:00:36, 0:01:24 left, loss 0.3333",
        "measuring [b] points of a long name: 6 of 10, 0:01:12, 0:00:48 left, loss 0.1667",
        "measuring [b] points of a long name: 9 of 10, 0:01:48, 0:00:12 left, loss 0.1111",
    ]


def test_what_is_short_says_nothing_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    output = said_without_a_terminal(monkeypatch)
    assert list(track(iter("abc"), "reading")) == ["a", "b", "c"]
    assert output.getvalue() == ""


def test_of_what_has_no_end_no_remaining_time_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    output = said_without_a_terminal(monkeypatch)
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    list(track(iter("ab"), "reading"))
    assert output.getvalue().splitlines() == ["reading: 1, 0:00:00", "reading: 2, 0:00:00"]


@pytest.mark.parametrize("terminal", [True, False], ids=["bar", "lines"])
def test_a_training_shows_its_loss(
    terminal: bool, cache_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = (said_on_a_terminal if terminal else said_without_a_terminal)(monkeypatch)
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    train(lpd_config(cache_path, tmp_path, steps=3))
    losses = [f"loss {float(value):.4g}" for value in column(tmp_path / "steps.csv", "loss")]
    shown = re.findall(r"loss [\d.]+", output.getvalue())
    assert "training the transformer" in output.getvalue()
    if terminal:  # it is drawn ten times a second, and at its end
        assert shown[-1] == losses[-1]
        assert "3/3" in output.getvalue()
    else:
        assert shown == losses
