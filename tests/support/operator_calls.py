"""Calls of every operator with random arguments that are right: all dtypes, small sizes, empty ones, slices of larger
buffers. What the operator then gives is judged by fuzz_operators.py.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from steps import Layout, make_step
from torch import Tensor

from lpd_ext.packing import pack_weight

Call = dict[str, object]
FLOATS = (torch.float32, torch.bfloat16, torch.float16)

# The arguments that an operator writes.
WRITTEN: dict[str, tuple[str, ...]] = {
    "group_attention": ("k_cache", "v_cache", "workspace"),
    "append_kv": ("k_cache", "v_cache"),
    "residual_layer_norm": ("x",),
    "sample_step": ("contents", "grid"),
    "residual_linear": ("x",),
    "packed_linear": ("out",),
    "packed_linear_int8": ("out",),
    "conv3x3": ("out",),
}


class Draw(random.Random):
    """Random numbers and tensors of one call."""

    def floats(self, *shape: int, dtype: torch.dtype = torch.float32, spread: float = 1.0) -> Tensor:
        generator = torch.Generator().manual_seed(self.getrandbits(60))
        return (spread * torch.randn(*shape, generator=generator)).to(dtype)

    def integers(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        generator = torch.Generator().manual_seed(self.getrandbits(60))
        return torch.randint(low, high, shape, generator=generator).to(dtype)

    def size(self, *, least: int = 0) -> int:
        return max(least, self.choice((0, 1, 1, 2, 3, 5, 8, 13)))

    def often(self) -> bool:
        return self.random() < 0.7

    def sliced(self, tensor: Tensor) -> Tensor:
        """The same values, now and then as a slice of a larger buffer, whole in its last dimension."""
        if self.often() or tensor.dim() == 0:
            return tensor
        pads = [self.randint(0, 2) for _ in tensor.shape[:-1]] + [self.randint(0, 9)]
        buffer = self.floats(*(size + 2 * pad for size, pad in zip(tensor.shape, pads, strict=True))).to(tensor.dtype)
        for dim, (size, pad) in enumerate(zip(tensor.shape, pads, strict=True)):
            buffer = buffer.narrow(dim, pad, size)
        return buffer.copy_(tensor)


def _of_16_bits(draw: Draw) -> torch.dtype:
    return draw.choice(FLOATS[1:])


def _step(draw: Draw) -> Call:
    choices = (0, 0, 1, 2, 5, 17)
    layouts = [
        Layout(draw.choice(choices), draw.choice(choices), draw.choice((0, 1, 4, 16)))
        for _ in range(draw.randint(0, 3))
    ]
    head_dim, dtype = draw.choice((8, 16, 32, 64, 24)), draw.choice(FLOATS)
    strided, cuda = not draw.often(), draw.random() < 0.5
    step = make_step(layouts, draw.choice((0, 1, 2, 3)), head_dim, dtype, draw.getrandbits(30), 1.0, strided, cuda)
    return dict(vars(step))


def append_kv(draw: Draw) -> Call:
    step = _step(draw)
    return {name: step[name] for name in ("qkv", "k_cache", "v_cache", "segments", "max_rows")}


def group_attention(draw: Draw) -> Call:
    step = _step(draw)
    qkv = step["qkv"]
    assert isinstance(qkv, Tensor)
    step["scale"] = draw.choice((None, 0.0, 0.25))
    step["first_output_row"] = 0 if draw.often() else draw.randint(0, len(qkv))
    step["settled"] = draw.often()
    step["workspace"] = None if draw.often() else torch.zeros(draw.choice((0, 16, 4096)), dtype=torch.uint8)
    return step


def embed_rows(draw: Draw) -> Call:
    rows, contents, positions, width = draw.size(), draw.size(least=1), draw.size(least=1), draw.size()
    width, dtype = width * draw.choice((1, 8, 33)), draw.choice(FLOATS)
    return {
        "content_ids": draw.integers(0, contents, rows),
        "positions": draw.integers(0, positions, rows),
        "content": draw.sliced(draw.floats(contents, width, dtype=dtype)),
        "position_embedding": draw.sliced(draw.floats(positions, width, dtype=dtype)),
        "weight": draw.floats(width, dtype=dtype),
        "bias": draw.floats(width, dtype=dtype),
        "eps": draw.choice((1e-6, 0.5)),
    }


def embed_scaled_rows(draw: Draw) -> Call:
    rows, contents, positions, width = draw.size(), draw.size(least=1), draw.size(least=1), 32 * draw.choice((1, 2, 5))
    dtype, looked_up = _of_16_bits(draw), draw.integers(0, 2, 2).tolist()
    ids = {"content": draw.integers(0, contents, rows), "position": draw.integers(0, positions, rows)}
    index = [draw.integers(0, rows, rows) if given and rows else None for given in looked_up]
    return {
        "content_ids": ids["content"],
        "positions": ids["position"],
        "content": draw.sliced(draw.floats(contents, width, dtype=dtype)),
        "position_embedding": draw.sliced(draw.floats(positions, width, dtype=dtype)),
        "weight": draw.floats(width, dtype=dtype),
        "bias": draw.floats(width, dtype=dtype),
        "scale": draw.floats(width, dtype=dtype),
        "eps": draw.choice((1e-6, 0.5)),
        "content_index": index[0],
        "position_index": index[1],
    }


def residual_layer_norm(draw: Draw) -> Call:
    rows, width, dtype = draw.size(), draw.size() * draw.choice((1, 8, 33)), draw.choice(FLOATS)
    return {
        "x": draw.sliced(draw.floats(rows, width, spread=2.0)),
        "delta": draw.sliced(draw.floats(rows, width, dtype=dtype)) if draw.often() else None,
        "weight": draw.floats(width, dtype=dtype),
        "bias": draw.floats(width, dtype=dtype),
        "eps": draw.choice((1e-6, 0.5)),
    }


def sample_tokens(draw: Draw) -> Call:
    rows, vocab, tokens = draw.size(least=1), draw.choice((1, 2, 7, 40, 300, 1025)), draw.size()
    return {
        "logits": draw.sliced(draw.floats(rows, vocab, dtype=draw.choice(FLOATS), spread=3.0)),
        "conditional_row": draw.integers(0, rows, tokens, dtype=torch.int32),
        "unconditional_row": draw.integers(-1, rows, tokens, dtype=torch.int32),
        "guidance": draw.floats(tokens).abs() * 3,
        "temperature": draw.floats(tokens).abs() * draw.choice((0, 1)),
        "top_k": None if draw.often() else draw.integers(0, vocab + 2, tokens, dtype=torch.int32),
        "top_p": None if draw.often() else 1 - 0.9 * draw.floats(tokens).abs().clamp(max=1),
        "seed": draw.integers(-(2**62), 2**62, tokens),
        "cell": draw.integers(0, 2**32, tokens),
    }


def sample_step(draw: Draw) -> Call:
    images, cells = draw.size(least=1), draw.size(least=1)
    columns = cells + 2
    drawn = [(image, n) for image in range(images) for n in range(cells) if draw.random() < 0.4]
    orders = torch.stack([draw.integers(0, 2**30, cells).argsort() for _ in range(images)])
    ends = torch.zeros(images, 1, dtype=torch.int64), torch.full((images, 1), -7)
    positions = torch.cat([ends[0], orders + 1, ends[1]], dim=1).repeat(2, 1)  # images, then their twins
    image, n = torch.tensor(drawn, dtype=torch.int64).reshape(-1, 2).unbind(1)
    has_twin = draw.integers(0, 2, images).bool()[image]
    call = sample_tokens(draw)
    rows, tokens = call["logits"].shape[0], len(drawn)
    settings, seeds = (
        draw.floats(images, 4).abs() * draw.choice((0, 1)),
        draw.integers(-(2**62), 2**62, images, 3)[:, 1],
    )
    temperature, top_p = settings[:, 0], 1 - 0.9 * settings[:, 1].clamp(max=1)
    in_records = not draw.often()
    return {
        "logits": call["logits"],
        "conditional_row": draw.integers(0, rows, tokens, dtype=torch.int32),
        "unconditional_row": draw.integers(-1, rows, tokens, dtype=torch.int32),
        "image": image.contiguous(),
        "token_index": n.contiguous(),
        "write_index": image * columns + 1 + n,
        "twin_index": torch.where(has_twin, (images + image) * columns + 1 + n, -1),
        "guidance": draw.sliced(draw.floats(images, cells).abs() * 3),
        "temperature": temperature if in_records else temperature.contiguous(),
        "top_k": None if draw.often() else draw.integers(0, 2000, images, dtype=torch.int32),
        "top_p": None if draw.often() else top_p,
        "seeds": seeds if in_records else seeds.contiguous(),
        "positions": positions,
        "contents": draw.integers(-1, 50, 2 * images, columns),
        "grid": draw.integers(-1, 50, images, cells),
    }


def locality_order(draw: Draw) -> Call:
    height, width, batch = draw.randint(1, 5), draw.randint(1, 5), draw.choice((0, 1, 1, 2))
    cells = height * width
    known = None if draw.often() else draw.integers(0, 2, 1, cells).bool().expand(batch, -1).contiguous()
    free = cells if known is None or batch == 0 else cells - int(known[0].sum())
    cuts = sorted(draw.randint(0, free) for _ in range(draw.randint(0, 4)))
    sizes = [b - a for a, b in zip([0, *cuts], [*cuts, free], strict=True)]
    group_sizes = torch.tensor(sizes, dtype=torch.int32)
    return {
        "group_sizes": group_sizes if draw.often() else group_sizes.expand(batch, -1).contiguous(),
        "height": height,
        "width": width,
        "proximity_threshold": draw.choice((-1.0, 0.0, 0.9, 2.0, float("inf"))),
        "repulsion_threshold": draw.choice((0, 1, 2, 9)),
        "seeds": draw.integers(-(2**62), 2**62, batch),
        "known": known,
    }


def residual_linear(draw: Draw) -> Call:
    rows, width, depth, dtype = (
        draw.size(),
        32 * draw.choice((0, 1, 2, 5)),
        32 * draw.choice((1, 2, 7)),
        _of_16_bits(draw),
    )
    return {
        "x": draw.sliced(draw.floats(rows, width, spread=2.0)),
        "rows": draw.sliced(draw.floats(rows, depth, dtype=dtype)),
        "weight": draw.sliced(draw.floats(width, depth, dtype=dtype, spread=depth**-0.5)),
        "bias": draw.floats(width, dtype=dtype) if draw.often() else None,
        "scale": draw.floats(width, dtype=dtype),
    }


def normed_linear(draw: Draw) -> Call:
    rows, features, depth, dtype = draw.size(), 8 * draw.size(), 32 * draw.choice((1, 2, 7)), _of_16_bits(draw)
    statistics = torch.stack([draw.floats(rows, depth // 32), 32 + draw.floats(rows, depth // 32).abs()], 2)
    return {
        "scaled": draw.sliced(draw.floats(rows, depth, dtype=dtype)),
        "statistics": statistics,
        "weight": draw.sliced(draw.floats(features, depth, dtype=dtype, spread=depth**-0.5)),
        "slope": draw.floats(features),
        "shift": draw.floats(features),
        "eps": draw.choice((1e-6, 0.5)),
        "gelu": draw.random() < 0.5,
    }


def fold_layer_norm(draw: Draw) -> Call:
    features, depth, dtype = draw.size(), 32 * draw.choice((1, 2, 9)), _of_16_bits(draw)
    return {
        "weight": draw.sliced(draw.floats(features, depth, dtype=dtype)),
        "gamma": draw.floats(depth, dtype=dtype),
        "beta": draw.floats(depth, dtype=dtype),
        "bias": draw.floats(features, dtype=dtype) if draw.often() else None,
    }


def quantize_rows(draw: Draw) -> Call:
    rotate = not draw.often()
    width = 64 * draw.randint(0, 5) if rotate else draw.size() * draw.choice((1, 8, 33))
    return {
        "x": draw.sliced(
            draw.floats(draw.size(), width, dtype=draw.choice(FLOATS), spread=draw.choice((1e-3, 1, 1e3)))
        ),
        "levels": draw.choice((1, 2, 127, 255)),
        "rotate": rotate,
        "planes": draw.choice((1, 2)),
    }


def packed_linear(draw: Draw) -> Call:
    rows, inputs, outputs = draw.size(), draw.choice((1, 2, 7, 64, 129)), draw.choice((1, 31, 32, 33, 70))
    dtype = draw.choice(FLOATS[:2])
    return {
        "x": draw.sliced(draw.floats(rows, inputs, dtype=dtype)),
        "weight": pack_weight(draw.floats(outputs, inputs, dtype=dtype, spread=inputs**-0.5)),
        "bias": draw.floats(outputs, dtype=dtype) if draw.often() else None,
        "out_features": outputs,
        "gelu": draw.random() < 0.5,
        "out": draw.floats(rows, outputs, dtype=dtype),
    }


def packed_linear_int8(draw: Draw) -> Call:
    rows, inputs, outputs = draw.size(), draw.choice((1, 2, 7, 64, 129)), draw.choice((1, 31, 32, 33, 70))
    planes = draw.choice((1, 2))
    quantization = torch.stack([draw.floats(planes * rows).abs(), draw.integers(0, 256, planes * rows).float()], 1)
    return {
        "quantized": draw.sliced(draw.integers(0, 256, planes * rows, inputs, dtype=torch.uint8)),
        "quantization": quantization,
        "weight": pack_weight(draw.integers(-127, 128, outputs, inputs, dtype=torch.int8)),
        "scale": draw.floats(outputs).abs() / 127,
        "column_sum": draw.floats(outputs),
        "bias": draw.floats(outputs) if draw.often() else None,
        "planes": planes,
        "gelu": draw.random() < 0.5,
        "out": draw.floats(rows, outputs),
    }


def group_norm_scale_shift(draw: Draw) -> Call:
    groups, pixels = draw.choice((1, 2, 3, 7)), (draw.choice((1, 2, 9, 130)), draw.choice((1, 3)))
    channels = groups * draw.choice((0, 1, 2, 9, 24))
    return {
        "x": draw.floats(draw.choice((0, 1, 2)), *pixels, channels) + draw.choice((0, 50)),
        "weight": draw.floats(channels),
        "bias": draw.floats(channels),
        "num_groups": groups,
        "eps": draw.choice((1e-6, 0.5)),
    }


def conv3x3(draw: Draw) -> Call:
    batch, height, width = draw.choice((0, 1, 2)), draw.choice((0, 1, 4, 5, 9)), draw.choice((0, 1, 4, 7))
    channels, outputs, upsample = draw.choice((16, 32)), draw.choice((0, 1, 16, 33)), not draw.often()
    factor = 2 if upsample else 1
    return {
        "x": draw.floats(batch, height, width, channels),
        "weight": draw.floats(3, 3, channels, outputs, spread=(9 * channels) ** -0.5),
        "bias": draw.floats(outputs),
        "scale_shift": draw.floats(batch, 2, channels) if draw.random() < 0.5 else None,
        "out": draw.floats(batch, height * factor, width * factor, outputs),
        "upsample": upsample,
        "accumulate": not draw.often(),
        "bfloat16": not draw.often(),
    }


def preview_pixels(draw: Draw) -> Call:
    codes, length, stride = draw.choice((1, 5, 300)), draw.choice((1, 4, 8)), draw.choice((0, 1, 2, 3, 4))
    width1, width2 = draw.choice((1, 8, 33)), draw.choice((1, 16, 50))
    grid = draw.choice((0, 1, 2)), draw.choice((1, 5, 13)), draw.choice((1, 4, 17))  # torch convolves no empty image
    return {
        "tokens": draw.integers(-1, codes, *grid),
        "codebook": draw.floats(codes, length),
        "weight1": draw.floats(3, 3, length + 1, width1),
        "bias1": draw.floats(width1),
        "weight2": draw.floats(3, 3, width1, width2, spread=(9 * width1) ** -0.5),
        "bias2": draw.floats(width2),
        "head": draw.floats(width2, stride, stride, 3, spread=0.3 * width2**-0.5),
        "head_bias": draw.floats(stride, stride, 3, spread=0.3),
    }


def _tables(draw: Draw) -> tuple[Tensor, Tensor]:
    sizes = [draw.choice((1, 2, 3, 9)) for _ in range(draw.randint(1, 4))]
    rows, head_dim = 1 + 2 * sum(sizes) - sizes[-1], draw.choice((8, 16, 24, 64))
    qkv = draw.floats(draw.choice((0, 1, 2)), rows, 3, draw.choice((0, 1, 2)), head_dim, dtype=draw.choice(FLOATS))
    return draw.sliced(qkv), torch.tensor(sizes, dtype=torch.int32)


def training_attention(draw: Draw) -> Call:
    qkv, group_sizes = _tables(draw)
    mutual, scale = draw.often(), draw.choice((None, 0.0, 0.5))
    return {"qkv": qkv, "group_sizes": group_sizes, "mutual_visibility": mutual, "scale": scale}


def training_attention_backward(draw: Draw) -> Call:
    qkv, group_sizes = _tables(draw)
    mutual, scale = draw.often(), draw.choice((0.0, 0.5))
    output, logsumexp = torch.ops.lpd_ext.training_attention(qkv, group_sizes, mutual, scale)
    return {
        "grad_output": draw.floats(*output.shape, dtype=qkv.dtype),
        "qkv": qkv,
        "output": output,
        "logsumexp": logsumexp,
        "group_sizes": group_sizes,
        "mutual_visibility": mutual,
        "scale": scale,
    }


CALLS: dict[str, Callable[[Draw], Call]] = {
    call.__name__: call
    for call in (
        group_attention,
        append_kv,
        embed_rows,
        embed_scaled_rows,
        residual_layer_norm,
        sample_tokens,
        sample_step,
        locality_order,
        residual_linear,
        normed_linear,
        fold_layer_norm,
        quantize_rows,
        packed_linear,
        packed_linear_int8,
        group_norm_scale_shift,
        conv3x3,
        preview_pixels,
        training_attention,
        training_attention_backward,
    )
}
