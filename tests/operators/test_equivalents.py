"""The functions of docs/guide/operators.md do what the operators do, on random calls."""

from __future__ import annotations

import copy
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from operator_calls import CALLS, WRITTEN, Draw
from torch import Tensor

from lpd_ext import ops

PAGE = Path(__file__).parents[2] / "docs/guide/operators.md"
OTHERS = ("sample_tokens", "locality_order", "training_attention_backward")  # the page describes these otherwise
OF_16_BITS = ("embed_scaled_rows", "residual_linear", "normed_linear", "fold_layer_norm")
NAMES = sorted(set(CALLS) - set(OTHERS))


@pytest.fixture(scope="module")
def shown() -> dict[str, Any]:
    """Returns the definitions of the page's code, but for the example at its end."""
    text = PAGE.read_text(encoding="utf-8").partition("## Alone")[0]
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(block, names)
    return names


def is_compared(name: str, call: dict[str, Any]) -> bool:
    """Plain torch refuses some empty tensors; other dtypes round otherwise; the page shows one plane of bytes."""
    floats = [value for value in call.values() if isinstance(value, Tensor) and value.is_floating_point()]
    plain = all((tensor.dtype == torch.float32 or name in OF_16_BITS) and tensor.numel() for tensor in floats)
    return plain and not call.get("bfloat16") and not (name == "quantize_rows" and call["planes"] == 2)


@pytest.mark.parametrize("name", NAMES)
def test_the_operator_does_what_the_page_shows(name: str, shown: dict[str, Any]) -> None:
    calls = [call for call in (CALLS[name](Draw(seed)) for seed in range(60)) if is_compared(name, call)]
    assert len(calls) >= 5
    for call in calls:
        other = copy.deepcopy(call)
        compare(getattr(ops, name)(**call), shown[name](**other))
        for written in set(WRITTEN.get(name, ())) & set(call) - {"workspace"}:
            compare(call[written], other[written])


def compare(ours: object, theirs: object) -> None:
    if isinstance(ours, tuple):
        assert isinstance(theirs, tuple)
        for pair in zip(ours, theirs, strict=True):
            compare(*pair)
    elif isinstance(ours, Tensor) and ours.dtype == torch.uint8:  # a value half way between two bytes
        torch.testing.assert_close(ours.int(), theirs.int(), rtol=0, atol=1)
    elif isinstance(ours, Tensor) and not ours.is_floating_point():
        assert torch.equal(ours, theirs)
    elif isinstance(ours, Tensor):
        rounding = 1e-4 if ours.dtype == torch.float32 else 1.01 * torch.finfo(ours.dtype).eps  # one step of 16 bits
        torch.testing.assert_close(ours, theirs, rtol=rounding, atol=1e-4, equal_nan=True)  # of unused cache positions
    else:
        assert ours is None


def test_sample_tokens_draws_from_what_the_page_shows(shown: dict[str, Any]) -> None:
    draws, vocab = 20000, 11
    one = {
        "guidance": torch.tensor([1.5]),
        "temperature": torch.tensor([1.7]),
        "top_k": torch.tensor([8], dtype=torch.int32),
        "top_p": torch.tensor([0.9]),
    }
    logits, row = Draw(0).floats(2, vocab, spread=2.0), torch.zeros(1, dtype=torch.int32)
    expected = shown["probabilities"](logits, row, row + 1, **one)[0]
    many = {name: value.expand(draws).contiguous() for name, value in one.items()}
    rows = row.expand(draws).contiguous()
    seed_and_cell = torch.full((draws,), 5), torch.arange(draws)
    tokens = ops.sample_tokens(logits, rows, rows + 1, *many.values(), *seed_and_cell)
    share = torch.bincount(tokens, minlength=vocab) / draws
    assert 1 < int((expected > 0).sum()) < 8  # top-p leaves fewer than top-k
    assert torch.equal(share > 0, expected > 0)
    assert float((share - expected).abs().sum()) < 0.02  # 3 standard deviations of the sum, about


def test_the_page_shows_every_operator_with_its_arguments(shown: dict[str, Any]) -> None:
    for name in NAMES:
        assert list(inspect.signature(shown[name]).parameters) == list(inspect.signature(getattr(ops, name)).parameters)
    headings = set(re.findall(r"^### (\w+)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE))
    assert headings == set(CALLS) - {"training_attention_backward"}
