"""Captured decodes: one capture per batch layout serves every request of it, and what may be captured at all.

Without a GPU the recorder below stands in for CUDA's: it keeps a function and calls it again on the same buffers.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import itertools
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from decodes import random_model, request_for
from recorder import Recorder
from torch import Tensor
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode

from lpd_ext import cuda_graphs
from lpd_ext.cuda_graphs import DecodeGraphs
from lpd_ext.decode_state import DecodeState, Layout
from lpd_ext.model import LPDModel
from lpd_ext.plan import Places, _plan_decoding
from lpd_ext.request import DecodeRequest
from lpd_ext.sampler import generate


@pytest.fixture
def model() -> LPDModel:
    return random_model(32, (4, 4))


def requests_of_one_layout(model: LPDModel) -> list[DecodeRequest]:
    """Everything differs that is data: orders, labels, seeds, guidance and its schedule, temperature, filters."""
    schedules = [[1, 3, 5, 7], [4, 12]]
    first = request_for(
        model, schedules, guidance_scale=[2.0, 1.0], temperature=[6.0, 9.0], top_k=[20, 0], top_p=[1.0, 0.95]
    )
    generator = torch.Generator().manual_seed(7)
    return [
        first,
        dataclasses.replace(first, labels=[4, 3], seeds=[-5, 2**40]),
        dataclasses.replace(first, order=torch.stack([torch.randperm(16, generator=generator) for _ in range(2)])),
        dataclasses.replace(first, guidance_scale=[7.5, 1.0], temperature=[0.0, 1.7], guidance_schedule="constant"),
        dataclasses.replace(first, top_k=[50, 3], top_p=[0.3, 1.0]),
        first,
    ]


def test_replays_equal_the_eager_decode(model: LPDModel) -> None:
    recorder = Recorder()
    graphs = DecodeGraphs(capture=recorder, device_type="cpu")
    seen = []
    for i, request in enumerate(requests_of_one_layout(model), start=1):
        tokens = generate(model, request, graphs)
        assert torch.equal(tokens, generate(model, request))
        assert (recorder.captures, recorder.replays) == (1, i)
        seen.append(tokens)
    assert len({tuple(tokens.flatten().tolist()) for tokens in seen}) == 5  # results are not views of one buffer


def test_a_layout_of_its_own_is_captured_anew(model: LPDModel) -> None:
    recorder = Recorder()
    graphs = DecodeGraphs(limit=10, capture=recorder, device_type="cpu")
    first = requests_of_one_layout(model)[0]
    layouts: list[dict[str, Any]] = [
        {},
        {"group_sizes": [[2, 2, 5, 7], [4, 12]]},
        {"guidance_scale": [2.0, 3.0]},
        {"labels": [None, 1]},
        {"top_k": [0, 0]},
        {"top_p": [1.0, 1.0]},
    ]
    for count, changes in enumerate(layouts, start=1):
        request = dataclasses.replace(first, **changes)
        assert torch.equal(generate(model, request, graphs), generate(model, request))
        assert recorder.captures == count == len(graphs)


def test_weights_that_moved_are_captured_anew(model: LPDModel) -> None:
    recorder = Recorder()
    graphs = DecodeGraphs(capture=recorder, device_type="cpu")
    request = requests_of_one_layout(model)[0]
    before = generate(model, request, graphs)
    head = model.head.weight
    model.head.weight = torch.nn.Parameter(-head.detach())
    after = generate(model, request, graphs)
    assert recorder.captures == 2
    assert torch.equal(after, generate(model, request))
    assert not torch.equal(before, after)
    with torch.no_grad():
        model.head.weight.copy_(head)  # in place: the same capture, the new values
    assert torch.equal(generate(model, request, graphs), before)
    assert recorder.captures == 2


def test_the_least_recently_used_layout_is_dropped(model: LPDModel) -> None:
    recorder = Recorder()
    graphs = DecodeGraphs(limit=2, capture=recorder, device_type="cpu")
    a, b, c = (request_for(model, [sizes]) for sizes in ([16], [8, 8], [4, 12]))
    for request, captures in ((a, 1), (b, 2), (a, 2), (c, 3), (a, 3), (b, 4)):
        assert torch.equal(generate(model, request, graphs), generate(model, request))
        assert recorder.captures == captures
        assert len(graphs) <= 2


@pytest.mark.parametrize("steps", [16, 4])
def test_many_steps_are_captured_one_by_one(model: LPDModel, monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    request = request_for(model, [[16 // steps] * steps], guidance_scale=[3.0])
    whole, single = Recorder(), Recorder()
    assert torch.equal(
        generate(model, request, DecodeGraphs(capture=whole, device_type="cpu")), generate(model, request)
    )
    assert whole.captures == 1
    monkeypatch.setattr(cuda_graphs, "MAX_STEPS_PER_GRAPH", steps - 1)
    graphs = DecodeGraphs(capture=single, device_type="cpu")
    for _ in range(2):
        assert torch.equal(generate(model, request, graphs), generate(model, request))
    assert (single.captures, single.replays) == (steps, 2 * steps)


def tensors_of(state: DecodeState) -> dict[str, int]:
    """Returns the address of each tensor that a graph of this decode would go on reading and writing."""
    found = {name: value for name, value in vars(state).items() if isinstance(value, Tensor) and name[0] != "_"}
    for i, layer in enumerate(state.parts.layers):
        found |= {f"k_cache {i}": layer.k_cache, f"v_cache {i}": layer.v_cache}
    assert len(found) == 9 + 2 * len(state.parts.layers)
    return {name: tensor.data_ptr() for name, tensor in found.items()}


def moves_when_loaded(model: LPDModel) -> set[str]:
    first, *others = requests_of_one_layout(model)
    layout = Layout.of(first)
    plan = layout.plan(model.config.num_tokens, torch.device("cpu"))
    state = DecodeState(model, plan.capacity, layout.filters)
    state.load(first, plan.places)
    before = tensors_of(state)
    for request in others:
        state.load(request, plan.places)
    return {name for name, address in tensors_of(state).items() if address != before[name]}


def test_a_request_is_loaded_into_the_buffers_of_the_one_before(model: LPDModel) -> None:
    assert moves_when_loaded(model) == set()


def test_a_buffer_that_is_replaced_is_seen(model: LPDModel, monkeypatch: pytest.MonkeyPatch) -> None:
    load, kept = DecodeState.load, list[Tensor]()

    def replacing(self: DecodeState, request: DecodeRequest, places: Places) -> None:
        load(self, request, places)
        self.temperature = torch.tensor(request.temperature)
        kept.append(self.temperature)  # or the next one may come to lie where this one did

    monkeypatch.setattr(DecodeState, "load", replacing)
    assert moves_when_loaded(model) == {"temperature"}


def test_a_gpu_without_kernels_is_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    for architectures, supported in (("", False), ("80 90", True)):
        monkeypatch.setattr(cuda_graphs._C, "build_config", lambda found=architectures: {"cuda_architectures": found})
        assert DecodeGraphs().supports(torch.device("cuda", 0)) == supported


def refusing(error: Exception) -> Callable[[Sequence[Callable[[], None]]], list[Callable[[], None]]]:
    def refuse(runs: Sequence[Callable[[], None]]) -> list[Callable[[], None]]:
        raise error

    return refuse


@pytest.mark.parametrize("error", [RuntimeError("not permitted"), TypeError("an adapter"), AssertionError("")])
def test_a_decode_that_cannot_be_captured_goes_on_without(model: LPDModel, error: Exception) -> None:
    recorder = Recorder()
    graphs = DecodeGraphs(capture=recorder, device_type="cpu")
    generate(model, request_for(model, [[8, 8]]), graphs)
    graphs._capture = refusing(error)
    request = request_for(model, [[16]])
    with pytest.warns(UserWarning, match=f"without a CUDA graph, .* captured: {type(error).__name__}: {error}"):
        drawn = generate(model, request, graphs)
    assert torch.equal(drawn, generate(model, request))
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(graphs.lock.acquire, blocking=False).result()
        pool.submit(graphs.lock.release).result()
    assert torch.equal(generate(model, request, graphs), drawn)  # not tried again, so not warned of either
    graphs._capture = recorder
    generate(model, request, graphs)
    generate(model, request_for(model, [[8, 8]]), graphs)
    assert (recorder.captures, len(graphs)) == (1, 1)  # the other layout's is kept
    model.norm.weight = torch.nn.Parameter(model.norm.weight.detach().clone())
    generate(model, request, graphs)
    assert recorder.captures == 2  # other weights, another try


def test_without_memory_for_a_capture_decoding_goes_on_without(model: LPDModel) -> None:
    recorder = Recorder()
    graphs = DecodeGraphs(capture=recorder, device_type="cpu")
    generate(model, request_for(model, [[8, 8]]), graphs)
    assert len(graphs) == 1
    graphs._capture = refusing(torch.OutOfMemoryError("CUDA out of memory"))
    request = request_for(model, [[16]])
    with pytest.warns(UserWarning, match="captured: OutOfMemoryError: CUDA out of memory"):
        assert torch.equal(generate(model, request, graphs), generate(model, request))
    assert len(graphs) == 0
    graphs._capture = recorder  # there may be memory later
    generate(model, request, graphs)
    assert recorder.captures == 2


def test_what_a_recording_takes_from_the_model_is_in_its_key(model: LPDModel) -> None:
    """Weights that are computed when a decode begins, types, adapters' attributes, and torch's choice of TF32."""
    recorder = Recorder()
    graphs = DecodeGraphs(capture=recorder, device_type="cpu")
    request = requests_of_one_layout(model)[0]

    def captures() -> int:
        assert torch.equal(generate(model, request, graphs), generate(model, request))
        return recorder.captures

    class Scaled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("factor", torch.tensor(-2.0))
            self.settings = {"default": 1.0}

        def forward(self, weight: Tensor) -> Tensor:
            scaled: Tensor = weight * self.factor * self.settings["default"]
            return scaled

    parametrize.register_parametrization(model.blocks[0].mlp.fc1, "weight", scaled := Scaled())
    assert (captures(), captures()) == (1, 1)
    scaled.factor.neg_()
    assert (captures(), captures()) == (2, 2)
    scaled.settings["default"] = 4.0
    assert (captures(), captures()) == (3, 3)
    with torch.no_grad():
        model.blocks[0].mlp.fc1.parametrizations.weight.original.neg_()
    assert (captures(), captures()) == (4, 4)
    with torch.no_grad():
        model.blocks[0].mlp.fc2.weight.neg_()  # read where it lies
    assert captures() == 4
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if before != "tf32" else "ieee"
    try:
        assert (captures(), captures()) == (5, 5)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


class FakeStream:
    """Notes which streams it waited for."""

    def __init__(self, handle: int = 0, device: int = 0) -> None:
        self.handle, self.waited = handle, []

    def wait_stream(self, other: FakeStream) -> None:
        self.waited.append(other)


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> FakeStream:
    """torch.cuda with streams that do nothing; the current one."""
    current, handles = FakeStream(), itertools.count(1)
    for name, stand_in in {
        "current_stream": lambda: current,
        "current_device": lambda: 0,
        "ExternalStream": FakeStream,
        "stream": lambda stream: nullcontext(),
        "graph": lambda graph, **options: nullcontext(),
        "graph_pool_handle": lambda: None,
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: None),
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(cuda_graphs._C, "create_stream", lambda: next(handles), raising=False)
    monkeypatch.setattr(cuda_graphs._OwnStream, "_free", {})
    return current


def test_the_current_stream_waits_for_a_warm_up_that_fails(fake_cuda: FakeStream) -> None:
    def fail() -> None:
        raise RuntimeError("no such kernel")

    with pytest.raises(RuntimeError, match="no such kernel"):
        cuda_graphs.capture_cuda_graphs([fail])
    (side,) = fake_cuda.waited
    assert side.waited == [fake_cuda]


def test_no_two_recordings_share_a_stream(fake_cuda: FakeStream) -> None:
    """torch's streams are 32 in all; ours are used again once nothing recorded on them is left."""
    kept = [cuda_graphs.capture_cuda_graphs([lambda: None] * 2) for _ in range(40)]
    handles = [[run.recorded_on.stream.handle for run in runs] for runs in kept]
    assert handles == [[i, i] for i in range(1, 41)]
    del kept[3]
    gc.collect()
    assert cuda_graphs.capture_cuda_graphs([lambda: None])[0].recorded_on.stream.handle == 4
    kept.append(cuda_graphs.capture_cuda_graphs([lambda: None]))


def test_only_devices_that_can_be_captured_are(model: LPDModel) -> None:
    recorder = Recorder()
    request = request_for(model, [[4, 12]])
    assert torch.equal(generate(model, request, DecodeGraphs(capture=recorder)), generate(model, request))
    assert recorder.captures == 0
    empty = request_for(model, [])
    assert generate(model, empty, DecodeGraphs(capture=recorder, device_type="cpu")).shape == (0, 16)


def test_copies_start_empty(model: LPDModel) -> None:
    graphs = DecodeGraphs(limit=1, capture=Recorder(), device_type="cpu")
    generate(model, request_for(model, [[16]]), graphs)
    assert len(graphs) == 1
    assert len(copy.deepcopy(graphs)) == 0
    with pytest.raises(ValueError, match="limit must be >= 1, got 0"):
        DecodeGraphs(limit=0)


class _DuringSteps(TorchDispatchMode):
    """Records the operators called while steps run, and refuses those that wait for a device or cannot be captured."""

    forbidden = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "_unique2", "masked_select", "_pin_memory")

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in self.forbidden, f"{name} waits for the device"
        for index in args[1] if name in ("index", "index_put_") else ():
            assert index is None or index.dtype != torch.bool, "a mask as index waits for the device"
        self.calls.append(name)
        return func(*args, **(kwargs or {}))


def calls_of_a_decode(model: LPDModel, request: DecodeRequest) -> list[str]:
    """Operators dispatched by the steps of a replayed decode, all of which a CUDA graph has to record."""
    mode = _DuringSteps()

    def capture(runs: Sequence[Callable[[], None]]) -> list[Callable[[], None]]:
        def replay() -> None:
            with mode:
                for run in runs:
                    run()

        return [replay]

    generate(model, request, DecodeGraphs(capture=capture, device_type="cpu"))
    return mode.calls


def test_steps_do_nothing_that_waits_for_the_device(model: LPDModel) -> None:
    calls = calls_of_a_decode(model, requests_of_one_layout(model)[0])
    assert calls.count("sample_step") == 4


def test_a_step_is_four_kernels_beside_its_blocks(model: LPDModel) -> None:
    calls = calls_of_a_decode(model, request_for(model, [[16]], guidance_scale=[3.0], top_k=[5], top_p=[0.5]))
    kernels = [call for call in calls if call not in ("view", "slice", "transpose", "t", "unbind", "select")]
    block = [
        "residual_layer_norm",
        "addmm",
        "group_attention",
        "addmm",
        "residual_layer_norm",
        "addmm",
        "gelu",
        "addmm",
    ]
    assert kernels == ["embed_rows", *block * len(model.blocks), "residual_layer_norm", "mm", "sample_step"]


def test_a_wait_planted_in_a_step_is_seen(model: LPDModel, monkeypatch: pytest.MonkeyPatch) -> None:
    run_step = model.decode_step

    def waiting(ids: Tensor, *rest: Any) -> Tensor | None:
        assert int(ids.sum()) >= 0
        return run_step(ids, *rest)

    monkeypatch.setattr(model, "decode_step", waiting)
    with pytest.raises(AssertionError, match="_local_scalar_dense waits for the device"):
        calls_of_a_decode(model, request_for(model, [[16]]))


def test_a_block_costs_at_most_ten_dispatcher_calls() -> None:
    """The eager path is bound by the host: what a block adds to a step is held to ten calls."""
    per_step = []
    for depth in (2, 7):
        torch.manual_seed(0)
        config = dataclasses.replace(random_model(32, (4, 4)).config, depth=depth)
        calls = calls_of_a_decode(LPDModel(config).eval(), request_for(LPDModel(config), [[1, 15]]))
        assert calls.count("group_attention") == 2 * depth
        per_step.append(len(calls) / 2)
    assert (per_step[1] - per_step[0]) / 5 <= 10


def test_a_recording_keeps_what_it_reads(model: LPDModel) -> None:
    """It knows addresses: the plan of a layout may be forgotten while its graph is not."""
    read: list[weakref.ref[Tensor]] = []

    def capture(runs: Sequence[Callable[[], None]]) -> list[Callable[[], None]]:
        for run in runs:
            run()
        return [lambda: None for _ in runs]

    graphs = DecodeGraphs(capture=capture, device_type="cpu")
    request = requests_of_one_layout(model)[0]
    plan = Layout.of(request).plan(model.config.num_tokens, torch.device("cpu"))
    read = [weakref.ref(step.segments) for step in plan.steps]
    with suppress(RuntimeError):  # replayed, nothing is drawn
        generate(model, request, graphs)
    del plan
    _plan_decoding.cache_clear()
    gc.collect()
    assert all(reference() is not None for reference in read)
    graphs.clear()
    gc.collect()
    assert all(reference() is None for reference in read)
