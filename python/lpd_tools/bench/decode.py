"""Whole decodes of a named model and schedule, ours against plain torch, the weights drawn at random.

A time counts only where the work is the same: see `check_equal`.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lpd_ext.compat import SampleTokens, accelerate
from lpd_ext.cuda_graphs import DecodeGraphs
from lpd_ext.decode_state import DecodeState, Layout
from lpd_ext.linear import ResultRows, linear_step, pack
from lpd_ext.model import Block, LPDModel
from lpd_ext.orders import make_orders
from lpd_ext.plan import plan_decoding
from lpd_ext.quantize import quantize
from lpd_ext.request import DecodeRequest, make_request
from lpd_ext.sampler import decode_step, generate
from lpd_tools.bench.cases import Shape
from lpd_tools.bench.plain_decode import attend_in_two_calls, call_block, decode_plain, guidance_of
from lpd_tools.bench.result import Result
from lpd_tools.bench.timing import Times, interleaved

LOGITS_TOLERANCE = 2e-5  # of the largest logit
_TIE = 1e-4  # of the largest logit: where the best two are closer, rounding decides
PUBLISHED, NEXT_TOKEN, TWO_CALLS, COMPILED = "published", "next token", "two calls", "compiled"
BASELINES = (PUBLISHED, TWO_CALLS, COMPILED, NEXT_TOKEN)


@dataclass(frozen=True)
class Decode:
    """B images of a shape, with guidance, and the weights, labels, orders and schedule that all decoders share."""

    shape: Shape
    model: LPDModel
    orders: Tensor  # int64 [B, N]

    @classmethod
    def at_random(
        cls, shape: Shape, batch: int, device: torch.device, dtype: torch.dtype, depth: int | None = None
    ) -> Decode:
        """Makes a decode with random weights; depth: of the model, if not the shape's own."""
        torch.manual_seed(0)
        config = shape.config if depth is None else replace(shape.config, depth=depth)
        with torch.device(device):
            model = LPDModel(config).to(dtype).eval().requires_grad_(False)
        sizes = [shape.group_sizes] * batch
        orders = make_orders(
            "locality", sizes, shape.grid, torch.arange(batch), repulsion_threshold=shape.repulsion_threshold
        )
        return cls(shape, model, orders.to(device))

    @property
    def batch(self) -> int:
        return len(self.orders)

    @property
    def labels(self) -> Tensor:
        return torch.arange(self.batch, device=self.orders.device) % self.model.config.num_classes

    def request(self, sizes: list[int] | None = None, top_k: int = 0) -> DecodeRequest:
        batch = self.batch
        return make_request(
            self.model.config,
            self.labels.tolist(),
            group_sizes=[sizes or self.shape.group_sizes] * batch,
            order=self.orders,
            guidance_scale=self.shape.guidance_scale,
            top_k=top_k,
            seeds=0,
        )

    def plain(self, sizes: list[int] | None = None, **options: Any) -> Tensor:
        sizes = sizes or self.shape.group_sizes
        return decode_plain(self.model, self.labels, sizes, self.orders, self.shape.guidance_scale, **options)


def baselines(decode: Decode) -> dict[str, Callable[[], Tensor]]:
    """Returns the baselines: published style, two SDPA calls per step, published style compiled, one token per step."""
    compiled = torch.compile(call_block, dynamic=True)
    one_by_one = [1] * decode.model.config.num_tokens
    return {
        PUBLISHED: decode.plain,
        TWO_CALLS: partial(decode.plain, attention=attend_in_two_calls),
        COMPILED: partial(decode.plain, block_call=compiled),
        NEXT_TOKEN: partial(decode.plain, one_by_one, attention=attend_in_two_calls),
    }


def ours_on_cpu(decode: Decode) -> dict[str, LPDModel]:
    """Returns our decoders on a CPU: float32 and int8, from the same weights."""
    packed, rounded = (copy.deepcopy(decode.model) for _ in range(2))
    pack(packed)
    quantize(rounded)
    return {"float32": packed, "int8": rounded}


def drop_in(decode: Decode) -> Callable[[], Tensor]:
    """Returns the accelerated `sample_tokens` of a published model object that shares decode.model's weights."""
    published = nn.Module()
    for name, tensor in decode.model.state_dict().items():
        module = published
        *path, leaf = name.split(".")
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        module.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))
    sample_tokens = accelerate(published, heads=decode.model.config.heads).sample_tokens
    assert isinstance(sample_tokens, SampleTokens)
    return partial(
        sample_tokens,
        decode.batch,
        cfg=decode.shape.guidance_scale,
        labels=decode.labels,
        group_sizes=decode.shape.group_sizes,
        orders=decode.orders,
    )


def ours_on_cuda(decode: Decode) -> dict[str, Callable[[], Tensor]]:
    """Returns our decoders on CUDA: as one CUDA graph, and eagerly."""
    graphs, request = DecodeGraphs(), decode.request()
    return {
        "decode": lambda: generate(decode.model, request, graphs),
        "decode, eager": lambda: generate(decode.model, request),
    }


def decode_logits(model: LPDModel, request: DecodeRequest, tokens: Tensor) -> list[Tensor]:
    """Returns the logits [rows, V] of each decoding step, teacher-forced with tokens int64 [B, N] in raster order."""
    layout = Layout.of(request)
    plan = layout.plan(model.config.num_tokens, model.pos_embed.device)
    state = DecodeState(model, plan.capacity, layout.filters)
    with torch.no_grad():
        state.load(request, plan.places, teacher=tokens)
        return [decode_step(state, step).clone() for step in plan.steps]


def check_equal(decode: Decode, model: LPDModel) -> float:
    """Raises RuntimeError unless `model` computes what the published style does; returns the largest difference.

    Teacher-forced logits must agree within 2e-5 of the largest one. With top_k = 1 the tokens must be the same, up to
    the first step where the two best logits are so close that rounding decides.
    """
    expected: list[Tensor] = []
    tokens = decode.plain(top_k=1)
    decode.plain(given=tokens, logits_out=expected)
    found = decode_logits(model, decode.request(), tokens)
    largest = max(float(logits.abs().max()) for logits in expected)
    difference = max(
        float((ours - plain.flatten(0, 1)).abs().max()) for ours, plain in zip(found, expected, strict=True)
    )
    if not difference <= LOGITS_TOLERANCE * largest:
        raise RuntimeError(f"logits differ by {difference:.3g}, of {largest:.3g}: not the same computation")
    drawn = generate(model, decode.request(top_k=1))
    done = 0
    for logits, size in zip(expected, decode.shape.group_sizes, strict=True):
        cells = decode.orders[:, done : done + size]
        same = drawn.gather(1, cells) == tokens.gather(1, cells)
        if not same.all():
            conditional, unconditional = logits.chunk(2)
            num_tokens = decode.model.config.num_tokens
            guidance = guidance_of(done, size, num_tokens, decode.shape.guidance_scale, logits.device)[:, None]
            mixed = unconditional + guidance * (conditional - unconditional)
            first, second = mixed[~same].topk(2).values.unbind(-1)
            if bool((first - second > _TIE * mixed.abs().max()).any()):
                raise RuntimeError(f"tokens differ after {done} tokens although their logits lie apart")
            break
        done += size
    return difference / largest


def distance(decode: Decode, model: LPDModel) -> dict[str, Any]:
    """Measures how far a rounded model is from decode.model, on tokens that the latter drew.

    cosine: of the teacher-forced output rows, one per block; kl: mean divergence of the logits in nats; agreement: of
    their argmax.
    """
    request = decode.request()
    tokens = decode.plain(top_k=1)
    exact, found = (torch.cat(decode_logits(m, request, tokens)) for m in (decode.model, model))
    outputs: list[list[Tensor]] = [[], []]
    for kept, m in zip(outputs, (decode.model, model), strict=True):
        hooks = [
            block.register_forward_hook(lambda _, __, out, kept=kept: kept.append(out.flatten(0, 1)))
            for block in m.blocks
        ]
        with torch.no_grad():
            m(tokens, decode.labels, decode.orders, decode.shape.group_sizes)
        for hook in hooks:
            hook.remove()
    cosines = [float(torch.cosine_similarity(a, b).mean()) for a, b in zip(*outputs, strict=True)]
    log_p, log_q = exact.log_softmax(-1), found.log_softmax(-1)
    return {
        "cosine": cosines,
        "kl": float((log_p.exp() * (log_p - log_q)).sum(-1).mean()),
        "agreement": float((exact.argmax(-1) == found.argmax(-1)).float().mean()),
    }


def products_alone(model: LPDModel, request: DecodeRequest) -> Callable[[], None]:
    """Returns a function that computes a decode's matrix products and nothing else."""
    config = model.config
    plan = plan_decoding(request.group_sizes, [True] * len(request.labels), config.num_tokens, torch.device("cpu"))
    widths = (config.dim, config.mlp_ratio * config.dim)
    inputs = {
        (rows, width): torch.randn(rows, width)
        for step in plan.steps
        for rows in (step.num_context_rows + step.num_query_rows, step.num_query_rows)
        for width in widths
    }
    blocks = [block for block in model.blocks if isinstance(block, Block)]
    qkv_rows, delta_rows, hidden_rows, logit_rows = (ResultRows(plan.capacity.most_rows) for _ in range(4))
    calls = [
        (
            linear_step(block.attn.qkv, qkv_rows),
            linear_step(block.attn.proj, delta_rows),
            linear_step(block.mlp.fc1, hidden_rows),
            linear_step(block.mlp.fc2, delta_rows),
        )
        for block in blocks
    ]
    head = linear_step(model.head, logit_rows)

    def run() -> None:
        with torch.no_grad():
            for step in plan.steps:
                for i, (qkv, proj, fc1, fc2) in enumerate(calls):
                    rows = step.num_context_rows + step.num_query_rows
                    qkv(inputs[rows, widths[0]])
                    if i == len(calls) - 1:
                        rows = step.num_query_rows
                    proj(inputs[rows, widths[0]])
                    fc1(inputs[rows, widths[0]])
                    fc2(inputs[rows, widths[1]])
                head(inputs[step.num_query_rows, widths[0]])

    return run


def time_on_cpu(decode: Decode, repeats: int, chosen: Sequence[str] = BASELINES) -> list[Result]:
    """Times our decoders and the chosen baselines in one interleaved run; next-token decoding is timed once.

    Raises RuntimeError if float32 does not compute what the published style does.
    """
    models = ours_on_cpu(decode)
    plain = {name: run for name, run in baselines(decode).items() if name in chosen}
    difference = check_equal(decode, models["float32"])
    rounded = distance(decode, models["int8"])
    runs: dict[str, Callable[[], Any]] = {
        name: partial(generate, model, decode.request()) for name, model in models.items()
    }
    runs["float32, drop-in"] = drop_in(decode)
    runs["float32, GEMMs alone"] = products_alone(models["float32"], decode.request())
    runs["int8, GEMMs alone"] = products_alone(models["int8"], decode.request())
    runs |= {name: run for name, run in plain.items() if name != NEXT_TOKEN}
    cpu = torch.device("cpu")
    timed = dict(zip(runs, interleaved(list(runs.values()), repeats, cpu, warm_up=1), strict=True))
    if NEXT_TOKEN in plain:
        start = time.perf_counter()
        plain[NEXT_TOKEN]()
        timed[NEXT_TOKEN] = Times([time.perf_counter() - start] * 2)
    notes = {
        "float32": f"logits differ by {difference:.1e} of the largest",
        "int8": f"KL {rounded['kl']:.1e} nats, argmax {rounded['agreement']:.1%}, cosine of the last block "
        f"{rounded['cosine'][-1]:.5f}",
        NEXT_TOKEN: "timed once",
    }
    against = {name: timed[name] for name in plain}
    return [
        Result.against(name, times, against, note=notes.get(name, ""), rounded=rounded if name == "int8" else None)
        for name, times in timed.items()
    ]


def time_on_cuda(decode: Decode, repeats: int, chosen: Sequence[str] = (PUBLISHED,)) -> list[Result]:
    """Times our decoders, as one graph and eagerly, and the published style, the only baseline on CUDA."""
    if PUBLISHED not in chosen:
        raise ValueError(f"baseline must be {PUBLISHED!r} on device cuda, got {list(chosen)}")
    runs = ours_on_cuda(decode) | {PUBLISHED: decode.plain}
    times_of = interleaved(list(runs.values()), repeats, decode.orders.device, in_graph=False, warm_up=1)
    timed = dict(zip(runs, times_of, strict=True))
    return [Result.against(name, times, {PUBLISHED: timed[PUBLISHED]}) for name, times in timed.items()]
