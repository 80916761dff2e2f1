"""Tests of the inputs and outputs of evaluation's feature networks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")
pytest.importorskip("torchmetrics")

from evaluation_models import DATA, FASHION, noise, save_inception, stand_in_inception
from lpd_tools.data.sources import open_data
from lpd_tools.evaluation.features import (
    EfficientNetFeatures,
    Features,
    InceptionFeatures,
    JudgeFeatures,
    extract,
)
from lpd_tools.evaluation.images import data_images, in_memory
from lpd_tools.training.judge import judge_features, load_judge, predict


def test_efficientnet_reads_photographs_as_it_was_trained_to() -> None:
    """Input is (value - 127) / 128 at 224 pixels, 96 for small ones; features are all 320 of the last block."""
    see = EfficientNetFeatures()
    for value, side in ((255, 256), (127, 224), (0, 32)):
        constant = torch.full((1, side, side, 3), value, dtype=torch.uint8)
        assert (see.network_input(constant) - (value - 127) / 128).abs().max() < 1e-5
    colours = torch.arange(3, dtype=torch.uint8).mul(100).expand(1, 32, 32, 3)
    assert see.network_input(colours).mean((0, 2, 3)).mul(128).add(127).round().tolist() == [0, 100, 200]
    assert see.network_input(torch.zeros(2, 65, 64, 3, dtype=torch.uint8)).shape == (2, 3, 224, 224)
    assert see.network_input(torch.zeros(2, 64, 64, 3, dtype=torch.uint8)).shape == (2, 3, 96, 96)
    pixels = torch.from_numpy(noise(2, 32))
    values = see(pixels).values
    assert values.shape == (2, 320)
    assert (values.std(0) > 0).sum() > 300
    # By the network's own forward pass: its head and classifier on top of the same features' map.
    maps: list[Tensor] = []
    see.net.get_submodule("_conv_head").register_forward_pre_hook(lambda module, inputs: maps.append(inputs[0]))
    with torch.no_grad():
        see.net(see.network_input(pixels))
    assert torch.allclose(maps[0].mean((2, 3)), values, atol=1e-4)


def test_features_that_are_not_finite_name_their_image() -> None:
    """Values and logits, in whichever batch; the judge's functions too, where NaN would count as a class."""
    images = in_memory(torch.from_numpy(noise(5)), None, "drawn")

    class Broken:
        name = "broken"

        def __init__(self, logits: bool) -> None:
            self.logits = logits

        def __call__(self, pixels: Tensor) -> Features:
            values = pixels.float().flatten(1)
            odd = values.clone()
            odd[(pixels == images.read([3])).flatten(1).all(1), 0] = torch.nan
            return Features(values, odd) if self.logits else Features(odd)

    with pytest.raises(ValueError, match="broken features of drawn must be finite, but row 3 of 5 has NaN or inf"):
        extract(Broken(logits=False), images, 2)
    with pytest.raises(ValueError, match="broken logits of drawn must be finite, but row 3 of 5"):
        extract(Broken(logits=True), images, 2)
    judge = load_judge(DATA / "judge.safetensors")
    assert judge.fc.bias is not None
    judge.fc.bias[0] = torch.nan
    for function in (predict, judge_features):
        with pytest.raises(ValueError, match=r"the judge's .* must be finite, but row 0 of 2"):
            function(judge, torch.zeros(2, 1, 28, 28))


def test_judge_reads_the_grey_centre() -> None:
    see = JudgeFeatures(DATA / "judge.safetensors")
    images = data_images(open_data(FASHION).test, (32, 32), "real")
    assert images.labels is not None
    seen = extract(see, images, 128)
    assert seen.values.shape == (300, 128)
    assert seen.logits is not None
    assert (seen.logits.argmax(1) == images.labels).float().mean() >= 0.9
    with pytest.raises(ValueError, match="the judge reads 32 x 32 images, got"):
        see(torch.zeros(1, 28, 28, 3, dtype=torch.uint8))


def test_inception_of_a_torchscript_file(tmp_path: Path) -> None:
    """Features and class log-probabilities without the bias of the last layer, of images in 0 to 255."""
    see = InceptionFeatures(save_inception(tmp_path / "inception.pt"))
    pixels = torch.from_numpy(noise(3, 16))
    seen, net = see(pixels), stand_in_inception()
    with torch.no_grad():
        values = net(pixels.permute(0, 3, 1, 2), return_features=True)
        log_probabilities = (values @ net.classes.weight.t()).log_softmax(1)
    assert torch.allclose(seen.values, values, atol=1e-5)
    assert seen.logits is not None
    assert torch.allclose(seen.logits, log_probabilities, atol=1e-4)
    with pytest.raises(FileNotFoundError, match="inception: no file at"):
        InceptionFeatures(tmp_path / "none.pt")
    torch.save({"weight": torch.zeros(1)}, tmp_path / "weights.pth")
    (tmp_path / "text.pt").write_text("weights")
    for name in ("weights.pth", "text.pt"):
        with pytest.raises(ValueError, match=rf"{name}' is no TorchScript file"):
            InceptionFeatures(tmp_path / name)


def test_extract_keeps_every_feature_in_order() -> None:
    """Batches are put together whole, whatever their size."""

    class Sums:
        name = "sums"

        def __call__(self, pixels: Tensor) -> Features:
            return Features(pixels.flatten(1).float().cumsum(1)[:, ::7])

    pixels = torch.from_numpy(noise(11))
    images = in_memory(pixels, None, "noise")
    whole = extract(Sums(), images, 100).values
    assert torch.equal(extract(Sums(), images, 4).values, whole)
    assert torch.equal(whole, pixels.flatten(1).float().cumsum(1)[:, ::7])
