"""Saving: a folder is as it was, or as it shall be; what is saved can be loaded."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from little_space import little_space
from safetensors import SafetensorError

from lpd_ext import state_files
from lpd_ext.checkpoint import infer_config, load_model, model_from_state_dict, save_model
from lpd_ext.model import LPDConfig, LPDModel
from lpd_ext.pipeline import LPDPipeline, SamplingDefaults
from lpd_ext.state_files import complete_files, read_state_dict, write_state_dict
from lpd_ext.tokenizer import TokenizerConfig, VQTokenizer

CONFIG = LPDConfig(dim=16, depth=2, heads=2, vocab_size=32, num_classes=3, grid=(4, 4))
FILES = ["config.json", "model.safetensors", "tokenizer.safetensors"]


def pipeline(seed: int, **settings: Any) -> LPDPipeline:
    torch.manual_seed(seed)
    tokenizer = VQTokenizer(TokenizerConfig(32, (1, 1), 8, 32, 4, 1, 1)).eval()
    defaults = SamplingDefaults(num_inference_steps=3, **settings)
    return LPDPipeline(LPDModel(CONFIG).eval(), tokenizer, defaults, ["a", "b", "c"])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def unwritable_names(pipe: LPDPipeline) -> None:
    pipe.class_names = ["a", Path("b"), "c"]


def unwritable_settings(pipe: LPDPipeline) -> None:
    object.__setattr__(pipe.defaults, "guidance_scale", np.float32(4))


def unwritable_weights(pipe: LPDPipeline) -> None:
    pipe.tokenizer.register_buffer("odd", torch.zeros(3).to_sparse())


@pytest.mark.parametrize(
    ("spoil", "error", "sentence"),
    [
        (unwritable_names, ValueError, "'class_names' must be a list of strings"),
        (unwritable_settings, TypeError, r"sampling cannot be written to config\.json"),
        (unwritable_weights, RuntimeError, "memory format|sparse|Sparse"),  # in torch's words
    ],
)
def test_what_cannot_be_saved_leaves_the_folder_as_it_was(
    spoil: Callable[[LPDPipeline], None], error: type[Exception], sentence: str, tmp_path: Path
) -> None:
    pipeline(0).save_pretrained(tmp_path)
    before = contents(tmp_path)
    assert sorted(before) == FILES
    pipe = pipeline(1)
    spoil(pipe)
    with pytest.raises(error, match=sentence):
        pipe.save_pretrained(tmp_path)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("extra", [{"x": np.float32(4)}, {"x": {1, 2}}, {"x": float("nan")}, {"x": float("inf")}])
def test_entries_that_are_no_json_are_refused_by_name(extra: dict[str, Any], tmp_path: Path) -> None:
    save_model(LPDModel(CONFIG), tmp_path)
    before = contents(tmp_path)
    with pytest.raises((TypeError, ValueError), match=r"x cannot be written to config\.json"):
        save_model(LPDModel(CONFIG), tmp_path, extra=extra)
    assert contents(tmp_path) == before


def test_settings_of_numpy_are_numbers(tmp_path: Path) -> None:
    pipe = pipeline(0, guidance_scale=np.float32(4), top_k=np.int64(3), repulsion_threshold=np.int32(2))
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["sampling"]["guidance_scale"] == 4.0
    assert LPDPipeline.from_pretrained(tmp_path).defaults == pipe.defaults
    with pytest.raises(ValueError, match="guidance_scale"):
        SamplingDefaults(guidance_scale=float("nan"))
    with pytest.raises(TypeError, match="top_k must be an integer, got 'x'"):
        SamplingDefaults(top_k="x")


@pytest.mark.parametrize("which", FILES)
def test_no_file_is_replaced_before_all_are_written(
    which: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk, met by any of the three files."""
    pipeline(0).save_pretrained(tmp_path)
    before = contents(tmp_path)
    full = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    write, write_text = state_files.save_file, Path.write_text

    def save_file(tensors: Any, path: Path, metadata: Any) -> None:
        if which in path.name:
            raise full
        write(tensors, path, metadata=metadata)

    def text(path: Path, *arguments: Any, **options: Any) -> int:
        if which in path.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_text(path, *arguments, **options)

    monkeypatch.setattr(state_files, "save_file", save_file)
    monkeypatch.setattr(Path, "write_text", text)
    with pytest.raises(OSError, match="No space left on device") as raised:
        pipeline(1).save_pretrained(tmp_path)
    assert raised.value.errno == errno.ENOSPC
    assert str(tmp_path) in str(raised.value)
    assert contents(tmp_path) == before


def test_what_the_disk_does_not_take_is_an_error_of_the_system(tmp_path: Path) -> None:
    """safetensors has an error of its own for it, which names no file."""
    with little_space(), pytest.raises(OSError, match=r"File too large: '.*a\.safetensors'") as raised:
        write_state_dict({"a": torch.zeros(100_000)}, tmp_path / "a.safetensors")
    assert raised.value.errno == errno.EFBIG
    assert list(tmp_path.iterdir()) == []


def test_the_umask_decides_who_may_read_weights(tmp_path: Path) -> None:
    """safetensors itself writes files for their owner alone."""
    before = os.umask(0o022)
    try:
        write_state_dict({"a": torch.zeros(3)}, tmp_path / "a.safetensors")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.safetensors").stat().st_mode) == 0o644


def test_a_folder_in_the_way_is_seen_before_anything_is_replaced(tmp_path: Path) -> None:
    pipeline(0).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.safetensors").unlink()
    (tmp_path / "tokenizer.safetensors").mkdir()
    weights = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(IsADirectoryError, match=r"tokenizer\.safetensors"):
        pipeline(1).save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == weights
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES


def test_errors_about_other_files_stay_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"), complete_files(tmp_path / "a", tmp_path / "b"):
        Path("nowhere").read_bytes()
    assert list(tmp_path.iterdir()) == []


def test_compiled_parts_are_saved_under_their_own_names(tmp_path: Path) -> None:
    plain = pipeline(0)
    plain.save_pretrained(tmp_path / "plain")
    compiled = pipeline(0)
    compiled.model.blocks[0] = torch.compile(compiled.model.blocks[0], backend="eager")
    compiled.model.head = torch.compile(compiled.model.head, backend="eager")
    compiled.tokenizer.decoder = torch.compile(compiled.tokenizer.decoder, backend="eager")
    assert any("_orig_mod" in name for name in compiled.model.state_dict())
    compiled.save_pretrained(tmp_path / "compiled")
    assert contents(tmp_path / "compiled") == contents(tmp_path / "plain")
    whole = torch.compile(pipeline(0).model, backend="eager")
    save_model(whole, tmp_path / "whole")
    assert contents(tmp_path / "whole")["model.safetensors"] == contents(tmp_path / "plain")["model.safetensors"]
    compiled.tokenizer.save(tmp_path / "vq.safetensors")
    assert not any("_orig_mod" in name for name in read_state_dict(tmp_path / "vq.safetensors"))
    # States that were not saved by this library.
    state = compiled.model.state_dict()
    assert model_from_state_dict(state, infer_config(state, heads=2)).config == CONFIG
    VQTokenizer.from_state_dict(compiled.tokenizer.state_dict())
    torch.save(state, tmp_path / "a.pth")
    assert load_model(tmp_path / "a.pth", heads=2).config == CONFIG


def test_a_state_without_a_table_leaves_its_rows() -> None:
    """strict=False is obeyed, and the name that is missing is the published one."""
    torch.manual_seed(0)
    state = {name: value.clone() for name, value in LPDModel(CONFIG).state_dict().items()}
    del state["class_emb.weight"]
    for model in (LPDModel(CONFIG), LPDModel(CONFIG).half()):
        before = model.content.detach().clone()
        result = model.load_state_dict(state, strict=False)
        assert (result.missing_keys, result.unexpected_keys) == (["class_emb.weight"], [])
        assert torch.equal(model.content[:32], state["token_emb.weight"].to(model.content.dtype))
        assert torch.equal(model.content[32:35], before[32:35])
        with pytest.raises(RuntimeError, match=r"Missing key.*class_emb\.weight"):
            model.load_state_dict(state)
    with torch.device("meta"):
        empty = LPDModel(CONFIG)
    assert empty.load_state_dict(state, strict=False, assign=True).missing_keys == ["class_emb.weight"]
    wrong = state | {"class_emb.weight": torch.zeros(4, 16)}
    with pytest.raises(RuntimeError, match=r"class_emb\.weight: expected shape \[3, 16\], got \[4, 16\]"):
        LPDModel(CONFIG).load_state_dict(wrong, strict=False)
