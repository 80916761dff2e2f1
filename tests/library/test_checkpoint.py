"""Loading what users bring: published files, safetensors, directories, other grids, and files that must be refused."""

from __future__ import annotations

import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from golden import load_golden
from safetensors import safe_open
from safetensors.torch import save_file

from lpd_ext.checkpoint import (
    infer_config,
    load_model,
    model_from_state_dict,
    resize_position_embedding,
    save_model,
)
from lpd_ext.model import LPDConfig, LPDModel
from lpd_ext.sampler import generate
from lpd_ext.state_files import read_state_dict, write_state_dict


def published_state() -> dict[str, torch.Tensor]:
    return load_golden().part("model.")


def test_published_pth_and_safetensors_give_the_same_model(tmp_path: Path) -> None:
    torch.save({"model": published_state(), "epoch": 3}, tmp_path / "model.pth")
    save_file(published_state(), tmp_path / "model.safetensors")
    wanted = load_golden().tensors["sample0.tokens"].long()
    for name in ("model.pth", "model.safetensors"):
        model = load_model(tmp_path / name, heads=3)
        assert model.config == load_golden().config()
        assert not model.training
        assert torch.equal(generate(model, load_golden().request(0)), wanted)


def test_save_and_load_a_directory_round_trip(tmp_path: Path) -> None:
    model = load_golden().model()
    save_model(model, tmp_path / "saved", extra={"class_names": ["a"]})
    loaded = load_model(tmp_path / "saved")
    assert loaded.config == model.config
    state = loaded.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in published_state().items())
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["class_names"] == ["a"]
    assert sorted(file.name for file in (tmp_path / "saved").iterdir()) == ["config.json", "model.safetensors"]


def test_mutual_visibility_is_kept(tmp_path: Path) -> None:
    """In config.json, where it may be missing, and in the metadata of a file that is moved elsewhere."""
    blind = dataclasses.replace(load_golden().config(), mutual_visibility=False)
    save_model(LPDModel(blind), tmp_path)
    assert load_model(tmp_path).config == blind
    moved = tmp_path / "moved.safetensors"
    moved.write_bytes((tmp_path / "model.safetensors").read_bytes())
    assert load_model(moved).config == blind
    write_state_dict(read_state_dict(moved), tmp_path / "model.safetensors")
    assert load_model(tmp_path / "model.safetensors").config == blind
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["model"].pop("mutual_visibility") is False
    (tmp_path / "config.json").write_text(json.dumps(stored))
    assert load_model(tmp_path).config == load_golden().config()


def test_half_precision_storage_loads_as_float32(tmp_path: Path) -> None:
    save_model(load_golden().model(), tmp_path, dtype=torch.float16)
    assert read_state_dict(tmp_path / "model.safetensors")["head.weight"].dtype == torch.float16
    weight = load_model(tmp_path).head.weight
    assert weight.dtype == torch.float32
    assert torch.equal(weight, published_state()["head.weight"].half().float())


def test_sizes_are_inferred(tmp_path: Path) -> None:
    assert infer_config(published_state(), heads=3) == load_golden().config()
    wide = {
        "token_emb.weight": torch.empty(7, 128),
        "class_emb.weight": torch.empty(5, 128),
        "pos_embed": torch.empty(1, 17, 128),
        "blocks.0.mlp.fc1.weight": torch.empty(512, 128),
    }
    assert infer_config(wide).heads == 2
    with pytest.raises(ValueError, match="heads must be given: width 96"):
        infer_config(published_state())
    oblong = {**wide, "pos_embed": torch.empty(1, 19, 128)}
    assert infer_config(oblong, grid=(3, 6)).grid == (3, 6)
    with pytest.raises(ValueError, match="no square grid"):
        infer_config(oblong)
    with pytest.raises(ValueError, match="no square grid"):
        infer_config(oblong, grid=(4, 4))
    with pytest.raises(ValueError, match=r"class_emb\.weight"):
        infer_config({name: tensor for name, tensor in wide.items() if name != "class_emb.weight"})


def test_position_embedding_is_resized_bicubically_and_keeps_the_condition() -> None:
    torch.manual_seed(0)
    embedding = torch.randn(1, 1 + 8 * 6, 2)
    resized = resize_position_embedding(embedding, (8, 6), (16, 12))
    assert resized.shape == (1, 1 + 16 * 12, 2)
    assert torch.equal(resized[:, 0], embedding[:, 0])

    def weights(t: float) -> torch.Tensor:  # Keys' cubic convolution with a = -0.75 at distances 1+t, t, 1-t, 2-t
        def near(x: float) -> float:
            return 1.25 * x**3 - 2.25 * x**2 + 1

        def far(x: float) -> float:
            return -0.75 * x**3 + 3.75 * x**2 - 6 * x + 3

        return torch.tensor([far(1 + t), near(t), near(1 - t), far(2 - t)])

    # Half-pixel centres (align_corners off): output row 7 lies at (7 + 0.5) / 2 - 0.5 = 3.25, column 4 at 1.75.
    patch = embedding[0, 1:].view(8, 6, 2)[2:6, 0:4]
    wanted = torch.einsum("r,c,rce->e", weights(0.25), weights(0.75), patch)
    assert torch.allclose(resized[0, 1:].view(16, 12, 2)[7, 4], wanted, atol=1e-5)
    with pytest.raises(ValueError, match="needs 50"):
        resize_position_embedding(embedding, (7, 7), (8, 8))


def test_load_model_at_another_grid(tmp_path: Path) -> None:
    save_model(load_golden().model(), tmp_path)
    model = load_model(tmp_path, grid=(4, 12))
    assert model.config.grid == (4, 12)
    assert model.pos_embed.shape == (49, 96)


def test_heads_and_grid_of_a_single_file(tmp_path: Path) -> None:
    """No tensor shape tells them: they are in the metadata, or in the config.json beside a model.safetensors."""
    config = LPDConfig(192, depth=1, heads=6, vocab_size=16, num_classes=2, grid=(2, 8))
    save_model(LPDModel(config), tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "heads": "6", "grid": "2x8"}
    moved = tmp_path / "moved.safetensors"
    moved.write_bytes((tmp_path / "model.safetensors").read_bytes())
    assert load_model(moved).config == config
    assert load_model(moved, heads=6, grid=(4, 4)).config == dataclasses.replace(config, grid=(4, 4))
    with pytest.raises(ValueError, match="heads must be 6 as the metadata of"):
        load_model(moved, heads=3)
    state = read_state_dict(moved)
    write_state_dict(state, tmp_path / "model.safetensors")
    assert load_model(tmp_path / "model.safetensors").config == config
    write_state_dict(state, moved)
    assert load_model(moved).config.heads == 3
    for metadata in ({"heads": "six", "grid": "4x4"}, {"heads": "6"}, {"heads": "6", "grid": "16"}):
        write_state_dict(state, moved, metadata=metadata)
        with pytest.raises(ValueError, match=r"moved\.safetensors' has metadata whose heads or grid"):
            load_model(moved)


def test_the_content_of_a_file_tells_its_kind(tmp_path: Path) -> None:
    save_file(published_state(), tmp_path / "model.pth")
    save_file(published_state(), tmp_path / "0123abcd")
    torch.save(published_state(), tmp_path / "4567cdef")
    for name in ("model.pth", "0123abcd", "4567cdef"):
        assert load_model(tmp_path / name, heads=3).config == load_golden().config()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": torch.float64}, "dtype must be one of .* got torch.float64"),
        ({"dtype": torch.int32}, "dtype must be one of .* got torch.int32"),
        ({"grid": (0, 4)}, r"grid must be two integers .* got \(0, 4\)"),
        ({"grid": (4.0, 4)}, "grid must be two integers"),
        ({"grid": (4,)}, "grid must be two integers"),
        ({"grid": 4}, "grid must be two integers"),
    ],
)
def test_bad_options_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path / "nothing_is_read.pth", **options)


def test_another_grid_needs_a_position_embedding() -> None:
    config = load_golden().config()
    without = {name: tensor for name, tensor in published_state().items() if name != "pos_embed"}
    for state, message in [(without, "pos_embed is missing"), (without | {"pos_embed": torch.zeros(5)}, "needs 65")]:
        with pytest.raises(ValueError, match=message):
            model_from_state_dict(state, config, grid=(4, 12))


class Exploit:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("code in a pickle ran",))


def test_files_that_must_be_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file(published_state(), tmp_path / "good.safetensors")
    content = (tmp_path / "good.safetensors").read_bytes()
    (tmp_path / "truncated.safetensors").write_bytes(content[: len(content) // 2])
    (tmp_path / "noise.safetensors").write_bytes(b"\x00" * 100)
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "empty.pth").write_bytes(b"")
    torch.save({"model": published_state()}, tmp_path / "good.pth")
    content = (tmp_path / "good.pth").read_bytes()
    (tmp_path / "truncated.pth").write_bytes(content[: len(content) // 2])
    torch.save({"model": Exploit()}, tmp_path / "code.pth")
    (tmp_path / "code.pkl").write_bytes(pickle.dumps({"model": Exploit()}))
    torch.save([1, 2, 3], tmp_path / "list.pth")
    refused = [
        "truncated.safetensors", "noise.safetensors", "text.pth", "empty.pth", "truncated.pth", "code.pth",
        "code.pkl", "list.pth",
    ]  # fmt: skip
    for name in refused:
        with pytest.raises(ValueError, match=name):
            load_model(tmp_path / name, heads=3)
    assert "ran" not in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth"):
        load_model(tmp_path / "nowhere.pth")
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_model(tmp_path)


def test_a_config_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    save_model(load_golden().model(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for change, message in [
        ({"depth": 4}, "does not fit"),
        ({"num_classes": 11}, r"class_emb\.weight: expected shape \[11, 96\]"),
        ({"heads": 5}, "multiple of 8"),
        ({"surprise": 1}, "surprise"),
    ]:
        text = json.dumps({**config, "model": {**config["model"], **change}})
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            load_model(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        load_model(tmp_path)


def test_writing_replaces_a_file_only_when_complete(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    write_state_dict({"a": torch.ones(3)}, path)
    with pytest.raises(Exception, match=r"."):
        write_state_dict({"a": torch.zeros(3).to_sparse()}, path)
    assert torch.equal(read_state_dict(path)["a"], torch.ones(3))
    assert [file.name for file in tmp_path.iterdir()] == ["weights.safetensors"]
