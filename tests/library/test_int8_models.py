"""int8 models and pipelines: near the float ones, the same out of their files; files that do not fit are refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from decodes import recorded_logits
from golden import load_golden
from safetensors.torch import load_file, save_file
from test_pipeline import small_pipeline
from test_quantize import random_linear, rounded
from torch import Tensor, nn

from lpd_ext import quantize
from lpd_ext.checkpoint import load_model, save_model
from lpd_ext.linear import pack, unpack
from lpd_ext.model import LPDConfig, LPDModel
from lpd_ext.pipeline import LPDPipeline
from lpd_ext.quantize import SCALE, Int8Linear, is_quantized
from lpd_ext.sampler import generate


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
    """Returns logits of the teacher-forced pass and of guided decodes."""
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
        ({"dtype": "int8", "device": "cuda"}, "'int8' decodes on the CPU, got device cuda"),
        ({"device": "cuda:1"}, "'int8' decodes on the CPU, got device cuda:1"),
        ({"device": "meta"}, "'int8' decodes on the CPU, got device meta"),
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
