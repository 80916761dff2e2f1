"""The tokenizer's decoder on the CPU, several times faster than module by module; tokenizer.py stays its definition.

Activations are [B, h, w, C] throughout. A residual block is two passes over its input for GroupNorm's statistics and
two calls of `ops.conv3x3`, which normalises what it reads and adds to the residual stream in place.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lpd_ext import _C, ops
from lpd_ext.tokenizer import AttnBlock, ResBlock, VQTokenizer

# Images that go through together: more would not be faster, and each takes 75 MB at 256 x 256 pixels and full width.
_IMAGES_AT_A_TIME = 4
_CHANNEL_MULTIPLE = 16  # of the channels that ops.conv3x3 reads


def can_decode(tokenizer: VQTokenizer) -> bool:
    """Whether FastDecoder can take this tokenizer here: float32 weights on a CPU with vector instructions."""
    weights = tokenizer.decoder.parameters()
    return _C.cpu_isa() != "scalar" and all(w.device.type == "cpu" and w.dtype == torch.float32 for w in weights)


class FastDecoder:
    """Decodes with the weights of a VQTokenizer, which it shares.

    The first decode lays each 3x3 weight out anew in memory, [3, 3, C, K], and leaves the tokenizer's parameter as a
    view of that: there is one copy, changes in place are seen, and parameters that are replaced are laid out again.
    """

    def __init__(self, tokenizer: VQTokenizer) -> None:
        self.tokenizer = tokenizer

    @torch.no_grad()
    def decode_features(self, features: Tensor) -> Tensor:
        """Images [B, 3, Hp, Wp] of code vectors [B, d, h, w], as `VQTokenizer.decode_features` up to rounding."""
        decoder, stride = self.tokenizer.decoder, self.tokenizer.config.stride
        batch, _, height, width = features.shape
        images = features.new_empty(batch, height * stride, width * stride, decoder.conv_out.out_channels)
        for start in range(0, batch, _IMAGES_AT_A_TIME):
            part = slice(start, start + _IMAGES_AT_A_TIME)
            self._decode(features[part].permute(0, 2, 3, 1), images[part])
        return images.permute(0, 3, 1, 2).contiguous()

    def _decode(self, features: Tensor, images: Tensor) -> None:
        decoder = self.tokenizer.decoder
        x = _conv3x3(decoder.conv_in, _conv1x1(self.tokenizer.post_quant_conv, features))
        for block in decoder.mid:
            x = _attend(block, x) if isinstance(block, AttnBlock) else _residual(block, x)
        for level in decoder.conv_blocks:
            inner = None
            for i, block in enumerate(level.res):
                inner = _new(x, block.conv1) if inner is None else inner
                x = _residual(block, x, inner)
                if len(level.attn):
                    x = _attend(level.attn[i], x)
            if hasattr(level, "upsample"):
                x = _conv3x3(level.upsample.conv, x, upsample=True)
        _conv3x3(decoder.conv_out, x, decoder.norm_out, out=images)


def _kernel(conv: nn.Conv2d) -> Tensor:
    """The weight [3, 3, C, K] of a convolution, contiguous; see FastDecoder."""
    kernel = conv.weight.permute(2, 3, 1, 0)
    if not kernel.is_contiguous():
        kernel = kernel.contiguous()
        conv.weight.data = kernel.permute(3, 2, 0, 1)
    return kernel


def _new(x: Tensor, conv: nn.Conv2d, scale: int = 1) -> Tensor:
    batch, height, width, _ = x.shape
    return x.new_empty(batch, height * scale, width * scale, conv.out_channels)


def _conv3x3(
    conv: nn.Conv2d,
    x: Tensor,
    norm: nn.GroupNorm | None = None,
    out: Tensor | None = None,
    upsample: bool = False,
    accumulate: bool = False,
) -> Tensor:
    """conv(silu(norm(x))), conv(x doubled) or conv(x), into out or added to it."""
    if x.shape[-1] % _CHANNEL_MULTIPLE:  # of conv_in alone
        return F.conv2d(x.permute(0, 3, 1, 2), conv.weight, conv.bias, padding=1).permute(0, 2, 3, 1).contiguous()
    scale_shift = norm and ops.group_norm_scale_shift(x, norm.weight, norm.bias, norm.num_groups, norm.eps)
    out = _new(x, conv, 2 if upsample else 1) if out is None else out
    ops.conv3x3(x, _kernel(conv), conv.bias, scale_shift, out, upsample, accumulate)
    return out


def _conv1x1(conv: nn.Conv2d, x: Tensor) -> Tensor:
    return F.linear(x, conv.weight.flatten(1), conv.bias)


def _residual(block: ResBlock, x: Tensor, inner: Tensor | None = None) -> Tensor:
    """The block's result, in x itself where widths do not differ; inner: scratch memory [B, h, w, K]."""
    inner = _conv3x3(block.conv1, x, block.norm1, inner)
    out = x if isinstance(block.nin_shortcut, nn.Identity) else _conv1x1(block.nin_shortcut, x)
    return _conv3x3(block.conv2, inner, block.norm2, out, accumulate=True)


def _attend(block: AttnBlock, x: Tensor) -> Tensor:
    norm = block.norm
    scale, shift = ops.group_norm_scale_shift(x, norm.weight, norm.bias, norm.num_groups, norm.eps).unbind(1)
    y = torch.addcmul(shift[:, None], x.flatten(1, 2), scale[:, None])  # [B, hw, C]
    q, k, v = (_conv1x1(f, y).unsqueeze(1) for f in (block.q, block.k, block.v))
    attended = F.scaled_dot_product_attention(q, k, v).squeeze(1)
    return x + _conv1x1(block.proj_out, attended).view_as(x)
