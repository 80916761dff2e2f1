"""The decoding steps that the C++ microbenchmarks time are those of the published schedules."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from lpd_ext.plan import plan_decoding
from lpd_ext.schedule import group_sizes

HEADER = Path(__file__).parents[2] / "csrc" / "bench" / "bench_shapes.h"
GRIDS = {"L-256-20": (16, 16, 2), "L-512-48": (32, 32, 4)}  # height, width and repulsion threshold


def numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def entries(pattern: str) -> dict[str, list[int]]:
    """Each initialiser of the header with a name that matches, and the numbers in it."""
    text = HEADER.read_text("utf-8")
    return {name: numbers(values) for name, values in re.findall(rf'\{{"({pattern})",([\d\s,{{]+)\}}', text)}


def test_every_entry_is_found() -> None:
    assert entries(r"L-\d+-\d+").keys() == GRIDS.keys()
    steps = {"L-256-20": (1, 8, 15, 19), "L-512-48": (30,)}
    assert list(entries(r"[^\"]+ step \d+")) == [f"{name} step {t}" for name in steps for t in steps[name]]


@pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake")
def test_without_its_library_the_build_says_what_to_install(tmp_path: Path) -> None:
    """In one sentence, and not in a page of CMake's search for it."""
    command = ["cmake", "-S", HEADER.parents[2], "-B", tmp_path, "--log-level=WARNING", "-DLPD_BENCHMARKS=ON",
               "-DLPD_CUDA=OFF", "-DCMAKE_DISABLE_FIND_PACKAGE_benchmark=ON"]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode != 0
    told = " ".join(result.stderr.split())
    assert "need Google Benchmark: install it (Debian: apt install libbenchmark-dev)." in told
    assert len(result.stderr.splitlines()) < 10


@pytest.mark.parametrize("name", GRIDS)
def test_schedules(name: str) -> None:
    height, width, repulsion = GRIDS[name]
    sizes = group_sizes(height * width, int(name.split("-")[2]))
    assert entries(r"L-\d+-\d+")[name] == [height, width, repulsion, len(sizes), *sizes]


@pytest.mark.parametrize("name", entries(r"[^\"]+ step \d+"))
def test_steps(name: str) -> None:
    schedule, t = name.split(" step ")
    height, width, _ = GRIDS[schedule]
    sizes = group_sizes(height * width, int(schedule.split("-")[2]))
    plan = plan_decoding([sizes], [True], height * width, torch.device("cpu"))
    for segment in plan.steps[int(t)].segments.tolist():
        _, num_context, _, num_query, cached, _ = segment
        expected = [num_context, num_query, cached, plan.capacity.cache_positions, list(GRIDS).index(schedule)]
        assert entries(r"[^\"]+ step \d+")[name] == expected
