"""Bytes that the CUDA kernels move, counted by the emulator, against the least and against the committed table."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import emulation
import pytest
import torch
from cuda_traffic import CASES, PRODUCTS, TABLE, group_attention, markdown

pytestmark = pytest.mark.emulated

COMMITTED = json.loads(TABLE.read_text())
# Bytes moved over the least, per operator.
LIMITS = {
    "group_attention": 1.10,
    "append_kv": 1.02,
    "embed_rows": 1.02,
    "embed_scaled_rows": 1.02,
    "residual_layer_norm": 1.02,
    "residual_linear": 1.02,
    "normed_linear": 1.02,
    "sample_tokens": 1.05,
    "locality_order": 1.05,  # a seed and a schedule are smaller than the sectors they lie in
}
CLUSTER_LIMIT = 1.25  # of group_attention, whose blocks of a cluster each read the rows of Q that all of them need
# Not bounded by LIMITS, but by the committed table: the row does not fit on the chip and is read in several passes.
SEVERAL_PASSES = "V = 131072"


@pytest.fixture(scope="module")
def counted() -> dict[str, dict[str, int]]:
    emulation.load()
    return {name: case().count() for name, case in CASES.items()}


@pytest.mark.parametrize("name", CASES)
def test_no_more_than_the_least_allows(counted: dict[str, dict[str, int]], name: str) -> None:
    counts = counted[name]
    operator = name.split(",")[0]
    in_cluster = operator == "group_attention" and counts["cluster"] > 1
    if SEVERAL_PASSES not in name:
        assert counts["moved"] <= (CLUSTER_LIMIT if in_cluster else LIMITS[operator]) * counts["least"]
    assert counts["moved"] >= counts["least"]  # else something is not counted


@pytest.mark.parametrize("name", CASES)
def test_no_more_than_committed(counted: dict[str, dict[str, int]], name: str) -> None:
    """A kernel that got better: write the table anew, `python tests/support/cuda_traffic.py`."""
    assert set(COMMITTED) == set(CASES)
    counts, committed = counted[name], COMMITTED[name]
    for figure in ("moved", "apart", "requests", "wavefronts", "shared_bytes", "distributed"):
        assert counts[figure] <= 1.01 * committed[figure], figure
    assert counts["least"] == committed["least"]


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("group_attention")])
def test_group_attention_has_no_bank_conflicts(counted: dict[str, dict[str, int]], name: str) -> None:
    counts = counted[name]
    assert counts["conflict_free"] > 1000
    assert counts["wavefronts"] <= 1.05 * counts["conflict_free"]


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("group_attention")])
def test_group_attention_reads_the_cache_by_asynchronous_copies_alone(
    counted: dict[str, dict[str, int]], name: str
) -> None:
    assert counted[name]["plain_cache_reads"] == 0


def test_keys_are_split_over_blocks_only_where_multiprocessors_would_idle(counted: dict[str, dict[str, int]]) -> None:
    for name, counts in counted.items():
        if name.startswith("group_attention") and not name.endswith("sm_90"):
            assert (counts["apart"] > 0) == ("B = 1," in name)
            assert counts["copying_blocks"] >= 64


def test_clusters_fill_the_chip_without_global_partials(counted: dict[str, dict[str, int]]) -> None:
    """Blocks that bring keys, for 132 multiprocessors."""
    names = [name for name in counted if name.startswith("group_attention") and name.endswith("sm_90")]
    assert len(names) == 4
    for name in names:
        counts = counted[name]
        assert counts["copying_blocks"] >= 108
        assert counts["cluster"] == 4
        assert counts["apart"] == 0
        assert counts["distributed"] > 0


@pytest.mark.parametrize(
    ("dtype", "blocks_at_once", "keys", "lines"), [(torch.bfloat16, 4, 64, 1), (torch.float32, 3, 32, 2)]
)
def test_blocks_ask_for_the_first_keys_of_those_that_take_their_places(
    dtype: torch.dtype, blocks_at_once: int, keys: int, lines: int
) -> None:
    """From 9.0 on, in launches of more blocks than run at once; every later block's first tile, once."""
    few = replace(emulation.SM_90, multiprocessors=8)
    counts = group_attention("L-256-20 step 15", 4, dtype, few).count()
    assert (counts["blocks"], counts["cluster"]) == (128, 1)
    assert counts["cache_lines_ahead"] == (128 - 8 * blocks_at_once) * 2 * keys * lines
    assert counts["moved"] <= LIMITS["group_attention"] * counts["least"]
    for other in (replace(few, compute_capability=80), emulation.SM_90):
        assert group_attention("L-256-20 step 15", 4, dtype, other).count()["cache_lines_ahead"] == 0


@pytest.mark.parametrize("name", [name for name in CASES if "linear" in name])
def test_products_of_few_rows_fill_the_chip_without_bank_conflicts(
    counted: dict[str, dict[str, int]], name: str
) -> None:
    counts = counted[name]
    assert counts["blocks"] == counts["copying_blocks"] == 128  # of 132 multiprocessors
    assert counts["wavefronts"] == counts["conflict_free"]
    rows, features = int(name.split(" rows")[0].split()[-1]), PRODUCTS[name.split()[2].removesuffix(",")][0]
    # Each block pushes its sums once, but for those that it finishes itself.
    tiles_of_8, others = -(-rows // 8), 1 - 1 / counts["cluster"]
    assert counts["distributed"] == 8 * tiles_of_8 * features * 4 * counts["cluster"] * others


def test_no_clusters_where_every_multiprocessor_has_a_block() -> None:
    counts = group_attention("L-256-20 step 15", 5, torch.bfloat16, emulation.SM_90).count()
    assert (counts["blocks"], counts["cluster"], counts["distributed"], counts["apart"]) == (160, 1, 0, 0)


def test_the_documented_figures_are_the_committed_ones() -> None:
    assert markdown(COMMITTED) in (Path(__file__).parents[2] / "docs/design/kernels.md").read_text()
