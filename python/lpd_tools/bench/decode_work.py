"""Counts the bytes and operations of a decode from its plan, and the least time a machine needs for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lpd_ext.model import LPDConfig
from lpd_ext.plan import Step, plan_decoding

FLOAT32, INT8, BFLOAT16 = "float32", "int8", "bfloat16"
_BYTES = {FLOAT32: 4, INT8: 1, BFLOAT16: 2}  # of a weight of a linear layer
_PER_BLOCK = 8  # two norms, qkv, attention, proj, fc1, GELU, fc2
_PER_STEP = 4  # embedding, last norm, head, sampling


@dataclass(frozen=True)
class StepWork:
    """The work of one step: linear weights are read once, keys and values once per sequence."""

    weight_bytes: int
    key_value_bytes: int
    linear_flops: int
    attention_flops: int
    launches: int


@dataclass(frozen=True)
class DecodeWork:
    """The work of all steps, and the memory: the model, the KV cache, the activations of the largest step."""

    steps: tuple[StepWork, ...]
    parameters: int
    model_bytes: int
    cache_bytes: int
    activation_bytes: int

    def total(self, name: str) -> int:
        """Sums a field of StepWork over the steps."""
        return sum(getattr(step, name) for step in self.steps)

    @property
    def resident_bytes(self) -> int:
        return self.model_bytes + self.cache_bytes + self.activation_bytes


@dataclass(frozen=True)
class Peaks:
    """The peaks of a machine: bytes and operations per second, and the seconds that each launch adds."""

    name: str
    bytes_per_second: float
    linear_flops: float
    attention_flops: float
    seconds_per_launch: float = 0.0


def linear_parameters(config: LPDConfig) -> int:
    """Counts the weights of the blocks' linear layers and of the head, without biases."""
    return config.depth * (4 + 2 * config.mlp_ratio) * config.dim**2 + config.dim * config.vocab_size


def other_parameters(config: LPDConfig) -> int:
    """Counts biases, LayerNorms, contents and positions, always float32 (bfloat16 in a bfloat16 model)."""
    biases = config.depth * (3 + 1 + config.mlp_ratio + 1) * config.dim
    norms = 2 * config.dim * (2 * config.depth + 2)
    tables = (config.vocab_size + config.num_classes + 2 + 1 + config.num_tokens) * config.dim
    return biases + norms + tables


def count(config: LPDConfig, batch: int, group_sizes: Sequence[int], dtype: str = FLOAT32) -> DecodeWork:
    """Counts the work of drawing `batch` images with guidance; dtype of the linear weights: float32, int8 or bfloat16.

    With int8 weights everything else is float32. A multiplication and an addition are two operations.
    """
    plan = plan_decoding([group_sizes] * batch, [True] * batch, config.num_tokens, torch.device("cpu"))
    element = _BYTES[BFLOAT16 if dtype == BFLOAT16 else FLOAT32]
    scales = 0
    if dtype == INT8:  # scale, sum and zero point of each output channel
        outputs = config.depth * (3 + 1 + config.mlp_ratio + 1) * config.dim + config.vocab_size
        scales = 3 * 4 * outputs
    activations = max(_activations(config, step) for step in plan.steps)
    cache = 2 * config.depth * plan.capacity.sequences * config.dim * plan.capacity.cache_positions
    return DecodeWork(
        steps=tuple(_count_step(config, step, _BYTES[dtype], element) for step in plan.steps),
        parameters=linear_parameters(config) + other_parameters(config),
        model_bytes=linear_parameters(config) * _BYTES[dtype] + other_parameters(config) * element + scales,
        cache_bytes=cache * element,
        activation_bytes=activations * element,
    )


def _count_step(config: LPDConfig, step: Step, weight_bytes: int, element: int) -> StepWork:
    _, context, _, query, cached, _ = step.segments.long().unbind(1)
    seen = cached + context
    by_query = int((query * (seen + query)).sum())
    pairs = config.depth * by_query + (config.depth - 1) * int((context * seen).sum())
    rows, query_rows = step.num_context_rows + step.num_query_rows, step.num_query_rows
    rows_past_attention = (config.depth - 1) * rows + query_rows  # in the last block only query rows go on
    square = config.dim**2
    multiplications = (
        config.depth * rows * 3 * square
        + rows_past_attention * (1 + 2 * config.mlp_ratio) * square
        + query_rows * config.dim * config.vocab_size
    )
    return StepWork(
        weight_bytes=weight_bytes * linear_parameters(config),
        key_value_bytes=element * 2 * config.depth * config.dim * int((seen + query).sum()),
        linear_flops=2 * multiplications,
        attention_flops=4 * config.dim * pairs,
        launches=_PER_BLOCK * config.depth + _PER_STEP,
    )


def _activations(config: LPDConfig, step: Step) -> int:
    """Counts the elements alive at once: residual stream, norm and MLP or attention, or the logits."""
    rows = (step.num_context_rows + step.num_query_rows) * config.dim
    block = rows * (2 + max(4, config.mlp_ratio + 1))  # qkv and attended; or hidden and result
    return max(block, step.num_query_rows * (config.vocab_size + 2 * config.dim))


def least_seconds(work: DecodeWork, peaks: Peaks) -> float:
    """Returns a lower bound: per step, weights stream while they are multiplied; then the same for attention."""
    return sum(
        max(step.weight_bytes / peaks.bytes_per_second, step.linear_flops / peaks.linear_flops)
        + max(step.key_value_bytes / peaks.bytes_per_second, step.attention_flops / peaks.attention_flops)
        + step.launches * peaks.seconds_per_launch
        for step in work.steps
    )


def bound_by_bytes(work: DecodeWork, peaks: Peaks) -> float:
    """Returns the share of the steps whose weights take longer to stream than to multiply."""
    streamed = [
        step.weight_bytes / peaks.bytes_per_second > step.linear_flops / peaks.linear_flops for step in work.steps
    ]
    return sum(streamed) / len(streamed)
