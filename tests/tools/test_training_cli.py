"""The training commands of `lpd`: every setting is an option, errors are one sentence, the chain runs end to end."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from lpd_tools.cli import app
from lpd_tools.data.icons import IconFolder
from lpd_tools.data.token_caching import TokenCaching
from lpd_tools.data.token_check import TokenCheck
from lpd_tools.evaluation.evaluate import Evaluation
from lpd_tools.evaluation.generate import Generation
from lpd_tools.evaluation.measure import Measurement
from lpd_tools.settings import settings_of
from lpd_tools.training.bundle import Bundling
from lpd_tools.training.curves import Curves
from lpd_tools.training.export import Export
from lpd_tools.training.judge import JudgeTraining
from lpd_tools.training.replay import Replay
from lpd_tools.training.tokenizer import TokenizerTraining
from lpd_tools.training.transformer import LPDTraining
from typer.testing import CliRunner, Result

from lpd_ext.pipeline import LPDPipeline

DATA = Path(__file__).parents[1] / "data"
CONFIGS = {
    "train-judge": JudgeTraining,
    "train-tokenizer": TokenizerTraining,
    "cache-tokens": TokenCaching,
    "check-tokens": TokenCheck,
    "prepare-icons": IconFolder,
    "train": LPDTraining,
    "replay": Replay,
    "export": Export,
    "bundle": Bundling,
    "generate": Generation,
    "measure": Measurement,
    "evaluate": Evaluation,
    "curves": Curves,
}


def lpd(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "200", "TERM": "dumb"}).invoke(app, [str(a) for a in arguments])


@pytest.mark.parametrize("command", CONFIGS)
def test_every_setting_is_an_option_with_help(command: str) -> None:
    output = lpd(command, "--help").output
    for item in settings_of(CONFIGS[command]):
        assert f"--{item.name.replace('_', '-')}" in output
        assert item.help.split()[0] in output


def test_errors_are_one_sentence(tmp_path: Path) -> None:
    missing = lpd("train", "--tokens", tmp_path / "none", "--out-dir", tmp_path)
    assert missing.exit_code == 2
    assert "no token cache at" in missing.output
    wrong = lpd("train-judge", "--out", tmp_path / "j", "--data-dir", DATA / "fashion_mnist", "--precision", "half")
    assert wrong.exit_code == 2
    assert "precision must be auto, fp32 or bf16, got 'half'" in wrong.output
    assert "Traceback" not in wrong.output
    assert list(tmp_path.iterdir()) == []


def test_from_images_to_a_pipeline(tmp_path: Path) -> None:
    """Tokenizer, token cache, transformer and bundle, a few steps each, end in a pipeline that draws."""
    data = ("--data", f"fashion-mnist:{DATA / 'fashion_mnist'}")
    quick = ("--precision", "fp32", "--batch-size", 4, "--steps", 3, "--warmup-steps", 1, "--decay-steps", 1)
    sizes = ("--ch-mult", 1, "--ch-mult", 1, "--ch-mult", 1, "--codebook-size", 16, "--z-channels", 8)
    log = ("--evaluate-every", 2, "--evaluate-images", 4)
    model = ("--dim", 32, "--depth", 1, "--heads", 2, "--decoding-steps", 8, "--decoding-steps", 10)
    defaults = ("--guidance-scale", 1.5, "--num-inference-steps", 8)
    tokenizer = tmp_path / "vq" / "tokenizer.safetensors"
    commands = [
        ("train-tokenizer", "--out-dir", tmp_path / "vq", *data, *quick, *sizes, *log),
        (
            "cache-tokens",
            "--tokenizer",
            tokenizer,
            "--out",
            tmp_path / "tokens",
            "--data",
            f"fashion-mnist:{DATA / 'fashion_mnist'}",
        ),
        ("check-tokens", "--tokens", tmp_path / "tokens", "--tokenizer", tokenizer),
        ("train", "--tokens", tmp_path / "tokens", "--out-dir", tmp_path / "lpd", *quick, *log, *model),
        ("bundle", "--model", tmp_path / "lpd", "--tokenizer", tokenizer, "--out", tmp_path / "bundle", *defaults),
    ]
    for command in commands:
        result = lpd(*command)
        assert result.exit_code == 0, result.output
    pipe = LPDPipeline.from_pretrained(tmp_path / "bundle")
    assert (pipe.defaults.guidance_scale, pipe.defaults.num_inference_steps) == (1.5, 8)
    assert pipe(["bag", 0], seeds=1, output_type="pt").images.shape == (2, 3, 32, 32)
    assert pipe.model.head.weight.dtype == torch.float32
    refused = lpd(*commands[-1], "--guidance-schedule", "cubic")
    assert refused.exit_code == 2
    assert "guidance_schedule must be one of" in refused.output
