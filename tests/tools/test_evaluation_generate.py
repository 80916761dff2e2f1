"""Images on disk: labels, seeds and files as announced, the same whoever draws them and however often it was killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("typer")
pytest.importorskip("rich")

from evaluation_models import save_small_model, with_hash
from lpd_tools.evaluation.generate import Generation, generate, repeat_of
from lpd_tools.evaluation.images import open_images
from training_runs import LPD

from lpd_ext.pipeline import LPDPipeline

SEED, CLASSES = 11, 3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("model"), CLASSES)


def generation(model: Path, out: Path, **changes: Any) -> Generation:
    config = Generation(str(out), str(model), images_per_class=4, seed=SEED, batch_size=5, temperature=0.9)
    return replace(config, **changes)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.png"))}


def test_each_image_is_that_of_its_label_and_seed(model: Path, tmp_path: Path) -> None:
    folder = generate(generation(model, tmp_path / "run"))
    assert list(contents(folder)) == [f"{c}/{number:02}.png" for c in range(3) for number in range(c, 12, 3)]
    pipe = LPDPipeline.from_pretrained(model)
    drawn, others = [], []
    for batch in (range(0, 5), range(5, 10), range(10, 12)):
        labels, seeds = [i % CLASSES for i in batch], [SEED + i for i in batch]
        drawn.extend(pipe(labels, seeds=seeds, temperature=0.9, output_type="np").images)
        shifted = [(label + 1) % CLASSES for label in labels]
        others.extend(pipe(shifted, seeds=seeds, temperature=0.9, output_type="np").images)
    for number, image in enumerate(drawn):
        np.testing.assert_array_equal(np.asarray(Image.open(folder / str(number % 3) / f"{number:02}.png")), image)
    # Else wrong seeds or labels would not be seen.
    assert len({image.tobytes() for image in drawn}) == 12
    assert not any((image == other).all() for image, other in zip(drawn, others, strict=True))


def test_manifest_has_all_that_draws_the_images_again(model: Path, tmp_path: Path) -> None:
    manifest = json.loads((generate(generation(model, tmp_path / "run")) / "manifest.json").read_text())
    settings = manifest["settings"]
    assert settings["seed"] == SEED
    assert settings["temperature"] == 0.9
    assert (settings["num_inference_steps"], settings["guidance_scale"]) == (4, 2.0)  # the model's defaults
    assert settings["repulsion_threshold"] == 2
    assert len(settings["sha256 of model.safetensors"]) == 64
    assert manifest["made_with"]["torch"]
    assert manifest["class_names"] == ["class 0", "class 1", "class 2"]


def test_npz_file_holds_the_same_images(model: Path, tmp_path: Path) -> None:
    pngs = generate(generation(model, tmp_path / "png"))
    folder = generate(generation(model, tmp_path / "npz", format="npz"))
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "samples.npz"]
    with np.load(folder / "samples.npz") as file:
        assert (file["arr_0"].dtype, file["arr_0"].shape) == (np.uint8, (12, 8, 8, 3))
        assert file["arr_1"].tolist() == [i % CLASSES for i in range(12)]
        for number, image in enumerate(file["arr_0"]):
            np.testing.assert_array_equal(np.asarray(Image.open(pngs / str(number % 3) / f"{number:02}.png")), image)
    before = (folder / "samples.npz").read_bytes()
    generate(generation(model, folder, format="npz"))
    assert (folder / "samples.npz").read_bytes() == before


@pytest.mark.parametrize("kind", ["png", "npz"])
def test_labels_of_generated_images_have_the_names_of_the_model(kind: str, model: Path, tmp_path: Path) -> None:
    images = open_images(str(generate(generation(model, tmp_path / "run", format=kind))))
    assert images.labels is not None
    assert sorted(images.labels.tolist()) == [0] * 4 + [1] * 4 + [2] * 4
    assert images.class_names == {0: "class 0", 1: "class 1", 2: "class 2"}


@pytest.mark.parametrize("hidden", [".DS_Store", ".ipynb_checkpoints", "__MACOSX"])
def test_a_folder_that_looks_empty_is_empty(hidden: str, model: Path, tmp_path: Path) -> None:
    (tmp_path / "run" / hidden).mkdir(parents=True)
    assert len(open_images(str(generate(generation(model, tmp_path / "run"))))) == 12


@pytest.mark.parametrize("kind", ["png", "npz"])
def test_only_what_is_missing_is_drawn(kind: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted after two of three batches, a run draws one batch more, and ends as an unbroken one."""
    whole = generate(generation(model, tmp_path / "whole", format=kind))
    drawn: list[int] = []
    draw = LPDPipeline.__call__

    def count(self: LPDPipeline, labels: list[int], **options: Any) -> Any:
        if len(drawn) == 2:
            raise KeyboardInterrupt
        drawn.append(options["seeds"][0])
        return draw(self, labels, **options)

    monkeypatch.setattr(LPDPipeline, "__call__", count)
    config = generation(model, tmp_path / "broken", format=kind)
    with pytest.raises(KeyboardInterrupt):
        generate(config)
    assert drawn == [SEED, SEED + 5]
    drawn.clear()
    generate(config)
    assert drawn == [SEED + 10]
    if kind == "png":
        (tmp_path / "broken" / "1" / "04.png").unlink()  # the rest of its batch is there
        drawn.clear()
        generate(config)
        assert drawn == [SEED]
        assert contents(tmp_path / "broken") == contents(whole)
    else:
        assert (tmp_path / "broken" / "samples.npz").read_bytes() == (whole / "samples.npz").read_bytes()


def test_killed_and_resumed(model: Path, tmp_path: Path) -> None:
    """SIGKILL at any time leaves whole images only, and the resumed run equals an unbroken one byte for byte."""
    options = ["--model", model, "--images-per-class", 60, "--seed", SEED, "--batch-size", 2]
    command = [sys.executable, LPD, "generate", "--out", tmp_path / "killed", *options]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(contents(tmp_path / "killed")) < 9 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = contents(tmp_path / "killed")
    assert 9 <= len(left) < 180
    # What a process killed while writing leaves.
    (tmp_path / "killed" / "0" / ".000.png.abcdefgh").write_bytes(b"half")
    changes = {"images_per_class": 60, "batch_size": 2, "temperature": None}
    whole = contents(generate(generation(model, tmp_path / "whole", **changes)))
    assert contents(generate(generation(model, tmp_path / "killed", **changes))) == whole
    assert len(whole) == 180
    assert all(whole[name] == image for name, image in left.items())
    assert not list(tmp_path.rglob(".*"))


def test_two_processes_draw_what_one_draws(model: Path, tmp_path: Path) -> None:
    options = ["--model", model, "--images-per-class", 4, "--seed", SEED, "--batch-size", 5, "--temperature", 0.9]
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        2,
        "--master-port",
        0,
        "--standalone",
    ]
    command = [*launcher, LPD, "generate", "--out", tmp_path / "two", *options]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120, env=os.environ)
    assert result.returncode == 0, result.stderr
    assert contents(tmp_path / "two") == contents(generate(generation(model, tmp_path / "one")))


def test_ranks_share_the_batches(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each batch is drawn by one process alone."""
    from lpd_tools.evaluation import generate as module
    from lpd_tools.processes import Processes

    drawn: list[list[int]] = []
    draw = LPDPipeline.__call__

    def note(self: LPDPipeline, labels: list[int], **options: Any) -> Any:
        drawn.append(list(options["seeds"]))
        return draw(self, labels, **options)

    monkeypatch.setattr(LPDPipeline, "__call__", note)
    monkeypatch.setattr(Processes, "wait", lambda self: None)
    for rank in (0, 1):
        module._generate(generation(model, tmp_path / "run"), Processes(rank, 2, torch.device("cpu")))
        if rank == 0:
            assert [seeds[0] for seeds in drawn] == [SEED, SEED + 10]
    assert sorted(seed for seeds in drawn for seed in seeds) == list(range(SEED, SEED + 12))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 12}, "seed is 12, but the images in .* were begun with 11"),
        ({"images_per_class": 5}, "images_per_class is 5, .* begun with 4"),
        ({"batch_size": 6}, "batch_size is 6, .* begun with 5"),
        ({"format": "npz"}, "format is 'npz', .* begun with 'png'"),
        ({"guidance_scale": 3.0}, r"guidance_scale is 3.0, .* begun with 2.0"),
        ({"temperature": None}, r"temperature is 1.0, .* begun with 0.9"),
    ],
)
def test_other_settings_are_refused(change: dict[str, Any], message: str, model: Path, tmp_path: Path) -> None:
    folder = generate(generation(model, tmp_path / "run"))
    before = contents(folder)
    with pytest.raises(ValueError, match=message):
        generate(generation(model, folder, **change))
    assert contents(folder) == before
    generate(generation(model, folder, guidance_scale=2.0))  # a default that is written out is no other setting


def test_another_model_is_refused(model: Path, tmp_path: Path) -> None:
    folder = generate(generation(model, tmp_path / "run"))
    other = Path(shutil.copytree(model, tmp_path / "other"))
    generate(generation(other, folder))  # the same weights in another folder
    data = bytearray((other / "tokenizer.safetensors").read_bytes())
    data[-1] ^= 1
    (other / "tokenizer.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match=r"sha256 of tokenizer\.safetensors is '"):
        generate(generation(other, folder))
    with_hash(other, "0" * 64)
    with pytest.raises(ValueError, match="is not the one whose tokens"):
        generate(generation(other, tmp_path / "new"))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "jpg"}, "format must be one of png, npz, got 'jpg'"),
        ({"images_per_class": 0}, "images_per_class must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"dtype": "int4"}, "dtype must be one of float32, bfloat16, float16, int8, got 'int4'"),
        ({"num_inference_steps": 17}, r"num_inference_steps must be in \[1, 16\], got 17"),
        ({"order": "zigzag"}, "order must be .* got 'zigzag'"),
        ({"seed": 2**63 - 3}, "seed must be in"),
        ({"device": "tpu"}, "device must be one of cpu.* got 'tpu'"),
    ],
)
def test_impossible_settings_write_nothing(change: dict[str, Any], message: str, model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        generate(generation(model, tmp_path / "run", **change))
    assert not (tmp_path / "run").exists()


def test_foreign_and_damaged_folders_are_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "mine.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"photos' is not empty and holds no manifest\.json"):
        generate(generation(model, tmp_path / "photos"))
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ValueError, match="out must be a folder"):
        generate(generation(model, tmp_path / "file"))
    folder = generate(generation(model, tmp_path / "run"))
    (folder / "1" / "04.png").unlink()
    with pytest.raises(ValueError, match="holds 11 images of 12: call `lpd generate` again"):
        open_images(str(folder))
    (folder / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"manifest\.json' is not valid JSON"):
        generate(generation(model, folder))


def test_repeats_share_no_seed(model: Path, tmp_path: Path) -> None:
    config = generation(model, tmp_path)
    runs = [repeat_of(config, repeat, 12) for repeat in range(3)]
    assert [run.seed for run in runs] == [11, 23, 35]
    assert [Path(run.out).name for run in runs] == ["seed_11", "seed_23", "seed_35"]
    first, second = (open_images(str(generate(run))) for run in runs[:2])
    assert not (first.read(range(12)) == second.read(range(12))).all()
