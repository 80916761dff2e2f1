"""A loss that is no number: the training stops with the step saved, and the step can be replayed."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("rich")

from lpd_tools.data.token_cache import load_token_cache
from lpd_tools.training import loop
from lpd_tools.training.failure import TrainingDivergedError, read_failure
from lpd_tools.training.gradients import clip_gradients
from lpd_tools.training.replay import Replay, replay
from lpd_tools.training.tokenizer import TokenizerTask, train_tokenizer
from lpd_tools.training.transformer import TransformerTask, make_batch, train
from training_runs import lpd_config, make_cache, newest_state, tokenizer_config

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def cache_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cache(tmp_path_factory.mktemp("tokens"))


def break_weights(monkeypatch: pytest.MonkeyPatch, at_step: int) -> None:
    """From that step on, the second block's fc2 has an infinite weight."""
    batch = TransformerTask.batch

    def broken(self: TransformerTask, step: int, rows: slice) -> object:
        if step == at_step:
            with torch.no_grad():
                self.network.blocks[1].mlp.fc2.weight[0, 0] = torch.inf
        return batch(self, step, rows)

    monkeypatch.setattr(TransformerTask, "batch", broken)


def test_a_loss_that_is_no_number_stops_the_training_and_can_be_replayed(
    cache_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = lpd_config(cache_path, tmp_path / "run", save_every_s=0.0, dropout=0.1, micro_batch_size=3)
    with monkeypatch.context() as patch:
        break_weights(patch, at_step=5)
        with pytest.raises(TrainingDivergedError, match=r"loss is (nan|inf) .*step 5 .*failed/step_000000005_rank_0"):
            train(config)
    path = tmp_path / "run" / "failed" / "step_000000005_rank_0.pt"
    failure = read_failure(path)
    cache = load_token_cache(cache_path)
    task = TransformerTask(config, cache, CPU)
    expected = make_batch(cache, task.shuffle.batch(5), config, 5)
    for name in ("tokens", "labels", "orders"):
        assert torch.equal(failure["batch"][name], getattr(expected, name))
    assert failure["batch"]["group_sizes"] == expected.group_sizes
    assert (failure["step"], failure["settings"]["seed"]) == (5, 0)
    found = replay(Replay(str(path)))
    assert (found.step, found.first_output) == (5, "blocks.1.mlp.fc2")
    assert "head.weight" in found.gradients
    assert "step 5: loss nan; first output that is not finite: blocks.1.mlp.fc2" in str(found)
    # The weights of step 4 are still there, untouched, and the training can go on from them.
    assert newest_state(tmp_path / "run")["progress"]["done"] == 5
    train(config)
    assert newest_state(tmp_path / "run")["progress"]["done"] == 8


def test_replaying_gives_the_loss_of_the_step(
    cache_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gradient that is no number, of a loss that is one: the same loss comes out, dropout and all."""
    config = lpd_config(cache_path, tmp_path, dropout=0.3, micro_batch_size=3, label_drop=0.5)
    monkeypatch.setattr(loop, "clip_gradients", lambda network, limit: clip_gradients(network, limit) * float("nan"))
    with pytest.raises(TrainingDivergedError, match=r"loss is 2\..* norm nan in step 0") as error:
        train(config)
    found = replay(Replay(str(tmp_path / "failed" / "step_000000000_rank_0.pt")))
    assert f"loss is {found.loss:g} and" in str(error.value)
    assert (found.first_output, found.gradients) == (None, [])


def test_a_failed_tokenizer_leaves_its_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = TokenizerTask.losses

    def broken(self: TokenizerTask, model: torch.nn.Module, batch: object) -> dict[str, torch.Tensor]:
        found = losses(self, model, batch)
        return found | {"loss": found["loss"] * torch.nan}

    monkeypatch.setattr(TokenizerTask, "losses", broken)
    with pytest.raises(TrainingDivergedError, match="step 0"):
        train_tokenizer(tokenizer_config(tmp_path))
    path = tmp_path / "failed" / "step_000000000_rank_0.pt"
    assert read_failure(path)["batch"]["images"].shape == (4, 3, 32, 32)
    with pytest.raises(ValueError, match="file must be of a training of the transformer, got TokenizerTraining"):
        replay(Replay(str(path)))


def test_other_files_are_not_replayed(cache_path: Path, tmp_path: Path) -> None:
    train(dataclasses.replace(lpd_config(cache_path, tmp_path), steps=1))
    with pytest.raises(ValueError, match="is no file to replay"):
        replay(Replay(str(tmp_path / "checkpoints" / "step_000000001.pt")))
    with pytest.raises(ValueError, match="is no file to replay"):
        replay(Replay(str(tmp_path / "model.safetensors")))
    with pytest.raises(FileNotFoundError, match="there is none at"):
        replay(Replay(str(tmp_path / "none.pt")))
