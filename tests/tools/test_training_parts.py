"""Tests of the training programs' parts beside the loop: measures and the judge."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from lpd_tools.data.fashion_mnist import centre_psnr, load_fashion_mnist
from lpd_tools.pictures import psnr
from lpd_tools.training.judge import JudgeTraining, augment, grey, load_judge, predict, train_judge

DATA = Path(__file__).parents[1] / "data" / "fashion_mnist"


# measures


def test_psnr() -> None:
    pixels = torch.full((2, 28, 28), 100, dtype=torch.uint8)
    assert psnr(torch.zeros(4), torch.full((4,), 25.5)) == pytest.approx(20)
    assert centre_psnr(torch.full((2, 1, 28, 28), 102.55 / 127.5 - 1), pixels) == pytest.approx(40, abs=1e-3)
    assert psnr(pixels, pixels) == math.inf


# judge


def test_judge_learns_and_is_stored(tmp_path: Path) -> None:
    path = tmp_path / "judge.safetensors"
    config = JudgeTraining(out=str(path), data_dir=str(DATA), epochs=10, batch_size=20, precision="fp32")
    accuracy = train_judge(config)
    assert accuracy > 0.5
    test = load_fashion_mnist("test", DATA)
    right = predict(load_judge(path), grey(test)) == test.labels
    assert right.float().mean().item() == pytest.approx(accuracy)
    assert len(path.with_suffix(".csv").read_text().splitlines()) == 11
    train_judge(dataclasses.replace(config, epochs=1))  # its log is its own
    assert len(path.with_suffix(".csv").read_text().splitlines()) == 2
    with pytest.raises(FileNotFoundError, match="train-judge"):
        load_judge(tmp_path / "none.safetensors")


def test_augmented_images_are_shifted_or_mirrored() -> None:
    images = torch.full((40, 1, 28, 28), -1.0)
    images[:, :, 14, 10] = 1
    moved = augment(images, torch.Generator().manual_seed(0))
    assert moved.shape == images.shape
    columns = {int(image.argmax()) % 28 for image in moved}
    assert len(columns) == 2
    assert sum(columns) in range(27 - 4, 27 + 5)
