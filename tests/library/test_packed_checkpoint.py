"""load_model(packed=True): the same model as without, from the same files, in little more memory than its weights."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from golden import load_golden
from safetensors.torch import save_file
from test_pipeline import small_pipeline
from torch import Tensor, nn

from lpd_ext import checkpoint
from lpd_ext.checkpoint import load_model, save_model
from lpd_ext.linear import PackedLinear, can_pack, unpack
from lpd_ext.model import LPDConfig, LPDModel
from lpd_ext.pipeline import LPDPipeline
from lpd_ext.sampler import generate


def published_state() -> dict[str, Tensor]:
    return load_golden().part("model.")


def assert_same(packed: LPDModel, plain: LPDModel) -> None:
    assert isinstance(packed.head, PackedLinear)
    assert not any(type(module) is nn.Linear for module in packed.modules())
    assert packed.config == plain.config
    assert not packed.training
    assert not any(parameter.requires_grad for parameter in packed.parameters())
    found, wanted = packed.state_dict(), plain.state_dict()
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        assert value.dtype == wanted[name].dtype
        assert value.equal(wanted[name]), name


def test_packed_loading_gives_the_same_model(tmp_path: Path) -> None:
    save_model(load_golden().model(), tmp_path / "float32")
    save_model(load_golden().model(), tmp_path / "float16", dtype=torch.float16)
    torch.save({"model": published_state(), "epoch": 3}, tmp_path / "model.pth")
    cases: list[tuple[str, dict[str, Any]]] = [
        ("float32", {}),
        ("float32", {"grid": (4, 12)}),
        ("float16", {}),
        ("float16", {"dtype": torch.float32}),
        ("model.pth", {"heads": 3}),
    ]
    if can_pack(torch.device("cpu"), torch.bfloat16):
        cases.append(("float32", {"dtype": torch.bfloat16}))
    for name, options in cases:
        assert_same(load_model(tmp_path / name, packed=True, **options), load_model(tmp_path / name, **options))
    for case in range(3):
        tokens = generate(load_model(tmp_path / "float32", packed=True), load_golden().request(case))
        assert tokens.equal(load_golden().tensors[f"sample{case}.tokens"].long())


def test_what_cannot_be_packed_is_loaded_plainly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(load_golden().model(), tmp_path)
    assert type(load_model(tmp_path).head) is nn.Linear
    assert type(load_model(tmp_path, packed=True, device="meta").head) is nn.Linear
    monkeypatch.setattr(checkpoint, "can_pack", lambda device, dtype: False)
    assert type(load_model(tmp_path, packed=True).head) is nn.Linear


def test_slow_arithmetic_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(load_golden().model(), tmp_path)
    monkeypatch.setattr(checkpoint, "has_fast_arithmetic", lambda dtype: dtype == torch.float32)
    for dtype in (torch.bfloat16, torch.float16):
        with pytest.warns(UserWarning, match=f"no {dtype} arithmetic: decoding is slower than in float32") as warned:
            assert load_model(tmp_path, dtype=dtype).head.weight.dtype == dtype
        assert warned[0].filename == __file__
    load_model(tmp_path, dtype=torch.float32)
    load_model(tmp_path)


@pytest.mark.parametrize("dtype", [None, "int8"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks.1.attn.proj.weight": None}, r"blocks\.1\.attn\.proj\.weight is missing"),
        ({"blocks.1.attn.proj.bias": None}, r"blocks\.1\.attn\.proj\.bias is missing"),
        ({"blocks.2.norm2.bias": None}, r"blocks\.2\.norm2\.bias is missing"),
        ({"head.weight": None}, r"head\.weight is missing"),
        ({"norm.weight": None}, r"norm\.weight is missing"),
        ({"fake_latent": None}, "fake_latent is missing"),
        ({"surprise": torch.ones(1)}, "surprise is unexpected"),
        ({"head.bias": torch.ones(64)}, r"head\.bias is unexpected"),
        ({"blocks.0.surprise": torch.ones(1)}, r"blocks\.0\.surprise is unexpected"),
        ({"blocks.3.norm1.bias": torch.ones(96)}, r"blocks\.3\.norm1\.bias is unexpected"),
        ({"blocks.7.norm1.bias": torch.ones(96)}, r"blocks\.7\.norm1\.bias is unexpected"),
        ({"blocks.01.norm1.bias": torch.ones(96)}, r"blocks\.01\.norm1\.bias is unexpected"),
        ({"blocks.2.mlp.fc1.weight": torch.ones(96, 384)}, r"blocks\.2\..*mlp\.fc1\.weight: expected shape"),
        ({"blocks.2.mlp.fc1.bias": torch.ones(5)}, r"blocks\.2\..*size mismatch for mlp\.fc1\.bias"),
        ({"blocks.0.norm1.weight": torch.ones(5)}, r"blocks\.0\..*size mismatch for norm1\.weight"),
        ({"pos_embed": torch.ones(1, 5, 96)}, r"size mismatch for pos_embed"),
    ],
)
def test_files_that_do_not_fit_are_refused(
    tmp_path: Path, change: dict[str, Tensor | None], message: str, dtype: Any
) -> None:
    assert load_golden().config().depth == 3
    save_model(load_golden().model(), tmp_path)
    state = {name: value for name, value in (published_state() | change).items() if value is not None}
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"(?s)the checkpoint does not fit .*{message}"):
        load_model(tmp_path, packed=True, dtype=dtype)
    with pytest.raises(ValueError, match="does not fit"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": 4}, r"blocks\.3\.norm1\.weight is missing"),
        ({"depth": 2}, r"blocks\.2\.norm1\.weight is unexpected"),
        ({"depth": 1}, r"blocks\.2\.norm1\.weight is unexpected"),
        ({"mlp_ratio": 2}, r"blocks\.0\..*mlp\.fc1\.weight: expected shape \[192, 96\], got \[384, 96\]"),
        ({"num_classes": 11}, r"class_emb\.weight: expected shape \[11, 96\]"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(tmp_path: Path, change: dict[str, int], message: str) -> None:
    save_model(load_golden().model(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model": {**config["model"], **change}}))
    with pytest.raises(ValueError, match=f"(?s){message}"):
        load_model(tmp_path, packed=True)


def test_truncated_files_are_refused(tmp_path: Path) -> None:
    save_model(load_golden().model(), tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors' is not a readable checkpoint"):
        load_model(tmp_path, packed=True)


def test_pipelines_pack_for_decoding(tmp_path: Path) -> None:
    small_pipeline().save_pretrained(tmp_path)
    pipe = LPDPipeline.from_pretrained(tmp_path)
    assert isinstance(pipe.model.head, PackedLinear)
    wanted = pipe([0, 1], seeds=3, output_type="tokens").tokens
    assert wanted.equal(small_pipeline()([0, 1], seeds=3, output_type="tokens").tokens)
    pipe.to("cpu")
    assert isinstance(pipe.model.head, PackedLinear)
    assert pipe([0, 1], seeds=3, output_type="tokens").tokens.equal(wanted)
    pipe.to(dtype=torch.float16)
    assert type(pipe.model.head) is nn.Linear
    assert pipe.model.head.weight.dtype == torch.float16
    assert pipe.to(dtype=torch.float32).model.head.weight.dtype == torch.float32
    unpack(pipe.model).train()
    pipe.to("cpu")
    assert type(pipe.model.head) is nn.Linear
    assert pipe.model.head.weight.requires_grad


PEAK = """
import sys
from pathlib import Path
import torch
from lpd_ext.checkpoint import load_model

def kilobytes(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))

small, large = sys.argv[1:]
load_model(small, packed=True)  # what torch imports meanwhile is no weight: 110 MB with torch 2.10
Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
before = kilobytes("VmRSS")
model = load_model(large, packed=True)
print(kilobytes("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_no_layer_is_held_twice(tmp_path: Path) -> None:
    files = [tmp_path / "small.safetensors", tmp_path / "large.safetensors"]
    for path, depth, width in zip(files, (1, 6), (256, 1024), strict=True):
        with torch.device("meta"):
            model = LPDModel(LPDConfig(width, depth, heads=16, vocab_size=1024, num_classes=10, grid=(16, 16)))
        weights = {name: torch.zeros(value.shape) for name, value in model.state_dict().items()}
        save_file(weights, path, metadata={"heads": "16", "grid": "16x16"})
    size = sum(value.numel() * 4 for value in weights.values())
    assert size > 300e6
    command = [sys.executable, "-c", PEAK, *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    # Beyond the weights: one of the six blocks as it was read.
    assert size < int(done.stdout) * 1024 < 1.25 * size
