"""`lpd sample --animate`: frames that show each group, in the order and at the time it was drawn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("rich")

from lpd_tools import animation
from lpd_tools.animation import Recording, overlay, record, record_orders, write_animation
from lpd_tools.cli import app
from PIL import Image
from typer.testing import CliRunner, Result

from lpd_ext.pipeline import LPDPipeline


@pytest.fixture(scope="module")
def pipe() -> LPDPipeline:
    return LPDPipeline.from_pretrained("fashion_mnist")


def lpd(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "200", "TERM": "dumb"}).invoke(app, [str(a) for a in arguments])


def frames_of(path: Path) -> list[tuple[Image.Image, int]]:
    """Frames and their milliseconds."""
    with Image.open(path) as image:
        found = []
        for i in range(image.n_frames):
            image.seek(i)
            image.load()
            found.append((image.convert("RGB"), image.info["duration"]))
    return found


def test_a_recording_is_the_pipelines_drawing_step_by_step(pipe: LPDPipeline) -> None:
    options = {"num_inference_steps": 6, "seeds": 3, "guidance_scale": 2.0}
    recording = record(pipe, [8, 9], "title", **options)
    assert len(recording.seconds) == len(recording.pictures) == 6
    assert recording.seconds == sorted(recording.seconds)
    assert recording.seconds[0] > 0
    previews = list(pipe.stream([8, 9], exact_previews=True, **options))
    for group, preview in enumerate(previews):
        assert np.array_equal(recording.group_of <= group, (preview.tokens >= 0).numpy())
        for found, wanted in zip(recording.pictures[group], preview.images, strict=True):
            assert found.tobytes() == wanted.tobytes()


def made_up(seconds: list[float]) -> Recording:
    """One image of 2 x 2 cells, white where drawn, a cell a group in raster order."""
    white = Image.new("RGB", (8, 8), "white")
    return Recording("made up", seconds, np.arange(4).reshape(1, 2, 2), [[white]] * 4)


def cell(frame: Image.Image, y: int, x: int, left: int = 0) -> tuple[int, ...]:
    """The colour in the middle of a cell of the panel that begins at `left`."""
    side = animation._SIDE // 2
    return frame.getpixel((left + animation._GAP + side * x + side // 2, animation._GAP + side * y + side // 2))


@pytest.mark.parametrize("suffix", [".webp", ".gif"])
def test_frames_show_what_is_drawn_at_their_time(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"new folder/out{suffix}"
    write_animation([made_up([1.0, 2.0, 3.0, 4.0])], path, play_seconds=2.0, hold_seconds=1.0)
    frames = frames_of(path)
    assert len(frames) == 5
    for drawn, (frame, _) in enumerate(frames):
        is_white = [min(cell(frame, y, x)) > 240 for y in (0, 1) for x in (0, 1)]
        assert is_white == [True] * drawn + [False] * (4 - drawn)
    durations = [duration for _, duration in frames]
    assert sum(durations) == pytest.approx(3000, abs=100)
    assert durations[:4] == pytest.approx([500] * 4, abs=51)
    assert durations[4] == pytest.approx(1000, abs=51)


def test_the_cells_of_the_last_group_are_framed_and_the_others_tell_their_turn() -> None:
    white, groups = Image.new("RGB", (8, 8), "white"), np.arange(4).reshape(2, 2)
    frame = overlay(white, groups, 2, 4)
    side = animation._SIDE // 2
    corners = {(y, x): frame.getpixel((x * side + side - 1, y * side)) for y in (0, 1) for x in (0, 1)}
    assert corners[0, 1] == animation._FRESH
    assert animation._FRESH not in (corners[0, 0], corners[1, 0], corners[1, 1])
    assert sum(corners[1, 0]) > sum(corners[1, 1])  # its turn comes sooner
    done = overlay(white, groups, 4, 4)
    assert done.getextrema() == ((255, 255),) * 3


def test_known_cells_of_an_edit_are_there_from_the_beginning() -> None:
    white, groups = Image.new("RGB", (8, 8), "white"), np.array([[-1, 1], [-1, 0]])
    begun = overlay(white, groups, 0, 2)
    side = animation._SIDE // 2
    assert begun.crop((0, 0, side, 2 * side)).getextrema() == ((255, 255),) * 3
    assert max(begun.crop((side, 0, 2 * side, 2 * side)).getextrema()[0]) < 255


def test_recordings_run_on_one_clock(tmp_path: Path) -> None:
    write_animation([made_up([1.0, 2.0, 3.0, 4.0]), made_up([0.5, 1.0, 1.5, 2.0])], tmp_path / "two.webp")
    second = animation._SIDE + animation._GAP
    for frame, _ in frames_of(tmp_path / "two.webp"):
        slow, quick = (sum(min(cell(frame, y, x, left)) > 240 for y in (0, 1) for x in (0, 1)) for left in (0, second))
        assert quick >= slow
        assert abs(min(4, 2 * slow) - quick) <= 2
    assert slow == quick == 4


def test_orders_are_compared_with_the_same_seeds(pipe: LPDPipeline) -> None:
    options = {"num_inference_steps": 8, "seeds": 5}
    first, second = record_orders(pipe, [1], ["locality", "raster:64"], order="locality", **options)
    assert (first.title, second.title) == ("locality, 8 steps", "raster, 64 steps")
    assert second.group_of[0].tolist() == torch.arange(64).view(8, 8).tolist()
    expected = pipe([1], seeds=5, order="raster", num_inference_steps=64)
    assert second.pictures[-1][0].tobytes() == expected.images[0].tobytes()
    (only,) = record_orders(pipe, [1], [], order="random", **options)
    assert only.title == "random, 8 steps"


def test_the_command_writes_an_animation_in_place_of_the_grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ("--animate", "bag.gif", "--compare", "locality,raster:16", "--steps", 4)
    result = lpd("sample", "bag", "-n", 2, *arguments, "--model", "fashion_mnist")
    assert result.exit_code == 0, result.output
    assert "bag.gif" in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["bag.gif"]
    assert len(frames_of(Path("bag.gif"))) > 4


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--compare", "locality"), "compare needs animate, the file to write"),
        (("--animate", "out.gif", "--like", "other.png"), "animate and like exclude each other"),
        (("--animate", "out.mp4"), "animate must end in .webp or .gif, got 'out.mp4'"),
        (("--animate", "out.gif", "--compare", "locality:many"), "each with or without ':steps', got 'locality:many'"),
        (("--animate", "out.gif", "--compare", "locality:65"), "num_inference_steps must be in [1, 64], got 65"),
        (("--animate", "out.gif", "--compare", "locality zigzag"), "zigzag"),
    ],
)
def test_wrong_arguments_write_nothing(
    arguments: tuple[object, ...], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = lpd("sample", "bag", *arguments, "--model", "fashion_mnist")
    assert result.exit_code == 2
    assert sentence in result.stderr
    assert not list(tmp_path.iterdir())
