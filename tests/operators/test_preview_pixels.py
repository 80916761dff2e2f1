"""preview_pixels against its twin in float64, and by explicit places of pixels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from fuzz_operators import judge_pixels
from operator_calls import CALLS, Call, Draw
from torch import Tensor

from lpd_ext import ops, reference

NAMES = ("tokens", "codebook", "weight1", "bias1", "weight2", "bias2", "head", "head_bias")
# Grid, code length, widths of the convolutions, stride.
SIZES = [
    ((1, 8, 8), 8, (48, 48), 4),
    ((3, 5, 7), 4, (129, 7), 3),
    ((2, 1, 1), 1, (1, 1), 1),
    ((1, 1, 13), 8, (16, 33), 2),
    ((1, 17, 2), 3, (15, 64), 16),
    ((2, 16, 16), 8, (48, 48), 16),
]


def random_arguments(grid: tuple[int, int, int], length: int, widths: tuple[int, int], stride: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(sum(grid) + stride)

    def normal(*size: int, spread: float = 1.0) -> Tensor:
        return spread * torch.randn(*size, generator=generator)

    first, second = widths
    return [
        torch.randint(-1, 40, grid, generator=generator),
        normal(40, length, spread=7.0),  # not unit vectors
        normal(3, 3, length + 1, first),
        normal(first),
        normal(3, 3, first, second, spread=(9 * first) ** -0.5),
        normal(second),
        normal(second, stride, stride, 3, spread=0.3 * second**-0.5),
        normal(stride, stride, 3, spread=0.3),
    ]


def exact(arguments: list[Tensor]) -> Call:
    return dict(zip(NAMES, [arguments[0], *(t.double() for t in arguments[1:])], strict=True))


@pytest.mark.parametrize(("grid", "length", "widths", "stride"), SIZES)
def test_right_to_half_a_step(
    grid: tuple[int, int, int], length: int, widths: tuple[int, int], stride: int, cpu_backend: torch.device
) -> None:
    arguments = random_arguments(grid, length, widths, stride)
    pixels = ops.preview_pixels(*arguments)
    assert pixels.shape == (grid[0], grid[1] * stride, grid[2] * stride, 3)
    assert pixels.dtype == torch.uint8
    judge_pixels(exact(arguments), pixels)
    undrawn = (arguments[0] < 0).repeat_interleave(stride, 1).repeat_interleave(stride, 2)
    assert (pixels[undrawn] == 128).all()
    alone = torch.cat([ops.preview_pixels(one[None], *arguments[1:]) for one in arguments[0]])
    assert torch.equal(pixels, alone)  # an image does not depend on the others


@pytest.mark.parametrize("grid", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_no_cells(grid: tuple[int, int, int], cpu_backend: torch.device) -> None:
    pixels = ops.preview_pixels(*random_arguments(grid, 4, (8, 8), 2))
    assert pixels.shape == (grid[0], 2 * grid[1], 2 * grid[2], 3)


def test_each_pixel_has_its_place(cpu_backend: torch.device) -> None:
    """Convolutions that pass on a cell's neighbour, and a head that tells rows, columns and colours apart."""
    codebook = torch.tensor([[3.0, 4.0]])
    weight1 = torch.zeros(3, 3, 3, 2)
    weight1[0, 2, 1, 0] = 0.5  # from the cell above and right, its second number
    weight2 = torch.zeros(3, 3, 2, 1)
    weight2[2, 1, 0, 0] = 2.0  # from the cell below
    head = torch.arange(12.0).view(1, 2, 2, 3) / 16
    tokens = torch.tensor([[[0, 0, 0], [0, -1, 0], [0, 0, 0]]])
    zeros = torch.zeros(2), torch.zeros(1), torch.zeros(2, 2, 3)
    pixels = ops.preview_pixels(tokens, codebook, weight1, zeros[0], weight2, zeros[1], head, zeros[2])
    # Cell (y, x) sees the cell (y, x + 1): 2 * 0.5 * 4 / 5 where it is drawn, in a row that has one below it.
    values = torch.tensor([[0.8, 0.8, 0.0], [0.0, 0.8, 0.0], [0.0, 0.0, 0.0]])
    images = torch.zeros(6, 6, 3)
    for y in range(3):
        for x in range(3):
            images[2 * y : 2 * y + 2, 2 * x : 2 * x + 2] = values[y, x] * head[0] if tokens[0, y, x] >= 0 else 0
    assert torch.equal(pixels[0], ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8))


MISTAKES = {
    "undrawn cells have a code": {"tokens": lambda t: t.clamp(min=0)},
    "other rows": {"weight1": lambda t: t.flip(0)},
    "other columns": {"weight2": lambda t: t.flip(1)},
    "no bias": {"bias1": torch.zeros_like},
    "transposed cells": {"head": lambda t: t.transpose(1, 2)},
}


@pytest.mark.parametrize("name", MISTAKES)
def test_the_comparison_rejects(name: str) -> None:
    arguments = random_arguments((2, 5, 7), 8, (16, 33), 3)
    wrong = exact(arguments)
    for key, change in MISTAKES[name].items():
        wrong[key] = change(wrong[key])
    with pytest.raises(AssertionError, match="steps off"):
        judge_pixels(wrong, ops.preview_pixels(*arguments))


def test_values_beyond_white_and_black_and_none(cpu_backend: torch.device) -> None:
    arguments = random_arguments((1, 2, 3), 2, (4, 5), 2)
    arguments[0].clamp_(min=0)
    for number, pixel in ((1e30, 255), (-1e30, 0), (float("inf"), 255), (float("-inf"), 0), (float("nan"), 0)):
        arguments[7] = torch.full((2, 2, 3), number)
        assert (ops.preview_pixels(*arguments) == pixel).all()
        assert (reference.preview_pixels(*arguments) == pixel).all()


@pytest.mark.parametrize("token", [-2, 40, 2**40])
def test_tokens_that_the_codebook_has_not(token: int, cpu_backend: torch.device) -> None:
    arguments = random_arguments((1, 2, 3), 2, (4, 5), 2)
    arguments[0][0, 1, 2] = token
    with pytest.raises(RuntimeError, match=rf"tokens must be in \[-1, 40\), got {token}"):
        ops.preview_pixels(*arguments)


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("tokens", torch.zeros(1, 2, 3), "tokens must be int64, got float32"),
        ("codebook", torch.zeros(40, 3), r"weight1 must have shape \[3, 3, d \+ 1, K\] = \[3, 3, 4, 4\]"),
        ("weight1", torch.zeros(3, 3, 3, 4).double(), "weight1 must be float32, got float64"),
        ("weight2", torch.zeros(3, 3, 5, 5), r"weight2 must have shape \[3, 3, K, L\] = \[3, 3, 4, 5\]"),
        ("head", torch.zeros(5, 2, 3, 2), r"head must have shape \[L, s, s, 3\] = \[5, 2, 2, 3\]"),
        ("head_bias", torch.zeros(2, 3, 3), r"head_bias must have shape \[s, s, 3\]"),
        ("head_bias", torch.zeros(1025, 1025, 3), "head_bias: s must be at most 1024, got 1025"),
    ],
)
def test_errors_name_the_argument(name: str, wrong: Tensor, message: str, cpu_backend: torch.device) -> None:
    arguments = dict(zip(NAMES, random_arguments((1, 2, 3), 2, (4, 5), 2), strict=True))
    with pytest.raises(RuntimeError, match=message):
        ops.preview_pixels(**{**arguments, name: wrong})


def test_the_twin_is_a_network_of_torchs_modules() -> None:
    arguments = random_arguments((2, 5, 7), 8, (16, 33), 3)
    tokens, codebook, weight1, bias1, weight2, bias2, head, head_bias = arguments
    drawn = (tokens >= 0).float()[:, None]
    codes = (codebook / codebook.norm(dim=1, keepdim=True))[tokens.clamp(min=0)].permute(0, 3, 1, 2)
    x = torch.cat([codes * drawn, drawn], 1)
    for weight, bias in ((weight1, bias1), (weight2, bias2)):
        x = F.relu(F.conv2d(x, weight.permute(3, 2, 0, 1), bias, padding=1))
    x = F.conv2d(x, head.permute(3, 1, 2, 0).reshape(-1, 33, 1, 1)) + head_bias.permute(2, 0, 1).reshape(1, -1, 1, 1)
    images = F.pixel_shuffle(x * drawn, 3).permute(0, 2, 3, 1)
    torch.testing.assert_close(reference.preview_images(*arguments), images, rtol=1e-5, atol=1e-5)


def test_opcheck(cpu_backend: torch.device) -> None:
    call = CALLS["preview_pixels"](Draw(3))
    torch.library.opcheck(torch.ops.lpd_ext.preview_pixels.default, tuple(call[name] for name in NAMES))
