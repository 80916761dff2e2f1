"""Five hundred requests of all kinds at once: each gets the tokens that the pipeline alone would give it."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from lpd_ext import editing
from lpd_ext.drawing import Drawing
from lpd_ext.engine import Engine
from lpd_ext.pipeline import LPDPipeline

REQUESTS = 500


def options_of(pipe: LPDPipeline, rng: random.Random, images: int) -> dict[str, Any]:
    def some(*values: Any) -> list[Any]:
        return [rng.choice(values) for _ in range(images)]

    return {
        "num_inference_steps": some(1, 2, 3, 5, 8, 13, 20),
        "order": some("locality", "random", "raster", "halton", "outward"),
        "guidance_scale": some(1.0, 1.0, 2.0, 5.0),
        "guidance_schedule": some("linear", "constant"),
        "temperature": some(0.0, 0.9, 1.2),
        "top_k": some(0, 0, 50),
        "top_p": some(1.0, 1.0, 0.9),
        "seeds": [rng.randrange(2**53) for _ in range(images)],
    }


def drawing_of(pipe: LPDPipeline, rng: random.Random) -> Drawing:
    """One or two images, every fifth time edits of a picture of noise."""
    images = rng.choice((1, 1, 1, 2))
    labels = [rng.choice((None, *range(10))) for _ in range(images)]
    options = options_of(pipe, rng, images)
    if rng.random() < 0.8:
        return pipe.drawing(pipe.prepare(labels, **options))
    noise = np.random.default_rng(rng.randrange(2**32))
    picture = noise.integers(0, 256, (32, 32, 3), np.uint8)
    cells = noise.random((8, 8)) < rng.choice((0.3, 0.7))
    cells[0, 0], cells[7, 7] = True, False  # some are to be painted, and some are known
    mask = cells.repeat(4, 0).repeat(4, 1)
    options["num_inference_steps"] = [min(steps, int(cells.sum())) for steps in options["num_inference_steps"]]
    block = rng.choice((None, 7))
    return editing.plan_inpaint(pipe, [picture] * images, mask, labels, prefill_block=block, **options)


def test_mixed_requests_get_the_tokens_of_the_pipeline_alone() -> None:
    pipe, rng = LPDPipeline.from_pretrained("fashion_mnist"), random.Random(0)
    drawings = [drawing_of(pipe, rng) for _ in range(REQUESTS)]
    with Engine(pipe, max_images=16, max_waiting=2 * REQUESTS) as engine:
        handles = [engine.submit(drawing, previews=rng.choice((0, 0, 1))) for drawing in drawings]
        found = [handle.result(600).tokens for handle in handles]
    edits = guided = 0
    for i, (drawing, tokens) in enumerate(zip(drawings, found, strict=True)):
        assert torch.equal(tokens, drawing.run("tokens").tokens), i
        edits += drawing.request.known_tokens is not None
        guided += any(drawing.request.guided)
    assert edits > REQUESTS // 8
    assert guided > REQUESTS // 4
