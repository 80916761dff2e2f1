"""The thread of pixels: what goes together, in which order, and that one failure is one job's."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from PIL import Image

from lpd_ext import pixel_thread
from lpd_ext.drawing import Drawing, pictures
from lpd_ext.pipeline import LPDPipeline
from lpd_ext.pixel_thread import PixelJob, PixelThread

PATIENCE = 60


@pytest.fixture(scope="module")
def drawing() -> Drawing:
    pipe = LPDPipeline.from_pretrained("fashion_mnist")
    return pipe.drawing(pipe.prepare([0] * 8, seeds=0))


class Desk:
    """Jobs by name, and what became of them; decoding is held until it is let go."""

    def __init__(self, drawing: Drawing) -> None:
        self.drawing = drawing
        self.calls: list[list[str]] = []  # what was decoded together
        self.approximate: list[bool] = []  # how
        self.done: list[str] = []
        self.failed: dict[str, Exception] = {}
        self.unwanted: set[str] = set()
        self.names: dict[int, str] = {}
        self.let_go, self.begun = threading.Event(), threading.Event()
        self.thread = PixelThread()

    def pictures(self, wanted: Any, *, approximate: bool = False) -> list[Image.Image]:
        self.begun.set()
        assert self.let_go.wait(PATIENCE)
        names = [self.names[id(tokens)] for _, tokens, _ in wanted]
        self.calls.append(names)
        self.approximate.append(approximate)
        if "bad" in names:
            raise RuntimeError("not finite")
        return [Image.new("RGB", (1, 1))] * len(names)

    def put(self, name: str, is_preview: bool = False, **how: bool) -> None:
        tokens = torch.zeros(8, 8, dtype=torch.int64)
        self.names[id(tokens)] = name
        self.kept = [*getattr(self, "kept", []), tokens]

        def deliver(_: Image.Image) -> None:
            if name == "clumsy":
                raise OSError("no")
            self.done.append(name)

        def fail(error: Exception) -> None:
            self.failed[name] = error

        job = PixelJob(self.drawing, tokens, 0, deliver, fail, lambda: name not in self.unwanted, is_preview)
        self.thread.put(job, **how)

    def end(self) -> None:
        self.let_go.set()
        self.thread.close()
        self.thread.join()


@pytest.fixture
def desk(drawing: Drawing, monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    monkeypatch.setattr(pixel_thread, "_FOR_COMPANY", 3600.0)
    desk = Desk(drawing)
    monkeypatch.setattr(pixel_thread, "pictures", desk.pictures)
    yield desk
    desk.end()


def hold(desk: Desk) -> None:
    """Until the thread is busy with a first job."""
    desk.put("first")
    assert desk.begun.wait(PATIENCE)


def test_what_is_urgent_goes_first_and_alone_the_rest_by_fours(desk: Desk) -> None:
    hold(desk)
    for name in "abcde":
        desk.put(name, may_wait=True)
    desk.put("preview")
    desk.put("U", urgent=True)
    desk.put("V", urgent=True)
    desk.end()
    assert desk.calls == [["first"], ["U", "V"], ["preview", "a", "b", "c"], ["d", "e"]]
    assert desk.done == ["first", "U", "V", "preview", *"abcde"]


@pytest.mark.parametrize("company", ["three more", "a moment", "hurry", "close"])
def test_a_finished_image_waits_for_company(desk: Desk, monkeypatch: pytest.MonkeyPatch, company: str) -> None:
    desk.let_go.set()
    if company == "a moment":
        monkeypatch.setattr(pixel_thread, "_FOR_COMPANY", 0.05)
    desk.put("a", may_wait=True)
    if company != "a moment":
        assert not desk.begun.wait(0.05)
    for name in "bcd" if company == "three more" else "":
        desk.put(name, may_wait=True)
    if company == "hurry":
        desk.thread.hurry()
    if company == "close":
        desk.end()
    assert desk.begun.wait(PATIENCE)
    desk.end()
    assert desk.calls == [["a", "b", "c", "d"] if company == "three more" else ["a"]]


def test_the_engine_may_wait_for_what_is_urgent(desk: Desk) -> None:
    hold(desk)
    desk.thread.wait_for_urgent(PATIENCE)  # of which there is nothing
    desk.put("a", may_wait=True)
    desk.put("U", urgent=True)
    desk.thread.wait_for_urgent(0.01)
    assert desk.done == []  # no longer than that
    threading.Timer(0.05, desk.let_go.set).start()
    desk.thread.wait_for_urgent(PATIENCE)
    assert desk.done == ["first", "U"]


def test_a_failure_is_that_of_one_job(desk: Desk) -> None:
    hold(desk)
    for name in ("a", "bad", "clumsy", "b"):
        desk.put(name)
    desk.end()
    assert desk.calls == [["first"], ["a", "bad", "clumsy", "b"], ["a"], ["bad"], ["clumsy"], ["b"]]
    assert desk.done == ["first", "a", "b"]
    assert {name: str(error) for name, error in desk.failed.items()} == {"bad": "not finite", "clumsy": "no"}


def test_nobody_waits_for_what_was_cancelled(desk: Desk) -> None:
    hold(desk)
    for name in "abc":
        desk.put(name)
    desk.unwanted |= {"a", "c"}
    desk.end()
    assert desk.calls == [["first"], ["b"]]


def test_pictures_of_another_tokenizer_do_not_go_along(desk: Desk) -> None:
    hold(desk)
    desk.put("a")
    mine, other = desk.drawing, LPDPipeline.from_pretrained("fashion_mnist")
    desk.drawing = other.drawing(mine.request)
    desk.put("b")
    desk.put("c")
    desk.end()
    assert desk.calls == [["first"], ["a"], ["b", "c"]]


def test_previews_do_not_go_with_finished_images(desk: Desk) -> None:
    hold(desk)
    for name in "abcd":
        desk.put(name, is_preview=name in "bc")
    desk.end()
    assert desk.calls == [["first"], ["a"], ["b", "c"], ["d"]]
    assert desk.approximate == [False, False, True, False]


def test_pictures_of_many_drawings_are_those_of_each(drawing: Drawing) -> None:
    """Each drawing's last step is done to its own images."""
    tokens = torch.randint(512, (4, 8, 8), generator=torch.Generator().manual_seed(0))
    tokens[0, 3:] = -1

    def brighter(by: float) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        return lambda images, rows: images + by * rows[:, None, None, None]

    pipe = LPDPipeline.from_pretrained("fashion_mnist")
    drawings = [pipe.drawing(drawing.request, finish=brighter(by)) for by in (0.0, 0.1, 0.2)]
    wanted = [(drawings[0], tokens[0], 1), (drawings[1], tokens[1], 1), (drawings[2], tokens[2], 3)]
    found = pictures(wanted)
    for (one, grid, row), image in zip(wanted, found, strict=True):
        grids = torch.zeros(8, 8, 8, dtype=torch.int64)
        grids[row] = grid
        (alone,) = one.images(grids, rows=torch.tensor([row]))
        assert image.tobytes() == alone.tobytes()
