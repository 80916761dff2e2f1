"""Published models by name: from a hub of our own, its cache and local files; what cannot be found says so."""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import COMMIT, Hub, serving
from huggingface_hub import HfApi, constants
from lpd_tools.cli import app
from lpd_tools.data.model_files import model_files
from lpd_tools.data.token_shards import file_hash
from PIL import Image
from safetensors.torch import save
from typer.testing import CliRunner

from lpd_ext import published
from lpd_ext.bundled import bundled_model
from lpd_ext.checkpoint import load_model
from lpd_ext.class_names import find_class, short_name
from lpd_ext.hub import HubOptions, find_model, find_tokenizer
from lpd_ext.model import LPDConfig, LPDModel
from lpd_ext.pipeline import LPDPipeline, SamplingDefaults
from lpd_ext.state_files import read_state_dict
from lpd_ext.tokenizer import TokenizerConfig, VQTokenizer

# The published vocabulary and classes in a model of a moment.
SMALL = LPDConfig(64, depth=1, heads=1, vocab_size=16384, num_classes=1000, grid=(16, 16))
FASHION_MNIST = str(Path(__file__).parents[1] / "data" / "fashion_mnist")
MODEL, TOKENIZER = "mit-han-lab/lpd_l_256", "FoundationVision/LlamaGen"


def torch_file(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def model() -> LPDModel:
    torch.manual_seed(0)
    return LPDModel(SMALL).eval()


@pytest.fixture(scope="module")
def tokenizer() -> VQTokenizer:
    torch.manual_seed(1)
    config = TokenizerConfig(ch=32, ch_mult=(1, 1), z_channels=8, codebook_size=16384, codebook_dim=4)
    return VQTokenizer(config).eval()


@pytest.fixture(scope="module")
def files(model: LPDModel, tokenizer: VQTokenizer) -> dict[str, dict[str, bytes]]:
    """Returns the files of the two published repositories, as the published trainer writes them."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))])
    checkpoint = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "epoch": 449,
        "scaler": {"scale": 65536.0, "_growth_tracker": 5},
        "args": argparse.Namespace(model="lpd_l", lr=1e-4, betas=(0.9, 0.95), output_dir="out", resume=None),
    }
    return {
        MODEL: {"README.md": b"# LPD", ".gitattributes": b"", "lpd_l_256.pth": torch_file(checkpoint)},
        TOKENIZER: {
            "vq_ds16_c2i.pt": torch_file({"model": tokenizer.state_dict()}),
            "c2i_B_256.pt": b"something else",
        },
    }


@pytest.fixture
def hub(files: dict[str, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The hub under HF_ENDPOINT, with an empty cache of its own."""
    with serving(Hub({name: dict(content) for name, content in files.items()})) as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.url)  # as the environment would before the import
        template = f"{running.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        yield running


@pytest.fixture
def published_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """The small model counts as one of the published ones."""
    monkeypatch.setitem(published._SAMPLING, (64, 1, 16), (20, 4.8, 2))


def go_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("name", ["lpd_l_256", MODEL])
def test_a_published_model_in_one_line(
    hub: Hub, published_size: None, model: LPDModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    pipe = LPDPipeline.from_pretrained(name)
    assert pipe.defaults == SamplingDefaults(20, 4.8, "linear", repulsion_threshold=2)
    assert len(pipe.class_names) == 1000
    drawn = pipe("golden retriever", num_inference_steps=2, seeds=1)
    assert drawn.images[0].size == (32, 32)
    assert torch.equal(drawn.tokens, pipe(207, num_inference_steps=2, seeds=1).tokens)
    for key, value in model.state_dict().items():
        assert torch.equal(pipe.model.state_dict()[key], value), key

    go_offline(monkeypatch)  # all of it again from the cache, nothing asked
    hub.requests.clear()
    again = LPDPipeline.from_pretrained(name)
    assert torch.equal(again(207, num_inference_steps=2, seeds=1).tokens, drawn.tokens)
    assert not hub.requests

    pipe.save_pretrained(tmp_path / "saved")
    assert sorted(p.name for p in (tmp_path / "saved").iterdir()) == [
        "config.json", "model.safetensors", "tokenizer.safetensors"
    ]  # fmt: skip
    saved = LPDPipeline.from_pretrained(tmp_path / "saved")
    assert (saved.defaults, saved.class_names) == (pipe.defaults, pipe.class_names)
    assert torch.equal(saved(207, num_inference_steps=2, seeds=1).tokens, drawn.tokens)


def test_commands_take_a_published_model(
    hub: Hub, published_size: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def run(*arguments: str) -> str:
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
        return result.output

    assert "lpd_l_256.pth" in run("fetch", "lpd_l_256")
    go_offline(monkeypatch)
    shown = " ".join(run("info", "--model", "lpd_l_256").split())
    assert "20 steps, locality order, guidance 4.8 linear" in shown
    assert "tench, goldfish," in shown
    assert "(1,000)" in shown
    picture = tmp_path / "dogs.png"
    options = ("--steps", "2", "-n", "1", "--dtype", "int8", "--output", str(picture))
    run("sample", "--model", "lpd_l_256", "golden retriever", *options)
    with Image.open(picture) as drawn:
        assert drawn.height > 64
    wrong = CliRunner().invoke(app, ["sample", "--model", "lpd_l_256", "golden retreiver"])
    assert wrong.exit_code == 2
    assert "did you mean 'golden retriever'" in " ".join(wrong.output.split())
    assert CliRunner().invoke(app, ["fetch", "lpd_xl_256"]).exit_code == 2


def test_bundles_of_published_models(
    hub: Hub, published_size: None, model: LPDModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By name, id, folder and file: the published tokenizer, guidance, steps and class names."""
    weights = tmp_path / "there" / "own.pth"
    weights.parent.mkdir()
    weights.write_bytes(hub.files[MODEL]["lpd_l_256.pth"])
    for name in ("lpd_l_256", MODEL, str(weights.parent), str(weights)):
        out = tmp_path / "out"
        result = CliRunner().invoke(app, ["bundle", "--model", name, "--out", str(out), "--temperature", "0.5"])
        assert (result.exit_code, result.output) == (0, f"wrote {out}\n")
        pipe = LPDPipeline.from_pretrained(out)
        assert pipe.defaults == SamplingDefaults(20, 4.8, "linear", 0.5, repulsion_threshold=2)
        assert pipe.class_names[207] == "golden retriever"
        embedding = "token_emb.weight"
        assert torch.equal(pipe.model.state_dict()[embedding], model.state_dict()[embedding].half().float())
    monkeypatch.setitem(published._SAMPLING, (64, 1, 16), (48, 7.3, 4))
    assert CliRunner().invoke(app, ["bundle", "--model", str(weights), "--out", str(out)]).exit_code == 0
    assert LPDPipeline.from_pretrained(out).defaults == SamplingDefaults(48, 7.3, "linear", repulsion_threshold=4)


def test_the_study_takes_names_and_judges_what_its_judge_knows(hub: Hub, tmp_path: Path) -> None:
    hub.files["someone/garments"] = {path.name: path.read_bytes() for path in bundled_model("fashion_mnist").iterdir()}
    judge = str(Path(__file__).parents[1] / "data" / "judge.safetensors")
    options = ["--judge", judge, "--minutes", "0", "--out", str(tmp_path / "study"), "--data-dir", FASHION_MNIST]
    result = CliRunner().invoke(app, ["study", "--model", "someone/garments", *options])
    assert result.exit_code == 0, result.output
    noted = json.loads((tmp_path / "study.json").read_text())
    assert noted["model_sha256"] == file_hash(bundled_model("fashion_mnist") / "model.safetensors")
    assert noted["tokenizer_sha256"] == file_hash(bundled_model("fashion_mnist") / "tokenizer.safetensors")
    refused = CliRunner().invoke(app, ["study", "--model", "lpd_l_256", *options])
    assert refused.exit_code == 2
    assert "the study judges Fashion-MNIST, 10 classes at 32x32 pixels, but this one draws 1000 at" in " ".join(
        refused.output.split()
    )


def test_an_evaluation_by_name(hub: Hub, tmp_path: Path) -> None:
    """A stranger's line, but for how much is drawn: one image of each class, against a folder of pictures."""
    hub.files["someone/garments"] = {path.name: path.read_bytes() for path in bundled_model("fashion_mnist").iterdir()}
    for i in range(4):
        (tmp_path / "real").mkdir(exist_ok=True)
        Image.new("RGB", (32, 32), (60 * i, 0, 0)).save(tmp_path / "real" / f"{i}.png")
    nothing_else = [f"--{what}-images=0" for what in ("nats", "self", "reconstructed")]
    options = ["--images-per-class", "1", "--num-inference-steps", "1", "--device", "cpu", *nothing_else]
    out = tmp_path / "evaluation"
    command = ["evaluate", "--model", "someone/garments", "--reference", str(tmp_path / "real"), "--out", str(out)]
    result = CliRunner().invoke(app, [*command, *options])
    assert result.exit_code == 0, result.output
    found = json.loads((out / "evaluation.json").read_text())
    assert found["images"]["generated"] == 10
    assert found["sampling"]["guidance_scale"] == LPDPipeline.from_pretrained("fashion_mnist").defaults.guidance_scale
    files = model_files("lpd_l_256")
    assert (files.model.name, files.tokenizer and files.tokenizer.name) == ("lpd_l_256.pth", "vq_ds16_c2i.pt")


def test_a_file_takes_the_published_tokenizer(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "own.pth").write_bytes(hub.files[MODEL]["lpd_l_256.pth"])
    pipe = LPDPipeline.from_pretrained(tmp_path / "own.pth")
    assert pipe.tokenizer.config.codebook_size == 16384
    assert hub.requests[-1].endswith("/vq_ds16_c2i.pt")
    hub.requests.clear()
    (tmp_path / "vq_ds16_c2i.pt").write_bytes(hub.files[TOKENIZER]["vq_ds16_c2i.pt"])
    for tokenizer in (tmp_path / "vq_ds16_c2i.pt", tmp_path):
        LPDPipeline.from_pretrained(tmp_path / "own.pth", tokenizer=tokenizer)
    assert not hub.requests
    assert find_tokenizer(TOKENIZER).read_bytes() == hub.files[TOKENIZER]["vq_ds16_c2i.pt"]


def test_a_repository_in_our_own_layout_and_in_shards(
    hub: Hub, tmp_path: Path, model: LPDModel, tokenizer: VQTokenizer
) -> None:
    LPDPipeline(model, tokenizer, SamplingDefaults(5), [f"class {c}" for c in range(1000)]).save_pretrained(tmp_path)
    hub.files["me/own"] = own = {path.name: path.read_bytes() for path in tmp_path.iterdir()} | {"extra.bin": b"x"}
    pipe = LPDPipeline.from_pretrained("me/own")
    assert (pipe.defaults.num_inference_steps, pipe.class_names[3]) == (5, "class 3")
    assert not any("extra.bin" in request for request in hub.requests)

    state = model.state_dict()
    halves = [dict(list(state.items())[::2]), dict(list(state.items())[1::2])]
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index = {"weight_map": {key: name for name, half in zip(names, halves, strict=True) for key in half}}
    shards = {name: save({k: v.clone() for k, v in half.items()}) for name, half in zip(names, halves, strict=True)}
    del own["model.safetensors"]
    hub.files["me/shards"] = own | shards | {"model.safetensors.index.json": json.dumps(index).encode()}
    found = LPDPipeline.from_pretrained("me/shards").model.state_dict()
    assert all(torch.equal(found[key], value) for key, value in state.items())


def test_revisions_and_tokens(hub: Hub) -> None:
    assert find_model("lpd_l_256", HubOptions(COMMIT)).model.parent.name == COMMIT
    with pytest.raises(FileNotFoundError, match=r"'mit-han-lab/lpd_l_256' has no revision 'v9'"):
        find_model("lpd_l_256", HubOptions("v9"))
    hub.gated = (MODEL,)
    with pytest.raises(PermissionError, match="'mit-han-lab/lpd_l_256' is open to those who asked for it"):
        find_model("lpd_l_256")
    assert find_model("lpd_l_256", HubOptions(token="hf_known")).model.name == "lpd_l_256.pth"


def test_half_a_download_goes_on_and_leaves_nothing_half_written(hub: Hub, tmp_path: Path) -> None:
    whole = hub.files[MODEL]["lpd_l_256.pth"]
    hub.cut[f"{MODEL}/lpd_l_256.pth"] = len(whole) // 2
    path = find_model("lpd_l_256").model
    assert path.read_bytes() == whole
    assert sum(request == f"GET /{MODEL}/resolve/{COMMIT}/lpd_l_256.pth" for request in hub.requests) <= 2


def test_without_a_network(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    nowhere = "http://127.0.0.1:9"
    monkeypatch.setattr(constants, "ENDPOINT", nowhere)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", nowhere + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # between its five tries
    with pytest.raises(ConnectionError, match="the hub cannot be reached for 'mit-han-lab/lpd_l_256'"):
        LPDPipeline.from_pretrained("lpd_l_256")
    go_offline(monkeypatch)
    with pytest.raises(ConnectionError, match="hub cannot be reached"):
        LPDPipeline.from_pretrained("lpd_l_256")


def test_a_full_disk_is_told(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(HfApi, "hf_hub_download", full)
    with pytest.raises(OSError, match=r"no space left to download 'mit-han-lab/lpd_l_256/lpd_l_256\.pth'"):
        find_model("lpd_l_256")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("me/nothing", "'me/nothing' is no repository of the hub, or a private one"),
        (
            "lpd_l_257",
            "'lpd_l_257' is neither a local path nor a hub id .* nor one of the models icons, fashion_mnist, lpd_l_256",
        ),
        ("./here/not", "neither a local path"),
        (Path("me/nothing"), "neither a local path"),
        ("weights.pth", "neither a local path"),
        ("me/empty", "'me/empty' holds no weights"),
    ],
)
def test_what_cannot_be_found(hub: Hub, name: str | Path, message: str) -> None:
    hub.files["me/empty"] = {"README.md": b""}
    with pytest.raises(FileNotFoundError, match=message):
        find_model(name)


def test_a_folder_that_an_owner_is_called_like_is_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").mkdir()
    with pytest.raises(FileNotFoundError, match="neither a local path nor a hub id"):
        find_model("weights/lpd_l")


def test_the_hub_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"lpd-ext\[hub\]"):
        find_model("owner/name")


def test_several_weight_files_are_not_guessed_among(tmp_path: Path) -> None:
    for name in ("a.pth", "b.pth", "tokenizer.safetensors", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match=r"holds several weight files, name one of them: a\.pth, b\.pth"):
        find_model(tmp_path)
    (tmp_path / "checkpoint-last.pth").write_bytes(b"")  # of the published trainer, beside earlier ones
    files = find_model(tmp_path)
    assert (files.model.name, files.tokenizer) == ("checkpoint-last.pth", tmp_path / "tokenizer.safetensors")


@pytest.mark.parametrize(
    ("wrap", "ema"),
    [
        (lambda state, _: state, False),
        (lambda state, _: {"model": state}, False),
        (lambda state, average: {"model": state, "model_ema": average}, False),
        (lambda state, average: {"model": average, "model_ema": state}, True),
        (lambda state, average: {"state_dict": average, "ema": state, "epoch": 3}, True),
        (lambda state, _: {"model_ema": state, "epoch": 3}, False),
        (lambda state, _: {"state_dict": {"model": state}}, False),
        (lambda state, _: {"module": state, "lr_scheduler": None}, False),
        (lambda state, _: {"state_dict": {f"module.{k}": v for k, v in state.items()}}, False),
        (lambda state, _: {"model": {f"_orig_mod.{k}": v for k, v in state.items()}}, False),
        (lambda state, _: {"model": {f"module._orig_mod.{k}": v for k, v in state.items()}}, False),
        (lambda state, _: {k.replace("blocks.0.", "blocks.0._orig_mod."): v for k, v in state.items()}, False),
        (lambda state, _: {"model": state, "args": argparse.Namespace(lr=1e-4, data="x", n=(1, 2))}, False),
        (lambda state, _: {"model": {k: v.bfloat16() for k, v in state.items()}}, False),
    ],
)
def test_every_layout_that_trainers_leave_loads(
    tmp_path: Path, model: LPDModel, wrap: Callable[[dict[str, Any], dict[str, Any]], object], ema: bool
) -> None:
    state = {name: value.bfloat16().float() for name, value in model.state_dict().items()}  # exact in bf16 too
    average = {name: value + 1 for name, value in state.items()}
    (tmp_path / "checkpoint-last.pth").write_bytes(torch_file(wrap(state, average)))
    for packed in (False, True):
        found = load_model(tmp_path / "checkpoint-last.pth", packed=packed, ema=ema).state_dict()
        assert found.keys() == state.keys()
        assert all(torch.equal(found[key], value) for key, value in state.items())


@pytest.mark.parametrize(
    ("content", "ema", "message"),
    [
        ({"epoch": 3, "weights": [1, 2]}, False, r"must hold a state dict .* got epoch \(int\), weights \(list\)"),
        ({"model": {"a": torch.ones(1), "b": 3}}, False, r"must hold a state dict .* got a \(Tensor\), b \(int\)"),
        ({"model": {"a": torch.ones(1)}}, True, r"must have an entry model_ema or ema .* for ema, got model \(dict\)"),
        ([torch.ones(1)], False, "got <class 'list'>"),
        ({"model": {}, "path": Path("/x")}, False, r"pickles more than tensors: pathlib\S*; save the state dict alone"),
    ],
)  # fmt: skip
def test_other_layouts_are_refused(tmp_path: Path, content: object, ema: bool, message: str) -> None:
    (tmp_path / "odd.pth").write_bytes(torch_file(content))
    with pytest.raises(ValueError, match=message):
        read_state_dict(find_model(tmp_path).model, ema)


def test_an_index_names_files_beside_it_only(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    for text in ("{}", "[1]", '{"weight_map": 3}', '{"weight_map": {"a": "../b.safetensors"}}', "[" * 100_000):
        index.write_text(text)
        with pytest.raises(ValueError, match=r"path .*(no index of safetensors files|is not valid JSON)"):
            read_state_dict(index)


def test_sampling_of_the_published_sizes() -> None:
    assert set(published.NAMES) == {"lpd_l_256", "lpd_xl_256", "lpd_xxl_256", "lpd_l_512", "lpd_xl_512"}
    for preset, grid, steps, guidance, repulsion in (
        ("lpd_l", 16, 20, 4.8, 2),
        ("lpd_xl", 16, 20, 4.9, 2),
        ("lpd_xxl", 16, 20, 5.9, 3),
        ("lpd_l", 32, 48, 7.3, 4),
        ("lpd_xl", 32, 48, 6.0, 4),
    ):
        config = LPDConfig.preset(preset, (grid, grid))
        defaults = SamplingDefaults(**published.sampling_settings(config))
        assert defaults == SamplingDefaults(steps, guidance, "linear", repulsion_threshold=repulsion)
        assert len(published.class_names(config)) == 1000
    for other in (SMALL, dataclasses.replace(LPDConfig.preset("lpd_l"), num_classes=10)):
        assert published.sampling_settings(other) == {}
        assert published.class_names(other) == []


def test_classes_by_what_people_call_them() -> None:
    names = published.imagenet_class_names()
    assert (names[0], names[1], names[207]) == ("tench, Tinca tinca", "goldfish, Carassius auratus", "golden retriever")
    for name, index in (
        ("golden retriever", 207),
        ("Golden  Retriever", 207),
        ("goldfish", 1),
        ("carassius auratus", 1),
        ("goldfish, Carassius auratus", 1),
        ("shades", 837),
    ):
        assert find_class(name, names) == index
    with pytest.raises(ValueError, match=r"'Crane' names several classes, give the index of one: 134 \(crane\), 517"):
        find_class("Crane", names)
    with pytest.raises(ValueError, match="names several classes"):
        find_class("crane", names)
    with pytest.raises(ValueError, match="'golden retreiver' is not a class name; did you mean 'golden retriever'"):
        find_class("golden retreiver", names)
    with pytest.raises(ValueError, match="'qqqqq' is not a class name; this model has 1000 classes"):
        find_class("qqqqq", names)
    assert short_name(names[1]) == "goldfish"
