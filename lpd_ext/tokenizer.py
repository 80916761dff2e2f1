"""The VQ image tokenizer: LlamaGen's convolutional encoder and decoder around an L2-normalised codebook."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lpd_ext.content import content_of
from lpd_ext.modes import own_modes
from lpd_ext.state_files import read_state_dict, without_prefixes, write_state_dict

NORM_GROUPS = 32
_MAX_LEVELS, _MAX_BLOCKS = 12, 32  # building a block takes milliseconds, and a damaged file may ask for any number


@dataclass(frozen=True)
class TokenizerConfig:
    """Sizes of a VQ tokenizer; the defaults are those of the published `vq_ds16_c2i`."""

    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    z_channels: int = 256
    codebook_size: int = 16384
    codebook_dim: int = 8
    encoder_res_blocks: int = 2
    decoder_res_blocks: int = 3

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            values = value if name == "ch_mult" else (value,)
            if not values or any(not isinstance(v, int) or isinstance(v, bool) or v < 1 for v in values):
                raise ValueError(f"{name} must be positive whole numbers, got {value!r}")
        if self.ch % NORM_GROUPS:
            raise ValueError(f"ch must be a multiple of {NORM_GROUPS} (GroupNorm), got {self.ch}")
        blocks = max(self.encoder_res_blocks, self.decoder_res_blocks)
        if len(self.ch_mult) > _MAX_LEVELS or blocks > _MAX_BLOCKS:
            raise ValueError(
                f"there may be at most {_MAX_LEVELS} levels of {_MAX_BLOCKS} blocks each, got {len(self.ch_mult)} of "
                f"{blocks}"
            )

    @property
    def stride(self) -> int:
        """Pixels per token along each side."""
        return int(2 ** (len(self.ch_mult) - 1))


def group_norm(channels: int) -> nn.GroupNorm:
    """Returns GroupNorm with the published number of groups."""
    return nn.GroupNorm(NORM_GROUPS, channels, eps=1e-6)


def conv3x3(in_channels: int, out_channels: int) -> nn.Conv2d:
    """Returns a 3x3 convolution that keeps the resolution."""
    return nn.Conv2d(in_channels, out_channels, 3, padding=1)


class ResBlock(nn.Module):
    """GN, swish, 3x3, GN, swish, 3x3, plus the input (1x1 `nin_shortcut` where widths differ)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = group_norm(in_channels)
        self.conv1 = conv3x3(in_channels, out_channels)
        self.norm2 = group_norm(out_channels)
        self.conv2 = conv3x3(out_channels, out_channels)
        self.nin_shortcut = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, h, w]
        y = self.conv1(F.silu(self.norm1(x)))
        out: Tensor = self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(y)))
        return out


class AttnBlock(nn.Module):
    """GN, single-head attention over all cells, plus the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, h, w]
        y = self.norm(x)
        q, k, v = (f(y).flatten(2).transpose(1, 2).unsqueeze(1) for f in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(q, k, v)  # [B, 1, hw, C]
        out: Tensor = self.proj_out(attended.squeeze(1).transpose(1, 2).reshape(x.shape))
        return x + out


class Downsample(nn.Module):
    """One zero column right and one zero row below, then 3x3 with stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return out


class Upsample(nn.Module):
    """Nearest x2, then 3x3."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = conv3x3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out


class Level(nn.Module):
    """The residual blocks of one resolution (with attention if wanted), then the change of resolution."""

    def __init__(self, in_channels: int, out_channels: int, blocks: int, attention: bool) -> None:
        super().__init__()
        self.res = nn.ModuleList(ResBlock(out_channels if i else in_channels, out_channels) for i in range(blocks))
        self.attn = nn.ModuleList(AttnBlock(out_channels) for _ in range(blocks if attention else 0))

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.res):
            x = block(x)
            if len(self.attn):
                x = self.attn[i](x)
        for name in ("downsample", "upsample"):
            if hasattr(self, name):
                x = getattr(self, name)(x)
        return x


def middle(channels: int) -> nn.ModuleList:
    """Returns the blocks between encoder and codebook, or codebook and decoder."""
    return nn.ModuleList([ResBlock(channels, channels), AttnBlock(channels), ResBlock(channels, channels)])


class Encoder(nn.Module):
    """Images [B, 3, Hp, Wp] to features [B, z, h, w]."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        widths = [config.ch * m for m in config.ch_mult]
        self.conv_in = conv3x3(3, config.ch)
        self.conv_blocks = nn.ModuleList()
        for i, width in enumerate(widths):
            lowest = i == len(widths) - 1
            level = Level(widths[i - 1] if i else config.ch, width, config.encoder_res_blocks, attention=lowest)
            if not lowest:
                level.downsample = Downsample(width)
            self.conv_blocks.append(level)
        self.mid = middle(widths[-1])
        self.norm_out = group_norm(widths[-1])
        self.conv_out = conv3x3(widths[-1], config.z_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in (*self.conv_blocks, *self.mid):
            x = block(x)
        out: Tensor = self.conv_out(F.silu(self.norm_out(x)))
        return out


class Decoder(nn.Module):
    """Features [B, z, h, w] to images [B, 3, Hp, Wp]; `conv_blocks` start at the lowest resolution."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        widths = [config.ch * m for m in reversed(config.ch_mult)]
        self.conv_in = conv3x3(config.z_channels, widths[0])
        self.mid = middle(widths[0])
        self.conv_blocks = nn.ModuleList()
        for i, width in enumerate(widths):
            level = Level(widths[max(i - 1, 0)], width, config.decoder_res_blocks, attention=i == 0)
            if i < len(widths) - 1:
                level.upsample = Upsample(width)
            self.conv_blocks.append(level)
        self.norm_out = group_norm(widths[-1])
        self.conv_out = conv3x3(widths[-1], 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in (*self.mid, *self.conv_blocks):
            x = block(x)
        out: Tensor = self.conv_out(F.silu(self.norm_out(x)))
        return out


class Codebook(nn.Module):
    """The code vectors [V, d], L2-normalised at every use."""

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(size, dim)


class VQTokenizer(nn.Module):
    """The published VQ tokenizer, with the published state-dict keys, at any width."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = Codebook(config.codebook_size, config.codebook_dim)
        self.quant_conv = nn.Conv2d(config.z_channels, config.codebook_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.codebook_dim, config.z_channels, 1)

    def features(self, images: Tensor) -> Tensor:
        """Encodes images [B, 3, Hp, Wp] to unit vectors [B, d, h, w], before the nearest-code search."""
        return F.normalize(self.quant_conv(self.encoder(images)), dim=1)

    def codes(self) -> Tensor:
        """Returns the unit-length code vectors [V, d]."""
        return F.normalize(self.quantize.embedding.weight, dim=1)

    def vectors(self, tokens: Tensor) -> Tensor:
        """Returns the code vectors [..., d] of tokens int64 [...], computing no others."""
        return F.normalize(F.embedding(tokens, self.quantize.embedding.weight), dim=-1)

    def nearest(self, features: Tensor) -> Tensor:
        """Returns the nearest codes int64 [B, h, w] of unit vectors [B, d, h, w]."""
        # Both sides have length 1, so the nearest code is the one with the largest dot product.
        return torch.einsum("bdhw,vd->bhwv", features, self.codes().to(features.dtype)).argmax(-1)

    def decode_features(self, features: Tensor) -> Tensor:
        """Decodes code vectors [B, d, h, w] to images [B, 3, Hp, Wp]."""
        images: Tensor = self.decoder(self.post_quant_conv(features))
        return images

    def encode(self, images: Tensor) -> Tensor:
        """Encodes images [B, 3, Hp, Wp] in [-1, 1] to tokens int64 [B, h, w]; sides must be multiples of the stride.

        Ignores torch.autocast, as `decode` does: rounding would change tokens.
        """
        stride = self.config.stride
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images must be [B, 3, Hp, Wp], got shape {tuple(images.shape)}")
        if not images.is_floating_point():
            raise TypeError(f"images must be floating point in [-1, 1], got {images.dtype}")
        if images.shape[2] % stride or images.shape[3] % stride or 0 in images.shape[2:]:
            raise ValueError(f"images must have sides that are multiples of {stride}, got {tuple(images.shape[2:])}")
        with own_modes(images.device):
            return self.nearest(self.features(images))

    def decode(self, tokens: Tensor) -> Tensor:
        """Decodes tokens int64 [B, h, w], or [B, N] of a square grid, to images [B, 3, Hp, Wp]; ids are in [0, V)."""
        if tokens.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"tokens must be int64 or int32, got {tokens.dtype}")
        if tokens.ndim == 2:
            side = math.isqrt(tokens.shape[1])
            if side * side != tokens.shape[1]:
                raise ValueError(f"tokens [B, N] need a square N, got {tokens.shape[1]}; pass [B, h, w]")
            tokens = tokens.unflatten(1, (side, side))
        if tokens.ndim != 3 or 0 in tokens.shape[1:]:
            raise ValueError(f"tokens must be [B, h, w] or [B, N], got shape {tuple(tokens.shape)}")
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.config.codebook_size:
            raise ValueError(
                f"tokens must lie in [0, {self.config.codebook_size}), got {int(tokens.min())} to {int(tokens.max())}"
            )
        with own_modes(tokens.device):
            return self.decode_features(self.vectors(tokens).permute(0, 3, 1, 2))

    @staticmethod
    def to_pixels(images: Tensor) -> Tensor:
        """Converts images [B, 3, H, W] in [-1, 1] to uint8 [B, H, W, 3]: round(clip((x + 1)·127.5, 0, 255))."""
        return ((images.float() + 1) * 127.5).clamp(0, 255).round().to(torch.uint8).permute(0, 2, 3, 1)

    @staticmethod
    def from_pixels(pixels: Tensor) -> Tensor:
        """Converts uint8 [B, H, W, 3] to images [B, 3, H, W] in [-1, 1], which `to_pixels` turns back exactly."""
        return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> VQTokenizer:
        """Builds a float32 tokenizer from a published-layout state dict, inferring its sizes; ValueError otherwise."""
        # The published file also counts code usage; nothing reads it.
        state = {name: tensor for name, tensor in without_prefixes(state).items() if name != "quantize.codebook_used"}
        config = infer_config(state)
        with torch.device("meta"):  # allocates nothing before the state is known to fit
            model = cls(config)
        try:
            model.load_state_dict(state, assign=True)
        except RuntimeError as error:
            raise ValueError(f"state is not a VQ tokenizer of the published layout: {error}") from error
        # Copies: the file may be memory-mapped, and the caller may go on using the tensors. Not in the default dtype,
        # which a caller may have changed.
        with own_modes():
            own = {name: tensor.to(torch.float32, copy=True).contiguous() for name, tensor in state.items()}
        for name, tensor in own.items():
            if not bool(tensor.isfinite().all()):
                raise ValueError(f"state is not a VQ tokenizer: {name} has numbers that are not finite")
        model.load_state_dict(own, assign=True)
        return model.eval().requires_grad_(False)

    @classmethod
    def from_file(cls, path: str | Path) -> VQTokenizer:
        """Loads a tokenizer from a safetensors file or a published `.pt`; errors as in `read_state_dict`."""
        with content_of(path):
            return cls.from_state_dict(read_state_dict(path))

    def save(self, path: str | Path, dtype: torch.dtype = torch.float16) -> None:
        """Writes the state dict as safetensors in `dtype`."""
        write_state_dict(self.state_dict(), path, dtype)


def infer_config(state: Mapping[str, Tensor]) -> TokenizerConfig:
    """Infers the config of a tokenizer from its published-layout state dict; ValueError with a missing or wrong key."""

    def shape(name: str, ndim: int = 4) -> tuple[int, ...]:
        if name not in state:
            raise ValueError(f"state is not a VQ tokenizer of the published layout: {name!r} is missing")
        found = tuple(state[name].shape)
        if len(found) != ndim or 0 in found:
            raise ValueError(
                f"state is not a VQ tokenizer of the published layout: {name!r} must have {ndim} dimensions, none of "
                f"size 0, got shape {found}"
            )
        return found

    def count(prefix: str) -> int:
        indices = {name[len(prefix) :].split(".")[0] for name in state if name.startswith(prefix)}
        return len(indices)

    ch = shape("encoder.conv_in.weight")[0]
    levels = count("encoder.conv_blocks.")
    codebook_size, codebook_dim = shape("quantize.embedding.weight", 2)
    return TokenizerConfig(
        ch=ch,
        ch_mult=tuple(shape(f"encoder.conv_blocks.{i}.res.0.conv2.weight")[0] // ch for i in range(levels)),
        z_channels=shape("encoder.conv_out.weight")[0],
        codebook_size=codebook_size,
        codebook_dim=codebook_dim,
        encoder_res_blocks=count("encoder.conv_blocks.0.res."),
        decoder_res_blocks=count("decoder.conv_blocks.0.res."),
    )
