"""`lpd train-preview`: what it learns, what it writes, and that a run repeats itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lpd_tools.cli import app
from lpd_tools.training import preview
from lpd_tools.training.preview import draw_tokens, psnr, train_preview
from lpd_tools.training.settings import PreviewTraining
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

from lpd_ext.pipeline import LPDPipeline
from lpd_ext.preview_decoder import PreviewDecoder
from lpd_ext.state_files import read_metadata


@pytest.fixture(scope="module")
def pipe() -> LPDPipeline:
    return LPDPipeline.from_pretrained("fashion_mnist")


def test_the_decoder_learns_to_come_near(pipe: LPDPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fed: list[Tensor] = []
    fit = preview._fit

    def seen(decoder: PreviewDecoder, exact: Any, tokens: Tensor, config: PreviewTraining) -> None:
        fed.append(tokens)
        fit(decoder, exact, tokens, config)

    monkeypatch.setattr(preview, "_fit", seen)
    out = str(tmp_path / "preview.safetensors")
    config = PreviewTraining(out=out, model="fashion_mnist", images=60, steps=100, width=16)
    quality = train_preview(config)
    sizes = pipe.tokenizer.config
    tokens = draw_tokens(pipe, 6, config.seed, 6)  # those that the training holds out
    assert fed[0].shape == (60, 8, 8)
    assert not any(torch.equal(a, b) for a in tokens for b in fed[0])
    untrained = LPDPipeline(pipe.model, pipe.tokenizer, pipe.defaults)
    torch.manual_seed(config.seed)
    untrained.preview_decoder = PreviewDecoder(sizes.codebook_dim, sizes.stride, 16).requires_grad_(False)
    assert quality > psnr(untrained, tokens) + 3
    trained = LPDPipeline(pipe.model, pipe.tokenizer, pipe.defaults)
    trained.preview_decoder = PreviewDecoder.from_file(config.out)
    assert psnr(trained, tokens) == pytest.approx(quality, abs=0.05)  # rounded to fp16
    with Image.open(tmp_path / "preview.png") as picture:
        assert picture.width > 6 * 64  # six images, enlarged
    assert read_metadata(config.out)["psnr"] == f"{quality:.2f}"


def test_the_same_settings_give_the_same_bytes(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("one.safetensors", "two.safetensors")]
    for file in files:
        arguments = ["--out", file, "--images", 20, "--steps", 3, "--batch-size", 4, "--width", 8]
        ended = CliRunner().invoke(app, ["train-preview", *map(str, arguments)])
        assert ended.exit_code == 0
        assert f"{file.name}: previews are at" in ended.output.replace("\n", "")
    assert files[0].read_bytes() == files[1].read_bytes()


def test_wrong_settings_are_named_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"out must end in \.safetensors, got"):
        train_preview(PreviewTraining(out=str(tmp_path / "p.png")))
    for name, value in (("width", 0), ("width", 2000), ("steps", 0), ("images", 0)):
        with pytest.raises(ValueError, match=name):
            PreviewTraining(**{"out": str(tmp_path / "p.safetensors"), name: value})
