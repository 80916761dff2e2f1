"""The tokenizer's decoder for CPUs, several times as fast as its modules; tokenizer.py defines what it computes.

Activations are [B, h, w, C] throughout. `ops.conv3x3` normalises its input while reading it and adds to the residual
stream in place, so GroupNorm costs one more pass over each input, for its statistics.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lpd_ext import _C, ops
from lpd_ext.tokenizer import AttnBlock, ResBlock, VQTokenizer

# Images decoded together: more would not be faster, and each takes 75 MB at 256 x 256 pixels and full width.
_IMAGES_AT_A_TIME = 4
_CHANNEL_MULTIPLE = 16  # of the channels that ops.conv3x3 reads
_SMALLEST_SIDE = 4  # of an image, in pixels, that is worth ops.conv3x3's tiles
# Resolutions, from the highest, whose products may be bfloat16. They are three quarters of the work; every further one
# costs 4 dB, and all of them would leave 34 to 38 dB of random weights.
_BFLOAT16_LEVELS = 2


DTYPES = (torch.float32, torch.bfloat16)


class PixelDecoder:
    """Decodes tokens to pixels with the weights of a VQTokenizer, which it shares.

    The first decode lays out each 3x3 weight as [3, 3, C, K] and makes the tokenizer's parameter a view of that: there
    is one copy, in-place changes take effect, and replaced parameters are laid out again.

    dtype bfloat16 rounds the operands of the products of the two highest resolutions; sums and activations stay
    float32. It is faster on processors with AVX512_BF16 only.
    """

    def __init__(self, tokenizer: VQTokenizer, dtype: torch.dtype = torch.float32) -> None:
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be torch.float32 or torch.bfloat16, got {dtype}")
        self.tokenizer = tokenizer
        self.dtype = dtype

    @staticmethod
    def supports(tokenizer: VQTokenizer) -> bool:
        """Whether the tokenizer can be decoded here: float32 weights on a CPU with vector instructions."""
        weights = tokenizer.decoder.parameters()
        return _C.cpu_isa() != "scalar" and all(w.device.type == "cpu" and w.dtype == torch.float32 for w in weights)

    @torch.no_grad()
    def decode_features(self, features: Tensor) -> Tensor:
        """Decodes code vectors [B, d, h, w] to images [B, 3, Hp, Wp]: `VQTokenizer.decode_features` up to rounding."""
        decoder, stride = self.tokenizer.decoder, self.tokenizer.config.stride
        batch, _, height, width = features.shape
        images = features.new_empty(batch, height * stride, width * stride, decoder.conv_out.out_channels)
        for start in range(0, batch, _IMAGES_AT_A_TIME):
            part = slice(start, start + _IMAGES_AT_A_TIME)
            self._decode(features[part].permute(0, 2, 3, 1), images[part])
        return images.permute(0, 3, 1, 2).contiguous()

    def _decode(self, features: Tensor, images: Tensor) -> None:
        decoder = cast(Any, self.tokenizer.decoder)  # the blocks of a ModuleList are but Modules to a type checker
        first_bfloat16 = len(decoder.conv_blocks) - _BFLOAT16_LEVELS
        bfloat16 = [self.dtype == torch.bfloat16 and i >= first_bfloat16 for i in range(len(decoder.conv_blocks) + 1)]
        x = _conv3x3(decoder.conv_in, _conv1x1(self.tokenizer.post_quant_conv, features))
        for block in decoder.mid:
            x = _attend(block, x) if isinstance(block, AttnBlock) else _residual(block, x)
        for i, level in enumerate(decoder.conv_blocks):
            inner = None
            for j, block in enumerate(level.res):
                inner = _new(x, block.conv1) if inner is None else inner
                x = _residual(block, x, inner, bfloat16[i])
                if len(level.attn):
                    x = _attend(level.attn[j], x)
            if hasattr(level, "upsample"):
                x = _conv3x3(level.upsample.conv, x, upsample=True, bfloat16=bfloat16[i + 1])
        _conv3x3(decoder.conv_out, x, decoder.norm_out, images, bfloat16=bfloat16[-1])


def _kernel(conv: nn.Conv2d) -> Tensor:
    """Returns the weight of a convolution as contiguous [3, 3, C, K]; see PixelDecoder."""
    kernel = conv.weight.permute(2, 3, 1, 0)
    if not kernel.is_contiguous():
        kernel = kernel.contiguous()
        conv.weight.data = kernel.permute(3, 2, 0, 1)
    return kernel


def _new(x: Tensor, conv: nn.Conv2d, scale: int = 1) -> Tensor:
    batch, height, width, _ = x.shape
    return x.new_empty(batch, height * scale, width * scale, conv.out_channels)


def _scale_shift(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    return ops.group_norm_scale_shift(x, norm.weight, norm.bias, norm.num_groups, norm.eps)


def _conv3x3(
    conv: nn.Conv2d,
    x: Tensor,
    norm: nn.GroupNorm | None = None,
    out: Tensor | None = None,
    *,
    upsample: bool = False,
    accumulate: bool = False,
    bfloat16: bool = False,
) -> Tensor:
    """Computes conv(silu(norm(x))), conv(x doubled) or conv(x) into out, or adds it to out."""
    assert conv.bias is not None
    kernel, scale_shift = _kernel(conv), _scale_shift(norm, x) if norm is not None else None
    out = _new(x, conv, 2 if upsample else 1) if out is None else out
    if min(out.shape[1:3]) >= _SMALLEST_SIDE and x.shape[-1] % _CHANNEL_MULTIPLE == 0:
        ops.conv3x3(x, kernel, conv.bias, scale_shift, out, upsample, accumulate, bfloat16)
        return out
    # GroupNorm over a few nearly equal numbers magnifies rounding, so torch's convolution is used there.
    if scale_shift is not None:
        scale, shift = scale_shift[:, :, None, None].unbind(1)
        x = F.silu(x * scale + shift)
    planes = x.permute(0, 3, 1, 2)
    planes = F.interpolate(planes, scale_factor=2.0, mode="nearest") if upsample else planes
    result = F.conv2d(planes, kernel.permute(3, 2, 0, 1), conv.bias, padding=1).permute(0, 2, 3, 1)
    return out.add_(result) if accumulate else out.copy_(result)


def _residual(block: ResBlock, x: Tensor, inner: Tensor | None = None, bfloat16: bool = False) -> Tensor:
    """Returns the block's result, in x itself if the widths are equal; inner: scratch memory [B, h, w, K]."""
    inner = _conv3x3(block.conv1, x, block.norm1, inner, bfloat16=bfloat16)
    out = x if isinstance(block.nin_shortcut, nn.Identity) else _conv1x1(block.nin_shortcut, x)
    return _conv3x3(block.conv2, inner, block.norm2, out, accumulate=True, bfloat16=bfloat16)


def _conv1x1(conv: nn.Conv2d, x: Tensor) -> Tensor:
    return F.linear(x, conv.weight.flatten(1), conv.bias)


def _attend(block: AttnBlock, x: Tensor) -> Tensor:
    scale, shift = _scale_shift(block.norm, x).unbind(1)
    y = torch.addcmul(shift[:, None], x.flatten(1, 2), scale[:, None])  # [B, hw, C]
    q, k, v = (_conv1x1(f, y).unsqueeze(1) for f in (block.q, block.k, block.v))
    attended = F.scaled_dot_product_attention(q, k, v).squeeze(1)
    return x + _conv1x1(block.proj_out, attended).view_as(x)
