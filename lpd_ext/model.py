"""The LPD transformer: one set of weights, a teacher-forced forward for training and a cached step for decoding.

Every row is `LN_z(content + pos_embed[position])`. All contents live in one table, so one gather serves every row:
content = [token_emb (V rows); class_emb (C rows); fake_latent; mask_token]. `state_dict` and `load_state_dict` use the
published layout, in which the four are separate tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lpd_ext import ops
from lpd_ext.checks import as_grid, as_positive_int
from lpd_ext.few_rows import (
    FewRowBlock,
    FewRows,
    LayerPair,
    NormedLayer,
    ResidualLayer,
    are_plain,
    chosen_products,
    chosen_rows,
    may_be_own,
)
from lpd_ext.linear import DecodingLinear, ResultRows, linear_step, mlp_step
from lpd_ext.plan import Step
from lpd_ext.products import step_products
from lpd_ext.schedule import check_group_sizes
from lpd_ext.training_attention import Visibility, attend

LAYER_NORM_EPS = 1e-6
_MAX_HEAD_DIM = 256  # of group_attention
_MAX_DEPTH = 1024  # building a block takes milliseconds, and a damaged file may ask for any number
_PRESETS = {"lpd_l": (1024, 24, 16), "lpd_xl": (1280, 36, 20), "lpd_xxl": (1536, 48, 24)}


@dataclass(frozen=True)
class LPDConfig:
    """Sizes of an LPD transformer: width E, depth L, heads H, vocabulary V, classes C, token grid (h, w).

    mutual_visibility: the query rows of a group see each other, as published; if False, only themselves.
    """

    dim: int
    depth: int
    heads: int
    vocab_size: int
    num_classes: int
    grid: tuple[int, int]
    mlp_ratio: int = 4
    mutual_visibility: bool = True

    def __post_init__(self) -> None:
        for name in ("dim", "depth", "heads", "vocab_size", "num_classes", "mlp_ratio"):
            object.__setattr__(self, name, as_positive_int(getattr(self, name), name))
        if self.depth > _MAX_DEPTH:
            raise ValueError(f"depth must be at most {_MAX_DEPTH}, got {self.depth}")
        if not isinstance(self.mutual_visibility, bool):
            raise ValueError(f"mutual_visibility must be True or False, got {self.mutual_visibility!r}")
        object.__setattr__(self, "grid", as_grid(self.grid))
        if self.dim % self.heads or self.head_dim % 8 or self.head_dim > _MAX_HEAD_DIM:
            raise ValueError(
                f"dim / heads must be a multiple of 8 and at most {_MAX_HEAD_DIM}, got dim {self.dim} and heads "
                f"{self.heads}"
            )

    @classmethod
    def preset(cls, name: str, grid: tuple[int, int] = (16, 16)) -> LPDConfig:
        """Returns the published sizes 'lpd_l', 'lpd_xl' or 'lpd_xxl' (V = 16384, C = 1000)."""
        if name not in _PRESETS:
            raise ValueError(f"preset must be one of {sorted(_PRESETS)}, got {name!r}")
        dim, depth, heads = _PRESETS[name]
        return cls(dim, depth, heads, vocab_size=16384, num_classes=1000, grid=grid)

    @property
    def num_tokens(self) -> int:
        """N = h * w."""
        return self.grid[0] * self.grid[1]

    @property
    def head_dim(self) -> int:
        """D = E / H."""
        return self.dim // self.heads

    @property
    def unconditional_id(self) -> int:
        """Content id of `fake_latent`, the condition of an unconditional image."""
        return self.vocab_size + self.num_classes

    @property
    def mask_id(self) -> int:
        """Content id of `mask_token`, the content of every position query token."""
        return self.vocab_size + self.num_classes + 1


class Attention(nn.Module):
    """Weights of multi-head attention: qkv [3, H, D] per row, and the output projection."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)


class Mlp(nn.Module):
    """Weights of the two-layer MLP with exact GELU."""

    def __init__(self, dim: int, ratio: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, ratio * dim)
        self.fc2 = nn.Linear(ratio * dim, dim)


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: LPDConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.norm1 = nn.LayerNorm(config.dim, eps=LAYER_NORM_EPS)
        self.attn = Attention(config.dim)
        self.norm2 = nn.LayerNorm(config.dim, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(config.dim, config.mlp_ratio)

    def forward(self, x: Tensor, visibility: Visibility, dropout: float = 0.0) -> Tensor:
        """Training pass over whole sequences x [B, rows, E], with dropout in training mode."""
        qkv = self.attn.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))
        attended = attend(qkv, visibility)
        x = x + F.dropout(self.attn.proj(attended), dropout, self.training)
        hidden = F.dropout(F.gelu(self.mlp.fc1(self.norm2(x))), dropout, self.training)
        return x + F.dropout(self.mlp.fc2(hidden), dropout, self.training)


@dataclass(frozen=True)
class DecodingLayer:
    """A block as the decoding steps use it, with its share of the caches."""

    norm1: nn.LayerNorm
    qkv: Callable[[Tensor], Tensor]  # [R, E] -> [R, 3E]
    proj: Callable[[Tensor], Tensor]  # [R, E] -> [R, E]
    norm2: nn.LayerNorm
    mlp: Callable[[Tensor], Tensor]  # [R, E] -> [R, E]
    k_cache: Tensor  # [S, H, P, D]
    v_cache: Tensor


@dataclass(frozen=True)
class DecodingParts:
    """The functions of a model that the decoding steps call, prepared for one decode."""

    layers: Sequence[DecodingLayer]
    head: Callable[[Tensor], Tensor]  # [R, E] -> [R, V]
    few_rows: FewRows | None = None  # in place of all other layers


class LPDModel(nn.Module):
    """Decoder-only transformer over 1 + N positions (condition, then grid cells in raster order)."""

    def __init__(self, config: LPDConfig) -> None:
        super().__init__()
        self.config = config
        num_contents = config.vocab_size + config.num_classes + 2
        self.content = nn.Parameter(torch.empty(num_contents, config.dim))
        self.pos_embed = nn.Parameter(torch.empty(1 + config.num_tokens, config.dim))
        self.z_proj_ln = nn.LayerNorm(config.dim, eps=LAYER_NORM_EPS)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.dim, eps=LAYER_NORM_EPS)
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.register_state_dict_post_hook(_to_published_layout)
        self.register_load_state_dict_pre_hook(_from_published_layout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises weights from Normal(0, 0.02) and biases to zero, as the published training does."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.content, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LPDModel:
        # A packed layer that cannot follow raises before anything has moved.
        for module in self.modules():
            if isinstance(module, DecodingLinear):
                module.check_move(fn)
        super()._apply(fn, recurse)
        return self

    def condition_ids(self, labels: Tensor) -> Tensor:
        """Returns the content ids of labels int64 [B] in [0, C), or -1 for an unconditional image."""
        config = self.config
        return torch.where(labels < 0, config.unconditional_id, config.vocab_size + labels)

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor,
        orders: Tensor,
        group_sizes: Sequence[int],
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        mutual_visibility: bool | None = None,
    ) -> Tensor:
        """Returns teacher-forced logits [B, N, V] in decoding order, every group in one pass (paper, section 3.2).

        tokens int64 [B, N] in raster order; labels int64 [B], -1 for unconditional; orders int64 [B, N]; group_sizes
        sum to N. In training mode dropout applies after proj, GELU and fc2, attention_dropout to the attention
        probabilities. mutual_visibility overrides the config's. Raises ValueError for a wrong shape or value.
        """
        for name, share in (("dropout", dropout), ("attention_dropout", attention_dropout)):
            if not 0 <= share < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {share!r}")
        if mutual_visibility is None:
            mutual_visibility = self.config.mutual_visibility
        group_sizes = self._check_training_batch(tokens, labels, orders, group_sizes)
        batch, num_tokens = tokens.shape
        num_context = num_tokens - group_sizes[-1]
        in_order = tokens.gather(1, orders[:, :num_context])
        mask_ids = tokens.new_full((batch, num_tokens), self.config.mask_id)
        contents = torch.cat([self.condition_ids(labels)[:, None], in_order, mask_ids], dim=1)
        condition_position = orders.new_zeros(batch, 1)
        positions = torch.cat([condition_position, orders[:, :num_context] + 1, orders + 1], dim=1)
        x = self.z_proj_ln(F.embedding(contents, self.content) + F.embedding(positions, self.pos_embed))
        attention_dropout = attention_dropout if self.training else 0.0
        visibility = Visibility.of(group_sizes, mutual_visibility, x, attention_dropout)
        for block in self.blocks:
            x = block(x, visibility, dropout)
        logits: Tensor = self.head(self.norm(x[:, 1 + num_context :]))
        return logits

    def _check_training_batch(
        self, tokens: Tensor, labels: Tensor, orders: Tensor, group_sizes: Sequence[int]
    ) -> list[int]:
        # All contents are rows of one table: an id out of range would quietly read another kind of content.
        config, batch, num_tokens = self.config, len(labels), self.config.num_tokens
        for name, values, shape, low, high in (
            ("tokens", tokens, (batch, num_tokens), 0, config.vocab_size),
            ("labels", labels, (batch,), -1, config.num_classes),
            ("orders", orders, (batch, num_tokens), 0, num_tokens),
        ):
            if tuple(values.shape) != shape:
                raise ValueError(f"{name} must have shape {list(shape)}, got {list(values.shape)}")
            smallest, largest = values.aminmax() if values.numel() else (low, low)
            if smallest < low or largest >= high:
                raise ValueError(f"{name} must lie in [{low}, {high}), got {int(smallest)} to {int(largest)}")
        return check_group_sizes(group_sizes, num_tokens)

    def decoding_parts(self, k_cache: Tensor, v_cache: Tensor, most_rows: int) -> DecodingParts:
        """Prepares the functions for the decoding steps, each block with its share of k_cache, v_cache [L, S, H, P, D].

        most_rows: the most rows that a step is expected to have; packed layers share memory for that many results.
        Raises ValueError for a model without mutual visibility, which group_attention cannot compute.
        """
        if not self.config.mutual_visibility:
            raise ValueError(
                "mutual_visibility must be True to decode, got a model trained with False: its queries must not see "
                "each other, and here they would"
            )
        # Every layer writes to the same four places. proj and fc2 share one: the residual stream has taken proj's rows
        # before fc2 writes its own, and the other way round.
        qkv_rows, delta_rows, hidden_rows, logit_rows = (ResultRows(most_rows) for _ in range(4))
        layers = []
        for block, k, v in zip(self.blocks, k_cache.unbind(), v_cache.unbind(), strict=True):
            assert isinstance(block, Block)
            qkv, proj = linear_step(block.attn.qkv, qkv_rows), linear_step(block.attn.proj, delta_rows)
            mlp = mlp_step(block.mlp.fc1, block.mlp.fc2, hidden_rows, delta_rows)
            layers.append(DecodingLayer(block.norm1, qkv, proj, block.norm2, mlp, k, v))
        return DecodingParts(layers, linear_step(self.head, logit_rows), self._few_rows())

    def _few_rows(self) -> FewRows | None:
        """Layers of our own products, if those are asked for, or faster, and can be had.

        What that costs a decode grows from check to check: layers are built last.
        """
        if chosen_products() == "cublaslt":
            return None
        config, device = self.config, self.pos_embed.device
        sizes = (config.dim, config.mlp_ratio * config.dim, config.vocab_size)
        products = step_products(*sizes, self.pos_embed.dtype)
        if not may_be_own(products, device):
            return None
        blocks = [block for block in self.blocks if isinstance(block, Block)]
        norms = [norm for block in blocks for norm in (block.norm1, block.norm2)] + [self.norm]
        linears = [m for b in blocks for m in (b.attn.qkv, b.attn.proj, b.mlp.fc1, b.mlp.fc2)] + [self.head]
        if not are_plain(linears, norms, products):
            return None
        own = chosen_rows(products, device)
        if not any(own.values()):
            return None
        following = [(block.norm1, block.attn.qkv, own["qkv"]) for block in blocks[1:]]
        following.append((self.norm, self.head, own["head"]))
        few_rows = [
            FewRowBlock(
                LayerPair(ResidualLayer(b.attn.proj, b.norm2), NormedLayer(b.norm2, b.mlp.fc1, gelu=True), own["fc1"]),
                LayerPair(ResidualLayer(b.mlp.fc2, norm), NormedLayer(norm, linear), rows),
            )
            for b, (norm, linear, rows) in zip(blocks, following, strict=True)
        ]
        return FewRows(NormedLayer(blocks[0].norm1, blocks[0].attn.qkv), few_rows, own, device)

    def decode_step(
        self,
        contents: Tensor,
        positions: Tensor,
        parts: DecodingParts,
        step: Step,
        workspace: Tensor | None = None,
    ) -> Tensor | None:
        """Runs one decoding step over ragged rows; returns logits [num query rows, V], None without query rows.

        contents, positions int64 [S, N + 2], the tables of plan.py, whose entries step.content_index and
        step.position_index are the rows. K and V of the context rows, which come first, enter the KV caches in `parts`.
        In the last block they go no further than that. The next step overwrites the logits. workspace: see
        ops.group_attention.
        """
        heads, head_dim = self.config.heads, self.config.head_dim
        scale = head_dim**-0.5
        ln = self.z_proj_ln
        tables = (contents.view(-1), positions.view(-1), self.content, self.pos_embed, ln.weight, ln.bias)
        index = (ln.eps, step.content_index, step.position_index)
        delta: Tensor | None = None
        few_rows = parts.few_rows
        following: Tensor | None = None  # by a layer of few rows: qkv of the block, or the logits
        if few_rows is not None and few_rows.takes_first(len(step.content_index)):
            x, scaled, statistics = ops.embed_scaled_rows(*tables, few_rows.first.scale, *index)
            following = few_rows.first(scaled, statistics)
        else:
            x = ops.embed_rows(*tables, *index)
        for i, layer in enumerate(parts.layers):
            qkv = layer.qkv(_add_norm(x, delta, layer.norm1)) if following is None else following
            qkv = qkv.view(-1, 3, heads, head_dim)
            first_row = 0
            if i == len(parts.layers) - 1:
                if step.num_query_rows == 0:
                    ops.append_kv(qkv, layer.k_cache, layer.v_cache, step.segments, step.max_rows)
                    return None
                first_row = step.num_context_rows
                x = x[first_row:]
            sizes = (step.max_rows, step.max_keys, first_row)
            caches = (layer.k_cache, layer.v_cache)
            attended = ops.group_attention(qkv, *caches, step.segments, *sizes, scale, workspace, settled=True)
            if few_rows is None:
                delta = layer.proj(attended)
                delta = layer.mlp(_add_norm(x, delta, layer.norm2))
            else:
                block = few_rows.blocks[i]
                following = block.fc2_next(x, block.proj_fc1(x, attended))
        return parts.head(_add_norm(x, delta, self.norm)) if following is None else following


def _add_norm(x: Tensor, delta: Tensor | None, norm: nn.LayerNorm) -> Tensor:
    return ops.residual_layer_norm(x, delta, norm.weight, norm.bias, norm.eps)


def _content_parts(config: LPDConfig) -> list[tuple[str, tuple[int, ...]]]:
    width = config.dim
    return [
        ("token_emb.weight", (config.vocab_size, width)),
        ("class_emb.weight", (config.num_classes, width)),
        ("fake_latent", (1, width)),
        ("mask_token", (1, 1, width)),
    ]


def _to_published_layout(module: nn.Module, state: dict[str, Any], prefix: str, local_metadata: object) -> None:
    assert isinstance(module, LPDModel)
    parts = _content_parts(module.config)
    rows = state.pop(prefix + "content").split([torch.Size(shape[:-1]).numel() for _, shape in parts])
    for (name, shape), part in zip(parts, rows, strict=True):
        state[prefix + name] = part.view(shape)
    state[prefix + "pos_embed"] = state[prefix + "pos_embed"][None]


def _from_published_layout(
    module: nn.Module,
    state: dict[str, Any],
    prefix: str,
    local_metadata: object,
    strict: bool,
    missing: list[str],
    unexpected: object,
    errors: list[str],
) -> None:
    """Loads the table of contents; rows missing from the state stay, and are reported by their published names."""
    assert isinstance(module, LPDModel)
    parts = _content_parts(module.config)
    rows = module.content.detach().split([torch.Size(shape[:-1]).numel() for _, shape in parts])
    tables: list[Tensor] = []
    given = next((state[prefix + name] for name, _ in parts if prefix + name in state), module.content)
    for (name, shape), own in zip(parts, rows, strict=True):
        part = state.pop(prefix + name, None)
        if part is None:
            missing.append(prefix + name)
        elif tuple(part.shape) != shape:
            errors.append(f"{name}: expected shape {list(shape)}, got {list(part.shape)}")
        fits = part is not None and tuple(part.shape) == shape
        tables.append(part.reshape(-1, shape[-1]) if fits else own if own.is_meta else own.to(given))
    # A model without memory has no rows that could stay.
    partly = any(table.is_meta for table in tables)
    state[prefix + "content"] = module.content.detach() if partly else torch.cat(tables)
    if prefix + "pos_embed" in state:
        state[prefix + "pos_embed"] = state[prefix + "pos_embed"].squeeze(0)
