"""The engine: requests from many threads are drawn together, and each gets the images that it would get alone."""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError
from typing import Any

import numpy as np
import pytest
import torch

from lpd_ext import memory
from lpd_ext.decode_state import cache_bytes
from lpd_ext.drawing import LPDPipelineOutput
from lpd_ext.engine import Engine, EngineClosedError, EngineFullError, StepReport
from lpd_ext.handle import Handle
from lpd_ext.linear import pack, unpack
from lpd_ext.pipeline import LPDPipeline
from lpd_ext.request import DecodeRequest
from lpd_ext.sampler import generate

PATIENCE = 60  # seconds, where something would wait for ever


@pytest.fixture(scope="module")
def pipe() -> LPDPipeline:
    return LPDPipeline.from_pretrained("fashion_mnist")


@pytest.fixture
def engine(pipe: LPDPipeline) -> Iterator[Engine]:
    with Engine(pipe, max_images=4) as engine:
        yield engine


def alone(pipe: LPDPipeline, request: DecodeRequest) -> LPDPipelineOutput:
    """The request's images by the pipeline's own way."""
    tokens = generate(pipe.model, request).unflatten(1, pipe.model.config.grid)
    return LPDPipelineOutput(pipe.drawing(request).images(tokens), tokens, list(request.seeds))


def any_request(pipe: LPDPipeline, rng: random.Random) -> DecodeRequest:
    """One to three images with settings of all kinds."""
    count = rng.randint(1, 3)

    def some(*values: Any) -> list[Any]:
        return [rng.choice(values) for _ in range(count)]

    return pipe.prepare(
        some(None, *range(10)),
        num_inference_steps=some(1, 5, 8, 13, 20, 64),
        order=some("locality", "random", "raster"),
        guidance_scale=some(1.0, 2.0, 5.0),
        temperature=some(0.0, 0.9),
        top_k=some(0, 0, 50),
        top_p=some(1.0, 1.0, 0.9),
        seeds=[rng.randrange(2**53) for _ in range(count)],
    )


class Held:
    """An engine whose thread waits in `on_step` until it is let go: what comes meanwhile must wait."""

    def __init__(self, pipe: LPDPipeline, **options: Any) -> None:
        self.steps, self.arrived = threading.Semaphore(0), threading.Semaphore(0)
        self.reports: list[StepReport] = []
        self.engine = Engine(pipe, on_step=self.on_step, **options)

    def on_step(self, report: StepReport) -> None:
        self.reports.append(report)
        self.arrived.release()
        assert self.steps.acquire(timeout=PATIENCE)

    def wait(self) -> None:
        """Until it has done a step."""
        assert self.arrived.acquire(timeout=PATIENCE)

    def go(self, steps: int = 1000) -> None:
        """Let it do so many more steps."""
        self.steps.release(steps)

    def __enter__(self) -> Held:
        return self

    def __exit__(self, *_: object) -> None:
        self.go()
        self.engine.close(finish=False)


def test_requests_from_many_threads_get_the_images_they_would_get_alone(pipe: LPDPipeline, engine: Engine) -> None:
    rng = random.Random(0)
    requests = [any_request(pipe, rng) for _ in range(16)]
    handles: dict[int, Handle] = {}

    def send(first: int) -> None:
        for i in range(first, len(requests), 4):
            handles[i] = engine.submit(requests[i])

    threads = [threading.Thread(target=send, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, request in enumerate(requests):
        output, expected = handles[i].result(PATIENCE), alone(pipe, request)
        assert torch.equal(output.tokens, expected.tokens)
        assert output.seeds == list(request.seeds)
        for found, wanted in zip(output.images, expected.images, strict=True):
            assert found.tobytes() == wanted.tobytes()
    assert engine.num_running == engine.num_waiting == 0


def test_images_begin_oldest_first_and_as_soon_as_they_were_promised(pipe: LPDPipeline) -> None:
    with Held(pipe, max_images=2) as held:
        order: list[int] = []
        first = held.engine.submit(pipe.prepare([0, 0], num_inference_steps=[3, 5]))
        held.wait()
        promises, handles = [], [first]
        for i, steps in enumerate((4, 2, 2)):
            promises.append(held.engine.steps_until_begun())
            handles.append(held.engine.submit(pipe.prepare(1, num_inference_steps=steps), previews=None))
            handles[-1].add_done_callback(lambda _, i=i: order.append(i))
        # After the first step 2 and 4 are left: the places are free again after 2, 4, 6 and 6 steps.
        assert promises == [2, 4, 6]
        assert held.engine.steps_until_begun() == 6
        held.go()
        for handle in handles:
            handle.result(PATIENCE)
    assert order == [0, 1, 2]
    assert [report.images for report in held.reports] == [2] * 7 + [1] * 2
    assert [report.waiting for report in held.reports[1:6]] == [3, 3, 2, 2, 1]


def test_an_image_of_a_request_does_not_wait_for_the_others(pipe: LPDPipeline, engine: Engine) -> None:
    request = pipe.prepare([1] * 11, num_inference_steps=4, seeds=0)
    assert torch.equal(engine.submit(request).result(PATIENCE).tokens, alone(pipe, request).tokens)


def test_previews_come_after_the_groups_asked_for(pipe: LPDPipeline, engine: Engine) -> None:
    request = pipe.prepare([3, 4], num_inference_steps=[9, 5], seeds=1)
    for count in (0, 2, None):
        handle = engine.submit(request, previews=count)
        seen = list(handle.previews())
        final = handle.result(PATIENCE).tokens
        for image, steps in enumerate((9, 5)):
            drawn = [preview.step for preview in seen if preview.image == image]
            allowed = {0: set(), 2: {3, 6} if steps == 9 else {2, 3}, None: set(range(1, steps))}[count]
            assert drawn == sorted(set(drawn))
            assert set(drawn) <= allowed
        assert bool(seen) == (count != 0)
        for preview in seen:
            assert preview.num_steps == (9, 5)[preview.image]
            shown = preview.tokens >= 0
            assert 0 < shown.sum() < shown.numel()
            assert torch.equal(preview.tokens[shown], final[preview.image][shown])
            assert preview.picture.size == (32, 32)
            undrawn = ~shown.repeat_interleave(4, 0).repeat_interleave(4, 1)
            grey = torch.from_numpy(np.array(preview.picture))[undrawn]
            assert set(grey.unique().tolist()) <= {127, 128}


def test_asyncio_gets_previews_and_images(pipe: LPDPipeline, engine: Engine) -> None:
    request = pipe.prepare([3], num_inference_steps=20, seeds=1)

    async def watch() -> tuple[list[int], Any]:
        handle = engine.submit(request, previews=None)
        steps = [preview.step async for preview in handle]
        return steps, await handle

    steps, output = asyncio.run(asyncio.wait_for(watch(), PATIENCE))
    assert steps
    assert steps == sorted(set(steps))
    assert torch.equal(output.tokens, alone(pipe, request).tokens)


def test_a_cancelled_request_frees_its_place(pipe: LPDPipeline) -> None:
    with Held(pipe, max_images=1) as held:
        running = held.engine.submit(pipe.prepare(0, num_inference_steps=64))
        held.wait()
        waiting = held.engine.submit(pipe.prepare(1, num_inference_steps=64))
        last = held.engine.submit(pipe.prepare(2, num_inference_steps=4, seeds=5))
        assert held.engine.steps_until_begun() == 63 + 64 + 4
        assert running.cancel()
        assert waiting.cancel()
        held.go()
        output = last.result(PATIENCE)
        assert torch.equal(output.tokens, pipe(2, num_inference_steps=4, seeds=5).tokens)
        assert len(held.reports) < 10
        for handle in (running, waiting):
            assert handle.cancelled()
            assert list(handle.previews()) == []
            with pytest.raises(CancelledError):
                handle.result(PATIENCE)
        assert not last.cancel()  # it has ended
        assert held.engine.num_running == held.engine.num_waiting == 0


def test_a_task_that_is_cancelled_cancels_its_request(pipe: LPDPipeline) -> None:
    with Held(pipe, max_images=1) as held:

        async def give_up() -> Handle:
            handle = held.engine.submit(pipe.prepare(0, num_inference_steps=64))
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(handle, 0.05)
            return handle

        assert asyncio.run(give_up()).cancelled()


def test_more_than_may_wait_is_refused_with_the_time_to_come_back(pipe: LPDPipeline) -> None:
    with Held(pipe, max_images=1, max_waiting=2) as held:
        held.engine.submit(pipe.prepare(0, num_inference_steps=10))
        held.wait()
        held.engine.submit(pipe.prepare([0, 0], num_inference_steps=7))
        with pytest.raises(EngineFullError, match=r"2 images wait already: .* would begin in 23 steps") as full:
            held.engine.submit(pipe.prepare(0))
        assert full.value.steps == 23
        with pytest.raises(ValueError, match=r"at most max_images \+ max_waiting = 1 \+ 2 images, got 4"):
            held.engine.submit(pipe.prepare([0] * 4))


def test_a_failed_step_fails_its_requests_alone(pipe: LPDPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    with Held(pipe, max_images=2) as held:
        two = [held.engine.submit(pipe.prepare(0, num_inference_steps=64)) for _ in range(2)]
        held.wait()
        third = held.engine.submit(pipe.prepare(0, num_inference_steps=3, seeds=9))
        advance = held.engine._batch.advance

        def fail() -> list[Any]:
            monkeypatch.setattr(held.engine._batch, "advance", advance)
            raise torch.OutOfMemoryError("no room")

        monkeypatch.setattr(held.engine._batch, "advance", fail)
        held.go()
        for handle in two:
            with pytest.raises(torch.OutOfMemoryError, match="no room"):
                handle.result(PATIENCE)
            assert isinstance(handle.exception(PATIENCE), torch.OutOfMemoryError)
        assert torch.equal(third.result(PATIENCE).tokens, pipe(0, num_inference_steps=3, seeds=9).tokens)


def test_closing_draws_what_was_taken_or_cancels_it(pipe: LPDPipeline) -> None:
    engine = Engine(pipe, max_images=1)
    handles = [engine.submit(pipe.prepare(i, num_inference_steps=5)) for i in range(5)]
    engine.close()
    assert all(handle.done() and not handle.cancelled() for handle in handles)
    with pytest.raises(EngineClosedError, match="closed"):
        engine.submit(pipe.prepare(0))
    engine.close()  # again: nothing
    engine = Engine(pipe, max_images=1)
    handles = [engine.submit(pipe.prepare(i, num_inference_steps=64)) for i in range(5)]
    engine.__exit__(KeyError, KeyError(), None)  # as after an exception in its `with` block
    assert handles[-1].cancelled()


def test_an_empty_request_ends_at_once(pipe: LPDPipeline, engine: Engine) -> None:
    output = engine.submit(pipe.prepare([])).result(PATIENCE)
    assert output.images == []
    assert output.tokens.shape == (0, 8, 8)


def test_the_cache_is_taken_once(pipe: LPDPipeline, engine: Engine) -> None:
    config = pipe.model.config
    assert engine.cache_bytes == 2 * config.depth * (2 * 4) * config.dim * config.num_tokens * 4
    assert engine.cache_bytes == cache_bytes(config, torch.float32, images=4)


def test_a_cache_larger_than_the_memory_is_refused(pipe: LPDPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    each = cache_bytes(pipe.model.config, torch.float32, images=1)
    monkeypatch.setattr(memory, "available", lambda: 3 * each + 1)
    with pytest.raises(
        ValueError,
        match=f"max_images = 4 needs {4 * each} bytes of KV cache, but {3 * each + 1} bytes of memory are available, "
        "enough for 3 images",
    ):
        Engine(pipe, 4)
    with Engine(pipe, 3) as engine:
        assert engine.cache_bytes == 3 * each
    monkeypatch.setattr(memory, "available", lambda: None)  # where nothing tells
    Engine(pipe, 1).close()


def test_replaced_weights_and_layers_are_used() -> None:
    pipe = LPDPipeline.from_pretrained("fashion_mnist")
    unpack(pipe.model)
    request = pipe.prepare([1, 2], num_inference_steps=5, guidance_scale=2.0, seeds=3)
    with Engine(pipe, 2) as engine:

        def check() -> torch.Tensor:
            tokens = engine.submit(request).result(PATIENCE).tokens
            assert torch.equal(tokens, alone(pipe, request).tokens)
            return tokens

        seen = [check()]
        fc1 = pipe.model.blocks[0].mlp.fc1
        fc1.weight = torch.nn.Parameter(-fc1.weight.detach())
        seen.append(check())
        pipe.model.blocks[0].mlp.fc1 = torch.nn.Sequential(fc1, torch.nn.Tanh())
        seen.append(check())
        pipe.model.blocks[0].mlp.fc1 = fc1
        pack(pipe.model)
        check()
        assert len({tuple(tokens.flatten().tolist()) for tokens in seen}) == 3


def test_a_model_that_is_moved_fails_its_requests() -> None:
    pipe = LPDPipeline.from_pretrained("fashion_mnist")
    unpack(pipe.model)
    with Engine(pipe, 2) as engine:
        engine.submit(pipe.prepare(1, seeds=3, num_inference_steps=2)).result(PATIENCE)
        pipe.model.double()
        handle = engine.submit(pipe.prepare(1, seeds=3, num_inference_steps=2))
        with pytest.raises(RuntimeError, match=r"the model was moved to cpu, torch\.float64; the caches are"):
            handle.result(PATIENCE)
        pipe.model.float()
        engine.submit(pipe.prepare(1, seeds=3, num_inference_steps=2)).result(PATIENCE)


def test_arguments_are_checked(pipe: LPDPipeline, engine: Engine) -> None:
    with pytest.raises(ValueError, match="max_images must be an integer >= 1, got 0"):
        Engine(pipe, 0)
    with pytest.raises(ValueError, match="max_waiting must be an integer >= 1, got 0"):
        Engine(pipe, 1, max_waiting=0)
    with pytest.raises(ValueError, match="previews must be None or >= 0, got -1"):
        engine.submit(pipe.prepare(0), previews=-1)


UNCLOSED = """
from lpd_ext.drawing import LPDPipelineOutput
from lpd_ext.engine import Engine
from lpd_ext.pipeline import LPDPipeline
pipe = LPDPipeline.from_pretrained("fashion_mnist")
engine = Engine(pipe, max_images=2)
handle = engine.submit(pipe.prepare([0] * 200, num_inference_steps=64), previews=None)
next(handle.previews())
print("leaving")
"""


def test_a_program_that_leaves_its_engine_open_ends_in_order() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", UNCLOSED],
        cwd=sys.prefix,  # no folder that holds unbuilt sources
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert (ended.returncode, ended.stdout) == (0, "leaving\n"), ended.stderr
    assert ended.stderr == ""
