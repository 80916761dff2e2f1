"""int8 layers: rounding within half a step of weights and activations, results within what follows."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from golden import load_golden
from torch import Tensor, nn

from lpd_ext import ops, quantize
from lpd_ext.linear import ResultRows, linear_step, mlp_step, pack
from lpd_ext.packing import ROTATION, rotate_rows
from lpd_ext.quantize import SCALE, Int8Linear, quantize_weight

EPS = torch.finfo(torch.float32).eps
SIZES = [(1, 1), (7, 5), (16, 129), (129, 16), (1, 33), (33, 1), (96, 512), (64, 5), (192, 129)]  # K, N


def random_linear(inputs: int, outputs: int, bias: bool = True) -> nn.Linear:
    torch.manual_seed(inputs + outputs)
    linear = nn.Linear(inputs, outputs, bias=bias)
    with torch.no_grad():
        linear.weight *= torch.logspace(-2, 1, outputs)[:, None]  # channels of very different size
    return linear


def rounded(linear: nn.Linear) -> Int8Linear:
    layer = quantize.quantize(nn.Sequential(copy.deepcopy(linear)))[0]
    assert isinstance(layer, Int8Linear)
    return layer


def as_multiplied(linear: nn.Linear) -> Tensor:
    """The weights as its int8 layer rounds them."""
    weight = linear.weight.detach()
    return rotate_rows(weight) / ROTATION if linear.in_features % ROTATION == 0 else weight


def of_bytes(layer: Int8Linear, x: Tensor) -> Tensor:
    """Computes the layer's exact results of the bytes of x, in float64."""
    plain = layer.plain()
    weight = plain["weight"].double() * plain[SCALE].double()[:, None]
    quantized, quantization = ops.quantize_rows(x, quantize._ACTIVATION_LEVELS, layer.rotate, layer.planes)
    scale, zero_point = quantization.double().unsqueeze(-1).unbind(1)
    y = (scale * (quantized - zero_point) @ weight.t()).unflatten(0, (layer.planes, len(x))).sum(0)
    return y if layer.bias is None else y + layer.bias.double()


def rounding_of(layer: Int8Linear, x: Tensor) -> Tensor:
    """Returns how far float32 may be from `of_bytes`: three roundings of each of the terms that add up to a result."""
    plain = layer.plain()
    weight, weight_scale = plain["weight"].double(), plain[SCALE].double()
    quantized, quantization = ops.quantize_rows(x, quantize._ACTIVATION_LEVELS, layer.rotate, layer.planes)
    scale, zero_point = quantization.double().unsqueeze(-1).unbind(1)
    terms = scale * ((quantized.double() @ weight.t()).abs() + zero_point * weight.sum(1).abs())
    terms = terms.unflatten(0, (layer.planes, len(x))).sum(0)
    return 1.5 * EPS * (weight_scale * terms + (0 if layer.bias is None else layer.bias.double().abs()))


def bound(linear: nn.Linear, x: Tensor, planes: int) -> Tensor:
    """Half a step of each weight times |x|, and half a step of each activation times |rounded weight|."""
    ints, weight_scale = quantize_weight(as_multiplied(linear))
    of_rotation: Tensor | float = 0.0
    if linear.in_features % ROTATION == 0:  # six sums of each weight and activation, each rounded
        sums = (part.detach().abs().double().unflatten(1, (ROTATION, -1)).sum(1) for part in (x, linear.weight))
        of_rotation = 6 * EPS * next(sums) @ next(sums).t()
        x = rotate_rows(x)
    low, high = x.double().amin(1, keepdim=True).clamp(max=0), x.double().amax(1, keepdim=True).clamp(min=0)
    levels = quantize._ACTIVATION_LEVELS
    step = (high - low) / levels
    step = step / levels ** (planes - 1) + step * 4 * levels * EPS  # and what float32 adds near ties
    of_weights = x.double().abs().sum(1, keepdim=True) * weight_scale / 2 * (1 + 127 * EPS)
    return of_weights + step / 2 * (ints.double().abs().sum(1) * weight_scale) + of_rotation


def assert_within_bounds(y: Tensor, layer: Int8Linear, linear: nn.Linear, x: Tensor) -> None:
    floor = rounding_of(layer, x)
    assert y.dtype == torch.float32
    assert ((y - of_bytes(layer, x)).abs() <= floor).all()
    exact = copy.deepcopy(linear).double()(x.double())
    assert ((y - exact).abs() <= bound(linear, x, layer.planes) + floor).all()


@pytest.mark.parametrize("size", SIZES)
def test_weights_are_rounded_per_channel(size: tuple[int, int]) -> None:
    weight = random_linear(*size).weight.detach()
    ints, scale = quantize_weight(weight)
    assert (ints.dtype, ints.shape) == (torch.int8, weight.shape)
    assert (scale.dtype, scale.shape) == (torch.float32, weight.shape[:1])
    assert ints.abs().amax(1).eq(127).all()
    error = (weight.double() - scale.double()[:, None] * ints).abs()
    # x / scale is rounded to float32 before it is rounded to a whole number.
    assert (error <= scale.double()[:, None] * (0.5 + 127 * EPS / 2)).all()
    assert scale.equal(weight.abs().amax(1) / 127)
    alone = quantize_weight(weight[-1:])
    assert ints[-1:].equal(alone[0])
    assert scale[-1:].equal(alone[1])


def test_half_precision_weights_round_as_their_values() -> None:
    weight = random_linear(33, 16).weight.detach()
    for dtype in (torch.bfloat16, torch.float16):
        assert all(map(torch.equal, quantize_weight(weight.to(dtype)), quantize_weight(weight.to(dtype).float())))


@pytest.mark.parametrize("value", [0.0, 1e-40])
@torch.no_grad()
def test_a_channel_of_nothing_gives_its_bias(value: float) -> None:
    linear = random_linear(33, 16)
    linear.weight[3] = value
    ints, scale = quantize_weight(linear.weight)
    assert ints[3].eq(0).all()
    assert scale[3] == 1
    y = rounded(linear)(torch.randn(5, 33))
    assert y[:, 3].equal(linear.bias[3].expand(5))


@pytest.mark.parametrize("levels", [127, 255])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_results_are_within_what_rounding_explains(
    size: tuple[int, int], planes: int, bias: bool, levels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize, "_ACTIVATION_LEVELS", levels)
    linear = random_linear(*size, bias)
    layer = rounded(linear)
    layer.planes = planes
    for rows in (1, 7, 40, 129):
        x = torch.randn(rows, size[0]) + 0.5
        assert_within_bounds(layer(x), layer, linear, x)
        assert linear_step(layer, ResultRows(rows))(x).equal(layer(x))


@torch.no_grad()
def test_extreme_bytes_do_not_overflow() -> None:
    """All activations at one end and all weights at +-127: the largest sums there can be, in a long row."""
    linear = nn.Linear(4095, 32, bias=False)  # not rotated: bytes would not be as extreme
    linear.weight.copy_(torch.tensor([1.0, -1.0]).repeat(16)[:, None].expand(32, 4095))
    layer = rounded(linear)
    assert not layer.rotate
    for x in (torch.ones(40, 4095), -torch.ones(40, 4095)):
        assert_within_bounds(layer(x), layer, linear, x)
        assert torch.allclose(layer(x), linear(x), rtol=1e-5)


@torch.no_grad()
def test_shapes_of_inputs() -> None:
    layer = rounded(random_linear(48, 33))
    x = torch.randn(2, 3, 48)
    y = layer(x)
    assert y.equal(layer(x.view(6, 48)).view(2, 3, 33))
    for shape in ((0,), (0, 3), (3, 0), (1, 1)):
        assert layer(torch.zeros(*shape, 48)).shape == (*shape, 33)
    assert layer(x[1, 2]).equal(y[1, 2])
    buffer = torch.full((2, 3, 60), 9.0)
    buffer[..., 5:53] = x
    assert layer(buffer[..., 5:53]).equal(y)
    for dtype in (torch.bfloat16, torch.float16):
        assert layer(x.to(dtype)).equal(layer(x.to(dtype).float()))


@pytest.mark.parametrize("levels", [127, 255])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sizes", [(48, 129), (64, 192), (64, 129), (48, 192)])
@pytest.mark.parametrize("planes", [(1, 1), (1, 2), (2, 1), (2, 2)])
@torch.no_grad()
def test_mlp_is_the_layers_one_after_the_other(
    planes: tuple[int, int], sizes: tuple[int, int], bias: bool, levels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize, "_ACTIVATION_LEVELS", levels)
    fc1, fc2 = rounded(random_linear(*sizes, bias)), rounded(random_linear(*sizes[::-1], bias))
    fc1.planes, fc2.planes = planes
    x = torch.randn(7, sizes[0])
    hidden = nn.functional.gelu(fc1(x))
    plain = fc2.plain()
    # GELU of the fused pass differs by about 3e-7, which moves a byte at a tie by one: one step, for a few of them.
    given = rotate_rows(hidden) if fc2.rotate else hidden
    step = (given.amax(1) - given.amin(1)).clamp(min=1e-9)[:, None] / levels
    largest = plain["weight"].abs().amax(1) * plain[SCALE]
    difference = (mlp_step(fc1, fc2, ResultRows(7), ResultRows(7))(x) - fc2(hidden)).abs()
    assert (difference <= 2.1 * step * largest).all()
    assert (difference <= 1e-4 * fc2(hidden).abs().max()).float().mean() >= 0.7


@pytest.mark.parametrize("mistake", ["column sums without scale", "bias left out", "scale of the wrong channel"])
@torch.no_grad()
def test_the_bounds_reject(mistake: str) -> None:
    linear = random_linear(96, 33)
    layer, x = rounded(linear), torch.randn(7, 96) + 0.5
    y = layer(x)
    wrong = copy.deepcopy(layer)
    if mistake == "column sums without scale":
        wrong._column_sum = wrong._column_sum / wrong._scale
    elif mistake == "bias left out":
        wrong.bias = None
    else:
        wrong._scale = wrong._scale.roll(1)
    assert_within_bounds(y, layer, linear, x)
    with pytest.raises(AssertionError):
        assert_within_bounds(wrong(x), layer, linear, x)


@pytest.mark.parametrize("size", SIZES)
def test_weights_come_back_bit_for_bit(size: tuple[int, int]) -> None:
    linear = random_linear(*size)
    ints, scale = quantize_weight(as_multiplied(linear))
    layer = rounded(linear)
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    assert list(state) == ["weight", SCALE, "bias"]
    assert state["weight"].equal(ints)
    assert state[SCALE].equal(scale)
    empty = Int8Linear(*size, bias=True)
    empty.load_state_dict(state, assign=True)
    of_floats = Int8Linear(*size, bias=True)
    of_floats.load_state_dict(linear.state_dict(), assign=True)
    x = torch.randn(3, size[0])
    for found in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), layer.to("cpu"), empty, of_floats):
        assert all(value.equal(state[name]) for name, value in found.state_dict().items())
        assert found(x).equal(layer(x))
    for value in layer.state_dict().values():  # copies, but for the bias
        value.detach().view(-1)[:1] = 1
    assert layer.plain()["weight"].equal(ints)
    assert layer.plain()[SCALE].equal(scale)


def test_layers_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match=r"weight must have shape \[5, 8\], got \[3, 8\]"):
        Int8Linear(8, 5, bias=False).pack(weight=torch.zeros(3, 8))
    with pytest.raises(ValueError, match="int8 layers have at most 65536 inputs, got 65537"):
        Int8Linear(65537, 5, bias=False).pack(weight=torch.zeros(5, 65537))


def good_state() -> dict[str, Tensor]:
    return dict(rounded(random_linear(7, 5)).state_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": None}, r'Missing key.*"0\.weight"'),
        ({"bias": None}, r'Missing key.*"0\.bias"'),
        ({"weight": torch.zeros(7, 5, dtype=torch.int8)}, r"0\.weight: expected shape \[5, 7\], got \[7, 5\]"),
        ({SCALE: None}, r"0\.weight: rotated_scale must be float32 \[5\] beside an int8 weight, got None"),
        ({SCALE: torch.ones(4)}, r"0\.weight: rotated_scale must be float32 \[5\].* got torch.float32 \[4\]"),
        ({SCALE: torch.ones(5).half()}, r"0\.weight: rotated_scale must be float32 .* got torch.float16"),
        ({"weight": torch.zeros(5, 7)}, r"0\.weight: .* got torch\.float32 beside a rotated_scale"),
        ({"weight": torch.zeros(5, 7, dtype=torch.uint8)}, r"0\.weight: weights must be int8 .* got torch\.uint8"),
        ({"surprise": torch.ones(1)}, r'Unexpected key.*"0\.surprise"'),
    ],
)
def test_a_state_dict_that_does_not_fit(change: dict[str, Tensor | None], message: str) -> None:
    layer = nn.Sequential(rounded(random_linear(7, 5)))
    state = {f"0.{name}": value for name, value in (good_state() | change).items() if value is not None}
    with pytest.raises(RuntimeError, match=f"(?s){message}"):
        layer.load_state_dict(state)
    assert layer[0].plain()["weight"].equal(good_state()["weight"])


@pytest.mark.parametrize("move", [torch.float16, torch.bfloat16, torch.float64, "meta"])
def test_moves_are_refused(move: torch.dtype | str) -> None:
    layer = rounded(random_linear(7, 5))
    with pytest.raises(ValueError, match=r"rotated_scale must be float32|int8 layers decode on the CPU"):
        layer.to(move)
    assert all(value.equal(good_state()[name]) for name, value in layer.state_dict().items())


@pytest.mark.parametrize("make", [quantize.quantize, pack])
@pytest.mark.parametrize("move", [torch.float16, torch.float64, "meta"])
def test_a_model_that_cannot_move_stays_as_it_is(
    make: Callable[[nn.Module], nn.Module], move: torch.dtype | str
) -> None:
    model = make(load_golden().model())
    before = model.state_dict()
    with pytest.raises(ValueError, match=r"rotated_scale must be float32|decode on the CPU|cannot pack weights of"):
        model.to(move)
    after = model.state_dict()
    assert all(value.dtype == before[name].dtype and value.equal(before[name]) for name, value in after.items())
    assert model.to("cpu").float() is model


def test_only_float32_models_are_rounded() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        with pytest.raises(ValueError, match=f"must be in float32, got {dtype}"):
            quantize.quantize(nn.Sequential(nn.Linear(3, 3).to(dtype)))
