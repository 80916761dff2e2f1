"""Training of the tokenizer: its codebook, what is resumed, what it logs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from lpd_tools.cli import app
from lpd_tools.data.sources import open_data
from lpd_tools.processes import Processes
from lpd_tools.training.codebook import CodebookAverages
from lpd_tools.training.curves import read_log
from lpd_tools.training.tokenizer import ImageBatch, TokenizerTask, tokenizer_sizes, train_tokenizer
from training_runs import as_options, differences, newest_state, tokenizer_config
from typer.testing import CliRunner

from lpd_ext.picture import UnreadableImageError
from lpd_ext.tokenizer import VQTokenizer


class KilledError(Exception):
    """Stands for the death of the process."""


def dies_before(step_of_death: int) -> Callable[[TokenizerTask, int, slice], ImageBatch]:
    """A stand-in for TokenizerTask.batch."""
    batch = TokenizerTask.batch

    def dying(self: TokenizerTask, step: int, rows: slice) -> ImageBatch:
        if step == step_of_death:
            raise KilledError
        return batch(self, step, rows)

    return dying


def test_tokenizer_training_resumes_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = load_file(train_tokenizer(tokenizer_config(tmp_path / "whole")))
    config = tokenizer_config(tmp_path / "parts", save_every_s=0.0)
    # Within the warm-up, before the codebook is made, and once it is.
    for step in (1, 4):
        with monkeypatch.context() as patch:
            patch.setattr(TokenizerTask, "batch", dies_before(step))
            with pytest.raises(KilledError):
                train_tokenizer(config)
    assert not (tmp_path / "parts" / "tokenizer.safetensors").exists()
    parts = load_file(train_tokenizer(config))
    assert all(torch.equal(parts[name], value) for name, value in whole.items())
    assert VQTokenizer.from_state_dict(whole).config == tokenizer_sizes(config)
    assert differences(newest_state(tmp_path / "parts"), newest_state(tmp_path / "whole")) == []


def test_tokenizer_training_depends_on_its_seed(tmp_path: Path) -> None:
    a, b = (load_file(train_tokenizer(tokenizer_config(tmp_path / str(seed), seed=seed))) for seed in (0, 1))
    assert not torch.equal(a["quantize.embedding.weight"], b["quantize.embedding.weight"])


def test_tokenizer_training_starts_from_another(tmp_path: Path) -> None:
    config = tokenizer_config(tmp_path / "first", steps=40, warmup_steps=10, learning_rate=2e-3, evaluate_images=20)
    start = train_tokenizer(config)
    again = dataclasses.replace(config, out_dir=str(tmp_path / "again"), init_from=str(start), steps=2, warmup_steps=2)
    end = train_tokenizer(dataclasses.replace(again, out_dir=str(tmp_path / "still"), learning_rate=0.0))
    before, after = load_file(start), load_file(end)
    for name, value in before.items():
        if name != "quantize.embedding.weight":
            assert torch.equal(after[name], value), name
    codes = [torch.nn.functional.normalize(state["quantize.embedding.weight"].float()) for state in (before, after)]
    assert 0.95 < (codes[0] * codes[1]).sum(1).mean() < 1 - 1e-6  # still those, moved by two steps
    train_tokenizer(again)
    losses = [read_log(tmp_path / folder / "steps.csv")["mse"] for folder in ("first", "again")]
    assert losses[1][0] < 0.7 * losses[0][0]
    assert read_log(tmp_path / "again" / "steps.csv")["commitment"][0] > 0  # quantised though in the warm-up
    with pytest.raises(ValueError, match=r"init_from: .* has codebook_dim 8, but the settings ask for 4"):
        train_tokenizer(dataclasses.replace(again, out_dir=str(tmp_path / "other"), codebook_dim=4))


def test_tokenizer_learns_and_reports_its_codebook(tmp_path: Path) -> None:
    config = tokenizer_config(tmp_path, steps=60, warmup_steps=10, decay_steps=20, learning_rate=2e-3)
    train_tokenizer(dataclasses.replace(config, evaluate_every=20, evaluate_images=20, sample_every=60))
    log = read_log(tmp_path / "log.csv")
    assert log["test_psnr_centre"][-1] > log["test_psnr_centre"][0] + 1
    assert log["train_mse"][-1] < 0.7 * log["train_mse"][0]
    assert 1 < log["perplexity"][-1] <= 16
    assert 0 < log["codes_used"][-1] <= 1
    steps = read_log(tmp_path / "steps.csv")
    weighted = [m + 0.025 * c for m, c in zip(steps["mse"], steps["commitment"], strict=True)]
    assert steps["loss"] == pytest.approx(weighted, rel=1e-5)
    with Image.open(tmp_path / "samples" / "step_000000060.png") as image:
        assert (image.text["lpd:command"], image.text["lpd:step"]) == ('"train-tokenizer"', "60")


def folder_of_pictures(root: Path, count: int = 12) -> str:
    """Coloured pictures of two classes, 40 x 32, a left half that is darker, and one file that is no picture."""
    for split in ("train", "val"):
        for number in range(count):
            folder = root / split / ("red", "blue")[number % 2]
            folder.mkdir(parents=True, exist_ok=True)
            pixels = np.full((32, 40, 3), 100 + 10 * number, np.uint8)
            pixels[:, :20] //= 2
            Image.fromarray(pixels).save(folder / f"{number:02}.png")
    (root / "train" / "red" / "broken.png").write_bytes(b"no picture")
    return f"folder:{root}"


def test_tokenizer_learns_from_a_folder_of_pictures(tmp_path: Path) -> None:
    """Colour, whole-image PSNR, the unreadable picture listed; other pictures are no resuming."""
    data = folder_of_pictures(tmp_path / "pictures")
    config = tokenizer_config(
        tmp_path / "run", data=data, image_size=16, evaluate_images=6, mirror=True, sample_every=6
    )
    train_tokenizer(config)
    log = read_log(tmp_path / "run" / "log.csv")
    assert "test_psnr_centre" not in log
    assert all(5 < value < 60 for value in log["test_psnr"])
    skipped = (tmp_path / "run" / "skipped.csv").read_text().splitlines()
    assert len(skipped) == 2
    assert "broken.png" in skipped[1]
    with pytest.raises(UnreadableImageError, match=r"broken\.png"):
        train_tokenizer(dataclasses.replace(config, out_dir=str(tmp_path / "strict"), strict=True))
    (tmp_path / "pictures" / "train" / "red" / "00.png").unlink()
    with pytest.raises(ValueError, match="data_sha256 is"):
        train_tokenizer(dataclasses.replace(config, steps=7))


def test_the_list_of_unreadable_pictures_is_whole(tmp_path: Path) -> None:
    """The list holds findings from before a stop and of other processes too."""
    data = folder_of_pictures(tmp_path / "pictures")
    (tmp_path / "pictures" / "train" / "blue" / "broken.png").write_bytes(b"")
    config = tokenizer_config(tmp_path / "run", data=data, image_size=16, evaluate_images=0)
    train_tokenizer(config)
    first = (tmp_path / "run" / "skipped.csv").read_text()
    assert first.count("broken.png") == 2
    # The seventh step alone does not come across both.
    result = CliRunner().invoke(app, ["train-tokenizer", *as_options(dataclasses.replace(config, steps=7))])
    assert "skipped 2 images that cannot be read: " in result.output
    assert (tmp_path / "run" / "skipped.csv").read_text() == first
    source = open_data(data)
    others = {"train": {0: "no picture"}, "test": {}}

    class Two(Processes):
        def gather(self, value: object) -> list[object]:
            return [value, others]

    task = TokenizerTask(config, source, 16, Two(0, 2, torch.device("cpu")))
    assert task.state()["unreadable"] == others
    assert [entry.name for entry in task.readers["train"].skipped] == [source.train.name(0)]


def test_test_images_are_of_all_classes(tmp_path: Path) -> None:
    data = open_data(folder_of_pictures(tmp_path / "pictures"))
    task = TokenizerTask(tokenizer_config(tmp_path / "run"), data, 16, Processes(0, 1, torch.device("cpu")))
    assert data.test.labels.tolist() == sorted(data.test.labels.tolist())
    assert data.test.labels[task.test_index(2)].tolist() == [0, 1]
    assert task.test_index(1000).tolist() == list(range(len(data.test)))


def test_mirrored_images_are_half_of_a_batch(tmp_path: Path) -> None:
    """A function of the step says which images are mirrored, whoever asks for which rows."""
    data = open_data(folder_of_pictures(tmp_path / "pictures"))
    config = tokenizer_config(tmp_path / "run", image_size=16, batch_size=12, mirror=True)
    task = TokenizerTask(config, data, 16, Processes(0, 1, torch.device("cpu")))
    whole = torch.cat([task.batch(step, slice(None)).images for step in range(20)])
    mirrored = (whole[..., 0].mean((1, 2)) > whole[..., -1].mean((1, 2))).float()
    assert 0.35 < mirrored.mean() < 0.65
    assert torch.equal(task.batch(3, slice(4, 9)).images, whole[3 * 12 :][4:9])
    plain = TokenizerTask(dataclasses.replace(config, mirror=False), data, 16, Processes(0, 1, torch.device("cpu")))
    assert all((plain.batch(3, slice(None)).images[..., 0] < plain.batch(3, slice(None)).images[..., -1]).flatten())


def test_data_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    data = folder_of_pictures(tmp_path / "pictures")
    with pytest.raises(ValueError, match="image_size must be a multiple of the tokenizer's stride 4, got 18"):
        train_tokenizer(tokenizer_config(tmp_path / "run", data=data, image_size=18))
    with pytest.raises(ValueError, match="judge must be empty unless data is fashion-mnist at 32 pixels, got 'folder:"):
        train_tokenizer(tokenizer_config(tmp_path / "run", data=data, judge="judge.safetensors"))
    assert not (tmp_path / "run").exists()


def test_a_warm_up_longer_than_the_training_is_refused(tmp_path: Path) -> None:
    """The codebook is made at its end: there would be none."""
    with pytest.raises(ValueError, match=r"warmup_steps must be in \[1, 6\], got 7"):
        train_tokenizer(tokenizer_config(tmp_path / "run", warmup_steps=7))
    assert not (tmp_path / "run").exists()
    train_tokenizer(tokenizer_config(tmp_path / "run", warmup_steps=6, evaluate_images=0))
    codes = VQTokenizer.from_file(tmp_path / "run" / "tokenizer.safetensors").quantize.embedding.weight
    assert (codes.norm(dim=1) - 1).abs().max() < 1e-2


def test_other_sizes_are_no_resuming(tmp_path: Path) -> None:
    train_tokenizer(tokenizer_config(tmp_path, steps=2))
    with pytest.raises(ValueError, match="z_channels is 16, but"):
        train_tokenizer(tokenizer_config(tmp_path, steps=2, z_channels=16))
    with pytest.raises(ValueError, match=r"warmup_steps must be in \[1, 6\], got 7"):
        train_tokenizer(tokenizer_config(tmp_path / "new", warmup_steps=7))
    with pytest.raises(ValueError, match="warmup_steps must be at least 1, got 0"):
        tokenizer_config(tmp_path / "new", warmup_steps=0)


def test_codebook_follows_its_vectors() -> None:
    averages = CodebookAverages(3, 2)
    vectors = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    averages.update(vectors, torch.tensor([0, 0]), decay=0.75)
    assert averages.count.tolist() == [1.25, 0.75, 0.75]
    assert averages.total.tolist() == [[0.25, 0.25], [0, 0], [0, 0]]
    for _ in range(300):
        averages.update(vectors, torch.tensor([0, 1]), decay=0.9)
    assert torch.allclose(averages.codes()[:2], vectors, atol=1e-6)
    assert averages.perplexity() == pytest.approx(2, rel=1e-3)
    assert averages.usage(0.05) == pytest.approx(2 / 3)
    revived = averages.revive(torch.tensor([[0.6, 0.8]]), 0.05, torch.Generator().manual_seed(0))
    assert revived == 1
    assert torch.allclose(averages.codes()[2], torch.tensor([0.6, 0.8]))
    assert torch.allclose(averages.codes()[:2], vectors, atol=1e-6)
    assert averages.usage(0.05) == 1


def test_codebook_starts_from_vectors() -> None:
    averages = CodebookAverages(5, 2)
    vectors = torch.nn.functional.normalize(torch.randn(7, 2), dim=1)
    averages.initialise(vectors, torch.Generator().manual_seed(0))
    assert all((vectors - code).norm(dim=1).min() < 1e-6 for code in averages.codes())
