"""The CUDA emulator itself: every planted mistake is reported, clean kernels pass in silence, counts are right.

Builds small programs with the system's C++ compiler; needs neither torch nor CUDA.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

EMULATION = Path(__file__).parents[1] / "cuda_emulation"
KERNELS = Path(__file__).parents[2] / "csrc" / "kernels"
COMPILER = shutil.which(os.environ.get("CXX", "c++"))

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the emulator needs Linux"),
    pytest.mark.skipif(COMPILER is None, reason="no C++ compiler"),
]

# What must report a mistake. "stopped": the emulator itself, by an exception; "outputs": NaNs, or outputs that differ
# over the three thread orders; the others are sanitizers.
REPORTED_BY = {
    "arrival_without_wait": {"stopped"},
    "barrier_in_one_warp": {"stopped"},
    "block_without_cluster_barrier": {"stopped"},
    "cluster_on_an_old_device": {"stopped"},
    "cluster_too_large": {"stopped"},
    "copies_rows_past_the_end": {"ASan"},
    "copy_in_flight_at_exit": {"stopped"},
    "divergent_shuffle": {"stopped"},
    "early_launch_copies_too_early": {"stopped"},
    "early_launch_is_left_without_wait": {"stopped"},
    "early_launch_lets_next_begin_too_early": {"stopped"},
    "early_launch_reads_too_early": {"stopped"},
    "early_launch_without_wait": {"stopped"},
    "early_launch_writes_too_early": {"stopped"},
    "exit_while_peer_reads": {"stopped"},
    "ldmatrix_before_barrier": {"outputs", "TSan"},
    "misaligned_cast": {"UBSan"},
    "misaligned_vector": {"stopped"},
    "misaligned_push": {"stopped"},
    "missing_barrier_before_reuse": {"outputs", "TSan"},
    "missing_syncwarp": {"outputs", "TSan"},
    "no_barrier_after_wait": {"outputs", "TSan"},
    "no_barrier_before_refill": {"outputs", "TSan"},
    "no_blocks": {"stopped"},
    "no_fence_after_counter": {"TSan"},
    "no_fence_before_counter": {"TSan"},
    "no_such_peer": {"stopped"},
    "part_of_a_cluster": {"stopped"},
    "peer_out_of_bounds": {"stopped"},
    "peer_read_after_arrival": {"outputs", "TSan"},
    "peer_read_after_relaxed_arrival": {"TSan"},
    "peer_read_before_barrier": {"outputs", "TSan"},
    "peer_read_before_start": {"stopped"},
    "peer_write_without_barrier": {"outputs", "TSan"},
    "plain_addition": {"TSan"},
    "push_before_peer_runs": {"stopped"},
    "push_of_fewer_bytes_than_expected": {"stopped"},
    "push_of_more_bytes_than_expected": {"stopped", "TSan"},
    "push_on_an_old_device": {"stopped"},
    "push_rounds_without_barrier": {"stopped", "TSan"},
    "push_to_barrier_not_shown": {"stopped"},
    "push_without_barrier": {"stopped"},
    "push_without_wait": {"stopped", "TSan"},
    "pushes_to_one_place": {"outputs", "TSan"},
    "race_between_blocks": {"outputs", "TSan"},
    "return_before_syncwarp": {"stopped"},
    "static_shared_out_of_bounds": {"outputs", "UBSan"},
    "stores_rows_past_the_end": {"ASan"},
    "too_much_dynamic_shared": {"stopped"},
    "too_much_shared": {"stopped"},
    "uninitialised_shared": {"outputs"},
    "waits_for_too_few_groups": {"outputs"},
    "warps_at_two_cluster_barriers": {"stopped"},
    "writes_past_dynamic_shared": {"ASan"},
}
CLEAN = {
    "clean_atomic",
    "clean_blocks",
    "clean_buffer_reuse",
    "clean_cluster",
    "clean_copy",
    "clean_early_launch",
    "clean_last_block",
    "clean_ldmatrix",
    "clean_much_shared",
    "clean_peer_write",
    "clean_product",
    "clean_push",
    "clean_shared_copy",
    "clean_shuffle",
    "clean_static_shared",
    "clean_syncthreads",
    "clean_syncwarp",
    "clean_vectors",
    "clean_whole_warp",
}
TRIPLE = r"\(\d+, \d+, \d+\)"
TOO_EARLY = r"reads 0x[0-9a-f]+, which the launch before wrote, before it has waited for that"
# Sentences, after the kernel's name and, but for launches that are refused, the place of the thread.
SENTENCES = {
    "arrival_without_wait": r"divergent cluster barrier: exits before it is passed; \d+ of 128 threads have arrived",
    "barrier_in_one_warp": r"divergent barrier: thread 0 waits in __syncthreads \(planted_pipeline.h:\d+\), thread 32 "
    r"waits in __syncthreads \(planted_pipeline.h:\d+\)",
    "block_without_cluster_barrier": r"divergent cluster barrier: (\d+ threads of the cluster have exited|"
    r"exits before it is passed; \d+ of 128 threads have arrived)",
    "cluster_on_an_old_device": "clusters of blocks need compute capability 9.0",
    "cluster_too_large": "invalid cluster size",
    "copy_in_flight_at_exit": r"exits with 1 cp.async in flight",
    "divergent_shuffle": rf"deadlock: no thread can run; thread \d+ of block {TRIPLE} waits in __shfl_sync "
    r"\(planted_mistakes.cpp:\d+\), mask 0xffffffff|__shfl_sync: lanes 0x[0-9a-f]+ of its mask 0xffffffff have exited",
    "early_launch_copies_too_early": TOO_EARLY,
    "early_launch_is_left_without_wait": "exits without having waited for the launch before",
    "early_launch_lets_next_begin_too_early": "lets the launch after begin before it has waited for the one before",
    "early_launch_reads_too_early": TOO_EARLY,
    "early_launch_without_wait": rf"{TOO_EARLY}|exits without having waited for the launch before",
    "early_launch_writes_too_early": r"writes to 0x[0-9a-f]+ before it has waited for the launch before",
    "exit_while_peer_reads": r"exits while another block may access its shared memory: no cluster barrier came after "
    r"that|access to shared memory of block \d of the cluster, which has exited",
    "misaligned_vector": r"misaligned read of 16 bytes at 0x[0-9a-f]+",
    "misaligned_push": r"st.async: misaligned target 0x[0-9a-f]+",
    "no_blocks": r"invalid configuration argument",
    "no_such_peer": r"mapa: block 2 of a cluster of 2",
    "part_of_a_cluster": "invalid cluster size",
    "peer_out_of_bounds": r"access to 8 bytes at 0x[0-9a-f]+, outside shared memory of block \d of the cluster",
    "peer_read_before_start": r"access to block \d of the cluster, which no cluster barrier has shown to run",
    "push_before_peer_runs": r"access to block \d of the cluster, which no cluster barrier has shown to run|"
    r"no mbarrier has been initialised at 0x[0-9a-f]+",
    "push_of_fewer_bytes_than_expected": rf"deadlock: no thread can run; thread \d+ of block {TRIPLE} waits in "
    r"mbarrier.try_wait \(planted_mistakes.cpp:\d+\), for 0 arrivals and 16 bytes",
    "push_of_more_bytes_than_expected": rf"deadlock: no thread can run; thread \d+ of block {TRIPLE} waits in "
    r"mbarrier.try_wait .*, for 0 arrivals and -?\d+ bytes|exits with an mbarrier that expects -32 more bytes",
    "push_on_an_old_device": r"(mbarrier|barrier.cluster) needs compute capability 9.0",
    "push_rounds_without_barrier": rf"deadlock: no thread can run; thread \d+ of block {TRIPLE} waits in "
    r"mbarrier.try_wait .*, for 0 arrivals and \d+ bytes",
    "push_to_barrier_not_shown": "st.async: no fence has shown the mbarrier's initialisation to the cluster",
    "push_without_barrier": r"no mbarrier has been initialised at 0x[0-9a-f]+",
    "push_without_wait": r"more than 1 arrivals at the mbarrier at 0x[0-9a-f]+",
    "return_before_syncwarp": rf"deadlock: no thread can run; thread \d+ of block {TRIPLE} waits in __syncwarp "
    r".*, mask 0xffffffff|"
    r"__syncwarp: lanes 0x[0-9a-f]+ of its mask 0xffffffff have exited",
    "too_much_dynamic_shared": "it needs 300000 bytes of shared memory per block, this GPU offers 232448",
    "too_much_shared": "it needs 232576 bytes of shared memory per block, this GPU offers 232448",
    "warps_at_two_cluster_barriers": r"divergent cluster barrier: threads of the block arrive in lines \d+ and \d+",
}
REFUSED = {
    "cluster_on_an_old_device",
    "cluster_too_large",
    "no_blocks",
    "part_of_a_cluster",
    "too_much_dynamic_shared",
    "too_much_shared",
}

FLAGS = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-ffp-contract=off", "-pthread"]
FLAGS += ["-DLPD_CUDA_EMULATED", f"-I{EMULATION}", f"-I{KERNELS}"]
RUNTIME = [
    "emulator",
    "emulator_counters",
    "emulator_launches",
    "emulator_mbarrier",
    "emulator_synchronization",
    "fiber",
    "warp_operations",
]
# Program: (what the kernels are compiled with, what the runtime is, what the program is linked with, sources)
PROGRAMS: dict[str, tuple[list[str], list[str], list[str], list[str]]] = {
    "plain": ([], [], [], ["planted_mistakes"]),
    "ucontext": (["-DLPD_EMULATOR_UCONTEXT"], ["-DLPD_EMULATOR_UCONTEXT"], [], ["planted_mistakes"]),
    "address": (["-fsanitize=address,undefined", "-DLPD_EMULATOR_ASAN"],) * 3 + (["planted_mistakes"],),
    "thread": (["-fsanitize=thread"], ["-DLPD_EMULATOR_TSAN"], ["-fsanitize=thread"], ["planted_mistakes"]),
    "count": (["-fsanitize=thread", "-DLPD_EMULATOR_COUNT"], [], [], ["counted_kernels"]),
}
RUNTIME_OF_COUNT = ["emulator_hooks", "python_interface"]


def compile_or_link(*arguments: str) -> None:
    done = subprocess.run([str(COMPILER), *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the programs, by the names in PROGRAMS."""
    folder = tmp_path_factory.mktemp("emulator")
    objects: dict[str, list[str]] = {}
    jobs: dict[str, list[str]] = {}
    for program, (kernel_flags, runtime_flags, _, kernels) in PROGRAMS.items():
        runtime = RUNTIME + (RUNTIME_OF_COUNT if program == "count" else [])
        units = [(name, kernel_flags) for name in kernels] + [(name, runtime_flags) for name in runtime]
        objects[program] = []
        for name, flags in units:
            out = str(folder / ("_".join([name, *flags]).replace(",", "_").replace("=", "_") + ".o"))
            objects[program].append(out)
            jobs[out] = [*FLAGS, *flags, "-c", str(EMULATION / f"{name}.cpp"), "-o", out]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda job: compile_or_link(*job), jobs.values()))
        links = [[*PROGRAMS[p][2], "-pthread", *objects[p], "-o", str(folder / p)] for p in PROGRAMS]
        list(pool.map(lambda job: compile_or_link(*job), links))
    return folder


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"UBSAN_OPTIONS": "halt_on_error=1", "TSAN_OPTIONS": "halt_on_error=1"}
    return subprocess.run([program, *arguments], capture_output=True, text=True, env=environment)


def reports(programs: Path, kernel: str) -> set[str]:
    """Who has something to say about this kernel."""
    found = set()
    plain = run(programs / "plain", kernel)
    outputs = plain.stdout.split("\n")[:-1]
    if plain.returncode == 86:
        found.add("stopped")
    elif len(set(outputs)) > 1 or any(not output.startswith("0 ") for output in outputs):
        found.add("outputs")
    address, thread = run(programs / "address", kernel), run(programs / "thread", kernel)
    if "ERROR: AddressSanitizer" in address.stderr:
        found.add("ASan")
    if "runtime error:" in address.stderr:
        found.add("UBSan")
    if "WARNING: ThreadSanitizer" in thread.stderr:  # not "FATAL": it could not start
        found.add("TSan")
    for instrumented in (address, thread):
        assert found or (instrumented.returncode, instrumented.stdout) == (0, plain.stdout), instrumented.stderr
    return found


def test_tables_name_every_kernel(programs: Path) -> None:
    names = run(programs / "plain").stdout.split()
    assert set(names) == CLEAN | REPORTED_BY.keys()
    assert all(name.startswith("clean_") == (name in CLEAN) for name in names)


@pytest.mark.parametrize("kernel", sorted(REPORTED_BY))
def test_mistake_is_reported(programs: Path, kernel: str) -> None:
    assert reports(programs, kernel) >= REPORTED_BY[kernel]


@pytest.mark.parametrize("kernel", sorted(CLEAN))
def test_clean_kernel_is_not(programs: Path, kernel: str) -> None:
    assert reports(programs, kernel) == set()


def test_sentences_name_kernel_and_thread(programs: Path) -> None:
    assert SENTENCES.keys() == {kernel for kernel, by in REPORTED_BY.items() if "stopped" in by}
    for kernel, sentence in SENTENCES.items():
        place = f"{kernel}: " if kernel in REFUSED else rf"CUDA emulator: {kernel}, block {TRIPLE}, thread {TRIPLE}: "
        for line in run(programs / "plain", kernel).stderr.strip().split("\n"):
            assert re.fullmatch(f"{place}({sentence})", line)


@pytest.mark.parametrize("program", ["plain", "address", "thread", "ucontext"])
def test_a_stopped_kernel_leaves_no_trace(programs: Path, program: str) -> None:
    stopped = sorted(kernel for kernel in SENTENCES if "TSan" not in REPORTED_BY[kernel])
    done = run(programs / program, *stopped, "clean_product")
    assert done.returncode == 86
    assert done.stdout.endswith(run(programs / "plain", "clean_product").stdout)
    assert "Sanitizer" not in done.stderr


def test_ucontext_gives_the_same(programs: Path) -> None:
    kernels = sorted(CLEAN)
    done = run(programs / "ucontext", *kernels)
    assert done.returncode == 0
    assert done.stdout == run(programs / "plain", *kernels).stdout


# Figures that are not zero. Global memory: requests, bytes asked for, sectors of 32 bytes; shared memory: requests,
# bytes, wavefronts, wavefronts without bank conflicts.
CONTIGUOUS = (1, 128, 4)
WRITES_OUT = {"out.written": CONTIGUOUS}
FILLS_SHARED = {"shared.written": (1, 128, 1, 1)}
COUNTS: dict[str, dict[str, tuple[int, ...]]] = {
    "contiguous": WRITES_OUT | {"in.read": CONTIGUOUS},
    "shifted": WRITES_OUT | {"in.read": (1, 128, 5)},
    "strided": WRITES_OUT | {"in.read": (1, 128, 32)},
    "two_blocks": {"in.read": (2, 256, 8), "out.written": (2, 256, 8)},
    "vectors_of_8": {"in.read": (1, 256, 8), "out.written": (1, 256, 8)},
    "vectors_of_16": {"in.read": (1, 512, 16), "out.written": (1, 512, 16)},
    "halves": WRITES_OUT | {"in.read": (3, 160, 5)},
    "broadcast": WRITES_OUT | {"in.read": (1, 512, 2)},
    "two_arrays": WRITES_OUT | {"in.read": (1, 32, 1), "out.read": (1, 96, 3)},
    "atomic": {"in.read": CONTIGUOUS, "out.atomic": (1, 128, 1)},
    "around_meeting": WRITES_OUT | {"in.read": (2, 192, 6)},
    "shared_stride_1": WRITES_OUT | FILLS_SHARED | {"shared.read": (1, 128, 1, 1)},
    "shared_stride_2": WRITES_OUT | FILLS_SHARED | {"shared.read": (1, 128, 2, 1)},
    "shared_stride_32": WRITES_OUT | FILLS_SHARED | {"shared.read": (1, 128, 32, 1)},
    "shared_stride_33": WRITES_OUT | FILLS_SHARED | {"shared.read": (1, 128, 1, 1)},
    "shared_broadcast": WRITES_OUT | FILLS_SHARED | {"shared.read": (1, 128, 1, 1)},
    "shared_vectors_of_8": WRITES_OUT | {"shared.written": (1, 256, 2, 2), "shared.read": (1, 256, 2, 2)},
    "shared_vectors_of_16": WRITES_OUT | {"shared.written": (1, 512, 4, 4), "shared.read": (1, 512, 4, 4)},
    "shared_vectors_apart": WRITES_OUT | {"shared.written": (1, 512, 32, 4), "shared.read": (1, 512, 32, 4)},
    "cp_async": WRITES_OUT
    | {"in.copied": (1, 384, 12), "shared.copied": (1, 512, 4, 4), "shared.read": (1, 512, 4, 4)},
    "ldmatrix": WRITES_OUT | {"shared.written": (1, 512, 4, 4), "shared.matrix_read": (1, 512, 32, 4)},
    "ldmatrix_swizzled": WRITES_OUT | {"shared.written": (1, 512, 4, 4), "shared.matrix_read": (1, 512, 4, 4)},
    "cluster": {
        "out.written": (2, 256, 8),
        "shared.peer_written": (2, 1024, 8, 8),
        "shared.read": (2, 256, 8, 2),
        "shared.peer_read": (2, 512, 8, 4),
    },
}
# Distinct bytes of `in` read and of `out` written where that is not 128, or is less than was asked for.
DISTINCT = {"contiguous": (128, 128), "two_blocks": (128, 128), "broadcast": (64, 128), "atomic": (128, 4)}


@pytest.fixture(scope="module")
def counted(programs: Path) -> dict[str, dict[str, Any]]:
    """Launches of counted_kernels.cpp by name."""
    return {launch["kernel"]: launch for launch in json.loads(run(programs / "count").stdout)}


def test_every_counted_kernel_has_figures(counted: dict[str, dict[str, Any]]) -> None:
    assert counted.keys() == COUNTS.keys()


@pytest.mark.parametrize("kernel", COUNTS)
def test_counts(counted: dict[str, dict[str, Any]], kernel: str) -> None:
    launch = counted[kernel]
    memories = launch["global"] | {"shared": launch["shared"]}
    figures = {
        f"{memory}.{way}": tuple(count.values())
        for memory, ways in memories.items()
        for way, count in ways.items()
        if isinstance(count, dict) and way != "all" and any(count.values())
    }
    assert figures == COUNTS[kernel]
    in_, out = launch["global"]["in"], launch["global"]["out"]
    assert out["moved"] == 32 * sum(out[way]["sectors"] for way in ("read", "copied", "written", "atomic"))
    if kernel in DISTINCT:
        assert (in_["distinct_read"], out["distinct_written"]) == DISTINCT[kernel]
