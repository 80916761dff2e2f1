"""Tokens to pixels on the CPU: the fast decoder and its convolutions against plain torch in the same run.

`python -m lpd_tools.bench.tokenizer [B]` prints the figures that docs/results/tokens_to_pixels.md shows.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lpd_ext import ops
from lpd_ext.pixel_decoder import PixelDecoder
from lpd_ext.tokenizer import NORM_GROUPS, TokenizerConfig, VQTokenizer
from lpd_tools.bench.result import Result, cell
from lpd_tools.bench.timing import interleaved
from lpd_tools.machine import machine
from lpd_tools.pictures import psnr

CPU = torch.device("cpu")
# (C, K, side in pixels, nearest x2) of the 3x3 convolutions that take most of a decode at 256 px.
CONVOLUTIONS = (
    (128, 128, 256, False),
    (128, 128, 256, True),
    (256, 256, 128, True),
    (128, 128, 128, False),
    (256, 256, 64, False),
    (512, 512, 16, False),
)


def decode_results(batch: int, repeats: int, config: TokenizerConfig | None = None) -> list[Result]:
    """Times decodes of 16 x 16 tokens with random weights against the plain decoder; `decibels`: PSNR to it."""
    torch.manual_seed(0)
    tokenizer = VQTokenizer(config or TokenizerConfig()).eval().requires_grad_(False)
    tokens = torch.randint(tokenizer.config.codebook_size, (batch, 16, 16))
    features = F.embedding(tokens, tokenizer.codes()).permute(0, 3, 1, 2).contiguous()
    shared = copy.deepcopy(tokenizer)  # the plain decoder keeps its weights in torch's layout
    channels_last = copy.deepcopy(tokenizer)
    for weight in channels_last.parameters():
        weight.data = weight.data.contiguous(memory_format=torch.channels_last) if weight.ndim == 4 else weight.data
    runs: dict[str, Callable[[], Tensor]] = {
        "decode, plain in channels_last": lambda: channels_last.decode_features(
            features.contiguous(memory_format=torch.channels_last)
        ),
        "decode, PixelDecoder": lambda: PixelDecoder(shared).decode_features(features),
        "decode, PixelDecoder bfloat16": lambda: PixelDecoder(shared, torch.bfloat16).decode_features(features),
    }
    with torch.inference_mode():
        expected = tokenizer.decode_features(features)
        decibels = {name: _decibels(run(), expected) for name, run in runs.items()}
        plain, *ours = interleaved([lambda: tokenizer.decode_features(features), *runs.values()], repeats, CPU)
    return [
        Result.against_plain(name, times, plain, batch=batch, decibels=decibels[name])
        for name, times in zip(runs, ours, strict=True)
    ]


def convolution_results(batch: int, repeats: int) -> list[Result]:
    """Times GroupNorm, swish, 3x3 and residual addition, or nearest x2 and 3x3, against the same in plain torch.

    GFLOP/s counts the operations of a direct convolution.
    """
    results = []
    for channels, out_channels, side, upsample in CONVOLUTIONS:
        torch.manual_seed(0)
        source = side // 2 if upsample else side
        x = torch.randn(batch, source, source, channels)
        kernel = torch.randn(3, 3, channels, out_channels) / (9 * channels) ** 0.5
        bias, norm_weight, norm_bias = torch.randn(out_channels), torch.randn(channels), torch.randn(channels)
        out = torch.zeros(batch, side, side, out_channels)
        planes, weight = x.permute(0, 3, 1, 2).contiguous(), kernel.permute(3, 2, 0, 1).contiguous()
        residual = torch.zeros(batch, out_channels, side, side)

        def ours(
            x: Tensor = x,
            kernel: Tensor = kernel,
            bias: Tensor = bias,
            norm: tuple[Tensor, Tensor] = (norm_weight, norm_bias),
            out: Tensor = out,
            upsample: bool = upsample,
            bfloat16: bool = False,
        ) -> None:
            scale_shift = None if upsample else ops.group_norm_scale_shift(x, *norm, NORM_GROUPS)
            ops.conv3x3(x, kernel, bias, scale_shift, out, upsample, not upsample, bfloat16)

        def plain(
            planes: Tensor = planes,
            weight: Tensor = weight,
            bias: Tensor = bias,
            norm: tuple[Tensor, Tensor] = (norm_weight, norm_bias),
            residual: Tensor = residual,
            upsample: bool = upsample,
        ) -> Tensor:
            if upsample:
                return F.conv2d(F.interpolate(planes, scale_factor=2.0), weight, bias, padding=1)
            return residual + F.conv2d(F.silu(F.group_norm(planes, NORM_GROUPS, *norm, 1e-6)), weight, bias, padding=1)

        with torch.inference_mode():
            fp32, bfloat16, torchs = interleaved([ours, lambda: ours(bfloat16=True), plain], repeats, CPU)
        name = f"conv3x3 {channels} to {out_channels}, {side} px" + (", x2" if upsample else "")
        gigaflops = 18e-9 * batch * channels * out_channels * side * side
        for suffix, times in (("", fp32), (", bfloat16", bfloat16)):
            rate = gigaflops / times.median
            results.append(Result.against_plain(name + suffix, times, torchs, batch=batch, gigaflops_per_second=rate))
    return results


def _decibels(images: Tensor, expected: Tensor) -> float:
    """Returns the peak signal-to-noise ratio of images in [-1, 1]."""
    return psnr(images.clamp(-1, 1), expected.clamp(-1, 1), peak=2)


def main() -> None:
    """Times convolutions and decodes, and prints them as tables."""
    batch = int(sys.argv[1]) if len(sys.argv) > 1 else 1
    results = convolution_results(batch, 7) if batch == 1 else []
    for result in results + decode_results(batch, 7 if batch == 1 else 3):
        rate = cell(result.gigaflops_per_second, ".0f")
        extra = f"{rate} GFLOP/s" if rate else f"{result.decibels:.1f} dB"
        print(
            f"{result.operator:38} B = {batch}  {1e3 * result.times.median:8.2f} ms ±{result.times.spread:4.0%}  "
            f"plain {1e3 * result.plain_times.median:8.2f} ms  {result.ratio:5.2f}x  {extra}"
        )
    print(", ".join(f"{key} {value}" for key, value in machine(CPU).items()))


if __name__ == "__main__":
    main()
