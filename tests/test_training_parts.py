"""What the training programs are made of: data, states, logs, schedules, measures and the judge."""

from __future__ import annotations

import itertools
import math
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from lpd_tools.data.fashion_mnist import epoch_batches, load_fashion_mnist
from lpd_tools.evaluation.metrics import centre_psnr, psnr
from lpd_tools.training.checkpointing import (
    append_csv,
    autocast_dtype,
    drop_rows_after,
    learning_rate,
    load_state,
    save_state,
    update_ema,
)
from lpd_tools.training.judge import JudgeTraining, augment, grey, load_judge, predict, train_judge

DATA = Path(__file__).parent / "data" / "fashion_mnist"


# batches


def take(batches: Iterator[Tensor], count: int) -> list[list[int]]:
    return [next(batches).tolist() for _ in range(count)]


def test_batches_visit_every_image_once_and_resume() -> None:
    whole = take(epoch_batches(10, 3, seed=5), 9)
    for epoch in range(3):
        seen = [i for batch in whole[3 * epoch : 3 * epoch + 3] for i in batch]
        assert len(set(seen)) == 9
    assert whole[:3] != whole[3:6]
    assert take(epoch_batches(10, 3, seed=5, start_step=4), 5) == whole[4:]
    assert take(epoch_batches(10, 3, seed=6), 9) != whole
    with pytest.raises(ValueError, match=r"batch_size must be in 1\.\.10, got 11"):
        next(epoch_batches(10, 11, seed=0))


# checkpointing


def test_failed_save_leaves_the_old_state(tmp_path: Path) -> None:
    path = tmp_path / "run" / "state.pt"
    save_state({"step": 1, "weight": torch.ones(3), "settings": {"seed": 0}}, path)
    with pytest.raises((pickle.PicklingError, AttributeError, TypeError)):
        save_state({"step": 2, "bad": lambda: None}, path)
    state = load_state(path, {"seed": 0})
    assert state is not None
    assert state["step"] == 1
    assert [p.name for p in path.parent.iterdir()] == ["state.pt"]
    assert load_state(tmp_path / "none.pt", {}) is None


def test_damaged_and_foreign_states_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    save_state({"step": 1, "settings": {"dim": 32, "ch_mult": (1, 2)}}, path)
    assert load_state(path, {"dim": 32, "ch_mult": (1, 2)}) is not None
    with pytest.raises(ValueError, match=r"dim is 64, but the training in '.*state\.pt' began with 32"):
        load_state(path, {"dim": 64})
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"state\.pt' is not a readable training state"):
        load_state(path, {})
    torch.save([1], path)
    with pytest.raises(ValueError, match=r"state\.pt' holds no training state"):
        load_state(path, {})


class Payload:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("this must never run",)


def test_pickled_code_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"model": Payload()}, tmp_path / "state.pt")
    with pytest.raises(ValueError, match="not a readable training state: UnpicklingError"):
        load_state(tmp_path / "state.pt", {})
    assert capsys.readouterr().out == ""


def test_learning_rate_shape() -> None:
    rates = [learning_rate(step, 100, 2.0, warmup=10, decay=40) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert rates[10:61] == [2.0] * 51
    assert rates[80] == pytest.approx(1.0)
    assert all(a > b for a, b in itertools.pairwise(rates[60:]))
    assert 0 < rates[99] < 0.01


def test_moving_average() -> None:
    layer = torch.nn.Linear(2, 2)
    average = {name: torch.zeros_like(value) for name, value in layer.state_dict().items()}
    update_ema(average, layer, 0.75)
    assert torch.allclose(average["weight"], 0.25 * layer.weight)


def test_precision_names() -> None:
    assert autocast_dtype("fp32") is None
    assert autocast_dtype("bf16") == torch.bfloat16
    with pytest.raises(ValueError, match="precision must be auto, fp32 or bf16, got 'half'"):
        autocast_dtype("half")


def test_csv_log(tmp_path: Path) -> None:
    for step in (1, 2):
        append_csv(tmp_path / "log.csv", {"step": step, "loss": step / 3})
    assert (tmp_path / "log.csv").read_text().split() == ["step,loss", "1,0.333333", "2,0.666667"]
    drop_rows_after(tmp_path / "log.csv", 1)
    append_csv(tmp_path / "log.csv", {"step": 2, "loss": 0.5})
    drop_rows_after(tmp_path / "none.csv", 1)
    assert (tmp_path / "log.csv").read_text().split() == ["step,loss", "1,0.333333", "2,0.5"]
    drop_rows_after(tmp_path / "log.csv", 0)
    append_csv(tmp_path / "log.csv", {"step": 1, "loss": 0.25})
    assert (tmp_path / "log.csv").read_text().split() == ["step,loss", "1,0.25"]


def test_log_survives_a_crash_while_rows_are_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2):
        append_csv(tmp_path / "log.csv", {"step": step})
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", lambda file: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            drop_rows_after(tmp_path / "log.csv", 1)
    assert (tmp_path / "log.csv").read_text().split() == ["step", "1", "2"]


# measures


def test_psnr() -> None:
    pixels = torch.full((2, 28, 28), 100, dtype=torch.uint8)
    assert psnr(torch.zeros(4), torch.full((4,), 25.5)) == pytest.approx(20)
    assert centre_psnr(torch.full((2, 1, 28, 28), 102.55 / 127.5 - 1), pixels) == pytest.approx(40, abs=1e-3)
    assert psnr(pixels, pixels) == math.inf


# judge


def test_judge_learns_and_is_stored(tmp_path: Path) -> None:
    path = tmp_path / "judge.safetensors"
    config = JudgeTraining(out=str(path), data_dir=str(DATA), epochs=10, batch_size=20, precision="fp32")
    accuracy = train_judge(config)
    assert accuracy > 0.5
    test = load_fashion_mnist("test", DATA)
    right = predict(load_judge(path), grey(test)) == test.labels
    assert right.float().mean().item() == pytest.approx(accuracy)
    assert len(path.with_suffix(".csv").read_text().splitlines()) == 11
    with pytest.raises(FileNotFoundError, match="train-judge"):
        load_judge(tmp_path / "none.safetensors")


def test_augmented_images_are_shifted_or_mirrored() -> None:
    images = torch.full((40, 1, 28, 28), -1.0)
    images[:, :, 14, 10] = 1
    moved = augment(images, torch.Generator().manual_seed(0))
    assert moved.shape == images.shape
    columns = {int(image.argmax()) % 28 for image in moved}
    assert len(columns) == 2
    assert sum(columns) in range(27 - 4, 27 + 5)
