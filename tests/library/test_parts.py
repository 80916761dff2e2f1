"""Many images in parts that memory allows: the same images, told before."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from lpd_ext import memory, parts
from lpd_ext.cuda_graphs import CapturedDecode, DecodeGraphs
from lpd_ext.decode_state import Layout
from lpd_ext.parts import bytes_of_images, parts_of
from lpd_ext.pipeline import LPDPipeline

LABELS = [1, 2, None, 3, 4, 5, 6]
OPTIONS: dict[str, Any] = {
    "num_inference_steps": [3, 4, 5, 3, 3, 6, 2],
    "guidance_scale": [1.0, 2.0, 3.0, 1.0, 4.0, 2.0, 2.0],
    "seeds": 5,
    "top_k": [0, 10, 0, 0, 5, 0, 1],
    "order": ["locality", "random", "raster", "halton", "locality", "spiral", "random"],
}


@pytest.fixture(scope="module")
def pipe() -> LPDPipeline:
    return LPDPipeline.from_pretrained("fashion_mnist")


def little_memory(monkeypatch: pytest.MonkeyPatch, free: float) -> None:
    monkeypatch.setattr(memory, "available", lambda: free)
    monkeypatch.setattr(parts, "_ALWAYS_THERE", 0)


@pytest.mark.parametrize("most", [1, 2, 3, 6, 7, 100])
def test_images_are_the_same_in_parts(most: int, pipe: LPDPipeline) -> None:
    wanted = pipe(LABELS, output_type="np", **OPTIONS)
    seen: list[tuple[int, int]] = []
    pipe.max_images = most
    try:
        found = pipe(LABELS, output_type="np", **OPTIONS)
        shown = pipe(LABELS, output_type="np", callback_on_step_end=lambda *step: seen.append(step), **OPTIONS)
        *_, last = pipe.stream(LABELS, **OPTIONS)
    finally:
        pipe.max_images = None
    assert torch.equal(found.tokens, wanted.tokens)
    assert torch.equal(shown.tokens, wanted.tokens)
    assert torch.equal(last.tokens, wanted.tokens)
    assert (found.images == wanted.images).all()
    assert found.seeds == wanted.seeds
    # Steps are counted over all parts.
    assert seen == [(step, len(seen)) for step in range(1, len(seen) + 1)]
    assert last.step == last.num_steps == len(seen)


def test_known_cells_go_with_their_images(pipe: LPDPipeline) -> None:
    known = torch.full((4, 64), -1)
    known[:, :10] = torch.arange(40).view(4, 10)
    request = pipe.prepare([1, 2, 3, 4], seeds=3, num_inference_steps=4, known_tokens=known)
    wanted = pipe.drawing(request).run("tokens").tokens
    found = pipe.drawing(request, max_images=3).run("tokens").tokens
    assert torch.equal(found, wanted)
    assert torch.equal(found.flatten(1)[:, :10], known[:, :10])


def test_memory_decides_and_it_is_told(
    pipe: LPDPipeline, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    request = pipe.prepare([1] * 10, seeds=1, num_inference_steps=4, guidance_scale=2.0)
    one = max(bytes_of_images(pipe.model, request))
    with caplog.at_level(logging.WARNING):
        assert len(parts_of(pipe.model, request)) == 1
        little_memory(monkeypatch, 100 * one)
        assert len(parts_of(pipe.model, request)) == 1
        assert not caplog.records
        little_memory(monkeypatch, 4.1 * one)  # three fit into three quarters
        assert [part.rows for part in parts_of(pipe.model, request)] == [
            slice(0, 3),
            slice(3, 6),
            slice(6, 9),
            slice(9, 10),
        ]
        assert "10 images need about" in caplog.text
        assert "drawn 3 at a time" in caplog.text
        little_memory(monkeypatch, 0)
        assert len(parts_of(pipe.model, request)) == 10  # one is tried in any case
        assert len(parts_of(pipe.model, request, max_images=2)) == 10
    monkeypatch.setattr(memory, "available", lambda: None)  # where nothing tells
    assert len(parts_of(pipe.model, request)) == 1
    assert [len(part.request.labels) for part in parts_of(pipe.model, request, max_images=4)] == [4, 4, 2]
    assert len(parts_of(pipe.model, pipe.prepare([]))) == 1


def test_a_captured_decode_has_its_memory_already(pipe: LPDPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    request = pipe.prepare([1] * 4, seeds=1, num_inference_steps=2)
    little_memory(monkeypatch, 0)
    graphs = DecodeGraphs(capture=lambda runs: list(runs), device_type="cpu")
    graphs.find((), "another", lambda: CapturedDecode(None, []))
    assert len(parts_of(pipe.model, request, graphs)) == 4
    assert len(graphs) == 0  # what others hold is given back before
    graphs.find((), Layout.of(request), lambda: CapturedDecode(None, []))
    assert len(parts_of(pipe.model, request, graphs)) == 1


def test_the_estimate_covers_the_caches(pipe: LPDPipeline) -> None:
    """And grows with guidance, steps of many rows and cells."""
    config = pipe.model.config
    few = bytes_of_images(pipe.model, pipe.prepare([1, 1], num_inference_steps=4, guidance_scale=[1.0, 2.0]))
    cache = 2 * config.depth * config.dim * (config.num_tokens // 2) * 4
    assert few[0] > cache
    assert few[1] == 2 * few[0]
    many = bytes_of_images(pipe.model, pipe.prepare([1], num_inference_steps=64))
    assert 2 * config.depth * config.dim * (config.num_tokens - 1) * 4 < many[0] < few[0] + cache


def test_max_images_is_a_whole_number() -> None:
    pipe = LPDPipeline.from_pretrained("fashion_mnist")
    for wrong in (0, -1, 1.5, "2", True):
        with pytest.raises(ValueError, match="max_images must be an integer >= 1"):
            LPDPipeline(pipe.model, pipe.tokenizer, max_images=wrong)
