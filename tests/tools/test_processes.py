"""The processes of a run: how they are joined, for how long they wait, and which device each has."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("typer")
pytest.importorskip("rich")

from lpd_tools.data.settings import TokenCaching
from lpd_tools.data.token_caching import run_caching
from lpd_tools.evaluation.generate import drawing_processes
from lpd_tools.launch import Place, place
from lpd_tools.processes import Processes, processes

CPU = torch.device("cpu")


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, timedelta]]:
    """Records torch's calls by the second of two processes, on a machine that seems to have two GPUs."""
    calls: list[tuple[str, timedelta]] = []
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, timeout: calls.append((backend, timeout)))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    return calls


@pytest.mark.parametrize(
    ("device", "backend", "own"), [("cpu", "gloo", "cpu"), ("", "nccl", "cuda:1"), ("cuda:0", "nccl", "cuda:1")]
)
def test_trainings_are_joined_by_what_their_device_has(
    device: str, backend: str, own: str, joined: list[tuple[str, timedelta]]
) -> None:
    """NCCL wants a GPU for each. By itself torch ends those who wait after 10 minutes (NCCL) or 30 (gloo)."""
    with processes(device) as group:
        assert group == Processes(1, 2, torch.device(own))
        assert not group.is_first
    ((found, patience),) = joined
    assert found == backend
    assert patience >= timedelta(hours=2)


@pytest.mark.parametrize(("device", "own"), [("cpu", "cpu"), ("", "cuda:1"), ("cuda", "cuda:1"), ("cuda:0", "cuda:0")])
def test_drawing_is_joined_by_gloo(device: str, own: str, joined: list[tuple[str, timedelta]]) -> None:
    """They may share a GPU that is named, and the quickest waits as long as the slowest draws."""
    with drawing_processes(device) as group:
        assert group == Processes(1, 2, torch.device(own))
    assert joined == [("gloo", timedelta(days=7))]


def test_a_group_that_is_there_is_used_and_kept(
    joined: list[tuple[str, timedelta]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: pytest.fail("the caller's group was destroyed"))
    with processes("cpu") as group:
        assert group.size == 2
    assert joined == []


Variables = dict[str, str]


def set_variables(monkeypatch: pytest.MonkeyPatch, variables: Variables) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    "variables",
    [{}, {"RANK": "1"}, {"LOCAL_RANK": "1"}, {"RANK": "3", "LOCAL_RANK": "1"}, {"WORLD_SIZE": "1", "RANK": "0"}],
    ids=str,
)
def test_one_process_joins_none(variables: Variables, monkeypatch: pytest.MonkeyPatch) -> None:
    """RANK without WORLD_SIZE, as a shell may have left it, makes no second process of the only one."""
    set_variables(monkeypatch, variables)
    assert place() == Place(0, 1, 0, launched=False)
    with processes("cpu") as group:
        assert not dist.is_initialized()
        group.wait()
        assert group.is_first
        assert group == Processes(0, 1, CPU)
        assert group.share(6) == slice(0, 6)


@pytest.mark.parametrize(
    ("variables", "problem"),
    [
        ({"WORLD_SIZE": "2"}, "RANK must be set where WORLD_SIZE is: start the processes with torchrun"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, r"RANK must be in \[0, WORLD_SIZE = 2\), got 2"),
        ({"WORLD_SIZE": "1", "RANK": "1"}, r"RANK must be in \[0, WORLD_SIZE = 1\), got 1"),
        ({"WORLD_SIZE": "2", "RANK": "-1"}, "RANK must be in"),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "2"}, "LOCAL_RANK must be in"),
        ({"WORLD_SIZE": "0", "RANK": "0"}, "WORLD_SIZE must be at least 1, got 0"),
        ({"WORLD_SIZE": "", "RANK": "0"}, "WORLD_SIZE must be a whole number, as torchrun sets it, got ''"),
        ({"WORLD_SIZE": "2", "RANK": "one"}, "RANK must be a whole number"),
    ],
    ids=str,
)
def test_variables_that_no_launcher_sets_are_refused(
    variables: Variables, problem: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """By every program alike, before anything is done."""
    set_variables(monkeypatch, variables)
    with pytest.raises(ValueError, match=problem), processes("cpu"):
        pass
    with pytest.raises(ValueError, match=problem):
        run_caching(TokenCaching("tokenizer", str(tmp_path / "out")))


def test_torchruns_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    set_variables(monkeypatch, {"WORLD_SIZE": "8", "RANK": "5", "LOCAL_RANK": "1"})
    assert place() == Place(5, 8, 1, launched=True)
    set_variables(monkeypatch, {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"})
    assert place() == Place(0, 1, 0, launched=True)


def test_a_batch_is_shared_out_evenly_or_refused() -> None:
    assert Processes(1, 2, CPU).share(8) == slice(4, 8)
    with pytest.raises(ValueError, match="batch_size must be a multiple of the 2 processes, got 7"):
        Processes(1, 2, CPU).share(7)


def test_a_device_is_checked_before_anything_is_joined(joined: list[tuple[str, timedelta]]) -> None:
    with pytest.raises(ValueError, match="device must be one of"), processes("cuda:2"):
        pass
    assert joined == []


LEAVING = """
import atexit, sys
from lpd_tools.launch import run_and_leave

class Last:
    def __del__(self):
        print("finalised")

kept = Last()
atexit.register(print, "exit functions ran")

def command():
    print("done", end=" ")
    sys.exit({code})

run_and_leave(command)
"""


@pytest.mark.parametrize("code", [0, 3, None])
@pytest.mark.parametrize("launched", [True, False])
def test_one_of_several_processes_ends_without_finalising_python(launched: bool, code: int | None) -> None:
    """Where gloo's threads live on, finalising is what kills them, and the process with them."""
    environment = {key: value for key, value in os.environ.items() if key not in ("WORLD_SIZE", "RANK", "LOCAL_RANK")}
    if launched:
        environment |= {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}
    ended = subprocess.run(
        [sys.executable, "-c", LEAVING.format(code=code)], env=environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == (code or 0), ended.stderr
    assert ended.stdout == "done exit functions ran\n" + ("" if launched else "finalised\n")
