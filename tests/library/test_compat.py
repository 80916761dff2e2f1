"""The drop-in on an object with the published state-dict layout and call signature."""

from __future__ import annotations

import inspect
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from golden import load_golden
from lpd_tools.bench.plain_decode import decode_plain
from published_model import PublishedModel, draw, draw_from_state, golden_arguments
from torch import Tensor, nn

from lpd_ext import memory
from lpd_ext.compat import accelerate, restore
from lpd_ext.linear import PackedLinear
from lpd_ext.model import LPDConfig, LPDModel


@pytest.fixture
def model() -> PublishedModel:
    return accelerate(PublishedModel())


def block_causal_mask(sizes: list[int], boolean: bool = False) -> Tensor:
    blocks = torch.tensor([1, *sizes])
    block = torch.arange(len(blocks)).repeat_interleave(blocks)
    allowed = block[:, None] >= block[None, :]
    return allowed if boolean else torch.zeros(allowed.shape).masked_fill(~allowed, float("-inf"))


def arguments(case: int = 0) -> dict[str, object]:
    sizes = load_golden().spec["cases"][case]["group_sizes"]
    return golden_arguments(case) | {"temperature": 1.0, "attn_mask": block_causal_mask(sizes), "top_p": 1.0}


@pytest.mark.parametrize("case", range(3))
def test_golden_tokens_under_the_published_signature(model: PublishedModel, case: int) -> None:
    tokens = model.sample_tokens(**arguments(case))
    assert tokens.dtype == torch.int64
    assert torch.equal(tokens, load_golden().tensors[f"sample{case}.tokens"].long())


def test_positional_arguments_have_the_published_order(model: PublishedModel) -> None:
    names = ["bsz", "cfg", "cfg_schedule", "labels", "temperature", "attn_mask", "top_k", "top_p"]
    names += ["group_sizes", "orders"]
    values = arguments()
    tokens = model.sample_tokens(*(values[name] for name in names))
    assert torch.equal(tokens, load_golden().tensors["sample0.tokens"].long())


def test_mask_may_be_absent_or_boolean_and_sizes_a_list(model: PublishedModel) -> None:
    wanted = load_golden().tensors["sample0.tokens"].long()
    sizes = load_golden().spec["cases"][0]["group_sizes"]
    for change in ({"attn_mask": None}, {"attn_mask": block_causal_mask(sizes, True)}, {"group_sizes": sizes}):
        assert torch.equal(model.sample_tokens(**(arguments() | change)), wanted)


def test_drawing_follows_torch_manual_seed(model: PublishedModel) -> None:
    options = arguments() | {"top_k": 0, "labels": None}
    torch.manual_seed(0)
    first = model.sample_tokens(**options)
    second = model.sample_tokens(**options)
    torch.manual_seed(0)
    assert torch.equal(model.sample_tokens(**options), first)
    assert not torch.equal(first, second)


def test_weights_are_shared_except_the_tables() -> None:
    published = PublishedModel()
    before = published.state_dict()["head.weight"].data_ptr()
    decoder = accelerate(published, packed=False).sample_tokens.decoder()
    assert published.state_dict()["head.weight"].data_ptr() == before == decoder.head.weight.data_ptr()
    assert published.state_dict().keys() == load_golden().part("model.").keys()


class Holder(nn.Module):
    """Weights under the published names, in modules that cannot be called."""

    def __init__(self) -> None:
        super().__init__()
        for name, tensor in load_golden().part("model.").items():
            module: nn.Module = self
            *path, leaf = name.split(".")
            for part in path:
                if not hasattr(module, part):
                    module.add_module(part, nn.Module())
                module = getattr(module, part)
            module.register_parameter(leaf, nn.Parameter(tensor.clone()))


@pytest.mark.parametrize("packed", [None, True, False, "inplace"])
def test_modules_may_only_hold_the_weights(packed: bool | str | None) -> None:
    holder = accelerate(Holder(), heads=3, packed=packed)
    assert torch.equal(holder.sample_tokens(**arguments()), load_golden().tensors["sample0.tokens"].long())
    restore(holder)
    assert not hasattr(holder, "sample_tokens")
    with pytest.raises(ValueError, match="heads must be given"):
        accelerate(Holder())


def packed_layers(model: nn.Module) -> int:
    return sum(isinstance(module, PackedLinear) for module in model.modules())


@pytest.mark.parametrize(("packed", "own", "decoders"), [(True, 0, 13), (False, 0, 0), ("inplace", 13, 13)])
def test_what_is_packed(packed: bool | str, own: int, decoders: int) -> None:
    published = accelerate(PublishedModel(), packed=packed)
    assert (packed_layers(published), packed_layers(published.sample_tokens.decoder())) == (own, decoders)
    assert torch.equal(draw(published), load_golden().tensors["sample0.tokens"].long())


def test_a_second_copy_is_made_where_there_is_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = sum(layer.weight.nbytes for layer in PublishedModel().modules() if isinstance(layer, nn.Linear))
    for free, copies in ((None, 13), (2 * weights, 13), (2 * weights - 2, 0)):
        monkeypatch.setattr(memory, "available", lambda free=free: free)
        assert packed_layers(accelerate(PublishedModel()).sample_tokens.decoder()) == copies


@pytest.mark.parametrize("packed", [None, "inplace"])
def test_restore_gives_the_model_back_as_it_was(packed: str | None) -> None:
    published = PublishedModel()
    published.head.weight.requires_grad_(False)
    modules, parameters = list(published.modules()), dict(published.named_parameters())
    state = {name: tensor.clone() for name, tensor in published.state_dict().items()}
    accelerate(accelerate(published, packed=packed), packed=packed)
    draw(published)
    if packed == "inplace":
        assert len(list(published.parameters())) == len(parameters) - 13
        assert all(parameters[f"{name}.weight"].numel() == 0 for name in ("head", "blocks.2.mlp.fc1"))
    found = published.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
    assert found.keys() == state.keys()
    assert restore(published) is published
    assert list(published.modules()) == modules
    assert all(parameters[name] is parameter for name, parameter in published.named_parameters())
    assert all(torch.equal(tensor, state[name]) for name, tensor in published.state_dict().items())
    assert [name for name, p in parameters.items() if not p.requires_grad] == ["head.weight"]
    with pytest.raises(AssertionError, match="the published decoder must not run"):
        published.sample_tokens()
    assert restore(published) is published


def test_layers_taken_over_are_loaded_and_cast(monkeypatch: pytest.MonkeyPatch) -> None:
    published = accelerate(PublishedModel(), packed="inplace")
    parameters = dict(published.named_parameters())
    changed = {name: -tensor for name, tensor in published.state_dict().items()}
    published.load_state_dict(changed)
    assert torch.equal(draw(published), draw_from_state(changed))
    restore(published)
    assert all(torch.equal(tensor, changed[name]) for name, tensor in published.state_dict().items())
    assert parameters.keys() < dict(published.named_parameters()).keys()


def test_a_weight_with_two_owners_is_not_taken_over() -> None:
    published = PublishedModel()
    published.head.weight = published.token_emb.weight
    accelerate(published, packed="inplace")
    assert packed_layers(published) == 12
    assert torch.equal(draw(published), draw_from_state(published.state_dict()))
    restore(published)
    assert published.head.weight is published.token_emb.weight


def test_a_model_that_is_refused_stays_as_it_was() -> None:
    published = PublishedModel()
    published.blocks[2].norm2 = nn.Identity()
    with pytest.raises(ValueError, match=r"blocks\.2\.norm2 must be a plain LayerNorm, got Identity"):
        accelerate(published, packed="inplace")
    assert packed_layers(published) == 0
    assert "sample_tokens" not in vars(published)
    with pytest.raises(ValueError, match="packed must be True, False, None or 'inplace', got 'in place'"):
        accelerate(PublishedModel(), packed="in place")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("lpd_l_256", "got 'lpd_l_256': LPDPipeline.from_pretrained loads models by name"),
        (LPDModel(LPDConfig(64, depth=1, heads=1, vocab_size=8, num_classes=2, grid=(2, 2))), "got an LPDModel: `gen"),
    ],
    ids=["name", "ours"],
)
def test_a_name_or_a_model_of_ours_is_told_where_to_go(model: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        accelerate(model)


class Wrapper(nn.Module):
    """Holds the model under a wrapper's name, and shows nothing else of it, as DDP."""

    def __init__(self, name: str, model: nn.Module) -> None:
        super().__init__()
        self.add_module(name, model)


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "DDP": lambda model: Wrapper("module", model),
    "PEFT": lambda model: Wrapper("base_model", Wrapper("model", model)),
    "torch.compile": lambda model: torch.compile(model, backend="eager"),
    "DDP of torch.compile": lambda model: Wrapper("module", torch.compile(model, backend="eager")),
}


@pytest.mark.parametrize("packed", [None, "inplace"])
@pytest.mark.parametrize("kind", WRAPPERS)
def test_wrappers(kind: str, packed: str | None) -> None:
    """A wrapped model is accelerated, and one that is wrapped afterwards stays so; weights are followed in both."""
    for wrapped_first in (True, False):
        published = PublishedModel()
        if wrapped_first:
            outer = accelerate(WRAPPERS[kind](published), packed=packed)
            assert torch.equal(draw(outer), load_golden().tensors["sample0.tokens"].long())
        else:
            outer = WRAPPERS[kind](accelerate(published, packed=packed))
        changed = {name: -tensor for name, tensor in published.state_dict().items()}
        published.load_state_dict(changed)
        assert torch.equal(draw(published), draw_from_state(changed))
        if wrapped_first:
            assert torch.equal(draw(outer), draw(published))
        restore(outer)
        assert packed_layers(published) == 0
        assert not any("sample_tokens" in vars(module) for module in outer.modules())


def test_real_ddp(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=(tmp_path / "store").as_uri(), rank=0, world_size=1)
    try:
        published = PublishedModel()
        outer = accelerate(nn.parallel.DistributedDataParallel(published))
        before = draw(outer)
        optimizer = torch.optim.SGD(outer.parameters(), lr=300.0)
        outer(torch.linspace(-1, 1, 96)[None]).sigmoid().sum().backward()
        optimizer.step()
        assert torch.equal(draw(outer), draw_from_state(published.state_dict()))
        assert not torch.equal(draw(outer), before)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("packed", [True, False, "inplace"])
def test_pickles_have_a_decoder_of_their_own(packed: bool | str) -> None:
    published = accelerate(PublishedModel(), packed=packed)
    golden = draw(published)
    other = pickle.loads(pickle.dumps(published))
    assert torch.equal(draw(other), golden)
    other.load_state_dict({name: -tensor for name, tensor in other.state_dict().items()})
    assert torch.equal(draw(other), draw_from_state(other.state_dict()))
    assert torch.equal(draw(published), golden)
    assert packed_layers(restore(other)) == 0
    assert packed_layers(published) == (13 if packed == "inplace" else 0)


def test_the_signature_is_the_published_one(model: PublishedModel) -> None:
    names = ["bsz", "cfg", "cfg_schedule", "labels", "temperature", "attn_mask", "top_k", "top_p"]
    assert list(inspect.signature(model.sample_tokens).parameters) == [*names, "group_sizes", "orders"]


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("scale", [0.3, -1.5])
def test_guidance_below_one_is_the_published_one(scale: float, packed: bool) -> None:
    published = accelerate(PublishedModel(), packed=packed)
    options = arguments() | {"cfg": scale, "cfg_schedule": "linear"}
    tokens = published.sample_tokens(**options)
    sizes = load_golden().spec["cases"][0]["group_sizes"]
    plain = decode_plain(load_golden().model(), options["labels"], sizes, options["orders"], scale, top_k=1)
    assert torch.equal(tokens, plain)
    assert not torch.equal(tokens, published.sample_tokens(**options | {"cfg": 1.0}))


def test_guidance_of_zero_leaves_the_unconditional_branch(model: PublishedModel) -> None:
    unconditional = model.sample_tokens(**arguments() | {"labels": None, "cfg": 1.0})
    tokens = model.sample_tokens(**arguments() | {"cfg": 0, "cfg_schedule": "constant"})
    assert torch.equal(tokens, unconditional)


def test_filters_and_temperature_beyond_their_range_are_the_published_ones(model: PublishedModel) -> None:
    def drawn(**changes: object) -> Tensor:
        torch.manual_seed(0)
        return model.sample_tokens(**arguments() | {"top_k": 0} | changes)

    free, greedy = drawn(), drawn(top_k=1)
    assert not torch.equal(free, greedy)
    for changes in ({"top_k": -1}, {"top_p": 1.5}, {"top_p": 1}, {"top_k": 10**6}):
        assert torch.equal(drawn(**changes), free)
    for changes in ({"top_p": 0.0}, {"top_p": -1.0}, {"top_p": 1e-300}, {"temperature": 0}, {"temperature": -2.0}):
        assert torch.equal(drawn(**changes), greedy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attn_mask": torch.zeros(65, 65)}, "attn_mask must be None or the block-causal mask"),
        ({"attn_mask": block_causal_mask([1, 63])}, "attn_mask must be None or the block-causal mask"),
        ({"attn_mask": block_causal_mask([1, 2, 4, 6, 8, 9, 10, 12, 11])}, "attn_mask must be None"),
        ({"attn_mask": block_causal_mask([1] * 64).clamp(min=-9.0)}, "attn_mask must be bool, or float"),
        ({"group_sizes": "__import__('os').getpid()"}, "group_sizes"),
        ({"group_sizes": "[1, 2]"}, "group_sizes"),
        ({"group_sizes": None}, "group_sizes and orders must be given"),
        ({"orders": None}, "group_sizes and orders must be given"),
        ({"cfg_schedule": "cosine"}, "cfg_schedule must be one of"),
        ({"attn_mask": block_causal_mask([1] * 64, True).long()}, "attn_mask must be bool, or float"),
        ({"labels": torch.tensor([1])}, r"labels must have bsz = 3 entries, got \[1\]"),
        ({"labels": torch.tensor(1)}, r"labels must have bsz = 3 entries, got \[\]"),
        ({"bsz": -1}, "bsz must be >= 0, got -1"),
        ({"labels": torch.tensor([1, 2, 10])}, r"labels\[2\]"),
        ({"temperature": float("nan")}, "temperature"),
        ({"cfg": float("inf")}, "guidance_scale"),
        ({"top_p": float("nan")}, "top_p"),
        ({"orders": torch.zeros(3, 64, dtype=torch.int64)}, r"orders\[0\] must be a permutation"),
    ],
)
def test_wrong_arguments_are_refused(model: PublishedModel, change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model.sample_tokens(**(arguments() | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"orders": arguments()["orders"].float()}, "orders must be a tensor of integers, got one of torch.float32"),
        ({"orders": arguments()["orders"].tolist()}, "orders must be a tensor of integers, got list"),
        ({"labels": [1, 2, 3]}, "labels must be a tensor of integers, got list"),
        ({"labels": torch.tensor([1.5, 2.0, 3.0])}, "labels must be a tensor of integers, got one of torch.float32"),
        ({"labels": torch.tensor([True, False, True])}, "labels must be a tensor of integers, got one of torch.bool"),
        ({"group_sizes": [1.9, 63]}, r"group_sizes\[0\] must be an integer, got 1\.9"),
        ({"group_sizes": 64}, "group_sizes must be a list of integers, got 64"),
        ({"attn_mask": "causal"}, "attn_mask must be None or a tensor, got str"),
        ({"bsz": 3.0}, "bsz must be an integer, got 3.0"),
    ],
)
def test_wrong_types_are_refused(model: PublishedModel, change: dict[str, object], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        model.sample_tokens(**(arguments() | change))


def test_autocast_around_the_call_changes_nothing(model: PublishedModel) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        tokens = model.sample_tokens(**arguments())
    assert torch.equal(tokens, load_golden().tensors["sample0.tokens"].long())


def test_the_grid_need_not_be_square() -> None:
    published = PublishedModel()
    published.pos_embed = nn.Parameter(published.get_parameter("pos_embed")[:, :25].detach())
    accelerate(published)
    orders = torch.arange(24).expand(2, -1)
    tokens = published.sample_tokens(2, labels=torch.tensor([0, 1]), group_sizes=[4, 20], orders=orders)
    assert tokens.shape == (2, 24)
    assert tokens.min() >= 0


def test_a_foreign_module_is_refused() -> None:
    foreign = nn.Linear(3, 3)
    with pytest.raises(ValueError, match="not an LPD checkpoint of the published layout"):
        accelerate(foreign)
    assert not hasattr(foreign, "sample_tokens")
