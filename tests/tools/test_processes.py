"""The processes of a run: how they are joined, for how long they wait, and which device each has."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("typer")
pytest.importorskip("rich")

from lpd_tools.evaluation.generate import drawing_processes
from lpd_tools.processes import Processes, processes

CPU = torch.device("cpu")


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, timedelta]]:
    """What torch is asked for by the second of two processes, on a machine that seems to have two GPUs."""
    calls: list[tuple[str, timedelta]] = []
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
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


def test_one_process_joins_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with processes("cpu") as group:
        assert not dist.is_initialized()
        group.wait()
        assert group.is_first
        assert group == Processes(0, 1, CPU)
        assert group.share(6) == slice(0, 6)


def test_a_batch_is_shared_out_evenly_or_refused() -> None:
    assert Processes(1, 2, CPU).share(8) == slice(4, 8)
    with pytest.raises(ValueError, match="batch_size must be a multiple of the 2 processes, got 7"):
        Processes(1, 2, CPU).share(7)


def test_a_device_is_checked_before_anything_is_joined(joined: list[tuple[str, timedelta]]) -> None:
    with pytest.raises(ValueError, match="device must be one of"), processes("cuda:2"):
        pass
    assert joined == []
