"""Tests the key of a recorded decode, which follows a model's weights, types, modules and adapters, and keeps none."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from decodes import random_model, request_for
from recorder import Recorder
from torch import Tensor
from torch.nn.utils import parametrize

from lpd_ext.cuda_graphs import DecodeGraphs
from lpd_ext.model import LPDConfig, LPDModel
from lpd_ext.sampler import generate
from lpd_ext.weights_key import weights_of


@pytest.fixture
def model() -> LPDModel:
    return random_model(32, (4, 4))


def test_the_type_of_a_weight_is_in_the_key(model: LPDModel) -> None:
    """Memory may come to hold weights of another type: here the same bytes."""
    before = weights_of(model)
    model.half()
    halves = model.head.weight.detach()
    key = weights_of(model)
    model.head.weight.data = halves.view(torch.bfloat16)
    assert model.head.weight.data_ptr() == halves.data_ptr()
    assert len({before, key, weights_of(model)}) == 3


def test_rounded_weights_that_others_are_computed_from(model: LPDModel) -> None:
    """.bfloat16().float() may leave new values at the old address, of an equal version."""
    parametrize.register_parametrization(model.head, "weight", torch.nn.Identity())
    before = weights_of(model)
    model.bfloat16().float()
    assert weights_of(model) != before


@pytest.mark.parametrize("computed", [False, True])
def test_the_key_follows_modules_and_tensors_that_come_and_go(model: LPDModel, computed: bool) -> None:
    """The model's modules are walked through once, and again when they are others."""
    block, keys = model.blocks[0], [weights_of(model)]

    def changed() -> None:
        keys.append(weights_of(model))
        assert weights_of(model) == keys[-1]
        assert keys[-1] != keys[-2]  # earlier ones may come again, with memory that was freed

    fc1 = block.mlp.fc1
    block.mlp.fc1 = torch.nn.Linear(fc1.in_features, fc1.out_features)
    changed()
    block.mlp.fc1.weight = torch.nn.Parameter(block.mlp.fc1.weight.clone())
    changed()
    block.mlp.fc1.weight.data = block.mlp.fc1.weight.clone()
    changed()
    block.mlp.fc1.bias = None
    changed()
    block.attn.qkv = adapter = Adapter(block.attn.qkv)
    changed()
    if computed:
        parametrize.register_parametrization(block.mlp.fc1, "weight", adapter := Adapter(torch.nn.Identity()))
        changed()
    adapter.register_buffer("mask", first := torch.ones(3))
    changed()
    adapter.mask = torch.ones(3)  # beside the first, so it lies elsewhere
    changed()
    assert first.data_ptr() != adapter.mask.data_ptr()
    adapter.register_parameter("gain", torch.nn.Parameter(torch.ones(3)))
    changed()
    del adapter.mask
    changed()
    block.mlp.fc1 = fc1
    changed()


def test_a_model_that_was_looked_at_is_freed() -> None:
    class Own(LPDModel):
        """A type of its own, whose attributes are looked at."""

    looked_at = Own(LPDConfig(grid=(2, 2), vocab_size=4, num_classes=2, dim=8, depth=1, heads=1))
    weights_of(looked_at)
    gone = weakref.ref(looked_at)
    del looked_at
    gc.collect()
    assert gone() is None


class Adapter(torch.nn.Module):
    """Around a layer, with an attribute that a recording would keep."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer, self.scale = layer, 1.0

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.scale * self.layer(x)
        return y


@pytest.mark.parametrize("place", ["mlp.fc1", "mlp.fc2", "attn.qkv"])
def test_an_adapter_is_called_in_every_step(model: LPDModel, place: str) -> None:
    recorder = Recorder()
    graphs = DecodeGraphs(capture=recorder, device_type="cpu")
    request = request_for(model, [[4, 12]])
    before = generate(model, request, graphs)
    parent, name = place.split(".")
    holder = model.blocks[0].get_submodule(parent)
    setattr(holder, name, adapter := Adapter(holder.get_submodule(name)))
    assert torch.equal(generate(model, request, graphs), before)
    adapter.scale = -3.0
    after = generate(model, request, graphs)
    assert recorder.captures == 3
    assert torch.equal(after, generate(model, request))
    assert not torch.equal(after, before)
