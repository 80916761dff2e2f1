"""Checkpoints on disk: atomic, the newest few and the best kept, damaged and foreign ones, a full disk."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("typer")

from lpd_tools.training.checkpoints import BEST, CheckpointFolder, DamagedCheckpointError, read_checkpoint
from lpd_tools.training.state import TrainingState, parameter_groups


def state(step: int, **settings: Any) -> dict[str, Any]:
    return {"settings": {"dim": 32, "ch_mult": (1, 2), **settings}, "step": step, "weight": torch.full((3,), step)}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_newest_and_best_are_kept(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "run", keep=2)
    assert folder.newest({}) is None
    for step, best in ((1, True), (2, True), (3, False), (4, False), (10, False)):
        folder.save(state(step), step, best=best)
    assert names(tmp_path / "run") == [BEST, "step_000000004.pt", "step_000000010.pt"]
    assert read_checkpoint(tmp_path / "run" / BEST)["step"] == 2
    newest = folder.newest({"dim": 32, "ch_mult": (1, 2)})
    assert newest is not None
    assert torch.equal(newest[1]["weight"], torch.full((3,), 10))


def test_the_best_is_copied_where_there_are_no_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", refuse)
    folder = CheckpointFolder(tmp_path, keep=1)
    folder.save(state(1), 1, best=True)
    folder.save(state(2), 2)
    assert names(tmp_path) == [BEST, "step_000000002.pt"]
    assert read_checkpoint(tmp_path / BEST)["step"] == 1


def test_a_checkpoint_is_on_disk_before_an_older_one_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = CheckpointFolder(tmp_path, keep=1)
    folder.save(state(1), 1)
    synced: list[tuple[str, list[str]]] = []
    fsync = os.fsync

    def watch(handle: int) -> None:
        fsync(handle)
        synced.append((str(Path(f"/proc/self/fd/{handle}").readlink()), names(tmp_path)))

    monkeypatch.setattr(os, "fsync", watch)
    folder.save(state(2), 2)
    (file, during), (directory, after) = synced
    assert Path(file).name.startswith(".step_000000002.pt.")
    assert "step_000000002.pt" not in during
    assert (directory, after) == (str(tmp_path), ["step_000000001.pt", "step_000000002.pt"])
    assert names(tmp_path) == ["step_000000002.pt"]


@pytest.mark.parametrize("fault", ["fsync", "write"])
def test_a_full_disk_leaves_the_older_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    folder = CheckpointFolder(tmp_path)
    with monkeypatch.context() as patch:
        if fault == "fsync":
            patch.setattr(os, "fsync", full_disk)
        else:
            patch.setattr(torch, "save", full_disk)
        with pytest.raises(OSError, match=r"step_000000001\.pt' could not be written .*No space left.*there is none"):
            folder.save(state(1), 1)
    folder.save(state(2), 2)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full_disk)
        with pytest.raises(OSError, match=r"step_000000003\.pt' could not .*step_000000002\.pt' is still there"):
            folder.save(state(3), 3)
    assert names(tmp_path) == ["step_000000002.pt"]
    newest = folder.newest({})
    assert newest is not None
    assert newest[1]["step"] == 2


def full_disk(*arguments: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_torch_says_a_full_disk_in_a_way_that_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = torch.save
    monkeypatch.setattr(torch, "save", lambda value, path: save(value, "/dev/full"))
    with pytest.raises(OSError, match=r"step_000000001\.pt' could not be written"):
        CheckpointFolder(tmp_path).save(state(1) | {"weight": torch.zeros(100_000)}, 1)
    assert names(tmp_path) == []


def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    for step in (1, 2):
        path = folder.save(state(step), step)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.warns(UserWarning, match=r"step_000000002\.pt' is not a readable checkpoint.*an older one is tried"):
        newest = folder.newest({"dim": 32})
    assert newest is not None
    assert newest[1]["step"] == 1
    (tmp_path / "step_000000001.pt").write_bytes(b"")
    with pytest.warns(UserWarning, match="tried"), pytest.raises(ValueError, match=r"no checkpoint in .* can be read"):
        folder.newest({})


def test_a_damaged_newest_does_not_take_the_place_of_those_that_follow(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=1)
    folder.save(state(9), 9)
    (tmp_path / "step_000000005.pt").write_bytes((tmp_path / "step_000000009.pt").read_bytes())
    (tmp_path / "step_000000009.pt").write_bytes(b"PK")
    assert folder.save(state(6), 6).is_file()  # of the training that went on from step 5
    newest = folder.newest({})
    assert newest is not None
    assert newest[1]["step"] == 6
    assert names(tmp_path) == ["step_000000006.pt"]


def test_the_best_is_the_last_resort(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=1)
    folder.save(state(1), 1, best=True)
    folder.save(state(2), 2).write_bytes(b"PK")
    with pytest.warns(UserWarning, match="step_000000002"):
        newest = folder.newest({})
    assert newest is not None
    assert newest[1]["step"] == 1


def test_other_settings_and_foreign_files_are_refused(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    path = folder.save(state(1), 1)
    with pytest.raises(ValueError, match=r"dim is 64, but the training in '.*step_000000001\.pt' began with 32"):
        folder.newest({"dim": 64})
    torch.save([1], path)
    with pytest.raises(DamagedCheckpointError, match="holds no training checkpoint of this version"):
        read_checkpoint(path)


class Payload:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("this must never run",)


def test_pickled_code_is_never_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(state(1) | {"format": 2, "weights": Payload()}, tmp_path / "step_000000001.pt")
    with pytest.raises(DamagedCheckpointError, match="not a readable checkpoint: it pickles more than tensors: print"):
        read_checkpoint(tmp_path / "step_000000001.pt")
    assert capsys.readouterr().out == ""


def test_unfinished_files_are_removed(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    folder.save(state(1), 1)
    (tmp_path / ".step_000000002.pt.x1y2").write_bytes(b"half")
    folder.remove_unfinished()
    assert names(tmp_path) == ["step_000000001.pt"]


# what is learnt


def trained(steps: int) -> tuple[torch.nn.Module, TrainingState]:
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))
    network[0].bias.requires_grad_(False)
    optimizer = torch.optim.AdamW(parameter_groups(network, 0.1), lr=0.01, fused=True)
    learnt = TrainingState(network, optimizer)
    for step in range(steps):
        network(torch.randn(5, 3, generator=torch.Generator().manual_seed(step))).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        learnt.update_average(0.9, step)
    return network, learnt


def test_everything_learnt_is_stored_and_put_back(tmp_path: Path) -> None:
    whole, learnt = trained(5)
    torch.save(learnt.gathered(), tmp_path / "state.pt")
    other, restored = trained(1)
    restored.restore(torch.load(tmp_path / "state.pt", weights_only=True))
    for network, state in ((whole, learnt), (other, restored)):
        network(torch.ones(5, 3)).square().sum().backward()
        state.optimizer.step()
        state.update_average(0.9, 5)
    for name, value in learnt.weights.items():
        assert torch.equal(restored.weights[name], value), name
        assert torch.equal(restored.average[name], learnt.average[name]), name
    assert int(restored.average["1.num_batches_tracked"]) == 6


def test_moving_average() -> None:
    network = torch.nn.Linear(2, 2)
    learnt = TrainingState(network, torch.optim.AdamW(network.parameters()))
    with torch.no_grad():
        before = network.weight.clone()
        network.weight.add_(1.0)
    learnt.update_average(0.75, step=1000)
    assert torch.allclose(learnt.average["weight"], before + 0.25)
    # In the first steps 0.75 would be too slow: at step 0 the decay is 0.1.
    learnt.update_average(0.75, step=0)
    assert torch.allclose(learnt.average["weight"], before + 0.25 * 0.1 + 0.9)
    learnt.update_average(0.0, step=1000)
    assert torch.equal(learnt.average["weight"], network.weight)


def test_weight_decay_spares_vectors_and_what_is_not_trained() -> None:
    network, _ = trained(0)
    decayed, spared = parameter_groups(network, 0.02)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.02, 0.0)
    assert {id(p) for p in decayed["params"]} == {id(network[0].weight), id(network[2].weight)}
    assert {id(p) for p in spared["params"]} == {id(network[1].weight), id(network[1].bias), id(network[2].bias)}
