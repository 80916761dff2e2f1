"""The drop-in on an object with the published state-dict layout and call signature."""

from __future__ import annotations

import pytest
import torch
from golden import load_golden
from torch import Tensor, nn

from lpd_ext.compat import accelerate


class PublishedModel(nn.Module):
    """Holds the published parameters under the published names; its own sample_tokens must be gone afterwards."""

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

    def sample_tokens(self, *arguments: object) -> Tensor:
        raise AssertionError("the published decoder must not run")


@pytest.fixture
def model() -> PublishedModel:
    return accelerate(PublishedModel(), heads=3)


def block_causal_mask(sizes: list[int], boolean: bool = False) -> Tensor:
    blocks = torch.tensor([1, *sizes])
    block = torch.arange(len(blocks)).repeat_interleave(blocks)
    allowed = block[:, None] >= block[None, :]
    return allowed if boolean else torch.zeros(allowed.shape).masked_fill(~allowed, float("-inf"))


def arguments(case: int = 0) -> dict[str, object]:
    golden = load_golden()
    spec, sample = golden.spec["cases"][case], golden.part(f"sample{case}.")
    return {
        "bsz": spec["batch"],
        "cfg": spec["cfg"],
        "cfg_schedule": spec["cfg_schedule"],
        "labels": sample["labels"].long(),
        "temperature": 1.0,
        "attn_mask": block_causal_mask(spec["group_sizes"]),
        "top_k": 1,
        "top_p": 1.0,
        "group_sizes": str(spec["group_sizes"]),
        "orders": sample["orders"].long(),
    }


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
    accelerate(published, heads=3)
    assert published.state_dict()["head.weight"].data_ptr() == before
    assert published.state_dict().keys() == load_golden().part("model.").keys()


def test_heads_are_read_from_the_published_attention() -> None:
    published = PublishedModel()
    published.blocks.get_submodule("0").attn.num_heads = 3
    blocks = nn.ModuleList(published.blocks.children())
    published.blocks = blocks
    assert torch.equal(
        accelerate(published).sample_tokens(**arguments()),
        load_golden().tensors["sample0.tokens"].long(),
    )


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
        ({"temperature": -1.0}, "temperature"),
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
    accelerate(published, heads=3)
    orders = torch.arange(24).expand(2, -1)
    tokens = published.sample_tokens(2, labels=torch.tensor([0, 1]), group_sizes=[4, 20], orders=orders)
    assert tokens.shape == (2, 24)
    assert tokens.min() >= 0


def test_a_foreign_module_is_refused() -> None:
    foreign = nn.Linear(3, 3)
    with pytest.raises(ValueError, match="not an LPD checkpoint of the published layout"):
        accelerate(foreign)
    assert not hasattr(foreign, "sample_tokens")
