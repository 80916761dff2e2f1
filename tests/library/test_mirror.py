"""The decoder of an accelerated model follows its weights: whatever changes them, the next call draws from them."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from golden import load_golden
from published_model import PublishedModel, draw, draw_from_state
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lpd_ext.compat import accelerate
from lpd_ext.linear import PackedLinear
from lpd_ext.mirror import Mirror

PACKINGS = [True, False]


def changed_state(model: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {n: t + 0.1 * torch.randn(t.shape, generator=generator) for n, t in model.state_dict().items()}


def train_a_step(model: PublishedModel) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    sum((p * torch.linspace(-1, 1, p.numel()).view_as(p)).sum() for p in model.parameters()).backward()
    optimizer.step()


@torch.no_grad()
def write_through_numpy(model: PublishedModel) -> None:
    for p in model.parameters():
        p.detach().numpy()[...] *= -1


def replace_parameters(model: PublishedModel) -> None:
    for module in model.modules():
        for name, p in list(module._parameters.items()):
            if p is not None:
                module._parameters[name] = nn.Parameter(-p.detach())


def replace_a_layer(model: PublishedModel) -> None:
    torch.manual_seed(1)
    model.blocks[0].mlp.fc1 = nn.Linear(model.blocks[0].mlp.fc1.in_features, model.blocks[0].mlp.fc1.out_features)


def negate(name: str) -> Callable[[PublishedModel], None]:
    @torch.no_grad()
    def change(model: PublishedModel) -> None:
        model.get_parameter(name).neg_()

    return change


def assign_data(model: PublishedModel) -> None:
    for p in model.parameters():
        p.data = -p.data


def write_to_data(model: PublishedModel) -> None:
    for p in model.parameters():
        p.data.neg_()


CHANGES: dict[str, Callable[[PublishedModel], object]] = {
    "a step of training": train_a_step,
    "load_state_dict": lambda m: m.load_state_dict(changed_state(m)),
    "load_state_dict, assigned": lambda m: m.load_state_dict(changed_state(m), assign=True),
    "assigned data": assign_data,
    "written data": write_to_data,
    "NumPy": write_through_numpy,
    "other parameters": replace_parameters,
    "another layer": replace_a_layer,
    "rounded to bfloat16 and back": lambda m: m.bfloat16().float(),
    **{
        f"{name} in place": negate(name)
        for name in (
            "token_emb.weight", "class_emb.weight", "fake_latent", "mask_token", "pos_embed", "z_proj_ln.weight",
            "blocks.0.attn.qkv.weight", "blocks.0.attn.qkv.bias", "blocks.1.attn.proj.weight", "blocks.1.norm2.bias",
            "blocks.1.mlp.fc1.weight", "blocks.0.mlp.fc2.weight", "norm.weight", "head.weight",
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("packed", PACKINGS)
@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_followed(change: str, packed: bool) -> None:
    model = accelerate(PublishedModel(), packed=packed)
    before = draw(model)
    assert torch.equal(before, load_golden().tensors["sample0.tokens"].long())
    CHANGES[change](model)
    after = draw(model)
    assert torch.equal(after, draw_from_state(model.state_dict()))
    assert change == "rounded to bfloat16 and back" or not torch.equal(after, before)
    assert torch.equal(draw(model), after)


@pytest.mark.parametrize("packed", PACKINGS)
def test_rounded_weights_lie_where_the_old_ones_did(packed: bool) -> None:
    """Addresses, versions and objects may all be as before; the logits tell."""
    model = accelerate(PublishedModel(), packed=packed)
    head = model.head.weight.detach().clone()
    model.bfloat16().float()
    assert not torch.equal(model.head.weight, head)
    assert torch.equal(model.sample_tokens.decoder().head.weight, model.head.weight)


@pytest.mark.parametrize("packed", PACKINGS)
def test_a_cast_is_followed(packed: bool) -> None:
    model = accelerate(PublishedModel(), packed=packed)
    model.bfloat16()
    decoder = model.sample_tokens.decoder()
    state = model.state_dict()
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
    for name, tensor in decoder.state_dict().items():
        assert torch.equal(tensor, state[name])
    assert draw(model).shape == draw_from_state(state).shape


@pytest.mark.parametrize("packed", [*PACKINGS, "inplace"])
def test_copies_have_weights_of_their_own(packed: bool | str) -> None:
    model = accelerate(PublishedModel(), packed=packed)
    other = copy.deepcopy(model)
    other.load_state_dict(changed_state(other))
    drawn = draw(other)
    assert torch.equal(drawn, draw_from_state(other.state_dict()))
    assert torch.equal(draw(model), load_golden().tensors["sample0.tokens"].long())
    assert not torch.equal(drawn, draw(model))


def test_nothing_is_made_anew_without_a_change(monkeypatch: pytest.MonkeyPatch) -> None:
    model = accelerate(PublishedModel(), packed=True)
    draw(model)
    decoder, layer = model.sample_tokens.decoder(), model.sample_tokens.decoder().head
    monkeypatch.setattr(PackedLinear, "pack", None)
    draw(model)
    with torch.no_grad():
        model.norm.weight.neg_()  # shared
        model.blocks[0].attn.qkv.bias.neg_()
    assert torch.equal(draw(model), draw_from_state(model.state_dict()))
    assert model.sample_tokens.decoder() is decoder
    assert decoder.head is layer


def test_only_what_has_changed_is_packed_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    model = accelerate(PublishedModel(), packed=True)
    pack, packed = PackedLinear.pack, []
    monkeypatch.setattr(PackedLinear, "pack", lambda self, **weights: (packed.append(self), pack(self, **weights)))
    negate("blocks.1.mlp.fc2.weight")(model)
    model.head.weight.data.neg_()
    decoder = model.sample_tokens.decoder()
    assert packed == [decoder.blocks[1].mlp.fc2, decoder.head]
    assert model.sample_tokens.decoder() is decoder
    assert len(packed) == 2


def test_a_write_in_place_keeps_the_decoder() -> None:
    """So that graphs which read its memory stay valid."""
    model = accelerate(PublishedModel(), packed=False)
    decoder = model.sample_tokens.decoder()
    content = decoder.content.data_ptr()
    negate("token_emb.weight")(model)
    assert model.sample_tokens.decoder() is decoder
    assert decoder.content.data_ptr() == content
    assert decoder.head.weight.data_ptr() == model.head.weight.data_ptr()


class LowRank(nn.Module):
    """LoRA as a parametrization: W + scale * B A."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.a, self.b = nn.Linear(weight.shape[1], 2, bias=False), nn.Linear(2, weight.shape[0], bias=False)
        self.scale = 3.0

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.scale * self.b.weight @ self.a.weight


def parametrized(packed: bool, path: str = "blocks.0.mlp.fc2") -> tuple[PublishedModel, LowRank]:
    model = accelerate(PublishedModel(), packed=packed)
    draw(model)
    layer = model.get_submodule(path)
    low_rank = LowRank(layer.weight)
    parametrize.register_parametrization(layer, "weight", low_rank)
    return model, low_rank


def merged_state(model: nn.Module, path: str) -> dict[str, Tensor]:
    state = {n: tensor for n, tensor in model.state_dict().items() if not n.startswith(f"{path}.parametrizations")}
    return state | {f"{path}.weight": model.get_submodule(path).weight}


@pytest.mark.parametrize("path", ["blocks.0.mlp.fc2", "head", "token_emb"])
@pytest.mark.parametrize("packed", PACKINGS)
def test_computed_weights_are_followed(packed: bool, path: str) -> None:
    model, low_rank = parametrized(packed, path)
    golden = load_golden().tensors["sample0.tokens"].long()
    drawn = [golden]

    def check() -> None:
        drawn.append(draw(model))
        assert torch.equal(drawn[-1], draw_from_state(merged_state(model, path)))
        assert not torch.equal(drawn[-1], drawn[-2])

    check()
    with torch.no_grad():
        low_rank.b.weight.neg_()
    check()
    low_rank.scale = 9.0
    check()
    parametrize.remove_parametrizations(model.get_submodule(path), "weight", leave_parametrized=False)
    check()
    assert torch.equal(drawn[-1], golden)


class Adapter(nn.Module):
    """LoRA around a layer, as PEFT has it."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.base_layer = base_layer
        self.a, self.b = nn.Linear(base_layer.in_features, 2, bias=False), nn.Linear(2, base_layer.out_features)
        self.scale = 3.0

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.base_layer(x) + self.scale * self.b(self.a(x))
        return result

    def merged(self) -> dict[str, Tensor]:
        weight = self.base_layer.weight + self.scale * self.b.weight @ self.a.weight
        bias = self.scale * self.b.bias + (0 if self.base_layer.bias is None else self.base_layer.bias)
        return {"weight": weight, "bias": bias}


@pytest.mark.parametrize("path", ["blocks.0.mlp.fc1", "blocks.1.attn.qkv"])
@pytest.mark.parametrize("packed", [*PACKINGS, "inplace"])
def test_an_adapter_is_called_where_it_is(packed: bool | str, path: str) -> None:
    model = accelerate(PublishedModel(), packed=packed)
    before = draw(model)
    parent, _, name = path.rpartition(".")
    adapter = Adapter(model.get_submodule(path))
    setattr(model.get_submodule(parent), name, adapter)

    def merged() -> dict[str, Tensor]:
        state = {key: tensor for key, tensor in model.state_dict().items() if not key.startswith(path)}
        return state | {f"{path}.{key}": tensor for key, tensor in adapter.merged().items()}

    first = draw(model)
    assert torch.equal(first, draw_from_state(merged()))
    assert not torch.equal(first, before)
    adapter.scale = 9.0
    second = draw(model)
    assert torch.equal(second, draw_from_state(merged()))
    assert not torch.equal(second, first)
    again = accelerate(model, packed=packed)
    assert torch.equal(draw(again), second)


def test_a_hook_on_a_layer_is_called() -> None:
    model = accelerate(PublishedModel(), packed=True)
    before = draw(model)
    handle = model.blocks[0].mlp.fc2.register_forward_hook(lambda module, inputs, result: -result)
    hooked = draw(model)
    handle.remove()
    assert not torch.equal(hooked, before)
    assert torch.equal(draw(model), before)
    negate("blocks.0.mlp.fc2.weight")(model)
    negate("blocks.0.mlp.fc2.bias")(model)
    assert torch.equal(draw(model), hooked)


class Refusing(nn.Module):
    def __init__(self, result: object) -> None:
        super().__init__()
        self.result = result

    def forward(self, x: Tensor) -> object:
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


@pytest.mark.parametrize(
    ("path", "module", "message"),
    [
        ("blocks.0.attn.proj", Refusing(RuntimeError("three-dimensional only")),
         r"blocks\.0\.attn\.proj \(Refusing\) cannot be called on rows \[1, 96\]: three-dimensional only"),
        ("head", Refusing(torch.zeros(1, 7)), "head must give rows of 320 numbers, got 7"),
        ("blocks.1.mlp.fc1", Refusing((torch.zeros(1, 384), None)), r"fc1 \(Refusing\) must make rows .*, got tuple"),
        ("blocks.1.mlp.fc1", Refusing(torch.zeros(1, 384).half()), r"must make rows .*, got torch\.float16 \[1, 384\]"),
        ("blocks.0.norm1", nn.RMSNorm(96), r"blocks\.0\.norm1 must be a plain LayerNorm, got RMSNorm"),
        ("token_emb", nn.Sequential(nn.Embedding(320, 96)), "token_emb must be a plain Embedding, got Sequential"),
        ("blocks.0.attn.qkv", nn.Linear(96, 143), r"attn\.qkv must give rows of 288 numbers, got 143"),
        ("blocks.0.attn.q_norm", nn.LayerNorm(16), r"nothing is made of blocks\.0\.attn\.q_norm\.weight"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_refused(path: str, module: nn.Module, message: str) -> None:
    model = accelerate(PublishedModel())
    draw(model)
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
    with pytest.raises(ValueError, match=message):
        draw(model)
    with pytest.raises(ValueError, match=message):
        accelerate(model)


def test_missing_and_misshapen_weights_are_refused() -> None:
    for change, message in (
        (lambda m: m._parameters.pop("fake_latent"), "fake_latent is missing"),
        (lambda m: m._modules.pop("norm"), "norm is missing"),
        (
            lambda m: setattr(m, "mask_token", nn.Parameter(torch.zeros(2, 96))),
            r"mask_token must have shape \[332, 96\], got",
        ),
        (lambda m: m.blocks[0].norm1.register_parameter("bias", None), r"blocks\.0\.norm1\.bias is missing"),
    ):
        model = PublishedModel()
        change(model)
        with pytest.raises(ValueError, match=message):
            Mirror(model, None, False)


def test_the_norms_keep_their_epsilon() -> None:
    model = PublishedModel()
    model.norm.eps = 1e-2
    assert Mirror(model, None, False).decoder.norm.eps == 1e-2


def test_weights_loaded_in_inference_mode() -> None:
    with torch.inference_mode():
        model = accelerate(PublishedModel())
        before = draw(model)
        negate("head.weight")(model)
    after = draw(model)
    assert torch.equal(after, draw_from_state(model.state_dict()))
    assert not torch.equal(after, before)
