"""Cancelling: a drawing stops between two groups and tells what it has; nothing is left behind."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lpd_ext import sampler
from lpd_ext.cancel import as_check
from lpd_ext.decode_state import DecodeState
from lpd_ext.pipeline import LPDPipeline


@pytest.fixture(scope="module")
def pipe() -> LPDPipeline:
    return LPDPipeline.from_pretrained("fashion_mnist")


def after(calls: int) -> Callable[[], bool]:
    """Says yes once it has been asked more often."""
    asked = 0

    def cancel() -> bool:
        nonlocal asked
        asked += 1
        return asked > calls

    return cancel


@pytest.fixture
def states(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[DecodeState]]:
    """The states, with their caches, of the decodes that begin, as long as something holds them."""
    begun: list[weakref.ref[DecodeState]] = []

    class Watched(DecodeState):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            begun.append(weakref.ref(self))

    monkeypatch.setattr(sampler, "DecodeState", Watched)
    return begun


@pytest.mark.parametrize("groups", [0, 1, 3])
def test_what_is_drawn_is_what_the_whole_would_have_had(
    pipe: LPDPipeline, groups: int, states: list[weakref.ref[DecodeState]]
) -> None:
    request = pipe.prepare([3, "bag"], seeds=1)
    whole = pipe([3, "bag"], seeds=1).tokens
    out = pipe([3, "bag"], seeds=1, cancel=after(groups))
    assert out.cancelled
    drawn = out.tokens >= 0
    assert drawn.sum((1, 2)).tolist() == [sum(request.group_sizes[0][:groups])] * 2
    assert torch.equal(out.tokens[drawn], whole[drawn])
    assert [image.size for image in out.images] == [(32, 32)] * 2
    assert out.seeds == [1, 2]
    assert len(states) == 2
    assert [state() for state in states] == [None, None]
    again = pipe([3, "bag"], seeds=1, cancel=after(100))
    assert not again.cancelled
    assert torch.equal(again.tokens, whole)


def test_another_thread_cancels(pipe: LPDPipeline, states: list[weakref.ref[DecodeState]]) -> None:
    cancel, first_group, results = threading.Event(), threading.Event(), []

    def on_step_end(step: int, num_steps: int) -> None:
        first_group.set()
        assert cancel.wait(10)

    def draw() -> None:
        results.append(pipe("coat", seeds=1, cancel=cancel, callback_on_step_end=on_step_end))

    thread = threading.Thread(target=draw)
    thread.start()
    assert first_group.wait(10)
    cancel.set()
    thread.join(10)
    (out,) = results
    assert out.cancelled
    assert (out.tokens >= 0).sum() == 1
    assert states[0]() is None
    assert not pipe("coat", seeds=1).cancelled


def test_a_stream_ends(pipe: LPDPipeline, states: list[weakref.ref[DecodeState]]) -> None:
    cancel = threading.Event()
    seen = []
    for preview in pipe.stream("coat", seeds=1, cancel=cancel):
        seen.append(preview.step)
        if preview.step == 2:
            cancel.set()
    assert seen == [1, 2]
    assert states[0]() is None
    stream = pipe.stream("coat", seeds=1)  # nor does one that is left alone keep anything
    next(stream)
    assert states[1]() is not None
    del stream
    gc.collect()
    assert states[1]() is None


def test_an_edit_that_is_cancelled_keeps_what_is_known(pipe: LPDPipeline) -> None:
    picture = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mask = torch.zeros(32, 32)
    mask[8:24, 8:24] = 1
    for groups in (0, 3):  # and one step of prefill
        out = pipe.inpaint(picture, mask, 3, seeds=1, cancel=after(groups + 1))
        assert out.cancelled
        assert torch.equal(out.images[0][:, mask == 0], picture[:, mask == 0])
        undrawn = (out.tokens[0] < 0).repeat_interleave(4, 0).repeat_interleave(4, 1)
        assert undrawn.sum() == 16 * (16 - groups)  # a group of one cell each
        assert (out.images[0][:, undrawn] == 0).all()


def test_every_step_asks_once(pipe: LPDPipeline) -> None:
    asked = 0

    def cancel() -> bool:
        nonlocal asked
        asked += 1
        return False

    assert not pipe("coat", seeds=1, num_inference_steps=7, cancel=cancel).cancelled
    assert asked == 7


def test_what_can_cancel() -> None:
    event = threading.Event()
    check = as_check(event)
    assert not check()
    event.set()
    assert check()
    assert not as_check(None)()
    assert as_check(lambda: 1)() is True
    with pytest.raises(TypeError, match=r"cancel must be an event such as threading.Event, or a callable, got True"):
        as_check(True)


def test_a_wrong_cancel_is_refused_at_once(pipe: LPDPipeline) -> None:
    with pytest.raises(TypeError, match="cancel must be an event"):
        pipe("coat", seeds=1, cancel=3)
    with pytest.raises(TypeError, match="cancel must be an event"):
        pipe.stream("coat", seeds=1, cancel=3)
