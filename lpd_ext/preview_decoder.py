"""A small network that draws previews: tokens to approximate pixels, in a fraction of a decoding step."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lpd_ext import ops
from lpd_ext.content import content_of
from lpd_ext.modes import decoding_modes, leave_lost_threads, own_modes
from lpd_ext.state_files import read_state_dict, write_state_dict
from lpd_ext.tokenizer import TokenizerConfig

_GREATEST_WIDTH = 1024  # a damaged file may ask for any number


def _parameter(*shape: int, inputs: int) -> nn.Parameter:
    """Returns random numbers as nn.Linear begins with."""
    return nn.Parameter((2 * torch.rand(shape) - 1) * inputs**-0.5)


class PreviewDecoder(nn.Module):
    """Two 3 x 3 convolutions on the grid of tokens, trained to come near a tokenizer's decoder (`lpd train-preview`).

    A pixel depends only on tokens within two cells; GroupNorm and attention make it depend on all in the exact decoder.
    Parameters are those of `ops.preview_pixels`, which does everything in one call: on a small grid torch's call
    overhead would exceed the work.
    """

    def __init__(self, codebook_dim: int, stride: int, width: int = 32) -> None:
        super().__init__()
        self.codebook_dim, self.stride = codebook_dim, stride
        inner, middle = 9 * (codebook_dim + 1), 9 * width  # inputs of a sum; a cell has a code and whether it is drawn
        self.weight1 = _parameter(3, 3, codebook_dim + 1, width, inputs=inner)
        self.bias1 = _parameter(width, inputs=inner)
        self.weight2 = _parameter(3, 3, width, width, inputs=middle)
        self.bias2 = _parameter(width, inputs=middle)
        self.head = _parameter(width, stride, stride, 3, inputs=width)
        self.head_bias = _parameter(stride, stride, 3, inputs=width)

    def forward(self, tokens: Tensor, codebook: Tensor) -> Tensor:
        """Draws tokens int64 [B, h, w] of codes [V, d]: images [B, 3, Hp, Wp], 0 where a token is -1."""
        drawn = (tokens >= 0)[:, None].to(codebook.dtype)
        codes = F.normalize(F.embedding(tokens.clamp(min=0), codebook), dim=-1).permute(0, 3, 1, 2)
        x = torch.cat([codes * drawn, drawn], 1)
        for weight, bias in ((self.weight1, self.bias1), (self.weight2, self.bias2)):
            x = F.relu(F.conv2d(x, weight.permute(3, 2, 0, 1), bias, padding=1))
        head = self.head.permute(3, 1, 2, 0).flatten(0, 2)[:, :, None, None]  # to planes [3 s s, h, w]
        cells = F.conv2d(x, head, self.head_bias.permute(2, 0, 1).flatten()) * drawn
        return F.pixel_shuffle(cells, self.stride)

    def pixels(self, tokens: Tensor, codebook: Tensor) -> Tensor:
        """Draws tokens int64 [B, h, w] of codes [V, d]: pixels uint8 [B, Hp, Wp, 3], 128 where a token is -1.

        Ignores torch.autocast, as the exact decoder does.
        """
        if tokens.is_cpu:  # there the operator is all, which modes of torch do not change
            leave_lost_threads()
            return ops.preview_pixels(tokens, codebook, *self._weights())
        with decoding_modes(tokens.device):
            return ops.preview_pixels(tokens, codebook, *self._weights())

    def _weights(self) -> tuple[Tensor, ...]:
        return self.weight1, self.bias1, self.weight2, self.bias2, self.head, self.head_bias

    def check(self, tokenizer: TokenizerConfig) -> None:
        """Raises ValueError unless the tokenizer's codes and patches of pixels have the sizes of this decoder's."""
        own, other = (self.codebook_dim, self.stride), (tokenizer.codebook_dim, tokenizer.stride)
        if own != other:
            raise ValueError(
                f"preview_decoder must be of the tokenizer's code length and stride, {other[0]} and {other[1]}, got "
                f"{own[0]} and {own[1]}"
            )

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> PreviewDecoder:
        """Builds a float32 decoder from a state dict, inferring its sizes; ValueError if it is not of one."""
        first, head = state.get("weight1"), state.get("head")
        if first is None or head is None or first.ndim != 4 or head.ndim != 4:
            raise ValueError("state is not a preview decoder: it has no weight1 [3, 3, d + 1, K] and head [K, s, s, 3]")
        channels, width, stride = first.shape[2], first.shape[3], head.shape[1]
        if not (1 <= width <= _GREATEST_WIDTH and channels > 1 and stride):
            raise ValueError(
                f"state is not a preview decoder: its width is {width} (at most {_GREATEST_WIDTH}), its codes have "
                f"{channels - 1} numbers and its cells {stride} pixels a side"
            )
        try:
            with torch.device("meta"):  # allocates nothing before the state is known to fit
                decoder = cls(channels - 1, stride, width)
            with own_modes():
                state = {name: value.to(torch.float32, copy=True).contiguous() for name, value in state.items()}
            decoder.load_state_dict(state, assign=True)
        except RuntimeError as error:
            raise ValueError(f"state is not a preview decoder: {error}") from error
        for name, value in state.items():
            if not bool(value.isfinite().all()):
                raise ValueError(f"state is not a preview decoder: {name} has numbers that are not finite")
        return decoder.eval().requires_grad_(False)

    @classmethod
    def from_file(cls, path: str | Path) -> PreviewDecoder:
        """Loads a decoder from a safetensors file; errors as in `read_state_dict`."""
        with content_of(path):
            return cls.from_state_dict(read_state_dict(path))

    def save(self, path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
        """Writes the state dict as safetensors, in float16."""
        write_state_dict(self.state_dict(), path, torch.float16, metadata)
