"""Gates on what nvcc made of the CUDA kernels: no spills, tensor cores, wide accesses, resources as committed.

Needs the extension built with CUDA kernels and cuobjdump, but no GPU. `make cuda-all` runs it for all architectures.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator

import pytest
from cuda_static import MULTIPROCESSORS, TABLE, Kernel, Multiprocessor, cuobjdump, kernels, nvcc_version, table
from cuda_traffic import TABLE as TRAFFIC

from lpd_ext import _C, ops

LOAD_128, STORE_128 = r"\bLDG\.E\.(\w+\.)*128\b", r"\bSTG\.E\.(\w+\.)*128\b"
LOCAL_MEMORY = r"\b(LDL|STL)\b"
CLUSTER_BARRIER, ATOMIC = r"\bUCGABAR_(ARV|WAIT)\b", r"\b(ATOM|ATOMG|RED|REDG)\b"


@pytest.fixture(scope="module")
def compiled() -> list[Kernel]:
    missing = "" if nvcc_version() else "the extension was built without CUDA kernels (no nvcc, or LPD_CUDA=OFF)"
    if cuobjdump() is None:
        missing = "cuobjdump was not found"
    if missing and "nvcc" in os.environ.get("LPD_REQUIRE", "").split():
        pytest.fail(missing)
    if missing:
        pytest.skip(f"STATIC GATES OF THE CUDA KERNELS SKIPPED: {missing}")
    return kernels()


def of(compiled: list[Kernel], prefix: str) -> Iterator[Kernel]:
    found = [kernel for kernel in compiled if kernel.name.startswith(prefix)]
    assert found, f"no kernel {prefix}"
    yield from found


def test_every_architecture_holds_every_kernel(compiled: list[Kernel]) -> None:
    architectures = {f"sm_{name}" for name in _C.build_config()["cuda_architectures"].split()}
    assert {kernel.architecture for kernel in compiled} == architectures
    names = {kernel.name for kernel in compiled}
    assert len(compiled) == len(names) * len(architectures)
    # The kernel of sample_tokens, with tables, and that of embed_rows, with a scale.
    for operator in {*ops.OPERATORS} - {"sample_step", "embed_scaled_rows"}:
        assert any(name.startswith(f"{operator}_kernel") for name in names)


def test_nothing_is_spilled(compiled: list[Kernel]) -> None:
    for kernel in compiled:
        assert (kernel.stack, kernel.local) == (0, 0), kernel.name
        assert not kernel.has(LOCAL_MEMORY), kernel.name


def test_half_precision_attention_uses_tensor_cores_and_asynchronous_copies(compiled: list[Kernel]) -> None:
    for dtype in ("BFloat16", "Float16"):
        for kernel in of(compiled, f"group_attention_kernel<{dtype}"):
            for instruction in (r"\bHMMA\.16816", r"\bLDGSTS\.E\.BYPASS\.128\b", r"\bLDSM\b", STORE_128):
                assert kernel.has(instruction), (kernel.name, kernel.architecture, instruction)


FEW_ROWS = ("residual_linear_kernel", "normed_linear_kernel")


def test_products_of_few_rows_use_tensor_cores_asynchronous_copies_and_pushes(compiled: list[Kernel]) -> None:
    """From 9.0 on; before, they are empty."""
    for prefix in FEW_ROWS:
        for kernel in of(compiled, prefix):
            has_clusters = int(kernel.architecture.removeprefix("sm_")) >= 90
            for instruction in (r"\bHMMA\.16816", r"\bLDGSTS\.E\.BYPASS\.128\b", r"\bLDSM\b", r"\bSTAS\.128\b"):
                assert kernel.has(instruction) == has_clusters, (kernel.name, kernel.architecture, instruction)
            assert kernel.has(CLUSTER_BARRIER) == has_clusters


def test_products_of_few_rows_wait_for_no_cluster_once_they_push(compiled: list[Kernel]) -> None:
    """One barrier of the cluster, arrived at relaxed: no fence, and nothing is read from another block."""
    for prefix in FEW_ROWS:
        for kernel in of(compiled, prefix):
            if int(kernel.architecture.removeprefix("sm_")) < 90:
                continue
            code = kernel.code
            assert len(re.findall(r"\bUCGABAR_ARV\b", code)) == 1
            assert not kernel.has(r"\bLD\.E|\bMEMBAR\.(ALL|SC)\.(GPU|SYS)"), (kernel.name, kernel.architecture)


def test_all_launches_begin_early_and_let_the_next_begin(compiled: list[Kernel]) -> None:
    """From 9.0 on; a kernel that did not wait would race with the launch before."""
    for kernel in compiled:
        begins_early = int(kernel.architecture.removeprefix("sm_")) >= 90
        for instruction in (r"\bACQBULK\b", r"\bPREEXIT\b"):
            assert kernel.has(instruction) == begins_early, (kernel.name, kernel.architecture, instruction)


def test_fp32_attention_does_not_round_to_tf32(compiled: list[Kernel]) -> None:
    for kernel in of(compiled, "group_attention_kernel<float"):
        assert kernel.has(r"\bLDGSTS\.E\.BYPASS\.128\b")
        assert not kernel.has("HMMA")


def test_attention_forms_clusters_from_9_0_on_and_counts_arrivals_before(compiled: list[Kernel]) -> None:
    for kernel in of(compiled, "group_attention_kernel"):
        has_clusters = int(kernel.architecture.removeprefix("sm_")) >= 90
        assert kernel.has(CLUSTER_BARRIER) == has_clusters, (kernel.name, kernel.architecture)
        assert kernel.has(ATOMIC) != has_clusters, (kernel.name, kernel.architecture)


def test_attention_asks_for_keys_ahead_from_9_0_on(compiled: list[Kernel]) -> None:
    for kernel in of(compiled, "group_attention_kernel"):
        has_clusters = int(kernel.architecture.removeprefix("sm_")) >= 90
        assert kernel.has(r"\bCCTL\.E\.PF2\b") == has_clusters, (kernel.name, kernel.architecture)


def test_attention_reads_nothing_of_other_blocks(compiled: list[Kernel]) -> None:
    """Partials are pushed: no load of another block's shared memory after the one barrier of the cluster, no fence."""
    for kernel in of(compiled, "group_attention_kernel"):
        if int(kernel.architecture.removeprefix("sm_")) < 90:
            continue
        assert kernel.has(r"\bSTAS\.128\b"), (kernel.name, kernel.architecture)
        assert len(re.findall(r"\bUCGABAR_ARV\b", kernel.code)) == 1
        assert not kernel.has(r"\bLD\.E|\bMEMBAR\.(ALL|SC)\.(GPU|SYS)"), (kernel.name, kernel.architecture)


def test_four_blocks_of_attention_fit_a_multiprocessor(compiled: list[Kernel]) -> None:
    """Head dimension 64 in 16 bits, where the multiprocessor has the shared memory; one more hides more latency."""
    for dtype in ("BFloat16", "Float16"):
        for kernel in of(compiled, f"group_attention_kernel<{dtype}, 64>"):
            assert kernel.registers <= 128, (kernel.name, kernel.architecture)


@pytest.mark.parametrize(
    ("prefix", "stores"),
    [
        ("append_kv_kernel", True),
        ("embed_rows_kernel<BFloat16, VectorSlice", True),
        ("residual_layer_norm_kernel<BFloat16, VectorSlice", True),
        ("sample_tokens_kernel<BFloat16", False),
    ],
)
def test_rows_move_128_bits_at_a_time(compiled: list[Kernel], prefix: str, stores: bool) -> None:
    for kernel in of(compiled, prefix):
        assert kernel.has(LOAD_128), (kernel.name, kernel.architecture)
        assert kernel.has(STORE_128) or not stores, (kernel.name, kernel.architecture)


def test_registers_and_shared_memory_are_as_committed(compiled: list[Kernel]) -> None:
    """Written anew by `make cuda-table`; the table holds what one version of nvcc makes, others are only gated."""
    committed = json.loads(TABLE.read_text())
    if nvcc_version() not in committed:
        pytest.skip(f"NOT COMPARED: the table is of nvcc {', '.join(committed)}, this is {nvcc_version()}")
    rows_by_architecture = table()
    assert rows_by_architecture or {kernel.architecture for kernel in compiled}.isdisjoint(MULTIPROCESSORS)
    for architecture, rows in rows_by_architecture.items():
        assert rows == committed[nvcc_version()][architecture]


def test_launches_in_the_table_are_those_that_were_counted(compiled: list[Kernel]) -> None:
    """The emulator records what the launchers ask for; the table's threads and shared bytes are the same."""
    rows = next(iter(table().values()))
    counted = json.loads(TRAFFIC.read_text())
    for case, kernel in {
        "group_attention, L-256-20 step 15, B = 32, bf16": "group_attention_kernel<BFloat16, 64>",
        "group_attention, L-256-20 step 15, B = 1, fp32": "group_attention_kernel<float, 64>",
        "embed_rows, L-256-20 step 15, B = 32, bf16": "embed_rows_kernel<BFloat16, VectorSlice>",
        "residual_layer_norm, L-256-20 step 15, B = 32, bf16": "residual_layer_norm_kernel<BFloat16, VectorSlice>",
        "residual_linear, L fc2, 74 rows, bf16, sm_90": "residual_linear_kernel<BFloat16, 80>",
        "normed_linear, L qkv, 74 rows, bf16, sm_90": "normed_linear_kernel<BFloat16, 80>",
    }.items():
        assert rows[kernel]["threads"] == counted[case]["threads"], case
        assert rows[kernel]["shared"] == counted[case]["shared_bytes"], case


# Worked by hand: registers come in units of 256 per warp, a block's shared memory has 1 KiB on top.
@pytest.mark.parametrize(
    ("architecture", "threads", "registers", "shared_bytes", "blocks"),
    [
        ("sm_80", 128, 128, 0, 4),  # 4 warps of 4096 registers: 16384 of 65536
        ("sm_80", 128, 129, 0, 3),  # rounded up to 136 per thread: 17408
        ("sm_80", 128, 32, 48 * 1024, 3),  # 49 KiB of 164
        ("sm_90", 128, 32, 48 * 1024, 4),  # 49 KiB of 228
        ("sm_86", 1024, 40, 0, 1),
        ("sm_80", 32, 16, 0, 32),
        ("sm_90", 1024, 64, 0, 1),
        ("sm_90", 1024, 32, 0, 2),
    ],
)
def test_resident_blocks(architecture: str, threads: int, registers: int, shared_bytes: int, blocks: int) -> None:
    assert MULTIPROCESSORS[architecture].resident_blocks(threads, registers, shared_bytes) == blocks


def test_what_the_gates_look_for_is_told_from_what_they_refuse() -> None:
    def kernel(code: str) -> Kernel:
        return Kernel("k", "sm_80", 1, 0, 0, 0, code)

    assert kernel("LDG.E.128.CONSTANT R4, [R2.64]").has(LOAD_128)
    assert kernel("LDG.E.LTC128B.128 R4").has(LOAD_128)
    assert not kernel("LDG.E.64 R4, [R2.64]").has(LOAD_128)
    assert kernel("@P0 STL [R1], R2").has(LOCAL_MEMORY)
    assert not kernel("STG.E.128 [R2.64], R4 ; LDSM").has(LOCAL_MEMORY)
    assert Multiprocessor(2048, 32, 1 << 20).resident_blocks(33, 32, 0) == 32  # two warps each
