"""A training that is killed, or asked to stop, and run again: bit for bit the same as one that was not."""

from __future__ import annotations

import dataclasses
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from lpd_tools.training.stopping import TrainingStopped
from lpd_tools.training.transformer import LPDTraining, TransformerTask, train
from training_runs import (
    as_options,
    column,
    differences,
    finish,
    lpd_config,
    make_cache,
    newest_state,
    start,
    start_python,
)

from lpd_ext.state_files import read_state_dict

STEPS = 150

# `lpd`, but killed when half of its third checkpoint is written.
DIES_WHILE_SAVING = """
import os, signal, torch
from lpd_tools.__main__ import main

save, count = torch.save, 0

def half(value, path):
    global count
    save(value, path)
    count += 1
    if count == 3:
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)

torch.save = half
main()
"""


@pytest.fixture(scope="module")
def cache_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cache(tmp_path_factory.mktemp("tokens"))


def config_in(out_dir: Path, cache_path: Path) -> LPDTraining:
    """A training with all that must be put back: dropout, averages, moments, a schedule, sums of losses."""
    config = lpd_config(cache_path, out_dir, steps=STEPS, dropout=0.2, ema_decay=0.95, warmup_steps=20)
    return dataclasses.replace(config, decay_steps=60, evaluate_every=40, log_every=1)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, cache_path: Path) -> Path:
    out = tmp_path_factory.mktemp("unbroken")
    train(config_in(out, cache_path))
    return out


def assert_identical(found: Path, wanted: Path) -> None:
    assert differences(newest_state(found), newest_state(wanted)) == []
    for file, names in (
        ("steps.csv", ("step", "lr", "loss", "gradient_norm")),
        ("log.csv", ("step", "train_loss", "test_nats_10_steps", "test_nats_16_steps")),
    ):
        for name in names:
            assert column(found / file, name) == column(wanted / file, name)
    models = [read_state_dict(out / "model.safetensors") for out in (found, wanted)]
    assert differences(*models) == []


def wait_for_rows(process: subprocess.Popen[str], out: Path, count: int) -> None:
    """Until the training has logged so many steps, and a checkpoint is there."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[0]
        rows = (out / "steps.csv").read_text().count("\n") if (out / "steps.csv").exists() else 0
        if rows > count and list((out / "checkpoints").glob("step_*.pt")):
            return
        time.sleep(0.002)
    raise AssertionError(f"no {count} steps within a minute")


def test_killed_at_random_steps_it_goes_on_exactly(cache_path: Path, unbroken: Path, tmp_path: Path) -> None:
    # Saved now and then, so that the kills come at any distance after the last checkpoint.
    config = dataclasses.replace(config_in(tmp_path, cache_path), save_every_s=0.05)
    row = 0
    for _ in range(2):
        row += random.randint(2, 25)
        process = start(["train", *as_options(config)], threads=torch.get_num_threads())
        wait_for_rows(process, tmp_path, row)
        process.kill()
        finish(process, code=-signal.SIGKILL)
        row = len(column(tmp_path / "steps.csv", "step"))
    assert not (tmp_path / "model.safetensors").exists()
    train(config)
    assert_identical(tmp_path, unbroken)


def test_killed_while_it_saves_it_goes_on_exactly(cache_path: Path, unbroken: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(config_in(tmp_path, cache_path), save_every_s=0.0)
    arguments = ["-c", DIES_WHILE_SAVING, "train", *as_options(config)]
    finish(start_python(arguments, threads=torch.get_num_threads()), code=-signal.SIGKILL)
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left[0].startswith(".step_000000003.pt.")
    assert left[1:] == ["step_000000001.pt", "step_000000002.pt"]
    train(config)
    assert_identical(tmp_path, unbroken)
    assert not [path for path in (tmp_path / "checkpoints").iterdir() if path.name.startswith(".")]


def test_a_truncated_newest_checkpoint_costs_only_its_steps(cache_path: Path, unbroken: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(config_in(tmp_path, cache_path), save_every_s=0.0)
    train(dataclasses.replace(config, steps=30, decay_steps=0))
    newest = tmp_path / "checkpoints" / "step_000000030.pt"
    newest.write_bytes(newest.read_bytes()[:1000])
    with pytest.warns(UserWarning, match=r"step_000000030\.pt' is not a readable checkpoint.*an older one is tried"):
        train(config)
    assert_identical(tmp_path, unbroken)


def test_sigterm_saves_and_ends_well(cache_path: Path, unbroken: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(config_in(tmp_path, cache_path), save_every_s=1e9)
    process = start(["train", *as_options(config)], threads=torch.get_num_threads())
    deadline = time.monotonic() + 60
    while not (tmp_path / "steps.csv").exists() and time.monotonic() < deadline:
        time.sleep(0.002)
    process.terminate()
    output = finish(process, code=0)
    step = newest_state(tmp_path)["progress"]["done"]
    assert 0 < step < STEPS
    assert f"stopped after step {step}, as asked; the same command goes on from" in output.replace("\n", " ")
    assert column(tmp_path / "steps.csv", "step")[-1] == str(step)
    assert not (tmp_path / "model.safetensors").exists()
    train(config)
    assert_identical(tmp_path, unbroken)


def test_sigint_is_taken_down_once(cache_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = TransformerTask.batch
    before = signal.getsignal(signal.SIGINT)  # ignored where the tests run in the background of a shell

    def interrupted(self: TransformerTask, step: int, rows: slice) -> object:
        if step == 4:
            os.kill(os.getpid(), signal.SIGINT)
            # The second one does what it always did.
            assert signal.getsignal(signal.SIGINT) is before
        return batch(self, step, rows)

    monkeypatch.setattr(TransformerTask, "batch", interrupted)
    with pytest.raises(TrainingStopped, match="stopped after step 5"):
        train(config_in(tmp_path, cache_path))
    assert newest_state(tmp_path)["progress"]["done"] == 5
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_full_disk_ends_the_training_with_what_is_left(
    cache_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(config_in(tmp_path, cache_path), save_every_s=0.0)
    save = torch.save

    def full(value: dict[str, dict[str, int]], path: Path) -> None:
        if value["progress"]["done"] == 7:
            raise OSError(28, "No space left on device")
        save(value, path)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(OSError, match=r"step_000000007.* could not be written .*step_000000006\.pt' is still"):
            train(config)
    train(dataclasses.replace(config, steps=8))
    assert column(tmp_path / "steps.csv", "step") == [str(step) for step in range(1, 9)]


def test_other_settings_or_tokens_are_no_resuming(cache_path: Path, tmp_path: Path) -> None:
    config = lpd_config(cache_path, tmp_path / "run", steps=1)
    train(config)
    with pytest.raises(ValueError, match=r"learning_rate is 0\.5, but the training in .* began with 0\.0015"):
        train(dataclasses.replace(config, learning_rate=0.5))
    for name, others in (
        ("grid", make_cache(tmp_path / "finer", levels=3)),
        ("vocab_size", make_cache(tmp_path / "wider", codes=32)),
    ):
        with pytest.raises(ValueError, match=f"{name} is .*, but the training in"):
            train(dataclasses.replace(config, tokens=str(others)))
    longer = dataclasses.replace(config, steps=2, decay_steps=1, evaluate_every=1, evaluate_images=7, save_every_s=9.0)
    train(dataclasses.replace(longer, micro_batch_size=2, keep=1))
    assert column(tmp_path / "run" / "log.csv", "step") == ["1", "2"]
