"""The benchmark's baseline computes what the library computes, so that its time is that of the same work."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from decodes import random_model, request_for
from lpd_tools.bench.cases import Shape
from lpd_tools.bench.decode import PUBLISHED, Decode, check_equal, time_on_cpu
from lpd_tools.bench.plain_decode import Attention, attend_in_two_calls, attend_with_mask, decode_plain

from lpd_ext.model import LPDConfig
from lpd_ext.sampler import generate

CPU = torch.device("cpu")


@pytest.mark.parametrize("attention", [attend_with_mask, attend_in_two_calls])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("sizes", [[1, 2, 3, 6], [12], [1] * 12])
def test_plain_decodes_draw_the_same_tokens(sizes: list[int], guidance_scale: float, attention: Attention) -> None:
    model = random_model(32, (3, 4))
    request = request_for(model, [sizes] * 2, guidance_scale=[guidance_scale] * 2, top_k=[1] * 2)
    plain = decode_plain(
        model, torch.tensor(request.labels), sizes, request.orders, guidance_scale, top_k=1, attention=attention
    )
    assert torch.equal(plain, generate(model, request))


@pytest.mark.parametrize("attention", [attend_with_mask, attend_in_two_calls])
@pytest.mark.parametrize("sizes", [[1, 2, 3, 6], [12], [1] * 12])
def test_queries_that_are_blind_to_each_other_decode_as_they_train(sizes: list[int], attention: Attention) -> None:
    model = random_model(32, (3, 4))
    model.config = replace(model.config, mutual_visibility=False)
    request = request_for(model, [sizes] * 2)
    labels, tokens = torch.tensor(request.labels), torch.randint(50, (2, 12))
    logits: list[torch.Tensor] = []
    decode_plain(model, labels, sizes, request.orders, 1.0, attention=attention, given=tokens, logits_out=logits)
    with torch.no_grad():
        wanted = model(tokens, labels, request.orders, sizes)
        mutual = model(tokens, labels, request.orders, sizes, mutual_visibility=True)
    tolerance = 2e-5 * wanted.abs().max()
    assert (torch.cat(logits, 1) - wanted).abs().max() <= tolerance
    assert ((wanted - mutual).abs().max() > 100 * tolerance) == (max(sizes) > 1)


def test_the_sampler_refuses_a_model_whose_queries_are_blind_to_each_other() -> None:
    model = random_model(32, (3, 4))
    model.config = replace(model.config, mutual_visibility=False)
    with pytest.raises(ValueError, match="mutual_visibility must be True to decode"):
        generate(model, request_for(model, [[12]] * 2))


def test_published_style_filters() -> None:
    model = random_model(32, (3, 4))
    request = request_for(model, [[12]] * 2)
    drawn = [
        decode_plain(model, torch.tensor(request.labels), [12], request.orders, 1.0, top_k=None, top_p=1e-6),
        decode_plain(model, torch.tensor(request.labels), [12], request.orders, 1.0, top_k=1, top_p=None),
    ]
    assert torch.equal(*drawn)


class SmallShape(Shape):
    """The steps of a named shape, for a model that is quick."""

    @property
    def config(self) -> LPDConfig:
        return LPDConfig(64, depth=1, heads=2, vocab_size=50, num_classes=3, grid=self.grid)


SMALL = SmallShape(grid=(4, 4), steps=4, step=2, guidance_scale=3.0, repulsion_threshold=1)


def test_decodes_are_timed_against_all_baselines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)  # a minute of compiling
    results = {result.operator: result for result in time_on_cpu(Decode.at_random(SMALL, 2, CPU, torch.float32), 3)}
    assert min(second for result in results.values() for second in result.seconds) > 0
    assert results[PUBLISHED].ratios[PUBLISHED] == 1
    assert set(results["float32"].ratios) == {name for name in results if not name.startswith(("float32", "int8"))}
    assert results["int8"].rounded["cosine"][-1] > 0.99


def test_a_decode_that_computes_something_else_is_not_timed() -> None:
    decode = Decode.at_random(SMALL, 2, CPU, torch.float32)
    check_equal(decode, decode.model)
    other = copy.deepcopy(decode.model)
    other.blocks[0].mlp.fc2.bias[0].add_(0.1)
    with pytest.raises(RuntimeError, match="logits differ by"):
        check_equal(decode, other)
