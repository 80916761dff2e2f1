"""The study: its points, its file that is gone on with, and its four instruments on the bundled model."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")
pytest.importorskip("torchmetrics")

from lpd_tools.bench.timing import Times
from lpd_tools.data.fashion_mnist import load_fashion_mnist
from lpd_tools.evaluation.likelihood import dependency_loss, orders_for
from lpd_tools.study import study as study_module
from lpd_tools.study import times
from lpd_tools.study.measure import Instruments
from lpd_tools.study.points import Measured, Point, Sweeps
from lpd_tools.study.report import INSTRUMENTS, summarise, tables
from lpd_tools.study.results import append_result, read_results
from lpd_tools.study.study import Study, run_study
from lpd_tools.study.times import read_times
from lpd_tools.training.judge import load_judge

from lpd_ext import ops
from lpd_ext.bundled import bundled_model
from lpd_ext.hub import CONFIG_FILE, TOKENIZER_FILE
from lpd_ext.pipeline import LPDPipeline
from lpd_ext.schedule import group_sizes

DATA = Path(__file__).parents[1] / "data"
BASE = Point("mutual", "mutual", "locality", 10, 8.0, 1.0, 2, 0)


def sweeps(**changes: Any) -> Sweeps:
    """Two steps, two orders, two seeds, three thresholds and two scales, without a twin."""
    plain = Sweeps(BASE, (4, 10), ("locality", "raster"), 2, (1.0,), (1, 2, 3), (1.0, 8.0), twin=False)
    return dataclasses.replace(plain, **changes)


def result(point: Point, value: float) -> Measured:
    """A point whose instruments all read `value`."""
    return Measured(point, 20, value, value, value, value)


def test_points_are_each_measured_once() -> None:
    """Sweeps share points, which come once, those of the first seed first."""
    every = sweeps().all_points()
    assert len(set(every)) == len(every)
    # 4 by orders and 2 drawn blind, repulsion 1 and 3, guidance 1; of two seeds each.
    assert len(every) == 2 * (4 + 2 + 2 + 1)
    assert [point.seed for point in every] == [0] * 9 + [1] * 9
    twins = set(sweeps(twin=True).all_points()) - set(every)
    assert {(point.trained, point.drawn, point.steps) for point in twins} == {
        ("blind", "blind", 4),
        ("blind", "blind", 10),
    }


def test_results_are_read_back(tmp_path: Path) -> None:
    """Every value survives the file; a row cut short and a file of other columns are refused."""
    path = tmp_path / "deep" / "study.csv"
    written = [result(dataclasses.replace(BASE, seed=seed, guidance_scale=7.5), 0.123456) for seed in (0, 1)]
    for one in written:
        append_result(path, one)
    assert read_results(path, Measured) == {one.point: one for one in written}
    path.write_text(path.read_text()[:-20])
    with pytest.raises(ValueError, match=r"line 3 of .* is no whole row"):
        read_results(path, Measured)
    path.write_text("step,loss\n1,2\n")
    with pytest.raises(ValueError, match="its columns must be trained, drawn, order"):
        read_results(path, Measured)


def test_summaries_are_over_the_seeds_of_a_point() -> None:
    """Mean and deviation take in all seeds of a point and nothing else."""
    other = dataclasses.replace(BASE, order="raster")
    measured = {one.point: one for one in (result(BASE, 1.0), result(dataclasses.replace(BASE, seed=1), 2.0))}
    measured[other] = result(other, 50.0)
    summary = summarise(measured, BASE, INSTRUMENTS[0])
    assert summary is not None
    assert (summary.mean, summary.seeds) == (1.5, 2)
    assert summary.deviation == pytest.approx(0.5**0.5)
    assert summarise(measured, dataclasses.replace(BASE, steps=4), INSTRUMENTS[0]) is None
    text = tables(measured, sweeps(), {"10 steps, guided": 10.04})
    assert "| locality, T = 10 | 1.5 ± 0.7 | 1.5 ± 0.7 | 1.50 ± 0.71 | 150.0 ± 70.7 | 10.0 | 2 |" in text
    assert "| raster, T = 10 | 50.0 | 50.0 | 50.00 | 5000.0 | 10.0 | 1 |" in text


@pytest.fixture(scope="module")
def instruments() -> Instruments:
    """40 guided and 20 scored images of the bundled model, which also stands in for its twin."""
    pipe = LPDPipeline.from_pretrained("fashion_mnist")
    judge = load_judge(DATA / "judge.safetensors")
    test = load_fashion_mnist("test", DATA / "fashion_mnist")
    return Instruments({"mutual": pipe, "blind": pipe}, judge, test, images=40, scored=20)


def test_instruments_measure_what_they_say(instruments: Instruments) -> None:
    """The bundled model draws what it is asked for, and its nats are those of the order and the steps of the point."""
    found = instruments.measure(BASE)
    assert found.recognised >= 0.85
    pipe = instruments.pipes["mutual"]
    orders = orders_for("locality", (8, 8), 10, 20, pipe.defaults)
    sizes = group_sizes(64, 10)
    expected = dependency_loss(pipe.model, instruments.tokens, instruments.labels, orders, sizes)
    assert found.dependency_nats == pytest.approx(float(expected.mean()), rel=1e-6)
    raster = instruments.measure(dataclasses.replace(BASE, order="raster", steps=2))
    # Contiguous groups ignore much more of what neighbours say about each other.
    assert raster.dependency_nats > found.dependency_nats + 30
    assert raster.consistency_nats > found.consistency_nats + 10
    assert raster.frechet > found.frechet


def test_blind_points_hide_queries(instruments: Instruments) -> None:
    """At one token a step nothing is hidden; at two steps both the loss and the tokens are others."""
    one_by_one = dataclasses.replace(BASE, steps=64, guidance_scale=1.0)
    plain, hidden = (instruments.measure(dataclasses.replace(one_by_one, drawn=drawn)) for drawn in ("mutual", "blind"))
    assert hidden.dependency_nats == pytest.approx(plain.dependency_nats, rel=1e-5)
    few = dataclasses.replace(BASE, steps=2)
    plain, hidden = (instruments.measure(dataclasses.replace(few, drawn=drawn)) for drawn in ("mutual", "blind"))
    assert abs(hidden.dependency_nats - plain.dependency_nats) > 0.1


def quick(tmp_path: Path, **changes: Any) -> Study:
    """A study of few images and points."""
    study = Study(
        out=str(tmp_path / "study"), judge=str(DATA / "judge.safetensors"), data_dir=str(DATA / "fashion_mnist")
    )
    study = dataclasses.replace(study, steps=(4, 10), orders=("locality", "raster"), seeds=1, images=4, scored_images=2)
    study = dataclasses.replace(study, proximities=(1.0,), repulsions=(2,), guidance_scales=(1.0,))
    return dataclasses.replace(study, **changes)


def test_a_study_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A study that is broken off measures the rest, nothing twice, and refuses other models and settings."""
    measured = []

    class Counting(Instruments):
        def measure(self, point: Point) -> Measured:
            if len(measured) == 3:
                raise KeyboardInterrupt
            measured.append(point)
            return super().measure(point)

    monkeypatch.setattr(study_module, "Instruments", Counting)
    with pytest.raises(KeyboardInterrupt):
        run_study(quick(tmp_path))
    assert list(read_results(tmp_path / "study.csv", Measured)) == measured
    monkeypatch.setattr(study_module, "Instruments", Instruments)
    points = read_results(run_study(quick(tmp_path)), Measured)
    assert list(points)[:3] == measured
    # T is 4, 10 and the number of tokens: orders 6, drawn blind 3, the second seed of the default for the thresholds,
    # guidance 1 with two seeds.
    assert len(points) == 6 + 3 + 1 + 2
    for name in ("orders", "visibility", "knobs"):
        with Image.open(tmp_path / f"study_{name}.png") as image:
            assert image.width == 1760
            assert json.loads(image.text["lpd:command"]) == "study"
            assert json.loads(image.text["lpd:steps"]) == [4, 10]
    text = (tmp_path / "study_tables.md").read_text()
    assert "| raster, T = 4 |" in text
    assert not (tmp_path / "study_times.json").exists()
    with pytest.raises(ValueError, match=r"images is 5, but the results in .* began with 4"):
        run_study(quick(tmp_path, images=5))


def test_times_are_a_pass_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One time for each number of steps, with guidance and without; the tables have them beside the points.

    A draw takes as many seconds here as it gives rows to attention: a clock would depend on what else runs.
    """
    attention, rows = ops.group_attention, [0]

    def counted(qkv: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:
        rows[0] += len(qkv)
        return attention(qkv, *rest, **named)

    def by_rows(draws: Sequence[Callable[[], object]], *_: object, **__: object) -> list[Times]:
        taken = []
        for draw in draws:
            rows[0] = 0
            draw()
            taken.append(Times([float(rows[0])]))
        return taken

    monkeypatch.setattr(ops, "group_attention", counted)
    monkeypatch.setattr(times, "interleaved", by_rows)
    monkeypatch.setattr(times, "BATCH", 4)
    run_study(quick(tmp_path, times=True, minutes=0.0))
    found = json.loads((tmp_path / "study_times.json").read_text())
    took = found["milliseconds per image"]
    assert set(took) == {"4 steps, guided", "10 steps, guided", "64 steps, guided", "10 steps, unguided"}
    assert 0 < took["10 steps, unguided"] == took["10 steps, guided"] / 2
    assert found["machine"]["threads"] >= 1
    assert not (tmp_path / "study.csv").exists()
    point = dataclasses.replace(BASE, steps=4)
    text = tables({point: result(point, 1.0)}, sweeps(), read_times(tmp_path / "study_times.json"))
    assert f"| locality, T = 4 | 1.0 | 1.0 | 1.00 | 100.0 | {took['4 steps, guided']:.1f} | 1 |" in text
    hidden = dataclasses.replace(point, drawn="blind")  # drawn by plain torch: its time says nothing
    text = tables({hidden: result(hidden, 1.0)}, sweeps(), read_times(tmp_path / "study_times.json"))
    assert "while drawing only, T = 4 | 1.0 | 1.0 | 1.00 | 100.0 |  | 1 |" in text


def test_times_are_milliseconds_of_an_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(times, "interleaved", lambda draws, *_, **__: [Times([0.1, 0.2, 0.9])] * len(draws))
    times.time_points(LPDPipeline.from_pretrained("fashion_mnist"), [BASE], tmp_path / "times.json")
    assert read_times(tmp_path / "times.json") == {"10 steps, guided": 2.0}  # 0.2 s for a hundred


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither half a note of what the results depend on, nor a file without a header that is refused ever after."""
    config = quick(tmp_path, minutes=0.0)
    run_study(config)
    noted = (tmp_path / "study.json").read_text()

    def full_disk(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full_disk)
        with pytest.raises(OSError, match="No space left"):
            run_study(config)
    assert (tmp_path / "study.json").read_text() == noted
    (tmp_path / "study.csv").touch()
    assert read_results(tmp_path / "study.csv", Measured) == {}
    append_result(tmp_path / "study.csv", result(BASE, 1.0))
    assert read_results(tmp_path / "study.csv", Measured) == {BASE: result(BASE, 1.0)}


def test_impossible_studies_are_refused(tmp_path: Path) -> None:
    """Orders, steps and twins that cannot be are refused before anything is written."""
    for changes, message in (
        ({"orders": ("zigzag",)}, "orders must be among locality, .* got zigzag"),
        ({"steps": (65,)}, r"steps must be in \[1, 64\], got 65"),
        ({"twin": str(bundled_model("fashion_mnist"))}, "was trained with mutual visibility"),
        ({"scored_images": 5}, r"scored_images must be in \[1, 4\], got 5"),
        ({"judge": "none"}, "no judge at 'none'"),
        ({"data_dir": "none"}, "none/t10k-images.* is missing"),
        ({"guidance_scales": (2.0, -1e31)}, r"guidance_scale\[0\] must be in \[-1e"),
        ({"repulsions": (2, -1)}, "repulsion_threshold must be"),
        ({"proximities": (math.nan,)}, "proximity_threshold must be"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            run_study(quick(tmp_path, **changes))
        assert not list(tmp_path.iterdir()), message
    twin = tmp_path / "twin"
    shutil.copytree(bundled_model("fashion_mnist"), twin)
    config = json.loads((twin / CONFIG_FILE).read_text()) | {"tokenizer_sha256": "0" * 64}
    (twin / CONFIG_FILE).write_text(json.dumps(config))
    with pytest.raises(ValueError, match="is not the one whose tokens"):
        run_study(quick(tmp_path, twin=str(twin)))
    assert [path.name for path in tmp_path.iterdir()] == ["twin"]
    assert (twin / TOKENIZER_FILE).is_file()
