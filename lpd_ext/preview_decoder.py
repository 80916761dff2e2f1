"""A small network that draws previews: tokens to approximate pixels, in a fraction of a decoding step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lpd_ext.content import content_of
from lpd_ext.modes import own_modes
from lpd_ext.state_files import read_state_dict, write_state_dict
from lpd_ext.tokenizer import TokenizerConfig

_MOST_LAYERS, _GREATEST_WIDTH = 8, 1024  # a damaged file may ask for any number


def _patches(x: Tensor) -> Tensor:
    """Returns the 3 x 3 cells around each cell of x [B, h, w, C], zeros beyond the edge: [B h w, 9 C]."""
    batch, height, width, channels = x.shape
    padded = F.pad(x, (0, 0, 1, 1, 1, 1))
    image, row, cell, _ = padded.stride()
    rows_of_three = padded.as_strided((batch, height, width, 3, 3 * channels), (image, row, cell, row, 1))
    return rows_of_three.reshape(-1, 9 * channels)


class PreviewDecoder(nn.Module):
    """3 x 3 convolutions on the grid of tokens, trained to come near a tokenizer's decoder (`lpd train-preview`).

    A pixel depends on the tokens within `layers` cells alone, where the decoder's GroupNorm and attention make it
    depend on all of them. The convolutions are products: on a CPU, waking threads for oneDNN's takes longer than the
    work.
    """

    def __init__(self, codebook_dim: int, stride: int, width: int = 48, layers: int = 2) -> None:
        super().__init__()
        self.codebook_dim, self.stride = codebook_dim, stride
        widths = [codebook_dim + 1, *[width] * layers]  # a code vector, and whether the cell is drawn
        self.layers = nn.ModuleList(nn.Linear(9 * a, b) for a, b in pairwise(widths))
        self.head = nn.Linear(width, 3 * stride * stride)

    def forward(self, vectors: Tensor, drawn: Tensor) -> Tensor:
        """Decodes code vectors [B, h, w, d] to images [B, 3, Hp, Wp], 0 except where drawn, bool [B, h, w]."""
        known = drawn[..., None].to(vectors.dtype)
        x = torch.cat([vectors * known, known], 3)
        for layer in self.layers:
            x = F.relu(layer(_patches(x))).unflatten(0, drawn.shape)
        pixels = (self.head(x) * known).unflatten(3, (3, self.stride, self.stride))  # [B, h, w, 3, dy, dx]
        images: Tensor = pixels.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
        return images

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
        layers = sum(name.startswith("layers.") and name.endswith(".weight") for name in state)
        first, head = state.get("layers.0.weight"), state.get("head.weight")
        if first is None or head is None or first.ndim != 2 or head.ndim != 2:
            raise ValueError("state is not a preview decoder: it has no matrices layers.0.weight and head.weight")
        width, channels = len(first), first.shape[1] // 9
        stride = math.isqrt(len(head) // 3)
        if not (1 <= layers <= _MOST_LAYERS and 1 <= width <= _GREATEST_WIDTH and channels > 1 and stride):
            raise ValueError(
                f"state is not a preview decoder: it has {layers} layers (at most {_MOST_LAYERS}) of width {width} "
                f"(at most {_GREATEST_WIDTH})"
            )
        with torch.device("meta"):  # allocates nothing before the state is known to fit
            decoder = cls(channels - 1, stride, width, layers)
        with own_modes():
            state = {name: value.to(torch.float32, copy=True).contiguous() for name, value in state.items()}
        try:
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
