"""Plain-torch twins of every operator: the oracle of the tests and the definition of what kernels compute.

They have the names and arguments of `lpd_ext.ops` and take any float dtype, float64 included.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lpd_ext.packing import rotate_rows, unpack_weight


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
    """LayerNorm(content[content_ids] + position_embedding[positions]) [R, E]; fp32 for 16-bit tables."""
    content_ids = content_ids if content_index is None else content_ids[content_index]
    positions = positions if position_index is None else positions[position_index]
    dtype = torch.promote_types(content.dtype, torch.float32)
    rows = content[content_ids].to(dtype) + position_embedding[positions].to(dtype)
    return F.layer_norm(rows, rows.shape[-1:], weight.to(dtype), bias.to(dtype), eps)


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
    """x of embed_rows; x * scale [R, E]; mean and squares of every 32 columns [R, E / 32, 2]."""
    tables = (content_ids, positions, content, position_embedding, weight, bias)
    x = embed_rows(*tables, eps, content_index, position_index)
    return x, (x * scale.to(x.dtype)).to(content.dtype), _column_statistics(x)


def _column_statistics(x: Tensor) -> Tensor:
    groups = x.unflatten(1, (-1, 32))
    means = groups.mean(2, keepdim=True)
    return torch.cat([means, ((groups - means) ** 2).sum(2, keepdim=True)], 2)


def residual_layer_norm(x: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor, eps: float = 1e-6) -> Tensor:
    """x += delta in place (unless None); LayerNorm(x) [R, E] in weight's dtype."""
    if delta is not None:
        x += delta.to(x.dtype)
    return F.layer_norm(x, x.shape[-1:], weight.to(x.dtype), bias.to(x.dtype), eps).to(weight.dtype)


def residual_linear(
    x: Tensor, rows: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """x += rows W^T + bias in place; x * scale [R, N]; mean and squares of every 32 columns [R, N / 32, 2]."""
    product = rows.to(x.dtype) @ weight.to(x.dtype).T
    x += product if bias is None else product + bias.to(x.dtype)
    return (x * scale.to(x.dtype)).to(weight.dtype), _column_statistics(x)


def normed_linear(
    scaled: Tensor,
    statistics: Tensor,
    weight: Tensor,
    slope: Tensor,
    shift: Tensor,
    eps: float = 1e-6,
    gelu: bool = False,
) -> Tensor:
    """(scaled W^T - mean * slope) / deviation + shift [R, N], or GELU of it."""
    dtype = statistics.dtype
    means, squares = statistics.unbind(2)
    mean = means.mean(1, keepdim=True)
    variance = (squares + 32 * (means - mean) ** 2).sum(1, keepdim=True) / scaled.shape[1]
    product = scaled.to(dtype) @ weight.to(dtype).T
    y = (product - mean * slope) * (variance + eps).rsqrt() + shift
    return (F.gelu(y) if gelu else y).to(weight.dtype)


def fold_layer_norm(weight: Tensor, gamma: Tensor, beta: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """W gamma and W beta + bias [N]; fp32 for 16-bit weights."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    slope, shift = weight.to(dtype) @ gamma.to(dtype), weight.to(dtype) @ beta.to(dtype)
    return slope, shift if bias is None else shift + bias.to(dtype)


def training_attention(
    qkv: Tensor, group_sizes: Tensor, mutual_visibility: bool = True, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Attends step by step: context rows see all context so far; query rows see that and each other, or themselves."""
    q, k, v = qkv.to(torch.promote_types(qkv.dtype, torch.float32)).permute(2, 0, 3, 1, 4)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    sizes = group_sizes.tolist()
    context, query = 0, 1 + sum(sizes[:-1])
    context_rows, query_rows = [], []
    for num_context, num_query in zip([1, *sizes[:-1]], sizes, strict=True):
        new = slice(context, context := context + num_context)
        own = slice(query, query := query + num_query)
        seen_k, seen_v = k[:, :, :context], v[:, :, :context]
        scores = scale * q[:, :, own] @ k[:, :, own].transpose(2, 3)
        if not mutual_visibility:
            others = ~torch.eye(num_query, dtype=torch.bool, device=qkv.device)
            scores = scores.masked_fill(others, float("-inf"))
        context_rows.append((scale * q[:, :, new] @ seen_k.transpose(2, 3), seen_v))
        scores = torch.cat([scale * q[:, :, own] @ seen_k.transpose(2, 3), scores], 3)
        query_rows.append((scores, torch.cat([seen_v, v[:, :, own]], 2)))
    parts = context_rows + query_rows
    output = torch.cat([scores.softmax(3) @ values for scores, values in parts], 2)
    logsumexp = torch.cat([scores.logsumexp(3) for scores, _ in parts], 2)
    return output.transpose(1, 2).flatten(2).to(qkv.dtype), logsumexp


def training_attention_backward(
    grad_output: Tensor,
    qkv: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    group_sizes: Tensor,
    mutual_visibility: bool,
    scale: float,
) -> Tensor:
    """Returns the gradient by autograd."""
    with torch.enable_grad():
        leaf = qkv.detach().requires_grad_()
        output, _ = training_attention(leaf, group_sizes, mutual_visibility, scale)
    return torch.autograd.grad(output, leaf, grad_output)[0].contiguous()


def quantize_rows(x: Tensor, levels: int = 255, rotate: bool = False, planes: int = 1) -> tuple[Tensor, Tensor]:
    """Bytes [R, K], and scale and zero point [R, 2] of each row, rotated or not, from a range that covers it and 0.

    With two planes [2R, K] and [2R, 2]: rows R.. hold what the first leave, half a step of theirs at most either way.
    """
    x = rotate_rows(x) if rotate else x.to(torch.promote_types(x.dtype, torch.float32))
    low, high = x.amin(1, keepdim=True).clamp(max=0), x.amax(1, keepdim=True).clamp(min=0)
    spoiled = (0 * x).sum(1, keepdim=True)  # NaN where a row has an infinity or a NaN
    step, zero = (high - low) / levels, -low
    quantized, quantization = [], []
    for _ in range(planes):
        scale = torch.where(step < torch.finfo(torch.float32).tiny, 1.0, step)
        zero_point = (zero / scale).round()
        bytes_ = (x / scale + zero_point).round().clamp(0, levels)
        quantized.append(bytes_.to(torch.uint8))
        quantization.append(torch.cat([scale + spoiled, zero_point], dim=1))
        x = x - scale * (bytes_ - zero_point)
        step, zero = scale / levels, scale / 2
    return torch.cat(quantized), torch.cat(quantization)


def packed_linear(x: Tensor, weight: Tensor, bias: Tensor | None, out_features: int, gelu: bool, out: Tensor) -> None:
    """F.linear with weights in their plain order, then GELU in its exact form; rounded to the dtype of out at the end.

    out [R, N] is written.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    plain = unpack_weight(weight, out_features, x.shape[1])
    y = F.linear(x.to(dtype), plain.to(dtype), None if bias is None else bias.to(dtype))
    out.copy_(F.gelu(y) if gelu else y)


def packed_linear_int8(
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
    """The sum over planes of row_scale * (scale * product of bytes - zero_point * column_sum), then bias and GELU.

    out [R, N] is written.
    """
    plain = unpack_weight(weight, len(scale), quantized.shape[1])
    product = (quantized.double() @ plain.double().t()).to(scale.dtype) * scale  # double: exact sums of whole numbers
    row_scale, zero_point = quantization.unsqueeze(-1).unbind(1)
    y = (row_scale * (product - zero_point * column_sum)).unflatten(0, (planes, -1)).sum(0)
    y = y if bias is None else y + bias
    out.copy_(F.gelu(y) if gelu else y)


def append_kv(qkv: Tensor, k_cache: Tensor, v_cache: Tensor, segments: Tensor, max_rows: int) -> None:
    """Copy each segment's context K and V into its cache slot at [cache_length, cache_length + num_context)."""
    for context_start, num_context, _, _, cached, slot in segments.tolist():
        _, k, v = qkv[context_start : context_start + num_context].permute(1, 2, 0, 3)  # [H, a, D] each
        k_cache[slot, :, cached : cached + num_context] = k
        v_cache[slot, :, cached : cached + num_context] = v


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
    """Append, then per segment one attention for its context rows and one for its query rows; [R - first, H*D]."""
    append_kv(qkv, k_cache, v_cache, segments, max_rows)
    output = torch.zeros_like(qkv[:, 0])  # [R, H, D]
    for context_start, num_context, query_start, num_query, cached, slot in segments.tolist():
        context = slice(context_start, context_start + num_context)
        query = slice(query_start, query_start + num_query)
        k, v = (cache[slot, :, : cached + num_context] for cache in (k_cache, v_cache))
        _, k_query, v_query = qkv[query].permute(1, 2, 0, 3)
        for rows, keys, values in (
            (context, k, v),
            (query, torch.cat([k, k_query], dim=1), torch.cat([v, v_query], dim=1)),
        ):
            attended = F.scaled_dot_product_attention(qkv[rows, 0].transpose(0, 1), keys, values, scale=scale)
            output[rows] = attended.transpose(0, 1)
    return output[first_output_row:].flatten(1)


def group_norm_scale_shift(x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float = 1e-6) -> Tensor:
    """Scale and shift [B, 2, C] with GroupNorm(x) = x * scale + shift, for x [B, H, W, C]."""
    groups = x.flatten(1, 2).unflatten(-1, (num_groups, -1))  # [B, H * W, groups, C / groups]
    variance, mean = torch.var_mean(groups, dim=(1, 3), correction=0)
    scale = weight.view(num_groups, -1) * torch.rsqrt(variance + eps)[..., None]
    shift = bias.view(num_groups, -1) - mean[..., None] * scale
    return torch.stack([scale.flatten(1), shift.flatten(1)], 1)


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
    """out [B, H, W, K] = conv(f(x)) + bias, added to out if accumulate; f: silu(x * scale + shift), nearest x2.

    bfloat16 only permits rounding, so it changes nothing here.
    """
    if scale_shift is not None:
        scale, shift = scale_shift[:, :, None, None].unbind(1)
        x = F.silu(x * scale + shift)
    planes = x.permute(0, 3, 1, 2)
    if upsample:
        planes = F.interpolate(planes, scale_factor=2.0, mode="nearest")
    result = F.conv2d(planes, weight.permute(3, 2, 0, 1), bias, padding=1).permute(0, 2, 3, 1)
    out.copy_(out + result if accumulate else result)


def preview_images(
    tokens: Tensor,
    codebook: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    head: Tensor,
    head_bias: Tensor,
) -> Tensor:
    """The images [B, h s, w s, 3] in about [-1, 1] that `preview_pixels` rounds; 0 where nothing is drawn."""
    drawn = (tokens >= 0)[..., None].to(codebook.dtype)
    vectors = F.normalize(F.embedding(tokens.clamp(min=0), codebook), dim=-1)
    x = torch.cat([vectors * drawn, drawn], 3)
    for weight, bias in ((weight1, bias1), (weight2, bias2)):
        x = F.conv2d(x.permute(0, 3, 1, 2), weight.permute(3, 2, 0, 1), bias, padding=1).relu().permute(0, 2, 3, 1)
    cells: Tensor = (torch.tensordot(x, head, 1) + head_bias) * drawn[..., None, None]  # [B, h, w, s, s, 3]
    return cells.transpose(2, 3).flatten(3, 4).flatten(1, 2)


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
    """Previews uint8 [B, h s, w s, 3] of tokens [B, h, w] by the network of `preview_images`."""
    images = preview_images(tokens, codebook, weight1, bias1, weight2, bias2, head, head_bias)
    return ((images + 1) * 127.5).clamp(0, 255).nan_to_num(0.0).round().to(torch.uint8)


def philox4x32_10(counter: Tensor, key: Tensor) -> Tensor:
    """Ten rounds of Philox4x32 (Salmon et al., SC 2011): counter [..., 4], key [..., 2] -> [..., 4], words in int64."""
    low = 0xFFFFFFFF
    c0, c1, c2, c3 = counter.unbind(-1)
    k0, k1 = key.unbind(-1)
    for _ in range(10):
        product0, product1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2  # int64 wraps, but keeps all 64 bits
        c0, c1, c2, c3 = (
            (product1 >> 32 & low) ^ c1 ^ k0,
            product1 & low,
            (product0 >> 32 & low) ^ c3 ^ k1,
            product0 & low,
        )
        k0, k1 = k0 + 0x9E3779B9 & low, k1 + 0xBB67AE85 & low
    return torch.stack([c0, c1, c2, c3], -1)


def philox_words(seed: Tensor, cell: Tensor, draw: int, domain: int) -> Tensor:
    """The four random words [..., 4] of (seed, cell, draw); domain 0: tokens, 1: orders."""
    seed, cell = torch.broadcast_tensors(seed, cell)
    low = 0xFFFFFFFF
    counter = torch.stack(
        [cell & low, torch.full_like(seed, draw), torch.zeros_like(seed), torch.full_like(seed, domain)], -1
    )
    return philox4x32_10(counter, torch.stack([seed & low, seed >> 32 & low], -1))


def uniform(seed: Tensor, cell: Tensor, draw: int = 0, domain: int = 0, word: int = 0) -> Tensor:
    """Float32 uniforms in [0, 1) of 24 bits, a pure function of int64 seed, cell, draw, domain and word."""
    return (philox_words(seed, cell, draw, domain)[..., word] >> 8).to(torch.float32) * 2.0**-24


def token_probabilities(
    logits: Tensor,
    conditional_row: Tensor,
    unconditional_row: Tensor,
    guidance: Tensor,
    temperature: Tensor,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
) -> Tensor:
    """Returns the distributions that sample_tokens draws from, float64 [M, V]; logits are mixed in fp32 or float64.

    A mixed logit is -inf where the conditional one is; logits of +inf share all the probability. Raises RuntimeError if
    a mixed row has a NaN or is -inf throughout.
    """
    inf = math.inf
    given = logits.to(torch.promote_types(logits.dtype, torch.float32))
    conditional, unconditional = given[conditional_row.long()], given[unconditional_row.long()]
    mixed = unconditional + guidance[:, None].to(given.dtype) * (conditional - unconditional)
    mixed = torch.where((unconditional_row[:, None] < 0) | (conditional == -inf), conditional, mixed).double()
    top = mixed.amax(-1, keepdim=True)
    if bool((top.isnan() | (top == -inf)).any()):
        raise RuntimeError("logits contain NaN or are -inf throughout: nothing can be drawn")
    mixed = torch.where(top == inf, torch.where(mixed == inf, 0.0, -inf), mixed)

    greedy = (temperature == 0)[:, None]
    tempered = mixed / temperature.double().masked_fill(temperature == 0, 1.0)[:, None]
    vocab_size = tempered.shape[1]
    if top_k is not None:
        rank = torch.where((top_k < 1) | (top_k > vocab_size), vocab_size, top_k.long())[:, None] - 1
        kth_largest = tempered.sort(-1, descending=True).values.gather(-1, rank)
        tempered = tempered.masked_fill(tempered < kth_largest, -inf)
    if top_p is not None:
        descending = tempered.sort(-1, descending=True).values
        before = descending.softmax(-1).cumsum(-1).roll(1, -1)
        before[:, 0] = 0.0
        # A token is kept while those before it have not exceeded p; the last one kept is the threshold.
        kept = (before <= top_p.double()[:, None]) | (top_p == 1)[:, None]
        last_kept = descending.gather(-1, kept.sum(-1, keepdim=True) - 1)
        tempered = tempered.masked_fill(tempered < last_kept, -inf)
    one_hot = F.one_hot(mixed.argmax(-1), vocab_size)
    return torch.where(greedy, one_hot.double(), tempered.softmax(-1))


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
    """Draws one token per entry of conditional_row; int64 [M]."""
    probabilities = token_probabilities(logits, conditional_row, unconditional_row, guidance, temperature, top_k, top_p)
    return descend(probabilities, seed, cell)


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
    """Draws a step's tokens by the tables of a decode, and writes them to these."""
    cell = positions.flatten()[write_index] - 1
    top_k, top_p = (None if setting is None else setting[image] for setting in (top_k, top_p))
    settings = (guidance[image, token_index], temperature[image], top_k, top_p, seeds[image])
    tokens = sample_tokens(logits, conditional_row, unconditional_row, *settings, cell)
    contents.view(-1)[write_index] = tokens
    has_twin = twin_index >= 0
    contents.view(-1)[twin_index[has_twin]] = tokens[has_twin]
    grid[image, cell] = tokens


def descend(probabilities: Tensor, seed: Tensor, cell: Tensor) -> Tensor:
    """Draws from float64 [M, V] by descending a binary tree over the ids, one uniform per level; int64 [M].

    Rounding of the logits then moves one boundary per level, where an inverse CDF would move V of them.
    """
    vocab_size = probabilities.shape[-1]
    levels = (vocab_size - 1).bit_length()
    remaining = F.pad(probabilities, (0, 2**levels - vocab_size))
    token = torch.zeros_like(seed)
    for level in range(levels):
        left, right = remaining.chunk(2, dim=-1)
        left_weight, right_weight = left.sum(-1), right.sum(-1)
        number = uniform(seed, cell, draw=level // 4, word=level % 4).double()
        go_right = number * (left_weight + right_weight) >= left_weight
        remaining = torch.where(go_right[:, None], right, left)
        token = 2 * token + go_right
    return token


def locality_order(
    group_sizes: Tensor,
    height: int,
    width: int,
    proximity_threshold: float,
    repulsion_threshold: int,
    seeds: Tensor,
    known: Tensor | None = None,
) -> Tensor:
    """Locality-aware order (paper, section 3.3): free cells in decoding order, then -1; int64 [B, N].

    group_sizes int32 [T] or [B, T]; seeds int64 [B]; known bool [B, N]. Equal to the kernels bit for
    bit, because only exact comparisons decide.
    """
    order = torch.full((len(seeds), height * width), -1, device=seeds.device)
    thresholds = proximity_threshold, repulsion_threshold
    for image, seed in enumerate(seeds.tolist()):
        sizes = (group_sizes if group_sizes.dim() == 1 else group_sizes[image]).tolist()
        drawn = torch.zeros(height * width, dtype=torch.bool) if known is None else known[image].clone()
        cells: list[int] = []
        for step, size in enumerate(sizes):
            group = _locality_group(size, step, seed, drawn, height, width, *thresholds)
            drawn[group] = True
            cells += group
        order[image, : len(cells)] = torch.tensor(cells, dtype=torch.int64)
    return order


def _locality_group(
    size: int,
    step: int,
    seed: int,
    drawn: Tensor,
    height: int,
    width: int,
    proximity_threshold: float,
    repulsion_threshold: int,
) -> list[int]:
    """Returns the cells of one group in the order taken, given the cells drawn before, bool [N]."""
    cells = range(height * width)
    words = philox_words(torch.tensor(seed), torch.arange(height * width), step, domain=1)
    ties, starts = words[:, 0].tolist(), words[:, 1].tolist()
    grid = F.pad(drawn.view(height, width).double(), (1, 1, 1, 1))
    edges = grid[:-2, 1:-1] + grid[2:, 1:-1] + grid[1:-1, :-2] + grid[1:-1, 2:]
    corners = grid[:-2, :-2] + grid[:-2, 2:] + grid[2:, :-2] + grid[2:, 2:]
    proximity = (edges + corners / math.sqrt(2)).flatten().tolist()

    def squared_distance(a: int, b: int) -> int:
        return (a // width - b // width) ** 2 + (a % width - b % width) ** 2

    def chebyshev_distance(a: int, b: int) -> int:
        return max(abs(a // width - b // width), abs(a % width - b % width))

    free = sorted((c for c in cells if not drawn[c]), key=lambda c: (-proximity[c], ties[c], c))
    taken: list[int] = []
    if size == 0:
        return taken
    if not drawn.any():  # the first group of an image spreads from a uniformly random cell
        taken = [min(free, key=lambda c: (starts[c], c))]
        candidates = [c for c in free if c not in taken]
    else:
        refused: list[int] = []
        for c in free:
            if proximity[c] >= proximity_threshold and len(taken) < size:
                close = any(chebyshev_distance(c, other) <= repulsion_threshold for other in taken)
                (refused if close else taken).append(c)
        candidates = [c for c in free if proximity[c] < proximity_threshold] + refused
    if len(candidates) <= size - len(taken):
        return taken + candidates
    if not taken:
        taken = [min(candidates, key=lambda c: (starts[c], c))]
    while len(taken) < size:  # farthest-point sampling; max() returns the first in the list on ties
        taken.append(max(candidates, key=lambda c: min(squared_distance(c, other) for other in taken)))
    return taken
