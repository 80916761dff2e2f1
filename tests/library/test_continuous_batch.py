"""Continuous batching: images come and go at any step, and each gets the tokens that it would get alone."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from decodes import random_model, request_for
from recorder import Recorder

from lpd_ext.continuous_batch import ContinuousBatch, RunningImage
from lpd_ext.cuda_graphs import DecodeGraphs
from lpd_ext.model import LPDModel
from lpd_ext.request import DecodeRequest
from lpd_ext.sampler import generate

SCHEDULES = [[1, 3, 5, 7], [16], [1] * 16, [8, 8], [2, 14]]


def any_request(model: LPDModel, rng: random.Random) -> DecodeRequest:
    """One to three images with settings of all kinds."""
    batch = rng.randint(1, 3)

    def some(values: list[float]) -> list[float]:
        return [rng.choice(values) for _ in range(batch)]

    return request_for(
        model,
        [rng.choice(SCHEDULES) for _ in range(batch)],
        labels=some([None, 0, 3]),
        guidance_scale=some([1.0, 2.5]),
        temperature=some([0.0, 1.0]),
        top_k=some([0, 0, 7]),
        top_p=some([1.0, 1.0, 0.9]),
        seeds=[rng.randrange(2**63) for _ in range(batch)],
    )


def test_images_that_come_and_go_are_those_drawn_alone(backend: torch.device) -> None:
    model, rng = random_model(32, (4, 4)).to(backend), random.Random(0)
    batch = ContinuousBatch(model, max_images=4, max_sequences=6)
    waiting = [any_request(model, rng) for _ in range(12)]
    one_after_the_other = sum(request.num_groups for request in waiting)
    owners: dict[RunningImage, tuple[DecodeRequest, int]] = {}
    most_at_once, steps = 0, 0
    while waiting or batch.running:
        while waiting and batch.fits(waiting[0]):
            request = waiting.pop(0)
            owners |= {image: (request, b) for b, image in enumerate(batch.admit(request))}
        most_at_once, steps = max(most_at_once, len(batch.running)), steps + 1
        for image in batch.advance():
            request, b = owners.pop(image)
            same = generate(model, request)[b] == batch.tokens(image)
            # A GPU's GEMM rounds differently in another batch, which decides a draw now and then.
            assert same.all() if backend.type == "cpu" else same.double().mean() > 0.8
            batch.release([image])
    assert most_at_once == 4
    assert not owners
    assert steps < one_after_the_other


def test_an_image_given_up_leaves_its_place_to_others() -> None:
    model = random_model(32, (4, 4))
    batch = ContinuousBatch(model, max_images=1)
    first, second = (request_for(model, [[1, 3, 5, 7]], guidance_scale=[2.0], seeds=[seed]) for seed in (1, 2))
    (image,) = batch.admit(first)
    batch.advance()
    drawn = batch.tokens(image)
    assert (drawn >= 0).sum() == 1
    assert not batch.fits(second)
    with pytest.raises(RuntimeError, match="no room for 1 images, 1 of them guided: 0 rows and 0 cache slots are free"):
        batch.admit(second)
    batch.release([image])
    (image,) = batch.admit(second)
    assert [len(batch.advance()) for _ in range(5)] == [0, 0, 0, 1, 0]
    assert torch.equal(batch.tokens(image), generate(model, second)[0])


def test_sizes_and_models_are_checked() -> None:
    model = random_model(32, (4, 4))
    with pytest.raises(ValueError, match="max_images and max_sequences must be >= 1, got 0 and 0"):
        ContinuousBatch(model, 0)
    with pytest.raises(ValueError, match="request was made for a model of"):
        ContinuousBatch(model, 1).admit(request_for(random_model(32, (2, 4)), [[8]]))


def test_a_mix_of_images_that_comes_again_is_recorded(backend: torch.device) -> None:
    """The recorder stands in for CUDA's, which a GPU test runs; the kernels are those of every backend."""
    if backend.type == "cuda":
        graphs = DecodeGraphs()
        recorder = None
    else:
        recorder = Recorder()
        graphs = DecodeGraphs(limit=8, capture=recorder, device_type="cpu")
    model = random_model(32, (4, 4)).to(backend)
    batch = ContinuousBatch(model, max_images=3, graphs=graphs)
    # Twice the same mix, then another one: images of other labels and seeds lie where those before them did.
    for round_, schedules in enumerate(([[2, 14], [1, 15]], [[2, 14], [1, 15]], [[2, 14], [1, 15]], [[16]])):
        request = request_for(model, schedules, guidance_scale=[2.0] * len(schedules), seeds=range(len(schedules)))
        request = dataclasses.replace(request, seeds=[100 * round_ + seed for seed in request.seeds])
        images = batch.admit(request)
        while any(not image.finished for image in images):
            batch.advance()
        drawn = torch.stack([batch.tokens(image) for image in images])
        same = generate(model, request) == drawn
        assert same.all() if backend.type == "cpu" else same.double().mean() > 0.8
        batch.release(images)
        if recorder is not None:
            assert (recorder.captures, recorder.replays) == [(0, 0), (2, 2), (2, 4), (2, 4)][round_]
