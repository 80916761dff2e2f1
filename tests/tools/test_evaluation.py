"""`lpd evaluate`: from a model to results."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")
pytest.importorskip("torchmetrics")

from evaluation_models import DATA, FASHION, noise, save_images, save_inception, save_small_model
from lpd_tools.cli import app
from lpd_tools.data.sources import open_data
from lpd_tools.evaluation import evaluate as evaluate_module
from lpd_tools.evaluation.evaluate import Evaluation, evaluate, tokens_of
from lpd_tools.evaluation.images import data_images
from lpd_tools.evaluation.likelihood import dependency_loss
from lpd_tools.processes import Processes
from typer.testing import CliRunner

from lpd_ext.pipeline import LPDPipeline


def test_evaluate_measures_a_model(tmp_path: Path) -> None:
    """Two repeats, everything measured, written and shown; a second call draws nothing again."""
    model = save_small_model(tmp_path / "model", classes=10, ch_mult=(1, 1, 1, 1))
    arguments = ["--model", model, "--out", tmp_path / "out", "--images-per-class", 2, "--repeats", 2,
                 "--judge", DATA / "judge.safetensors", "--reference", FASHION, "--nats-images", 6, "--self-images", 6,
                 "--nats-steps", 4, "--nats-steps", 16, "--nats-orders", "raster"]  # fmt: skip
    result = CliRunner(env={"COLUMNS": "200", "TERM": "dumb"}).invoke(app, ["evaluate", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    for text in (
        "FD-judge",
        "real (the floor)",
        "reconstructed",
        "self-consistency",
        "2 repeats ±",
        "note: only 20 images",
    ):
        assert text in result.output
    results = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert set(results["measures"]["FD-judge"]) == {"generated", "reconstructed", "real (the floor)"}
    assert set(results["recognised"]) == {
        "generated", "reconstructed", "reconstructed reference", "real reference"
    }  # fmt: skip
    assert len(results["measures"]["FD-judge"]["generated"]["interval95"]) == 2
    assert len(results["recognised"]["generated"]) == 11
    assert results["recognised"]["real reference"]["all"]["mean"] >= 0.9
    assert [run["settings"]["seed"] for run in results["generated_with"]] == [0, 20]
    assert results["sampling"]["guidance_scale"] == 2.0
    with Image.open(tmp_path / "out" / "grid.png") as picture:
        assert picture.height == 10 * 68 + 4
        assert picture.text["lpd:command"] == '"evaluate"'
        assert '"guidance_scale": 2.0' in picture.text["lpd:sampling"]
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("seed_*/*/*.png")}
    assert len(files) == 40
    config = Evaluation(str(tmp_path / "out"), str(model), images_per_class=2, repeats=2, reference=FASHION,
                        judge=str(DATA / "judge.safetensors"), nats_images=0, self_images=0)  # fmt: skip
    again = evaluate(config)
    assert again is not None
    assert again["measures"]["FD-judge"] == results["measures"]["FD-judge"]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("seed_*/*/*.png")} == files
    pipe = LPDPipeline.from_pretrained(model)
    raster = results["nats_per_reference_image"]["raster"]
    real = data_images(open_data(FASHION).test, (32, 32), "real")
    real = real.subset([i * len(real) // 6 for i in range(6)], "real")  # of a folder the first would be of one class
    orders = torch.arange(16).expand(6, -1)
    assert real.labels is not None
    nats = dependency_loss(pipe.model, tokens_of(pipe, real), real.labels, orders, [1] * 16)
    assert raster["16"]["mean"] == pytest.approx(nats.mean().item(), rel=1e-6)


def test_evaluate_learns_classes_and_shows_neighbours(tmp_path: Path) -> None:
    """For any labelled data. Reconstructed images are not recognised: the learned ones may be among them."""
    model = save_small_model(tmp_path / "model")
    for name, seed in (("real", 1), ("more", 2)):
        for label in range(3):
            save_images(tmp_path / name / f"class {label}", noise(3, seed=3 * seed + label))
    config = Evaluation(
        str(tmp_path / "out"), str(model), images_per_class=2, reference=str(tmp_path / "real"),
        floor=str(tmp_path / "more"), learned_images=9, neighbours=4, reconstructed_images=3, nats_images=0,
        self_images=0,
    )  # fmt: skip
    results = evaluate(config)
    assert results is not None
    probed = results["probed"]["efficientnet"]
    assert set(probed["recognised"]) == set(probed["nearest"]) == {"generated", "real reference"}
    assert set(probed["recognised"]["generated"]) == {"all", "class 0", "class 1", "class 2"}
    with Image.open(tmp_path / "out" / "neighbours.png") as picture:
        assert picture.text["lpd:command"] == '"evaluate"'
    others = save_images(tmp_path / "others" / "boots", noise(4)).parent
    save_images(others / "class 0", noise(4))
    with pytest.raises(ValueError, match="'the model' has the classes"):
        evaluate(replace(config, out=str(tmp_path / "second"), floor=str(others)))
    assert not (tmp_path / "second").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"repeats": 0}, r"repeats must be in \[1, 1000\], got 0"),
        ({"nats_steps": (17,)}, r"nats_steps must be in \[1, 16\], got 17"),
        ({"nats_orders": ("zigzag",)}, "order must be .* got 'zigzag'"),
        ({"judge": "none"}, "no judge at 'none'"),
        ({"reference": "nowhere"}, "no folder and no file at 'nowhere'"),
    ],
)
def test_impossible_evaluations_draw_nothing(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    model = save_small_model(tmp_path / "model")
    config = Evaluation(str(tmp_path / "out"), str(model), nats_steps=(4,), reference=FASHION)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        evaluate(replace(config, **change))
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_measured_is_refused_before_anything_is_drawn(tmp_path: Path) -> None:
    """Pictures of another size than the judge's, more classes than it knows, statistics of other features, labels."""
    small, large = save_small_model(tmp_path / "small"), save_small_model(tmp_path / "large", 11, (1, 1, 1, 1))
    real = str(save_images(tmp_path / "real", noise(4)))
    np.savez(tmp_path / "stats.npz", mu=np.zeros(7), sigma=np.eye(7))
    save_inception(tmp_path / "inception.pt")
    judge, stats = str(DATA / "judge.safetensors"), str(tmp_path / "stats.npz")
    for model, changes, message in (
        (small, {"reference": real, "judge": judge}, r"the judge reads 32 x 32 images, got \[8, 8\]"),
        (large, {"reference": FASHION, "judge": judge}, "model has 11 classes, but the judge knows 10"),
        (small, {"reference": stats}, "holds statistics of Inception features alone, and efficientnet needs"),
        (small, {"reference": stats, "inception": str(tmp_path / "inception.pt")}, "has 7 features, inception gives 6"),
        (small, {"reference": FASHION}, "labels up to 9, but the model has 3 classes"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate(replace(Evaluation(str(tmp_path / "out"), str(model), nats_steps=(4,)), **changes))
        assert not (tmp_path / "out").exists(), message


def test_the_reference_is_read_before_anything_is_drawn(tmp_path: Path) -> None:
    """Pictures that cannot be read are skipped by every measure; if none can be, nothing is drawn."""
    model, data = save_small_model(tmp_path / "model"), tmp_path / "data"
    for split, seed in (("train", 1), ("val", 2)):
        for label in range(3):
            folder = save_images(data / split / f"class {label}", noise(6, seed=seed + 10 * label))
            (folder / "000.png").write_bytes(b"")
            (folder / "004.png").write_text("no picture")
    config = Evaluation(str(tmp_path / "out"), str(model), images_per_class=4, reference=f"folder:{data}",
                        nats_images=7, self_images=0, nats_steps=(4,), nats_orders=("raster",),
                        reconstructed_images=9)  # fmt: skip
    results = evaluate(config)
    assert results is not None
    assert results["images"]["reference"] == 12
    assert len(results["skipped"]) == 12
    assert "real (the floor)" in results["measures"]["FD-efficientnet"]
    assert results["nats_per_reference_image"]["raster"]["4"]["mean"] > 0
    for path in data.rglob("val/*/*.png"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"none of the 18 images of folder:.* \(test\) can be read"):
        evaluate(replace(config, out=str(tmp_path / "other")))
    assert not (tmp_path / "other").exists()


def test_each_process_has_a_gpu_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not only to draw: model and feature networks of eight processes would fill the first one's memory."""
    asked = []

    @contextmanager
    def second_of_two(device: str) -> Iterator[Processes]:
        yield Processes(1, 2, torch.device(device or "cuda:1"))

    def note(directory: Path, tokenizer: Path, dtype: str, device: torch.device) -> None:
        asked.append(device)
        raise InterruptedError

    monkeypatch.setattr(evaluate_module, "drawing_processes", second_of_two)
    monkeypatch.setattr(evaluate_module, "load_pipeline", note)
    config = Evaluation(str(tmp_path / "out"), str(save_small_model(tmp_path / "model")), reference=FASHION)
    for device, wanted in (("", "cuda:1"), ("cuda:0", "cuda:0"), ("cpu", "cpu")):
        with pytest.raises(InterruptedError):
            evaluate(replace(config, device=device))
        assert asked.pop() == torch.device(wanted)
