"""Files that ask for more than they hold: refused at once, without the time or memory that they ask for."""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lpd_ext.bundled import bundled_model
from lpd_ext.checkpoint import load_model, save_model
from lpd_ext.model import LPDConfig, LPDModel
from lpd_ext.pipeline import LPDPipeline
from lpd_ext.state_files import read_state_dict
from lpd_ext.tokenizer import TokenizerConfig, VQTokenizer

CONFIG = LPDConfig(dim=16, depth=2, heads=2, vocab_size=32, num_classes=3, grid=(4, 4))
SECONDS, MEGABYTES = 8.0, 300.0  # of the processor; some of these files took minutes, and none takes a second


@contextmanager
def at_once() -> Iterator[None]:
    """Fails if the block takes much time or memory."""
    started, memory = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert time.process_time() - started < SECONDS
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) / 1024 < MEGABYTES


def state() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {name: value.clone() for name, value in LPDModel(CONFIG).state_dict().items()}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"depth": 20_000}, "depth must be at most 1024, got 20000"),
        ({"depth": 1000}, r"does not fit .*blocks\.2\.\S* is missing"),
        ({"dim": 2**40, "heads": 2**33}, "path .*"),
        ({"vocab_size": 2**62}, "path .*"),
        ({"mlp_ratio": 2**40}, "path .*"),
        ({"grid": [2**20, 2**20]}, "path .*pos_embed"),
    ],
)
def test_sizes_in_config_json_are_compared_with_the_file(
    change: dict[str, Any], reason: str, packed: bool, tmp_path: Path
) -> None:
    save_model(LPDModel(CONFIG), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({"model": config["model"] | change}))
    with at_once(), pytest.raises(ValueError, match=reason) as raised:
        load_model(tmp_path, packed=packed)
    assert str(tmp_path) in str(raised.value)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("count", [1000, 5000])
def test_names_of_many_blocks_are_no_blocks(count: int, packed: bool, tmp_path: Path) -> None:
    torch.save(state() | {f"blocks.{i}.x": torch.ones(1) for i in range(count)}, tmp_path / "a.pth")
    with at_once(), pytest.raises(ValueError, match=r"path '.*a\.pth' "):
        load_model(tmp_path / "a.pth", heads=2, packed=packed)


def test_many_whole_blocks_take_time_in_proportion(tmp_path: Path) -> None:
    """Each block of a packed model comes from a mapping of its own, but not from more than 64."""
    deep = LPDConfig(dim=16, depth=100, heads=2, vocab_size=4, num_classes=1, grid=(1, 1))
    save_model(LPDModel(deep), tmp_path)
    with at_once():
        assert load_model(tmp_path, packed=True).config == deep


def test_a_width_of_nothing_is_refused(tmp_path: Path) -> None:
    save_file(state() | {"token_emb.weight": torch.empty(512, 0)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"path '.*a\.safetensors' .*width of token_emb\.weight, which is 0"):
        load_model(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("name", "shape"),
    [("encoder.conv_in.weight", (17_024, 3, 3, 3)), ("quantize.embedding.weight", (2**18, 1))],
)
def test_a_tokenizer_is_no_larger_than_its_file(name: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    """17,024 channels in the first layer meant 147 GB for the others."""
    small = VQTokenizer(TokenizerConfig(32, (1, 1), 8, 32, 4, 1, 1)).state_dict()
    small = {key: value.half() for key, value in small.items()} | {name: torch.zeros(shape, dtype=torch.float16)}
    if "conv_in" in name:
        small |= {f"encoder.conv_blocks.{i}.res.0.conv2.weight": torch.zeros(17_024, 1, 1, 1) for i in range(2)}
    save_file(small, tmp_path / "a.safetensors")
    with at_once(), pytest.raises(ValueError, match=r"path '.*a\.safetensors' .*published layout"):
        VQTokenizer.from_file(tmp_path / "a.safetensors")


def test_a_tokenizer_of_many_names_is_refused(tmp_path: Path) -> None:
    small = VQTokenizer(TokenizerConfig(32, (1, 1), 8, 32, 4, 1, 1)).state_dict()
    for prefix in ("decoder.conv_blocks.0.res.", "encoder.conv_blocks."):
        torch.save(small | {f"{prefix}{i}.x": torch.ones(1) for i in range(2000)}, tmp_path / "a.pth")
        with at_once(), pytest.raises(ValueError, match=r"path '.*a\.pth'"):
            VQTokenizer.from_file(tmp_path / "a.pth")


@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize(
    "make",
    [
        lambda: {"a": torch.ones(1).expand(10**6, 10**6)},
        lambda: {"a": torch.ones(100), **{f"b{i}": None for i in range(0)}, "c": torch.ones(1).expand(1000)},
        lambda: (lambda table: {f"a{i}": table for i in range(1000)})(torch.ones(100_000)),
        lambda: {"a": torch.ones(3).to_sparse()},
        lambda: {1: torch.ones(3)},
    ],
    ids=["stride 0", "some of stride 0", "one table a thousand times", "sparse", "no name"],
)
def test_tensors_are_no_more_than_their_bytes(make: Any, new_format: bool, tmp_path: Path) -> None:
    torch.save(make(), tmp_path / "a.pth", _use_new_zipfile_serialization=new_format)
    with at_once(), pytest.raises(ValueError, match=r"path '.*a\.pth' is not a readable checkpoint"):
        read_state_dict(tmp_path / "a.pth")


def test_tied_tables_are_read(tmp_path: Path) -> None:
    table = torch.rand(100, 16)
    torch.save({"a": table, "b": table, "c": table[:50]}, tmp_path / "a.pth")
    assert torch.equal(read_state_dict(tmp_path / "a.pth")["c"], table[:50])


def test_a_name_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    """One of the two would be dropped without a word."""
    torch.save({"module.a": torch.ones(1), "_orig_mod.a": torch.zeros(1)}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"a\.pth' is not .*: a is there twice"):
        read_state_dict(tmp_path / "a.pth")


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("top_k", "x"), ("top_k", -1), ("top_p", 0), ("temperature", []), ("guidance_scale", "4"),
        ("guidance_scale", float("nan")), ("guidance_schedule", "cubic"), ("num_inference_steps", 0),
        ("num_inference_steps", None), ("order", "sideways"), ("order", ["locality"]), ("proximity_threshold", None),
        ("repulsion_threshold", "far"), ("surprise", 1),
    ],
)  # fmt: skip
def test_sampling_settings_are_checked_when_they_are_loaded(entry: str, value: object, tmp_path: Path) -> None:
    for file in bundled_model("fashion_mnist").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"sampling": config["sampling"] | {entry: value}}))
    with pytest.raises(ValueError, match=rf"path '.*config\.json' cannot be used: .*{entry}"):
        LPDPipeline.from_pretrained(tmp_path)


def test_weights_of_a_tokenizer_are_finite(tmp_path: Path) -> None:
    tokenizer = VQTokenizer(TokenizerConfig(32, (1, 1), 8, 32, 4, 1, 1)).state_dict()
    tokenizer["decoder.conv_in.weight"][0, 0, 0, 0] = torch.nan
    save_file(tokenizer, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"a\.safetensors' .*decoder\.conv_in\.weight has numbers that are not finite"):
        VQTokenizer.from_file(tmp_path / "a.safetensors")
