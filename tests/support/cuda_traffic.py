"""Counts, by the emulator, the bytes that the CUDA kernels move at the named shapes, beside the least they could.

`python tests/support/cuda_traffic.py` writes the table that test_cuda_traffic.py compares with and that
docs/design/kernels.md quotes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import emulation
import torch
from lpd_tools.markdown import markdown_table
from torch import Tensor

from lpd_ext import _C
from lpd_ext.plan import Step, plan_decoding
from lpd_ext.schedule import group_sizes

TABLE = Path(__file__).parents[1] / "data" / "cuda_traffic.json"

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
HEADS, HEAD_DIM, WIDTH, VOCAB = 16, 64, 1024, 16384  # of lpd_l
# Named shapes: grid, steps, and the step whose operators are counted; with guidance.
SHAPES = {"L-256-20 step 15": ((16, 16), 20, 15), "L-512-48 step 30": ((32, 32), 48, 30)}


@dataclass(frozen=True)
class Case:
    """A launch to count: the operator's arguments by name, the least bytes it must move, and what is stated apart."""

    operator: str
    arguments: dict[str, Any]
    least: int
    apart: tuple[str, ...] = ()  # arguments whose traffic `least` leaves out
    device: emulation.Device = emulation.SM_80

    def count(self) -> dict[str, int]:
        """Bytes moved (32 per sector touched, every request counted), apart and least, and shared-memory wavefronts."""
        tensors = {name: value for name, value in self.arguments.items() if isinstance(value, Tensor)}
        with emulation.running(device=self.device), emulation.counting(**tensors) as launches:
            getattr(torch.ops.lpd_emulated, self.operator)(**self.arguments)
        (launch,) = launches
        moved = {name: counts["moved"] for name, counts in launch["global"].items()}
        kinds = ("read", "copied", "written", "atomic")
        requests = sum(counts[kind]["requests"] for counts in launch["global"].values() for kind in kinds)
        apart = sum(moved.pop(name) for name in self.apart)
        shared = launch["shared"]["all"]
        caches = [counts for name, counts in launch["global"].items() if name.endswith("_cache")]
        return {
            "blocks": int(torch.tensor(launch["grid"]).prod()),
            "cluster": int(torch.tensor(launch["cluster"]).prod()),
            "copying_blocks": launch["copying_blocks"],
            "threads": launch["block"][0],
            "shared_bytes": launch["shared_bytes"],
            "least": self.least,
            "moved": sum(moved.values()),
            "apart": apart,
            "requests": requests,
            "wavefronts": shared["wavefronts"],
            "conflict_free": shared["conflict_free"],
            "distributed": launch["shared"]["peer_read"]["bytes"] + launch["shared"]["peer_written"]["bytes"],
            "plain_cache_reads": sum(counts["read"]["requests"] for counts in caches),
            "cache_lines_ahead": sum(counts["prefetched"]["bytes"] for counts in caches),  # one stands for a line
        }


def _step(shape: str, batch: int) -> tuple[Step, int, int]:
    (height, width), steps, index = SHAPES[shape]
    sizes = group_sizes(height * width, steps)
    plan = plan_decoding([sizes] * batch, [True] * batch, height * width, torch.device("cpu"))
    return plan.steps[index], plan.capacity.sequences, plan.capacity.cache_positions


def group_attention(shape: str, batch: int, dtype: torch.dtype, device: emulation.Device = emulation.SM_80) -> Case:
    step, sequences, positions = _step(shape, batch)
    rows = step.num_context_rows + step.num_query_rows
    least = 0
    for _, context, _, query, cached, _ in step.segments.tolist():
        # q; cached K and V; K and V of this step; K and V appended; output
        least += (context + query) + 2 * cached + 2 * (context + query) + 2 * context + (context + query)
    caches = [torch.zeros(sequences, HEADS, positions, HEAD_DIM, dtype=dtype) for _ in range(2)]
    arguments = {
        "qkv": torch.zeros(rows, 3, HEADS, HEAD_DIM, dtype=dtype),
        "k_cache": caches[0],
        "v_cache": caches[1],
        "segments": step.segments,
        "max_rows": step.max_rows,
        "max_keys": step.max_keys,
        "first_output_row": 0,
        "scale": 0.125,
        "workspace": torch.zeros(
            _C.group_attention_workspace_bytes(HEAD_DIM, device.multiprocessors), dtype=torch.uint8
        ),
    }
    return Case("group_attention", arguments, least * WIDTH * dtype.itemsize, apart=("workspace",), device=device)


def append_kv(shape: str, batch: int, dtype: torch.dtype) -> Case:
    attention = group_attention(shape, batch, dtype).arguments
    step, *_ = _step(shape, batch)
    names = ("qkv", "k_cache", "v_cache", "segments", "max_rows")
    arguments = {name: attention[name] for name in names}
    least = 4 * step.num_context_rows * WIDTH * dtype.itemsize + step.segments.nbytes
    return Case("append_kv", arguments, least)


def embed_rows(shape: str, batch: int, dtype: torch.dtype) -> Case:
    step, *_ = _step(shape, batch)
    rows = step.num_context_rows + step.num_query_rows
    (height, width), *_ = SHAPES[shape]
    arguments = {
        "content_ids": torch.randint(VOCAB, (rows,)),
        "positions": torch.randint(1 + height * width, (rows,)),
        "content": torch.zeros(VOCAB + 1002, WIDTH, dtype=dtype),
        "position_embedding": torch.zeros(1 + height * width, WIDTH, dtype=dtype),
        "weight": torch.zeros(WIDTH, dtype=dtype),
        "bias": torch.zeros(WIDTH, dtype=dtype),
        "eps": 1e-6,
    }
    return Case("embed_rows", arguments, rows * (16 + WIDTH * (2 * dtype.itemsize + 4)), apart=("weight", "bias"))


def embed_scaled_rows(shape: str, batch: int, dtype: torch.dtype) -> Case:
    case = embed_rows(shape, batch, dtype)
    rows = len(case.arguments["content_ids"])
    results = rows * (WIDTH * dtype.itemsize + WIDTH // 32 * 8)
    arguments = case.arguments | {"scale": torch.zeros(WIDTH, dtype=dtype)}
    return Case("embed_scaled_rows", arguments, case.least + results, apart=("weight", "bias", "scale"))


def residual_layer_norm(shape: str, batch: int, dtype: torch.dtype) -> Case:
    step, *_ = _step(shape, batch)
    rows = step.num_context_rows + step.num_query_rows
    arguments = {
        "x": torch.zeros(rows, WIDTH),
        "delta": torch.zeros(rows, WIDTH, dtype=dtype),
        "weight": torch.zeros(WIDTH, dtype=dtype),
        "bias": torch.zeros(WIDTH, dtype=dtype),
        "eps": 1e-6,
    }
    return Case("residual_layer_norm", arguments, rows * WIDTH * (8 + 2 * dtype.itemsize), apart=("weight", "bias"))


# Products of lpd_l: features, K, which of the two operators.
PRODUCTS = {
    "qkv": (3 * WIDTH, WIDTH, "normed_linear"),
    "proj": (WIDTH, WIDTH, "residual_linear"),
    "fc1": (4 * WIDTH, WIDTH, "normed_linear"),
    "fc2": (WIDTH, 4 * WIDTH, "residual_linear"),
    "head": (VOCAB, WIDTH, "normed_linear"),
}


def few_rows(product: str, rows: int, device: emulation.Device = emulation.SM_90) -> Case:
    """Apart: what blocks read of the rows, each the part of K that it has, and of vectors."""
    features, depth, operator = PRODUCTS[product]
    inputs, weight = torch.zeros(rows, depth, dtype=BF16), torch.zeros(features, depth, dtype=BF16)
    if operator == "normed_linear":
        arguments = {
            "scaled": inputs,
            "statistics": torch.ones(rows, depth // 32, 2),
            "weight": weight,
            "slope": torch.zeros(features),
            "shift": torch.zeros(features),
            "eps": 1e-6,
            "gelu": product == "fc1",
        }
        apart: tuple[str, ...] = ("scaled", "statistics", "slope", "shift")
        return Case(operator, arguments, weight.nbytes + 2 * rows * features, apart, device)
    arguments = {
        "x": torch.zeros(rows, features),
        "rows": inputs,
        "weight": weight,
        "bias": torch.zeros(features, dtype=BF16),
        "scale": torch.zeros(features, dtype=BF16),
    }
    results = rows * (features * (8 + 2) + features // 32 * 8)
    return Case(operator, arguments, weight.nbytes + results, ("rows", "bias", "scale"), device)


def sample_tokens(vocab: int, mode: str, dtype: torch.dtype) -> Case:
    tokens = 3
    torch.manual_seed(0)
    full, ids = torch.ones(tokens), torch.arange(tokens)
    rows = ids.int()
    guided = "guided" in mode
    arguments = {
        "logits": (4 * torch.randn(2 * tokens if guided else tokens, vocab)).to(dtype),
        "conditional_row": rows,
        "unconditional_row": rows + tokens if guided else torch.full_like(rows, -1),
        "guidance": 3 * full,
        "temperature": 0 * full if "greedy" in mode else 0.9 * full,
        "top_k": torch.full_like(rows, 900) if "top-k" in mode else None,
        "top_p": 0.95 * full if "top-p" in mode else None,
        "seed": ids,
        "cell": ids,
    }
    inputs = sum(
        tokens * value.element_size()
        for name, value in arguments.items()
        if isinstance(value, Tensor) and name != "logits"
    )
    logits = arguments["logits"]
    assert isinstance(logits, Tensor)
    return Case("sample_tokens", arguments, logits.numel() * dtype.itemsize + inputs + 8 * tokens)


def locality_order(shape: str, batch: int) -> Case:
    (height, width), steps, _ = SHAPES[shape]
    sizes = torch.tensor(group_sizes(height * width, steps), dtype=torch.int32)
    arguments = {
        "group_sizes": sizes,
        "height": height,
        "width": width,
        "proximity_threshold": 1.0,
        "repulsion_threshold": 2 if height == 16 else 4,
        "seeds": torch.arange(batch),
        "known": None,
    }
    return Case("locality_order", arguments, batch * (sizes.nbytes + 8 + 8 * height * width))


MODES = (
    "plain", "greedy", "top-k", "top-p", "top-k top-p",
    "guided", "guided greedy", "guided top-k", "guided top-p", "guided top-k top-p",
)  # fmt: skip
CASES: dict[str, Callable[[], Case]] = {}
for _shape in SHAPES:
    for _batch in (1, 32):
        if _batch == 1 or _shape == "L-256-20 step 15":
            for _operator in (group_attention, append_kv, embed_rows, residual_layer_norm):
                CASES[f"{_operator.__name__}, {_shape}, B = {_batch}, bf16"] = (
                    lambda operator=_operator, shape=_shape, batch=_batch: operator(shape, batch, BF16)
                )
    CASES[f"embed_scaled_rows, {_shape}, B = 1, bf16"] = lambda shape=_shape: embed_scaled_rows(shape, 1, BF16)
    for _dtype, _name in ((BF16, "bf16"), (FP32, "fp32")):
        CASES[f"group_attention, {_shape}, B = 1, {_name}, sm_90"] = lambda shape=_shape, dtype=_dtype: group_attention(
            shape, 1, dtype, emulation.SM_90
        )
    CASES[f"group_attention, {_shape}, B = 1, fp16"] = lambda shape=_shape: group_attention(shape, 1, FP16)
    CASES[f"group_attention, {_shape}, B = 1, fp32"] = lambda shape=_shape: group_attention(shape, 1, FP32)
    CASES[f"locality_order, {_shape}, B = 2"] = lambda shape=_shape: locality_order(shape, 2)
for _product, (*_, _operator_name) in PRODUCTS.items():
    for _rows in (20, 74) if _product in ("qkv", "fc2") else (74,):
        CASES[f"{_operator_name}, L {_product}, {_rows} rows, bf16, sm_90"] = lambda product=_product, rows=_rows: (
            few_rows(product, rows)
        )
for _mode in MODES:
    CASES[f"sample_tokens, V = 16384, {_mode}, bf16"] = lambda mode=_mode: sample_tokens(VOCAB, mode, BF16)
CASES["sample_tokens, V = 16384, guided top-k top-p, fp16"] = lambda: sample_tokens(VOCAB, MODES[-1], FP16)
CASES["sample_tokens, V = 16384, guided top-k top-p, fp32"] = lambda: sample_tokens(VOCAB, MODES[-1], FP32)
CASES["sample_tokens, V = 131072, guided, bf16"] = lambda: sample_tokens(131072, "guided", BF16)
CASES["sample_tokens, V = 131072, guided top-k top-p, bf16"] = lambda: sample_tokens(131072, MODES[-1], BF16)


def markdown(counted: dict[str, dict[str, int]]) -> str:
    """The table of docs/design/kernels.md."""
    rows = []
    for name, counts in counted.items():
        conflicts = f"{counts['wavefronts'] / counts['conflict_free']:.3f}" if counts["conflict_free"] else "none"
        ratio = f"{counts['moved'] / counts['least']:.3f}"
        rows.append([name, f"{counts['blocks']:,}", ratio, f"{counts['least']:,}", f"{counts['apart']:,}", conflicts])
    head = ["launch", "blocks", "moved / least", "least, bytes", "apart, bytes", "wavefronts / conflict-free"]
    return markdown_table(head, rows) + "\n"


if __name__ == "__main__":
    emulation.load()
    table = {name: case().count() for name, case in CASES.items()}
    TABLE.write_text(json.dumps(table, indent=1) + "\n")
    print(markdown(table))
    print(TABLE)
