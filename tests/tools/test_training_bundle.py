"""A trained model and its tokenizer in one folder: the best weights, and the tokenizer that made the tokens."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from lpd_tools.cli import app
from lpd_tools.data.model_files import model_files
from lpd_tools.data.token_cache import check_tokenizer
from lpd_tools.evaluation.evaluate import Evaluation, evaluate
from lpd_tools.training.best import best_of, best_sentence
from lpd_tools.training.bundle import Bundling, bundle
from lpd_tools.training.checkpoints import read_checkpoint
from lpd_tools.training.tokenizer import tokenizer_sizes
from lpd_tools.training.transformer import train
from safetensors.torch import load_file
from training_runs import as_options, lpd_config, make_cache, tokenizer_config
from typer.testing import CliRunner

from lpd_ext.bundled import bundled_model
from lpd_ext.pipeline import LPDPipeline, SamplingDefaults
from lpd_ext.tokenizer import VQTokenizer

STEPS = 12


@pytest.fixture(scope="module")
def cache_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cache(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def tokenizer(cache_path: Path) -> str:
    return str(cache_path.with_name("tokenizer.safetensors"))


@pytest.fixture(scope="module")
def run(cache_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training whose test loss rises again: its learning rate is far too high."""
    out = tmp_path_factory.mktemp("a run") / "lpd"
    config = lpd_config(cache_path, out, steps=STEPS, evaluate_every=2, learning_rate=0.3, warmup_steps=6, keep=1)
    return train(dataclasses.replace(config, decay_steps=0, ema_decay=0.0, evaluate_images=50))


def head(folder: Path) -> torch.Tensor:
    return load_file(folder / "model.safetensors")["head.weight"]


def test_the_best_weights_are_taken_unless_the_last_are_asked_for(run: Path, tokenizer: str, tmp_path: Path) -> None:
    best = best_of(run)
    assert best is not None
    assert 0 < best.step < STEPS
    out = bundle(Bundling(model=str(run), tokenizer=tokenizer, out=str(tmp_path / "best")))
    assert torch.equal(head(out), read_checkpoint(best.checkpoint)["average"]["head.weight"].half())
    assert json.loads((out / "config.json").read_text())["trained_steps"] == best.step
    pipe = LPDPipeline.from_pretrained(out)
    assert pipe.defaults == SamplingDefaults(10, 8.0, "linear", 0.9, repulsion_threshold=2)
    assert pipe.class_names[9] == "ankle boot"

    chosen = Bundling(model=str(run), tokenizer=tokenizer, out=str(tmp_path / "last"), weights="last")
    last = bundle(dataclasses.replace(chosen, temperature=0.5))
    assert torch.equal(head(last), head(run))
    assert not torch.equal(head(last), head(out))
    assert "trained_steps" not in json.loads((last / "config.json").read_text())
    assert LPDPipeline.from_pretrained(last).defaults.temperature == 0.5
    with pytest.raises(ValueError, match="weights must be one of best, last, got 'first'"):
        bundle(dataclasses.replace(chosen, weights="first"))


def test_the_end_of_a_training_says_which_step_was_best(cache_path: Path, run: Path, tmp_path: Path) -> None:
    best = best_of(run)
    assert best is not None
    sentence = best_sentence(run, STEPS)
    assert sentence is not None
    assert f"lowest after step {best.step} of {STEPS}, {best.loss:.4g}: `lpd bundle`" in sentence
    config = lpd_config(cache_path, tmp_path / "lpd", steps=2, evaluate_every=2)
    command = ["train", *(text for text in as_options(config) if text != "None")]
    said = CliRunner().invoke(app, command).output.splitlines()
    assert said[-2] == f"wrote {tmp_path / 'lpd'}"
    assert said[-1].startswith("the test loss was lowest at the end, ")
    untested = train(lpd_config(cache_path, tmp_path / "untested", steps=2, evaluate_images=0))
    assert best_sentence(untested, 2) is None


def test_a_training_that_goes_on_has_its_best_weights(run: Path, tokenizer: str, tmp_path: Path) -> None:
    under_way = tmp_path / "under way"
    shutil.copytree(run / "checkpoints", under_way / "checkpoints")
    out = bundle(Bundling(model=str(under_way), tokenizer=tokenizer, out=str(tmp_path / "model")))
    assert LPDPipeline.from_pretrained(out)(["bag"], seeds=1).images[0].size == (32, 32)
    with pytest.raises(FileNotFoundError, match="has not ended"):
        bundle(Bundling(model=str(under_way), tokenizer=tokenizer, out=str(tmp_path / "none"), weights="last"))
    (under_way / "checkpoints" / "best.pt").unlink()
    with pytest.raises(FileNotFoundError, match="has no best weights yet"):
        bundle(Bundling(model=str(under_way), tokenizer=tokenizer, out=str(tmp_path / "none")))
    assert not (tmp_path / "none").exists()


def test_a_training_taken_for_a_model_is_told_the_command(run: Path, tokenizer: str, tmp_path: Path) -> None:
    command = f"lpd bundle --model '{run}' --tokenizer FILE --out lpd-model`"  # a space in the path
    for load in (LPDPipeline.from_pretrained, lambda name: model_files(str(name))):
        with pytest.raises(ValueError, match=r"is the folder of a training, which has no tokenizer") as error:
            load(run)
        assert command in str(error.value)
    shutil.copytree(run / "checkpoints", tmp_path / "checkpoints")  # not yet at its end
    with pytest.raises(FileNotFoundError, match=f"lpd bundle --model {tmp_path} --tokenizer FILE"):
        LPDPipeline.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="lpd bundle --model"):
        bundle(Bundling(model=str(run), out=str(tmp_path / "model")))
    assert LPDPipeline.from_pretrained(run, tokenizer=tokenizer).class_names[9] == "ankle boot"


def test_a_bundle_is_bundled_as_it_is(run: Path, tokenizer: str, tmp_path: Path) -> None:
    """A model by any name but a training's keeps its tokenizer, defaults and class names."""
    first = bundle(
        Bundling(model=str(run), tokenizer=tokenizer, out=str(tmp_path / "first"), num_inference_steps=7, temperature=1)
    )
    second = bundle(Bundling(model=str(first), out=str(tmp_path / "second"), guidance_scale=2.0))
    assert torch.equal(head(first), head(second))
    old, new = LPDPipeline.from_pretrained(first), LPDPipeline.from_pretrained(second)
    assert new.defaults == dataclasses.replace(old.defaults, guidance_scale=2.0)
    assert new.class_names == old.class_names
    bundled = bundle(Bundling(model=str(bundled_model("fashion_mnist")), out=str(tmp_path / "bundled")))
    assert LPDPipeline.from_pretrained(bundled).defaults == LPDPipeline.from_pretrained("fashion_mnist").defaults


def test_another_tokenizer_is_refused(run: Path, tokenizer: str, tmp_path: Path) -> None:
    wrong = VQTokenizer(tokenizer_sizes(tokenizer_config(tmp_path)))
    wrong.save(tmp_path / "wrong.safetensors")
    out = bundle(Bundling(model=str(run), tokenizer=tokenizer, out=str(tmp_path / "bundle")))
    check_tokenizer(out, out / "tokenizer.safetensors")
    for weights in ("best", "last"):
        with pytest.raises(ValueError, match=r"wrong\.safetensors' is not the one whose tokens"):
            bundle(
                Bundling(
                    model=str(run),
                    tokenizer=str(tmp_path / "wrong.safetensors"),
                    out=str(tmp_path / "other"),
                    weights=weights,
                )
            )
    assert not (tmp_path / "other").exists()
    wrong.save(out / "tokenizer.safetensors")
    with pytest.raises(ValueError, match="is not the one whose tokens"):
        evaluate(Evaluation(out=str(tmp_path / "evaluation"), model=str(out)))
