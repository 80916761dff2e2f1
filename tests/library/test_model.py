"""The training pass against the published implementation, and the state-dict layout."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from golden import load_golden

from lpd_ext.model import LPDConfig, LPDModel


def golden_loss(model: LPDModel, mutual_visibility: bool | None = None) -> torch.Tensor:
    golden = load_golden()
    train = golden.part("train.")
    tokens, orders = train["tokens"].long(), train["orders"].long()
    arguments = (tokens, train["labels"].long(), orders, golden.spec["train_group_sizes"])
    logits = model(*arguments, mutual_visibility=mutual_visibility)
    return F.cross_entropy(logits.flatten(0, 1), tokens.gather(1, orders).flatten())


def test_training_loss_and_gradients_equal_the_published_ones() -> None:
    golden = load_golden()
    model = golden.model().requires_grad_(True)
    loss = golden_loss(model)
    assert abs(loss.item() - golden.tensors["train.loss"].item()) <= 1e-5
    loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert found["content"] is not None
    assert found["pos_embed"] is not None
    found["mask_token"] = found["content"][-1].view(1, 1, -1)
    found["pos_embed"] = found["pos_embed"][None]
    wanted = golden.part("train.grad.")
    assert len(wanted) >= 6
    for name, gradient in wanted.items():
        ours = found[name]
        assert ours is not None
        assert (ours - gradient).norm() <= 1e-5 * gradient.norm(), name


def test_mutual_visibility_matters_to_the_loss() -> None:
    """Without it the golden loss is missed by far more than its tolerance, whoever switches it off."""
    golden = load_golden()
    published = golden.tensors["train.loss"].item()
    model = golden.model()
    switched = golden_loss(model, mutual_visibility=False).item()
    assert abs(switched - published) > 1e-4
    model.config = replace(model.config, mutual_visibility=False)
    assert golden_loss(model).item() == switched
    assert abs(golden_loss(model, mutual_visibility=True).item() - published) <= 1e-5


def test_state_dict_is_the_published_layout() -> None:
    golden = load_golden()
    state = golden.model().state_dict()
    published = golden.part("model.")
    assert state.keys() == published.keys()
    assert all(torch.equal(state[name], published[name]) for name in published)


def test_load_state_dict_names_what_does_not_fit() -> None:
    golden = load_golden()
    state = dict(golden.part("model."))
    state["class_emb.weight"] = state["class_emb.weight"][:-1]
    with pytest.raises(RuntimeError, match=r"class_emb\.weight: expected shape \[10, 96\], got \[9, 96\]"):
        LPDModel(golden.config()).load_state_dict(state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": 0}, "dim must be"),
        ({"grid": (8,)}, "grid must be"),
        ({"grid": (8, 0)}, "grid must be"),
        ({"grid": (8, True)}, "grid must be"),
        ({"grid": 8}, "grid must be"),
        ({"depth": True}, "depth must be"),
        ({"heads": 7}, "multiple of 8"),
        ({"dim": 264}, "multiple of 8 and at most 256"),
        ({"vocab_size": 2.5}, "vocab_size must be"),
        ({"mutual_visibility": 1}, "mutual_visibility must be"),
    ],
)
def test_config_refuses(change: dict[str, object], message: str) -> None:
    sizes: dict[str, object] = {"dim": 64, "depth": 1, "heads": 1, "vocab_size": 16, "num_classes": 2, "grid": (2, 3)}
    with pytest.raises(ValueError, match=message):
        LPDConfig(**(sizes | change))


@pytest.mark.parametrize(("name", "millions"), [("lpd_l", 337), ("lpd_xl", 752), ("lpd_xxl", 1400)])
def test_presets_have_the_published_number_of_parameters(name: str, millions: int) -> None:
    with torch.device("meta"):
        model = LPDModel(LPDConfig.preset(name))
    count = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert abs(count - millions) <= 0.015 * millions


def test_dropout_is_off_in_eval_mode_and_acts_in_training_mode() -> None:
    golden = load_golden()
    train = golden.part("train.")
    model = golden.model()
    arguments = (
        train["tokens"].long(),
        train["labels"].long(),
        train["orders"].long(),
        golden.spec["train_group_sizes"],
    )
    with torch.no_grad():
        plain = model(*arguments)
        for name in ("dropout", "attention_dropout"):
            model.eval()
            assert torch.equal(model(*arguments, **{name: 0.5}), plain)
            model.train()
            assert torch.equal(model(*arguments, **{name: 0.0}), plain)
            assert not torch.allclose(model(*arguments, **{name: 0.5}), plain)
            with pytest.raises(ValueError, match=rf"{name} must lie in \[0, 1\), got 1"):
                model(*arguments, **{name: 1})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": torch.full((2, 6), 16)}, r"tokens must lie in \[0, 16\), got 16 to 16"),
        ({"tokens": torch.full((2, 6), -1)}, r"tokens must lie in \[0, 16\), got -1 to -1"),
        ({"tokens": torch.zeros(2, 5, dtype=torch.int64)}, r"tokens must have shape \[2, 6\], got \[2, 5\]"),
        ({"labels": torch.tensor([0, 2])}, r"labels must lie in \[-1, 2\), got 0 to 2"),
        ({"labels": torch.tensor([-2, 0])}, r"labels must lie in \[-1, 2\), got -2 to 0"),
        ({"labels": torch.zeros(2, 1, dtype=torch.int64)}, r"labels must have shape \[2\], got \[2, 1\]"),
        ({"orders": torch.full((2, 6), 6)}, r"orders must lie in \[0, 6\), got 6 to 6"),
        ({"orders": torch.arange(6)}, r"orders must have shape \[2, 6\], got \[6\]"),
        ({"group_sizes": [1, 4]}, "group_sizes must sum to 6"),
        ({"group_sizes": [0, 6]}, r"group_sizes\[0\] = 0 must be >= 1"),
    ],
)
def test_the_training_pass_refuses_what_is_out_of_range(change: dict[str, object], message: str) -> None:
    model = LPDModel(LPDConfig(dim=64, depth=1, heads=1, vocab_size=16, num_classes=2, grid=(2, 3)))
    good: dict[str, object] = {
        "tokens": torch.zeros(2, 6, dtype=torch.int64),
        "labels": torch.tensor([-1, 1]),
        "orders": torch.arange(6).expand(2, -1),
        "group_sizes": [1, 5],
    }
    assert model(**good).shape == (2, 6, 16)
    with pytest.raises(ValueError, match=message):
        model(**(good | change))
