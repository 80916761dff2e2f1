"""sample_step: what sample_tokens draws, by the tables of a decode and into them."""

from __future__ import annotations

import pytest
import torch
from operator_calls import CALLS, Call, Draw
from torch import Tensor

from lpd_ext import ops

NAMES = ("image", "token_index", "write_index", "twin_index")


def calls(count: int) -> list[Call]:
    """Random calls that draw something."""
    found = (CALLS["sample_step"](Draw(seed)) for seed in range(1000))
    return [call for call, _ in zip((c for c in found if len(tensor(c, "image")) > 1), range(count), strict=False)]


def tensor(call: Call, name: str) -> Tensor:
    value = call[name]
    assert isinstance(value, Tensor)
    return value


def on(call: Call, device: torch.device) -> Call:
    return {name: value.clone().to(device) if isinstance(value, Tensor) else value for name, value in call.items()}


def expected(call: Call) -> tuple[Tensor, Tensor]:
    """Contents and grid, token by token, of what sample_tokens draws from the settings gathered beforehand."""
    image, n, write, twin = (tensor(call, name) for name in NAMES)
    positions, contents, grid = tensor(call, "positions").flatten(), tensor(call, "contents").flatten(), call["grid"]
    filters = (None if call[name] is None else tensor(call, name)[image] for name in ("top_k", "top_p"))
    tokens = ops.sample_tokens(
        tensor(call, "logits"),
        tensor(call, "conditional_row"),
        tensor(call, "unconditional_row"),
        tensor(call, "guidance")[image, n],
        tensor(call, "temperature")[image],
        *filters,
        tensor(call, "seeds")[image],
        positions[write] - 1,
    )
    contents, grid = contents.clone().cpu(), tensor({"grid": grid}, "grid").clone().cpu()
    for m, token in enumerate(tokens.tolist()):
        contents[write[m]] = token
        if twin[m] >= 0:
            contents[twin[m]] = token
        grid[image[m], positions[write[m]] - 1] = token
    return contents.view(tensor(call, "contents").shape), grid


def test_tokens_are_those_of_sample_tokens_and_nothing_else_is_written(backend: torch.device) -> None:
    for call in calls(30):
        call = on(call, backend)
        contents, grid = expected(call)
        assert ops.sample_step(**call) is None
        assert torch.equal(tensor(call, "contents").cpu(), contents)
        assert torch.equal(tensor(call, "grid").cpu(), grid)


def test_settings_lie_at_any_stride(backend: torch.device) -> None:
    call = on(calls(1)[0], backend)
    images, cells = tensor(call, "grid").shape
    contents, grid = expected(call)
    record = torch.empty(images, cells + 5, device=backend)
    record[:, 2 : 2 + cells], record[:, 0] = tensor(call, "guidance"), tensor(call, "temperature")
    numbers = torch.empty(images, 3, dtype=torch.int64, device=backend)
    numbers[:, 2] = tensor(call, "seeds")
    views = {"guidance": record[:, 2 : 2 + cells], "temperature": record[:, 0], "seeds": numbers[:, 2]}
    ops.sample_step(**{**call, **views})
    assert torch.equal(tensor(call, "contents").cpu(), contents)
    assert torch.equal(tensor(call, "grid").cpu(), grid)


WRONG = {
    "conditional row": ("conditional_row", 2**31 - 1, r"conditional_row\[1\] = 2147483647 must be in \[0, \d+\)"),
    "unconditional row": ("unconditional_row", -2, r"unconditional_row\[1\] = -2 must be in \[-1, \d+\)"),
    "image": ("image", -1, r"image\[1\] = -1 must be in \[0, \d+\)"),
    "token index": ("token_index", 99, r"token_index\[1\] = 99 must be in \[0, \d+\)"),
    "write index": ("write_index", 9999, r"write_index\[1\] = 9999 must be in \[0, \d+\)"),
    "twin index": ("twin_index", -2, r"twin_index\[1\] = -2 must be in \[-1, \d+\)"),
    "a column that has no cell": ("write_index", 0, r"positions at write_index\[1\] = 0 must be in \[1, \d+\], got 0"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_lies_outside_is_refused_or_on_cuda_not_drawn(case: str, backend: torch.device) -> None:
    name, value, message = WRONG[case]
    call = on(calls(1)[0], backend)
    contents, grid = expected(call)
    before = tensor(call, "contents").cpu().clone(), tensor(call, "grid").cpu().clone()
    image, _, write, twin = (tensor(call, index).cpu().clone() for index in NAMES)
    cell = tensor(call, "positions").cpu().flatten()[write[1]] - 1
    tensor(call, name)[1] = value
    if ops._ops is torch.ops.lpd_ext and backend.type == "cpu":
        with pytest.raises(RuntimeError, match=message):
            ops.sample_step(**call)
        contents, grid = before
    else:
        ops.sample_step(**call)
        contents.view(-1)[write[1]] = before[0].view(-1)[write[1]]
        if twin[1] >= 0:
            contents.view(-1)[twin[1]] = before[0].view(-1)[twin[1]]
        grid[image[1], cell] = before[1][image[1], cell]
    assert torch.equal(tensor(call, "contents").cpu(), contents)
    assert torch.equal(tensor(call, "grid").cpu(), grid)


def test_a_token_without_logits_is_said(backend: torch.device) -> None:
    call = on(calls(1)[0], backend)
    tensor(call, "logits").fill_(float("nan"))
    before = on(call, backend)
    if ops._ops is torch.ops.lpd_ext and backend.type == "cpu":
        with pytest.raises(RuntimeError, match=r"logits of token 0 \(row \d+\) contain NaN"):
            ops.sample_step(**call)
        assert torch.equal(tensor(call, "contents"), tensor(before, "contents"))
        assert torch.equal(tensor(call, "grid"), tensor(before, "grid"))
    else:
        ops.sample_step(**call)
        assert (tensor(call, "contents").flatten()[tensor(call, "write_index")] == -1).all()


def test_settings_out_of_range_are_refused_or_on_cuda_draw_nothing(backend: torch.device) -> None:
    call = on(calls(1)[0], backend)
    call["temperature"] = torch.full_like(tensor(call, "temperature"), -1.0)
    before = on(call, backend)
    if ops._ops is torch.ops.lpd_ext and backend.type == "cpu":
        with pytest.raises(RuntimeError, match=r"temperature\[\d+\] = -1 must be finite and >= 0"):
            ops.sample_step(**call)
        assert torch.equal(tensor(call, "contents"), tensor(before, "contents"))
    else:
        ops.sample_step(**call)
        assert (tensor(call, "contents").flatten()[tensor(call, "write_index")] == -1).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grid": torch.zeros(2, 3)}, "grid must be int64, got float32"),
        ({"seeds": torch.zeros(3, dtype=torch.int32)}, "seeds must be int64, got int32"),
        ({"top_k": torch.zeros(1, dtype=torch.int32)}, r"top_k must have shape \[B\] = \[\d+\], got \[1\]"),
        ({"twin_index": torch.zeros(1, dtype=torch.int64)}, r"twin_index must have shape \[M\] = \[\d+\], got \[1\]"),
        ({"contents": torch.zeros(1, 2, dtype=torch.int64)}, r"contents must have shape \[S, N \+ 2\]"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_arguments_are_named(changes: Call, message: str) -> None:
    call = next(call for call in calls(30) if len(tensor(call, "grid")) == 3 or "seeds" not in changes)
    with pytest.raises(RuntimeError, match=message):
        ops.sample_step(**{**call, **changes})
