"""Training of the tokenizer: its codebook, what is resumed, what it logs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from lpd_tools.training.codebook import CodebookAverages
from lpd_tools.training.curves import read_log
from lpd_tools.training.tokenizer import train_tokenizer
from training_runs import differences, newest_state, tokenizer_config

from lpd_ext.tokenizer import VQTokenizer


def test_tokenizer_training_resumes_exactly(tmp_path: Path) -> None:
    whole = load_file(train_tokenizer(tokenizer_config(tmp_path / "whole")))
    config = tokenizer_config(tmp_path / "parts")
    # Stopped within the warm-up, before the codebook is made, and once it is.
    for steps, decay in ((1, 0), (4, 1), (6, 3)):
        parts = load_file(train_tokenizer(dataclasses.replace(config, steps=steps, decay_steps=decay)))
    assert all(torch.equal(parts[name], value) for name, value in whole.items())
    assert VQTokenizer.from_state_dict(whole).config == config.sizes()
    assert differences(newest_state(tmp_path / "parts"), newest_state(tmp_path / "whole")) == []


def test_tokenizer_training_depends_on_its_seed(tmp_path: Path) -> None:
    a, b = (load_file(train_tokenizer(tokenizer_config(tmp_path / str(seed), seed=seed))) for seed in (0, 1))
    assert not torch.equal(a["quantize.embedding.weight"], b["quantize.embedding.weight"])


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
    assert (tmp_path / "samples" / "step_000000060.png").exists()


def test_other_sizes_are_no_resuming(tmp_path: Path) -> None:
    train_tokenizer(tokenizer_config(tmp_path, steps=1))
    with pytest.raises(ValueError, match="z_channels is 16, but"):
        train_tokenizer(tokenizer_config(tmp_path, steps=1, z_channels=16))
    with pytest.raises(ValueError, match=r"warmup_steps must be in \[1, inf\], got 0"):
        train_tokenizer(tokenizer_config(tmp_path / "new", warmup_steps=0))


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
