"""int8 layers: rounding within half a step of weights and activations, results within what follows, and their files."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from golden import load_golden
from safetensors.torch import load_file, save_file
from test_pipeline import small_pipeline
from test_sampler import recorded_logits
from torch import Tensor, nn

from lpd_ext import ops, quantize
from lpd_ext.checkpoint import load_model, save_model
from lpd_ext.linear import linear_step, mlp_step, pack, unpack
from lpd_ext.model import LPDConfig, LPDModel
from lpd_ext.pipeline import LPDPipeline
from lpd_ext.quantize import SCALE, Int8Linear, is_quantized, quantize_weight
from lpd_ext.reference import ROTATION, rotate_rows
from lpd_ext.sampler import generate

EPS = torch.finfo(torch.float32).eps
SIZES = [(1, 1), (7, 5), (16, 129), (129, 16), (1, 33), (33, 1), (96, 512), (64, 5), (192, 129)]  # K, N

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


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
    """What the layer shall compute of the bytes of x, in float64."""
    plain = layer.plain()
    weight = plain["weight"].double() * plain[SCALE].double()[:, None]
    quantized, quantization = ops.quantize_rows(x, quantize._ACTIVATION_LEVELS, layer.rotate, layer.planes)
    scale, zero_point = quantization.double().unsqueeze(-1).unbind(1)
    y = (scale * (quantized - zero_point) @ weight.t()).unflatten(0, (layer.planes, len(x))).sum(0)
    return y if layer.bias is None else y + layer.bias.double()


def rounding_of(layer: Int8Linear, x: Tensor) -> Tensor:
    """How far float32 may be from `of_bytes`: three roundings of each of the terms that add up to a result."""
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
    if levels > quantize._ACTIVATION_LEVELS:
        pytest.skip("without VNNI products of whole bytes overflow 16 bits")
    monkeypatch.setattr(quantize, "_ACTIVATION_LEVELS", levels)
    linear = random_linear(*size, bias)
    layer = rounded(linear)
    layer.planes = planes
    for rows in (1, 7, 40, 129):
        x = torch.randn(rows, size[0]) + 0.5
        assert_within_bounds(layer(x), layer, linear, x)
        assert linear_step(layer)(x).equal(layer(x))


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
    if levels > quantize._ACTIVATION_LEVELS:
        pytest.skip("without VNNI products of whole bytes overflow 16 bits")
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
    difference = (mlp_step(fc1, fc2)(x) - fc2(hidden)).abs()
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


def test_packed_models_round_as_plain_ones() -> None:
    plain, packed = (quantize.quantize(model) for model in (load_golden().model(), pack(load_golden().model())))
    assert is_quantized(plain)
    assert not is_quantized(load_golden().model())
    state = plain.state_dict()
    assert all(value.equal(state[name]) for name, value in packed.state_dict().items())
    assert quantize.quantize(plain) is plain
    assert unpack(plain) is plain
    assert is_quantized(plain)


def logits_of(model: LPDModel) -> tuple[Tensor, ...]:
    """Of guided decodes and of the teacher-forced pass."""
    train = load_golden().part("train.")
    arguments = (train["tokens"].long(), train["labels"].long(), train["orders"].long())
    with torch.no_grad():
        forced = model(*arguments, load_golden().spec["train_group_sizes"])
    return (forced, *(part for case in range(3) for part in recorded_logits(model, load_golden().request(case))))


def assert_same_logits(a: LPDModel, b: LPDModel) -> None:
    for found, wanted in zip(logits_of(a), logits_of(b), strict=True):
        assert found.nan_to_num(nan=1e9).equal(wanted.nan_to_num(nan=1e9))  # NaN: a branch that was not run


@pytest.fixture
def golden_int8() -> LPDModel:
    model = quantize.quantize(load_golden().model())
    assert isinstance(model, LPDModel)
    return model


def test_int8_model_is_near_the_float_one(golden_int8: LPDModel) -> None:
    """1 % off in all (random weights); a wrong layer costs several."""
    forced, wanted = logits_of(golden_int8)[0], logits_of(load_golden().model())[0]
    assert (forced - wanted).norm() <= 0.02 * wanted.norm()
    layer = golden_int8.blocks[1].mlp.fc2
    assert isinstance(layer, Int8Linear)
    layer._column_sum = layer._column_sum.roll(1)
    assert (logits_of(golden_int8)[0] - wanted).norm() > 0.03 * wanted.norm()


def planes_of(model: LPDModel) -> dict[str, int]:
    return {name: layer.planes for name, layer in model.named_modules() if isinstance(layer, Int8Linear)}


def test_the_last_blocks_and_the_head_take_two_planes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = LPDModel(LPDConfig(64, 5, 2, vocab_size=32, num_classes=3, grid=(4, 4))).eval().requires_grad_(False)
    save_model(model, tmp_path / "float")
    planes = planes_of(quantize.quantize(model))
    assert len(planes) == 5 * 4 + 1
    for name, count in planes.items():
        assert count == (2 if name == "head" or name.split(".")[1] in "234" else 1), name
    save_model(model, tmp_path / "int8")
    for loaded in (load_model(tmp_path / "float", dtype="int8"), load_model(tmp_path / "int8"), copy.deepcopy(model)):
        assert planes_of(loaded) == planes
    assert quantize.use_planes(nn.Sequential(rounded(random_linear(7, 5))))[0].planes == 1


@pytest.mark.parametrize("dtype", [None, "int8"])
def test_a_file_of_int8_weights(golden_int8: LPDModel, tmp_path: Path, dtype: Any) -> None:
    save_model(golden_int8, tmp_path / "int8")
    save_model(load_golden().model(), tmp_path / "float")
    path = tmp_path / "int8" / "model.safetensors"
    stored = load_file(path)
    linears = {f"blocks.{i}.{name}" for i in range(golden_int8.config.depth) for name in
               ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")} | {"head"}  # fmt: skip
    assert {name for name, value in stored.items() if value.dtype == torch.int8} == {f"{n}.weight" for n in linears}
    assert {name for name in stored if name.endswith("scale")} == {f"{name}.rotated_scale" for name in linears}
    assert {value.dtype for value in stored.values()} == {torch.int8, torch.float32}
    saved = sum(3 * value.numel() for value in stored.values() if value.dtype == torch.int8)
    added = sum(4 * value.numel() for name, value in stored.items() if name.endswith("scale"))
    difference = (tmp_path / "float" / "model.safetensors").stat().st_size - path.stat().st_size
    assert abs(difference - (saved - added)) < 10_000  # the header
    loaded = load_model(tmp_path / "int8", dtype=dtype)
    assert is_quantized(loaded)
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert_same_logits(loaded, golden_int8)
    state = golden_int8.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    assert all(value.equal(state[name]) for name, value in loaded.state_dict().items())


def test_a_float_file_is_rounded_on_request(golden_int8: LPDModel, tmp_path: Path) -> None:
    save_model(load_golden().model(), tmp_path)
    torch.save({"model": load_golden().part("model.")}, tmp_path / "published.pth")
    assert not is_quantized(load_model(tmp_path))
    for path, options in ((tmp_path, {}), (tmp_path, {"packed": True}), (tmp_path / "published.pth", {"heads": 3})):
        assert_same_logits(load_model(path, dtype="int8", **options), golden_int8)


def test_scales_stay_float32_in_a_half_precision_file(golden_int8: LPDModel, tmp_path: Path) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        save_model(golden_int8, tmp_path, dtype=dtype)
        stored, state = load_file(tmp_path / "model.safetensors"), golden_int8.state_dict()
        for name, value in stored.items():
            exact = value.dtype == torch.int8 or name.endswith(".rotated_scale")
            assert value.equal(state[name] if exact else state[name].to(dtype)), name
        loaded = load_model(tmp_path)
        assert {value.dtype for value in loaded.state_dict().values()} == {torch.int8, torch.float32}
        assert all(value.equal(state[name]) for name, value in loaded.state_dict().items() if name.endswith(SCALE))


def test_int8_at_another_grid(golden_int8: LPDModel, tmp_path: Path) -> None:
    save_model(golden_int8, tmp_path)
    model = load_model(tmp_path, grid=(4, 12))
    assert model.config.grid == (4, 12)
    assert model.pos_embed.shape == (49, 96)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": torch.float32}, "dtype must be 'int8' or None for a checkpoint of int8 weights, got torch.float32"),
        ({"dtype": torch.float16}, "dtype must be 'int8' or None .* got torch.float16"),
        ({"dtype": "int4"}, "dtype must be one of .*int8, got int4"),
        ({"dtype": "int8", "device": "cuda"}, "'int8' decodes on the CPU, .* got device cuda"),
        ({"device": "cuda:1"}, "'int8' decodes on the CPU, .* got device cuda:1"),
        ({"device": "meta"}, "'int8' decodes on the CPU, .* got device meta"),
    ],
)
def test_int8_files_refuse(golden_int8: LPDModel, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    save_model(golden_int8, tmp_path)
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path, **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks.1.attn.proj.rotated_scale": None}, r"blocks\.1\..*attn\.proj\.weight: rotated_scale must be float32"),
        ({"blocks.0.mlp.fc1.rotated_scale": torch.ones(3)}, r"blocks\.0\..*fc1\.weight: rotated_scale must be float32"),
        ({"head.rotated_scale": torch.ones(3)}, r"head\.weight: rotated_scale must be float32"),
        ({"blocks.0.mlp.fc1.weight_scale": torch.ones(3)}, r"int8 weights of an earlier kind: make it again"),
        ({"blocks.0.mlp.fc1.weight": None}, r"blocks\.0\.mlp\.fc1\.weight is missing"),
        ({"blocks.2.norm1.rotated_scale": torch.ones(3)}, r"blocks\.2\.norm1\.rotated_scale is unexpected"),
    ],
)
def test_int8_files_that_do_not_fit(
    golden_int8: LPDModel, tmp_path: Path, change: dict[str, Tensor | None], message: str
) -> None:
    save_model(golden_int8, tmp_path)
    path = tmp_path / "model.safetensors"
    save_file({name: value for name, value in (load_file(path) | change).items() if value is not None}, path)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        load_model(tmp_path)


PLACES: dict[str, Callable[[LPDModel], Tensor]] = {
    "head": lambda model: model.head.weight[3, 5],
    "qkv": lambda model: model.blocks[0].attn.qkv.weight[7, 9],
    "fc1": lambda model: model.blocks[1].mlp.fc1.weight[7, 9],
    "bias of fc2": lambda model: model.blocks[1].mlp.fc2.bias[7],
    "position embedding": lambda model: model.pos_embed[5, 3],
    "last norm": lambda model: model.norm.weight[11],
}


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", PLACES)
def test_not_a_number_is_an_error(place: str, value: float) -> None:
    """Bytes cannot hold one, so it must travel in the scales: of a channel's weights, or of a row."""
    model, request = load_golden().model(), load_golden().request(0)
    with torch.no_grad():
        PLACES[place](model).fill_(value)
    assert is_quantized(quantize.quantize(model))
    with pytest.raises(RuntimeError, match="NaN"):
        generate(model, request)


def test_pipelines_with_int8(tmp_path: Path) -> None:
    small_pipeline().save_pretrained(tmp_path / "float")
    pipe = LPDPipeline.from_pretrained(tmp_path / "float", dtype="int8")
    assert is_quantized(pipe.model)
    wanted = pipe([0, 1, 2], seeds=3, output_type="tokens").tokens
    pipe.save_pretrained(tmp_path / "int8")
    for options in ({}, {"dtype": "int8"}):
        again = LPDPipeline.from_pretrained(tmp_path / "int8", **options)
        assert is_quantized(again.model)
        assert again([0, 1, 2], seeds=3, output_type="tokens").tokens.equal(wanted)
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("int8", "float")]
    assert sizes[0] < 0.5 * sizes[1]
    with pytest.raises(ValueError, match="dtype must be 'int8' or None"):
        LPDPipeline.from_pretrained(tmp_path / "int8", dtype=torch.float32)


def test_a_pipeline_with_int8_stays_where_it_is() -> None:
    pipe = small_pipeline()
    quantize.quantize(pipe.model)
    wanted = pipe([0, 1], seeds=3, output_type="tokens").tokens
    for options in ({}, {"device": "cpu"}, {"device": torch.device("cpu")}):
        assert pipe.to(**options) is pipe
        assert is_quantized(pipe.model)
        assert pipe([0, 1], seeds=3, output_type="tokens").tokens.equal(wanted)
    for options in ({"device": "cuda"}, {"device": "meta"}, {"dtype": torch.float16}, {"dtype": torch.float32}):
        with pytest.raises(ValueError, match="an int8 transformer stays on the CPU and computes in float32, got"):
            pipe.to(**options)
    assert pipe.tokenizer.quantize.embedding.weight.device.type == "cpu"
    assert pipe([0, 1], seeds=3, output_type="tokens").tokens.equal(wanted)
