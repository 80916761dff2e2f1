"""Decodes that someone watches or may cancel, by a graph for each step: the same tokens, and nothing kept too long.

The recorder stands in for CUDA's graphs, as in test_cuda_graphs.py.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Iterator

import pytest
import torch
from decodes import random_model, request_for
from recorder import Recorder
from torch import Tensor

from lpd_ext import sampler
from lpd_ext.cuda_graphs import DecodeGraphs
from lpd_ext.decode_state import DecodeState
from lpd_ext.model import LPDModel
from lpd_ext.pace import Pace
from lpd_ext.pipeline import LPDPipeline
from lpd_ext.request import DecodeRequest
from lpd_ext.sampler import decode, generate


@pytest.fixture
def model() -> LPDModel:
    return random_model(32, (4, 4))


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def graphs(recorder: Recorder) -> DecodeGraphs:
    return DecodeGraphs(capture=recorder, device_type="cpu")


def request_of(model: LPDModel, seed: int = 5, schedule: tuple[int, ...] = (1, 3, 5, 7)) -> DecodeRequest:
    request = request_for(model, [list(schedule), [4, 12]], guidance_scale=[2.0, 1.0], temperature=[6.0, 9.0])
    return dataclasses.replace(request, seeds=[seed, seed + 1])


def grids(steps: Iterator[Tensor]) -> list[list[list[int]]]:
    return [grid.tolist() for grid in steps]


def test_every_step_is_a_graph_and_shows_what_the_eager_one_does(backend: torch.device) -> None:
    model = random_model(32, (4, 4)).to(backend)
    recorder = Recorder()
    graphs = DecodeGraphs() if backend.type == "cuda" else DecodeGraphs(capture=recorder, device_type="cpu")
    for i, seed in enumerate((5, 900), start=1):
        request = request_of(model, seed)
        assert grids(decode(model, request, graphs=graphs)) == grids(decode(model, request))
        if backend.type == "cpu":
            assert (recorder.captures, recorder.replays) == (4, 4 * i)
    assert len(graphs) == 1


def test_whole_and_watched_decodes_share_their_buffers(
    model: LPDModel, recorder: Recorder, graphs: DecodeGraphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    states: list[DecodeState] = []

    class Counted(DecodeState):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments)
            states.append(self)

    monkeypatch.setattr(sampler, "DecodeState", Counted)
    for seed in (5, 900):
        request = request_of(model, seed)
        whole = generate(model, request, graphs)
        *_, watched = decode(model, request, graphs=graphs)
        assert torch.equal(whole, watched)
    assert (len(states), len(graphs)) == (1, 1)
    assert (recorder.captures, recorder.replays) == (1 + 4, 2 * (1 + 4))
    # What was yielded is the caller's: other decodes in the same buffers leave it as it is.
    generate(model, request_of(model, 77), graphs)
    assert torch.equal(whole, watched)


def test_a_decode_is_lent_to_who_watches_it(model: LPDModel, recorder: Recorder, graphs: DecodeGraphs) -> None:
    """Others of the same layout neither wait for it nor disturb it."""
    requests = [request_of(model, seed) for seed in (5, 900, 77)]
    expected = [grids(decode(model, request)) for request in requests]
    first = decode(model, requests[0], graphs=graphs)
    seen = [next(first).tolist()]
    assert recorder.captures == 4
    second = decode(model, requests[1], graphs=graphs)
    shown = [next(second).tolist()]
    assert (recorder.captures, recorder.replays) == (4, 1)  # eager: one watched decode of a layout is kept
    assert generate(model, requests[2], graphs).tolist() == expected[2][-1]
    assert recorder.captures == 5  # but one for those that nobody watches
    seen += grids(first)
    shown += grids(second)
    assert (seen, shown) == (expected[0], expected[1])
    assert len(graphs) == 1
    assert grids(decode(model, requests[0], graphs=graphs)) == expected[0]


def test_what_is_left_alone_comes_back(model: LPDModel, recorder: Recorder, graphs: DecodeGraphs) -> None:
    request = request_of(model)
    steps = decode(model, request, graphs=graphs)
    next(steps)
    assert len(graphs) == 0
    del steps
    gc.collect()
    assert len(graphs) == 1
    with graphs.lock:  # also where the garbage collector runs while this thread holds the lock
        steps = decode(model, request, graphs=graphs)
        next(steps)
        del steps
        gc.collect()
    assert len(graphs) == 1
    asked = iter([False, False, True])
    shown = grids(decode(model, request, cancel=lambda: next(asked), graphs=graphs))
    assert shown == grids(decode(model, request))[:2]
    assert recorder.captures == 4
    assert grids(decode(model, request, graphs=graphs)) == grids(decode(model, request))


def test_no_more_is_kept_than_the_limit(model: LPDModel, recorder: Recorder) -> None:
    graphs = DecodeGraphs(limit=2, capture=recorder, device_type="cpu")
    schedules = [(16,), (8, 8), (4, 12), (2, 14)]
    under_way = [decode(model, request_of(model, schedule=schedule), graphs=graphs) for schedule in schedules]
    for steps in under_way:
        next(steps)
    assert len(graphs) == 0  # all are lent
    for steps in under_way:
        assert list(steps) is not None
        assert len(graphs) <= 2
    assert graphs.has(sampler.Layout.of(request_of(model, schedule=(2, 14))))
    assert not graphs.has(sampler.Layout.of(request_of(model, schedule=(16,))))


def test_weights_that_are_replaced_while_someone_watches(
    model: LPDModel, recorder: Recorder, graphs: DecodeGraphs
) -> None:
    """A graph would read them where they lay: the steps that are left do without, and use what an eager decode does."""

    def draw(graphs: DecodeGraphs | None) -> list[list[list[int]]]:
        old = model.norm.weight
        shown = []
        for grid in decode(model, request_of(model), graphs=graphs):
            shown.append(grid.tolist())
            if len(shown) == 2:
                model.norm.weight = torch.nn.Parameter(-old.detach())
        model.norm.weight = old
        return shown

    eager = draw(None)
    assert draw(graphs) == eager != grids(decode(model, request_of(model)))
    assert recorder.replays == 2


def test_what_cannot_be_captured_goes_on_without(model: LPDModel) -> None:
    def refuse(runs: object) -> list[Callable[[], None]]:
        raise RuntimeError("not permitted")

    graphs = DecodeGraphs(capture=refuse, device_type="cpu")
    with pytest.warns(UserWarning, match="decoding without a CUDA graph, .* not permitted"):
        shown = grids(decode(model, request_of(model), graphs=graphs))
    assert shown == grids(decode(model, request_of(model)))
    assert grids(decode(model, request_of(model), graphs=graphs)) == shown  # not tried again
    assert len(graphs) == 0


def test_nan_logits_are_an_error_and_leave_the_graphs_usable(
    model: LPDModel, recorder: Recorder, graphs: DecodeGraphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = request_of(model)
    expected = grids(decode(model, request, graphs=graphs))
    with monkeypatch.context() as patch:
        patch.setattr(DecodeState, "check_drawn", lambda self: (_ for _ in ()).throw(RuntimeError("NaN")))
        with pytest.raises(RuntimeError, match="NaN"):
            grids(decode(model, request, graphs=graphs))
    assert grids(decode(model, request, graphs=graphs)) == expected
    assert recorder.captures == 4


def test_pipelines_watch_by_graphs() -> None:
    """Callbacks, cancel and streams, of drawings and of edits."""
    pipe, recorder = LPDPipeline.from_pretrained("fashion_mnist"), Recorder()
    plain = LPDPipeline.from_pretrained("fashion_mnist")
    pipe._graphs = DecodeGraphs(capture=recorder, device_type="cpu")
    calls: list[int] = []

    def count(step: int, _: int) -> None:
        calls.append(step)

    wanted = plain([3, 4], seeds=1, num_inference_steps=6)
    for options in ({"callback_on_step_end": count}, {"cancel": lambda: False}):
        out = pipe([3, 4], seeds=1, num_inference_steps=6, **options)
        assert torch.equal(out.tokens, wanted.tokens)
    *_, last = pipe.stream([3, 4], seeds=1, num_inference_steps=6)
    assert torch.equal(last.tokens, wanted.tokens)
    assert [a.tobytes() for a in last.images] == [b.tobytes() for b in wanted.images]
    assert calls == [1, 2, 3, 4, 5, 6]
    assert (recorder.captures, recorder.replays) == (6, 18)
    mask = torch.zeros(32, 32)
    mask[8:24, 8:24] = 1
    edited = plain.inpaint(wanted.images[0], mask, 3, seeds=1, num_inference_steps=4)
    for _ in range(2):
        again = pipe.inpaint(
            wanted.images[0], mask, 3, seeds=1, num_inference_steps=4, callback_on_step_end=count, cancel=lambda: False
        )
        assert torch.equal(again.tokens, edited.tokens)
        assert again.images[0].tobytes() == edited.images[0].tobytes()
    steps = 5  # the condition with the known cells' block takes one, groups four
    assert (recorder.captures, recorder.replays) == (6 + steps, 18 + 2 * steps)


def test_the_host_is_no_more_than_two_steps_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded: list[int] = []
    waited: list[int] = []

    class FakeEvent:
        def record(self, stream: object) -> None:
            self.index = len(recorded)
            recorded.append(self.index)

        def synchronize(self) -> None:
            waited.append(self.index)

    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    pace = Pace(torch.device("cuda"))
    for launched in range(1, 6):
        pace.keep()
        assert recorded == list(range(launched))
        assert waited == list(range(launched - 2))
    Pace(torch.device("cpu")).keep()
    assert len(recorded) == 5
