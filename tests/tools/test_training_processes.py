"""Training between processes: two of them, by DDP and FSDP2 over gloo, do what one does with the same batch."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from lpd_tools.training.failure import read_failure
from lpd_tools.training.gradients import seed_step
from lpd_tools.training.tokenizer import train_tokenizer
from lpd_tools.training.transformer import LPDTraining, train
from training_runs import (
    as_options,
    column,
    finish,
    lpd_config,
    make_cache,
    newest_state,
    start,
    start_python,
    tokenizer_config,
)

SESSION = Path(__file__).parents[1] / "support" / "training_session.py"
STEPS, TOLERANCE = 20, 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def cache_path(folder: Path) -> Path:
    return make_cache(folder)


def config_in(folder: Path, cache_path: Path, name: str, **changes: Any) -> LPDTraining:
    """Twenty clipped and averaged steps, with a validation in between."""
    config = lpd_config(cache_path, folder / name, steps=STEPS, batch_size=8, decay_steps=5, ema_decay=0.9)
    config = dataclasses.replace(config, clip=0.5, evaluate_every=10, keep=3, weight_decay=0.1)
    return dataclasses.replace(config, **changes)


@pytest.fixture(scope="module")
def alone(folder: Path, cache_path: Path) -> Path:
    """One process: checkpoints after 10 and 20 steps."""
    train(config_in(folder, cache_path, "alone", save_every_s=0.0, keep=STEPS))
    return folder / "alone"


@pytest.fixture(scope="module")
def session(folder: Path, cache_path: Path, alone: Path) -> Path:
    """Two processes: FSDP2 from the beginning and from a checkpoint of one process, a tokenizer, a failure."""
    fsdp = config_in(folder, cache_path, "fsdp", parallel="fsdp", micro_batch_size=2)
    resumed = dataclasses.replace(fsdp, out_dir=str(folder / "fsdp_resumed"))
    (folder / "fsdp_resumed" / "checkpoints").mkdir(parents=True)
    shutil.copy(alone / "checkpoints" / "step_000000010.pt", folder / "fsdp_resumed" / "checkpoints")
    failing = config_in(folder, cache_path, "failing", parallel="fsdp")
    asked = config_in(folder, cache_path, "asked", parallel="fsdp")
    odd = config_in(folder, cache_path, "odd", batch_size=7)
    recomputed = dataclasses.replace(fsdp, out_dir=str(folder / "recomputed"), checkpoint_activations=True)
    plan = [
        (fsdp, None),
        (resumed, None),
        (recomputed, None),
        (tokenizer_config(folder / "tokenizer_2", micro_batch_size=1), None),
        (failing, {"kind": "nan", "rank": 1, "step": 0}),
        (asked, {"kind": "signal", "rank": 1, "step": 3}),
        (odd, None),
    ]
    entries = [
        {"kind": type(config).__name__, "settings": dataclasses.asdict(config), "fault": fault}
        for config, fault in plan
    ]
    (folder / "plan.json").write_text(json.dumps(entries))
    finish(start_python([str(SESSION), str(folder / "plan.json")], processes=2, threads=1))
    return folder


def losses(out_dir: Path) -> list[float]:
    return [float(value) for value in column(out_dir / "steps.csv", "loss")]


def assert_close(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        other = found[name]
        if name.endswith("attn.qkv.bias"):
            # The same vector added to all keys changes no softmax: its gradient is rounding alone, and AdamW, which
            # divides by its size, makes steps of it.
            other, value = (torch.cat([x.chunk(3)[0], x.chunk(3)[2]]) for x in (other, value))
        assert (other - value).norm() <= TOLERANCE * value.norm() + 1e-9, name


def assert_same_training(found: Path, wanted: Path, first: int = 0) -> None:
    assert losses(found) == pytest.approx(losses(wanted)[first:STEPS], rel=TOLERANCE)
    norms = [[float(v) for v in column(out / "steps.csv", "gradient_norm")] for out in (found, wanted)]
    assert min(norms[1]) > 0.5  # or clipping is not tested
    assert norms[0] == pytest.approx(norms[1][first:STEPS], rel=TOLERANCE)
    tests = [column(out / "log.csv", "test_nats_10_steps") for out in (found, wanted)]
    assert float(tests[0][-1]) == pytest.approx(float(tests[1][-1]), rel=TOLERANCE)
    states = [newest_state(out) for out in (found, wanted)]
    for key in ("weights", "average"):
        assert_close(states[0][key], states[1][key])
    for name, moments in states[1]["moments"].items():
        assert states[0]["moments"][name].keys() == moments.keys()
        if not name.endswith("attn.qkv.bias"):
            assert_close(states[0]["moments"][name], moments)


def test_two_processes_train_as_one_by_ddp(folder: Path, cache_path: Path, alone: Path) -> None:
    config = config_in(folder, cache_path, "ddp", parallel="ddp", micro_batch_size=3)
    output = finish(start(["train", *as_options(config)], processes=2, threads=1))
    assert output.count("wrote") == 1
    assert_same_training(folder / "ddp", alone)


def test_two_processes_train_as_one_by_fsdp(session: Path, alone: Path) -> None:
    assert_same_training(session / "fsdp", alone)


def test_fsdp_goes_on_from_the_checkpoint_of_one_process(session: Path, alone: Path) -> None:
    assert_same_training(session / "fsdp_resumed", alone, first=10)


def test_one_process_goes_on_from_a_checkpoint_of_fsdp(session: Path, cache_path: Path, alone: Path) -> None:
    for name, source in (("after_fsdp", session / "fsdp"), ("after_alone", alone)):
        (session / name / "checkpoints").mkdir(parents=True)
        shutil.copy(source / "checkpoints" / "step_000000020.pt", session / name / "checkpoints")
        train(config_in(session, cache_path, name, steps=STEPS + 4, decay_steps=2))
    assert losses(session / "after_fsdp") == pytest.approx(losses(session / "after_alone"), rel=TOLERANCE)
    found, wanted = (newest_state(session / name) for name in ("after_fsdp", "after_alone"))
    assert_close(found["weights"], wanted["weights"])
    assert_close(found["average"], wanted["average"])


def test_activations_are_recomputed_under_fsdp(session: Path, alone: Path) -> None:
    assert_same_training(session / "recomputed", alone)


def test_two_processes_train_the_tokenizer_as_one(session: Path) -> None:
    train_tokenizer(tokenizer_config(session / "tokenizer_1"))
    assert losses(session / "tokenizer_2") == pytest.approx(losses(session / "tokenizer_1"), rel=TOLERANCE)
    found, wanted = (newest_state(session / f"tokenizer_{count}") for count in (2, 1))
    for name in ("count", "total"):
        assert torch.allclose(found["task"][name], wanted["task"][name], rtol=1e-4, atol=1e-5)


def test_a_failure_in_one_process_stops_all_and_is_saved_there(session: Path, cache_path: Path) -> None:
    out = session / "failing"
    errors = [(out / f"error_{rank}.txt").read_text() for rank in (0, 1)]
    assert errors[0] == errors[1]
    assert "TrainingDivergedError: loss is nan" in errors[0]
    assert [path.name for path in (out / "failed").iterdir()] == ["step_000000000_rank_1.pt"]
    failure = read_failure(out / "failed" / "step_000000000_rank_1.pt")
    assert failure["rank"] == 1
    assert failure["batch"]["tokens"].shape == (4, 16)
    assert failure["weights"]["content"].shape == (16 + 10 + 2, 32)


def test_a_signal_to_one_process_stops_all_with_a_checkpoint(session: Path) -> None:
    errors = [(session / "asked" / f"error_{rank}.txt").read_text() for rank in (0, 1)]
    assert all(error.startswith("TrainingStopped: stopped after step 4, as asked") for error in errors)
    state = newest_state(session / "asked")
    assert state["progress"]["done"] == 4
    assert state["weights"]["content"].shape == (16 + 10 + 2, 32)


def test_a_batch_that_cannot_be_shared_out_is_refused(session: Path) -> None:
    error = (session / "odd" / "error_0.txt").read_text()
    assert "batch_size must be a multiple of the 2 processes, got 7" in error


def test_processes_draw_their_own_dropout() -> None:
    draws = []
    for step, rank in ((3, 0), (3, 0), (3, 1), (4, 0)):
        seed_step(7, step, rank)
        draws.append(torch.rand(4))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0], draws[3])
