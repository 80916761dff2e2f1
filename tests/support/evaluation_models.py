"""A small random model in a folder, images, and stand-ins for files that users have, for the tests of evaluation."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from lpd_ext.model import LPDConfig, LPDModel
from lpd_ext.pipeline import LPDPipeline, SamplingDefaults
from lpd_ext.tokenizer import TokenizerConfig, VQTokenizer

DATA = Path(__file__).parents[1] / "data"
FASHION = f"fashion-mnist:{DATA / 'fashion_mnist'}"


def noise(count: int, side: int = 8, seed: int = 0, low: int = 0, high: int = 256) -> np.ndarray:
    return np.random.default_rng(seed).integers(low, high, (count, side, side, 3), dtype=np.uint8)


def save_images(folder: Path, pixels: np.ndarray) -> Path:
    folder.mkdir(parents=True)
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{number:03}.png")
    return folder


def save_small_model(folder: Path, classes: int = 3, ch_mult: tuple[int, ...] = (1, 1)) -> Path:
    """A pipeline of random weights on a 4 x 4 grid, which draws images of 8 x 8 (32 x 32 with four levels)."""
    torch.manual_seed(0)
    model = LPDModel(LPDConfig(32, depth=1, heads=2, vocab_size=40, num_classes=classes, grid=(4, 4))).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:  # as weights start in training, tokens would not depend on the label
            nn.init.normal_(parameter, std=0.5)
    sizes = TokenizerConfig(ch=32, ch_mult=ch_mult, z_channels=8, codebook_size=40, codebook_dim=4,
                            encoder_res_blocks=1, decoder_res_blocks=1)  # fmt: skip
    defaults = SamplingDefaults(num_inference_steps=4, guidance_scale=2.0, guidance_schedule="constant")
    names = [f"class {label}" for label in range(classes)]
    LPDPipeline(model, VQTokenizer(sizes).eval(), defaults, names).save_pretrained(folder)
    return folder


def with_hash(folder: Path, sha256: str) -> None:
    """Says in the folder's config.json that its model was trained on the tokens of another tokenizer."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_sha256": sha256}))


class StandInInception(nn.Module):
    """A toy of the standard Inception file: features and class probabilities of images of any size."""

    def __init__(self, width: int = 6, classes: int = 5) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(4)
        self.features = nn.Linear(48, width)
        self.classes = nn.Linear(width, classes)

    def forward(self, img: Tensor, return_features: bool = False, no_output_bias: bool = False) -> Tensor:
        features = self.features(self.pool(img.float() / 128 - 1).flatten(1))
        if return_features:
            return features
        logits = features @ self.classes.weight.t()
        if not no_output_bias:
            logits = logits + self.classes.bias
        return logits.softmax(1)


def stand_in_inception(seed: int = 0) -> StandInInception:
    """The stand-in with fixed weights whose classes differ visibly between images."""
    torch.manual_seed(seed)
    net = StandInInception()
    nn.init.normal_(net.classes.weight, std=3)
    return net.eval()


def save_inception(path: Path, seed: int = 0) -> Path:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`torch.jit")  # of torch: TorchScript is deprecated
        torch.jit.script(stand_in_inception(seed)).save(path)
    return path
