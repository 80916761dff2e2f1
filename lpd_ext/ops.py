"""Typed wrappers of the operators in `torch.ops.lpd_ext`, each with its fake kernel for torch.compile right under it.

Shapes use the letters of the project: R rows of a step, H heads, D head dimension, E = H*D, S cache slots, P cache
positions, Q logit rows or segments, V vocabulary, M tokens to draw, T steps, B images, N = height*width cells.
A wrong argument raises RuntimeError with its name, before anything is written. A tensor that an operator writes must
not alias another argument; its version counter is bumped, and in grad mode no argument may then require grad. Values in
CUDA tensors raise no error, since that would sync the device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lpd_ext import _C, reference  # loading _C registers the operators

_ops = torch.ops.lpd_ext


def _default_scale(qkv: Tensor) -> float:
    """Returns 1/sqrt(D), or anything for a tensor without a D, which the operator refuses."""
    return float(qkv.shape[-1]) ** -0.5 if qkv.dim() > 0 and qkv.shape[-1] != 0 else 1.0


def group_attention(
    qkv: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    segments: Tensor,
    max_rows: int,
    max_keys: int,
    first_output_row: int = 0,
    scale: float | None = None,
    workspace: Tensor | None = None,
    settled: bool = False,
) -> Tensor:
    """Appends the context rows' K and V to the caches, then attends with two KV lengths per sequence.

    Context rows see the cached positions and each other; query rows see all of those and each other.

    qkv [R, 3, H, D]; k_cache, v_cache [S, H, P, D], written; segments int32 [Q, 6] with columns context_start,
    num_context, query_start, num_query, cache_length, cache_slot. max_rows and max_keys bound num_context + num_query
    and cache_length + num_context + num_query. scale defaults to 1/sqrt(D). Returns [R - first_output_row, H*D].
    workspace: see group_attention_workspace; without one, a small batch leaves much of a GPU idle.
    settled: the preceding GPU launch wrote neither caches nor segments, so they may be read early.
    """
    if scale is None:
        scale = _default_scale(qkv)
    sizes = (max_rows, max_keys, first_output_row)
    result: Tensor = _ops.group_attention(qkv, k_cache, v_cache, segments, *sizes, scale, workspace, settled)
    return result


@torch.library.register_fake("lpd_ext::group_attention")
def _(
    qkv: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    segments: Tensor,
    max_rows: int,
    max_keys: int,
    first_output_row: int,
    scale: float,
    workspace: Tensor | None = None,
    settled: bool = False,
) -> Tensor:
    rows, _, heads, head_dim = qkv.shape
    return qkv.new_empty(rows - first_output_row, heads * head_dim)


def group_attention_workspace(head_dim: int, device: torch.device) -> Tensor | None:
    """Allocates zeroed scratch memory for group_attention, uint8, to be reused on one stream; None on the CPU.

    With it, a batch with too few blocks to fill a GPU splits its keys over several blocks.
    """
    if device.type != "cuda":
        return None
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    size = _C.group_attention_workspace_bytes(head_dim, multiprocessors)
    return torch.zeros(size, dtype=torch.uint8, device=device)


def append_kv(qkv: Tensor, k_cache: Tensor, v_cache: Tensor, segments: Tensor, max_rows: int) -> None:
    """Copies the context rows' K and V into the caches at cache_length of their slot; arguments as group_attention."""
    _ops.append_kv(qkv, k_cache, v_cache, segments, max_rows)


@torch.library.register_fake("lpd_ext::append_kv")
def _(qkv: Tensor, k_cache: Tensor, v_cache: Tensor, segments: Tensor, max_rows: int) -> None:
    return None


def embed_rows(
    content_ids: Tensor,
    positions: Tensor,
    content: Tensor,
    position_embedding: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-6,
    content_index: Tensor | None = None,
    position_index: Tensor | None = None,
) -> Tensor:
    """Returns LayerNorm(content[content_ids] + position_embedding[positions]), the fp32 residual stream [R, E].

    content_ids, positions int64 [R]; content [M, E]; position_embedding [1 + N, E]; weight, bias [E]. content_index,
    position_index int64 [R] gather the rows' ids from content_ids and positions of any length. On CUDA an out-of-range
    id or index makes its row NaN.
    """
    tables = (content_ids, positions, content, position_embedding, weight, bias)
    result: Tensor = _ops.embed_rows(*tables, eps, content_index, position_index)
    return result


@torch.library.register_fake("lpd_ext::embed_rows")
def _(
    content_ids: Tensor,
    positions: Tensor,
    content: Tensor,
    position_embedding: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    content_index: Tensor | None = None,
    position_index: Tensor | None = None,
) -> Tensor:
    rows = (content_ids if content_index is None else content_index).shape[0]
    return content.new_empty((rows, content.shape[1]), dtype=torch.float32)


def embed_scaled_rows(
    content_ids: Tensor,
    positions: Tensor,
    content: Tensor,
    position_embedding: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor,
    eps: float = 1e-6,
    content_index: Tensor | None = None,
    position_index: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns x of `embed_rows` and, for the first layer, the input of normed_linear as residual_linear does.

    That is x * scale [R, E] in scale's dtype, and fp32 [R, E / 32, 2], the mean and the sum of squared deviations of
    every 32 columns. Tables and scale [E] are bfloat16 or float16, whose range x * scale must not exceed; E is a
    multiple of 32.
    """
    tables = (content_ids, positions, content, position_embedding, weight, bias, scale)
    result: tuple[Tensor, Tensor, Tensor] = _ops.embed_scaled_rows(*tables, eps, content_index, position_index)
    return result


@torch.library.register_fake("lpd_ext::embed_scaled_rows")
def _(
    content_ids: Tensor,
    positions: Tensor,
    content: Tensor,
    position_embedding: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor,
    eps: float,
    content_index: Tensor | None = None,
    position_index: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, width = (content_ids if content_index is None else content_index).shape[0], content.shape[1]
    fp32 = [content.new_empty(shape, dtype=torch.float32) for shape in ((rows, width), (rows, width // 32, 2))]
    return fp32[0], content.new_empty(rows, width), fp32[1]


def residual_layer_norm(x: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor, eps: float = 1e-6) -> Tensor:
    """Adds delta, if any, to the fp32 residual stream x [R, E] in place; returns LayerNorm(x) in weight's dtype."""
    result: Tensor = _ops.residual_layer_norm(x, delta, weight, bias, eps)
    return result


@torch.library.register_fake("lpd_ext::residual_layer_norm")
def _(x: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return weight.new_empty(x.shape)


def sample_tokens(
    logits: Tensor,
    conditional_row: Tensor,
    unconditional_row: Tensor,
    guidance: Tensor,
    temperature: Tensor,
    top_k: Tensor | None,
    top_p: Tensor | None,
    seed: Tensor,
    cell: Tensor,
) -> Tensor:
    """Draws one token per entry of conditional_row from guided, tempered, filtered logits [Q, V]; returns int64 [M].

    conditional_row, unconditional_row int32 [M] (-1: no guidance); guidance, temperature (0: argmax), top_p (1: off)
    float32 [M]; top_k int32 [M] (0: off); seed, cell int64 [M] key the random number. Raises RuntimeError (the
    CUDA kernel returns token -1) if a row is not one of logits, a setting is out of range, or a mixed row has a NaN or
    is -inf throughout.
    """
    result: Tensor = _ops.sample_tokens(
        logits, conditional_row, unconditional_row, guidance, temperature, top_k, top_p, seed, cell
    )
    return result


@torch.library.register_fake("lpd_ext::sample_tokens")
def _(
    logits: Tensor,
    conditional_row: Tensor,
    unconditional_row: Tensor,
    guidance: Tensor,
    temperature: Tensor,
    top_k: Tensor | None,
    top_p: Tensor | None,
    seed: Tensor,
    cell: Tensor,
) -> Tensor:
    return seed.new_empty(conditional_row.shape)


def sample_step(
    logits: Tensor,
    conditional_row: Tensor,
    unconditional_row: Tensor,
    image: Tensor,
    token_index: Tensor,
    write_index: Tensor,
    twin_index: Tensor,
    guidance: Tensor,
    temperature: Tensor,
    top_k: Tensor | None,
    top_p: Tensor | None,
    seeds: Tensor,
    positions: Tensor,
    contents: Tensor,
    grid: Tensor,
) -> None:
    """Samples a step's tokens like `sample_tokens`, with inputs from a decode's tables, and writes them there.

    Token m is drawn with the settings of its image: guidance [B, N] at token_index[m], temperature, top_k, top_p and
    seeds [B]. Its cell is positions[write_index[m]] - 1. It goes to contents[write_index[m]], to
    contents[twin_index[m]] (-1: nowhere) and to grid int64 [B, N] at its cell. image, token_index, write_index,
    twin_index int64 [M], the latter two into positions and contents int64 [S, N + 2], flattened. On CUDA
    tokens with out-of-range rows or indices are skipped; invalid settings give token -1.
    """
    places = (image, token_index, write_index, twin_index)
    settings = (guidance, temperature, top_k, top_p, seeds)
    _ops.sample_step(logits, conditional_row, unconditional_row, *places, *settings, positions, contents, grid)


@torch.library.register_fake("lpd_ext::sample_step")
def _(
    logits: Tensor,
    conditional_row: Tensor,
    unconditional_row: Tensor,
    image: Tensor,
    token_index: Tensor,
    write_index: Tensor,
    twin_index: Tensor,
    guidance: Tensor,
    temperature: Tensor,
    top_k: Tensor | None,
    top_p: Tensor | None,
    seeds: Tensor,
    positions: Tensor,
    contents: Tensor,
    grid: Tensor,
) -> None:
    return None


def locality_order(
    group_sizes: Tensor,
    height: int,
    width: int,
    proximity_threshold: float,
    repulsion_threshold: int,
    seeds: Tensor,
    known: Tensor | None = None,
) -> Tensor:
    """Makes the locality-aware order (paper, section 3.3) of each image's free cells: int64 [B, N], -1 after the last.

    group_sizes int32 [T] or [B, T] (zero padded), summing to the free cells; seeds int64 [B]; known bool [B, N] marks
    cells that are already drawn.
    """
    result: Tensor = _ops.locality_order(
        group_sizes, height, width, proximity_threshold, repulsion_threshold, seeds, known
    )
    return result


@torch.library.register_fake("lpd_ext::locality_order")
def _(
    group_sizes: Tensor,
    height: int,
    width: int,
    proximity_threshold: float,
    repulsion_threshold: int,
    seeds: Tensor,
    known: Tensor | None,
) -> Tensor:
    return seeds.new_empty(seeds.shape[0], height * width)


def residual_linear(
    x: Tensor, rows: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Adds rows W^T + bias to the fp32 residual stream x [R, N] in place; returns the input of normed_linear.

    That is x * scale [R, N] in weight's dtype, and fp32 [R, N / 32, 2], the mean and the sum of squared deviations of
    every 32 columns. rows [R, K], weight [N, K], bias and scale [N] are bfloat16 or float16, whose range x * scale must
    not exceed; N and K are multiples of 32. A row does not depend on the others, to the last bit. On CUDA it needs
    compute capability 9.0.
    """
    result: tuple[Tensor, Tensor] = _ops.residual_linear(x, rows, weight, bias, scale)
    return result


@torch.library.register_fake("lpd_ext::residual_linear")
def _(x: Tensor, rows: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor) -> tuple[Tensor, Tensor]:
    num_rows, features = x.shape
    return rows.new_empty(num_rows, features), x.new_empty(num_rows, features // 32, 2)


def normed_linear(
    scaled: Tensor,
    statistics: Tensor,
    weight: Tensor,
    slope: Tensor,
    shift: Tensor,
    eps: float = 1e-6,
    gelu: bool = False,
) -> Tensor:
    """Returns LayerNorm(x) W^T + bias [R, N], or its GELU (exact form), from the results of residual_linear.

    scaled [R, K] = x * gamma and weight [N, K] are bfloat16 or float16, K a multiple of 32, N of 8; slope = W gamma and
    shift = W beta + bias, float32 [N], come from fold_layer_norm. A row does not depend on the others, to the last bit.
    On CUDA it needs compute capability 9.0.
    """
    result: Tensor = _ops.normed_linear(scaled, statistics, weight, slope, shift, eps, gelu)
    return result


@torch.library.register_fake("lpd_ext::normed_linear")
def _(
    scaled: Tensor, statistics: Tensor, weight: Tensor, slope: Tensor, shift: Tensor, eps: float, gelu: bool
) -> Tensor:
    return scaled.new_empty(scaled.shape[0], weight.shape[0])


def fold_layer_norm(weight: Tensor, gamma: Tensor, beta: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns slope = W gamma and shift = W beta + bias, float32 [N], with which normed_linear applies a LayerNorm.

    weight [N, K], gamma and beta [K], bias [N] are bfloat16 or float16; K is a multiple of 32.
    """
    result: tuple[Tensor, Tensor] = _ops.fold_layer_norm(weight, gamma, beta, bias)
    return result


@torch.library.register_fake("lpd_ext::fold_layer_norm")
def _(weight: Tensor, gamma: Tensor, beta: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    features = weight.shape[0]
    return (weight.new_empty(features, dtype=torch.float32), weight.new_empty(features, dtype=torch.float32))


def training_attention(
    qkv: Tensor, group_sizes: Tensor, mutual_visibility: bool = True, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Returns the attention of the teacher-forced pass [B, rows, H*D] and the log of each row's sum [B, H, rows].

    The first is differentiable, once; the second is not. qkv [B, rows, 3, H, D] holds the 1 + N - m_last context rows,
    then the N query rows; group_sizes int32 [T]; visibility.py defines who sees whom. scale defaults to 1/sqrt(D).
    """
    if scale is None:
        scale = _default_scale(qkv)
    result: tuple[Tensor, Tensor] = torch.ops.lpd_ext.training_attention(qkv, group_sizes, mutual_visibility, scale)
    return result


@torch.library.register_fake("lpd_ext::training_attention")
def _(qkv: Tensor, group_sizes: Tensor, mutual_visibility: bool, scale: float) -> tuple[Tensor, Tensor]:
    batch, rows, _, heads, head_dim = qkv.shape
    return qkv.new_empty(batch, rows, heads * head_dim), qkv.new_empty(batch, heads, rows, dtype=torch.float32)


def training_attention_backward(
    grad_output: Tensor,
    qkv: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    group_sizes: Tensor,
    mutual_visibility: bool,
    scale: float,
) -> Tensor:
    """Returns the gradient of qkv [B, rows, 3, H, D] from the results of training_attention and their gradient."""
    saved, sizes = (qkv, output, logsumexp), (group_sizes, mutual_visibility, scale)
    result: Tensor = torch.ops.lpd_ext.training_attention_backward(grad_output, *saved, *sizes)
    return result


@torch.library.register_fake("lpd_ext::training_attention_backward")
def _(
    grad_output: Tensor,
    qkv: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    group_sizes: Tensor,
    mutual_visibility: bool,
    scale: float,
) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _save_for_training_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, group_sizes, ctx.mutual_visibility, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(qkv, *output, group_sizes)


def _differentiate_training_attention(ctx: Any, grad_output: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
    qkv, output, logsumexp, group_sizes = ctx.saved_tensors
    sizes = (group_sizes, ctx.mutual_visibility, ctx.scale)
    return training_attention_backward(grad_output.contiguous(), qkv, output, logsumexp, *sizes), None, None, None


torch.library.register_autograd(
    "lpd_ext::training_attention", _differentiate_training_attention, setup_context=_save_for_training_attention
)


def _refuse_to_differentiate_twice(ctx: Any, grad_qkv: Tensor) -> None:
    raise RuntimeError(
        "training_attention has no second derivative: the gradient of its gradient was asked for. Attention by a mask "
        "(reference.training_attention, or scaled_dot_product_attention with visibility.training_mask) has one."
    )


torch.library.register_autograd("lpd_ext::training_attention_backward", _refuse_to_differentiate_twice)


def quantize_rows(x: Tensor, levels: int = 255, rotate: bool = False, planes: int = 1) -> tuple[Tensor, Tensor]:
    """Quantizes each row of x [R, K] to bytes 0..levels: uint8 [R, K], and float32 [R, 2], scale and zero point.

    x is about scale * (byte - zero_point); zero_point is a whole number, so zeros stay exact. A row with an infinity or
    a NaN has scale NaN. rotate: quantizes packing.rotate_rows(x), for which K must be a multiple of 64. planes = 2:
    returns twice the rows; rows R.. hold the rounding error of the first R, so that both add up to x.
    """
    result: tuple[Tensor, Tensor] = _ops.quantize_rows(x, levels, rotate, planes)
    return result


@torch.library.register_fake("lpd_ext::quantize_rows")
def _(x: Tensor, levels: int, rotate: bool, planes: int) -> tuple[Tensor, Tensor]:
    quantized = x.new_empty((planes * x.shape[0], x.shape[1]), dtype=torch.uint8)
    return quantized, x.new_empty((planes * x.shape[0], 2), dtype=torch.float32)


def packed_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out_features: int,
    gelu: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Returns x W^T + bias [R, N], or its GELU (exact form), with weights packed by packing.pack_weight.

    x [R, K], weight and bias [N] are all float32, or all bfloat16 (summed in float32). A row of the result does not
    depend on the other rows, to the last bit. The result is written to `out` if given.
    """
    out = x.new_empty((*x.shape[:1], max(out_features, 0))) if out is None else out
    _ops.packed_linear(x, weight, bias, out_features, gelu, out)
    return out


@torch.library.register_fake("lpd_ext::packed_linear")
def _(x: Tensor, weight: Tensor, bias: Tensor | None, out_features: int, gelu: bool, out: Tensor) -> None:
    return None


def packed_linear_int8(
    quantized: Tensor,
    quantization: Tensor,
    weight: Tensor,
    scale: Tensor,
    column_sum: Tensor,
    bias: Tensor | None,
    planes: int = 1,
    gelu: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Returns packed_linear of rows quantized by quantize_rows, with int8 weights, as float32 [R, N].

    quantized uint8 [planes * R, K] and quantization float32 [planes * R, 2] come from quantize_rows; weight int8,
    packed by packing.pack_weight, stands for weight * scale [N]; column_sum float32 [N] sums the latter over K;
    bias float32 [N]. Products of bytes are summed exactly; K is at most 65,536. out: as in packed_linear.
    """
    if out is None:
        rows = (len(quantized) if quantized.dim() else 0) // max(planes, 1)
        out = quantized.new_empty((rows, *scale.shape[:1]), dtype=torch.float32)
    _ops.packed_linear_int8(quantized, quantization, weight, scale, column_sum, bias, planes, gelu, out)
    return out


@torch.library.register_fake("lpd_ext::packed_linear_int8")
def _(
    quantized: Tensor,
    quantization: Tensor,
    weight: Tensor,
    scale: Tensor,
    column_sum: Tensor,
    bias: Tensor | None,
    planes: int,
    gelu: bool,
    out: Tensor,
) -> None:
    return None


def group_norm_scale_shift(x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float = 1e-6) -> Tensor:
    """Returns scale and shift [B, 2, C] per image and channel such that GroupNorm(x) = x * scale + shift.

    x float32 [B, H, W, C]; weight, bias float32 [C].
    """
    result: Tensor = _ops.group_norm_scale_shift(x, weight, bias, num_groups, eps)
    return result


@torch.library.register_fake("lpd_ext::group_norm_scale_shift")
def _(x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float) -> Tensor:
    return x.new_empty(x.shape[0], 2, x.shape[-1])


def conv3x3(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale_shift: Tensor | None,
    out: Tensor,
    upsample: bool = False,
    accumulate: bool = False,
    bfloat16: bool = False,
) -> None:
    """Computes a 3x3 convolution with zero padding by Winograd's F(4x4, 3x3), into out [B, H, W, K] or added to it.

    x float32 [B, H, W, C]; with scale_shift [B, 2, C], convolves silu(x * scale + shift); with upsample, doubles x by
    nearest-neighbour interpolation first (out is [B, 2 H, 2 W, K]). weight [3, 3, C, K]; bias [K]; C a multiple of 16.
    bfloat16 rounds the operands of the matrix products, which is faster on processors with AVX512_BF16 at an error of
    about 1 % of the result's deviation. As with Winograd in general, the error is proportional to the largest of the
    6x6 pixels around, not to the result.
    """
    _ops.conv3x3(x, weight, bias, scale_shift, out, upsample, accumulate, bfloat16)


@torch.library.register_fake("lpd_ext::conv3x3")
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale_shift: Tensor | None,
    out: Tensor,
    upsample: bool,
    accumulate: bool,
    bfloat16: bool,
) -> None:
    return None


def preview_pixels(
    tokens: Tensor,
    codebook: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    head: Tensor,
    head_bias: Tensor,
) -> Tensor:
    """Decodes tokens int64 [B, h, w] (-1: undrawn, grey) by a small network to pixels uint8 [B, h s, w s, 3].

    Unit vectors of codebook [V, d] and a channel marking drawn cells pass two 3x3 convolutions with ReLU, weight1
    [3, 3, d + 1, K] and weight2 [3, 3, K, L]; head [L, s, s, 3] maps each cell to its pixels in [-1, 1]. All weights
    are float32. Raises RuntimeError for a token outside [-1, V).
    """
    result: Tensor = _ops.preview_pixels(tokens, codebook, weight1, bias1, weight2, bias2, head, head_bias)
    return result


@torch.library.register_fake("lpd_ext::preview_pixels")
def _(
    tokens: Tensor,
    codebook: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    head: Tensor,
    head_bias: Tensor,
) -> Tensor:
    (batch, height, width), stride = tokens.shape, head_bias.shape[0]
    return tokens.new_empty((batch, height * stride, width * stride, 3), dtype=torch.uint8)


OPERATORS = (
    "group_attention",
    "append_kv",
    "embed_rows",
    "embed_scaled_rows",
    "residual_layer_norm",
    "sample_tokens",
    "sample_step",
    "locality_order",
    "residual_linear",
    "normed_linear",
    "fold_layer_norm",
)

# Operators with CPU kernels only.
CPU_OPERATORS = (
    "quantize_rows",
    "packed_linear",
    "packed_linear_int8",
    "group_norm_scale_shift",
    "conv3x3",
    "preview_pixels",
    "training_attention",
    "training_attention_backward",
)

# Without CUDA kernels in the build, CUDA tensors go through plain torch: slower, and it waits for the device.
for _name in CPU_OPERATORS if _C.build_config()["cuda_architectures"] else OPERATORS + CPU_OPERATORS:
    torch.library.impl(f"lpd_ext::{_name}", "CUDA", getattr(reference, _name))
