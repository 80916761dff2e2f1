"""The full-scale path in miniature: token cache, training, bundle and evaluation by one recipe and two processes."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")
pytest.importorskip("torchmetrics")

from training_runs import DATA, finish, start

from lpd_ext.pipeline import LPDPipeline
from lpd_ext.tokenizer import TokenizerConfig, VQTokenizer

RECIPE = """
[cache-tokens]
data = "fashion-mnist:{data}"
tokenizer = "{folder}/vq.safetensors"
out = "{folder}/tokens"
shard_size = 64
workers = 0

[train]
tokens = "{folder}/tokens"
tokenizer = "{folder}/vq.safetensors"
out_dir = "{folder}/run"
dim = 32
depth = 2
heads = 2
steps = 20
warmup_steps = 2
decay_steps = 5
batch_size = 8
micro_batch_size = 2
learning_rate = 1e-3
learning_rate_batch = 8
dropout = 0.1
decoding_steps = [4, 16]
parallel = "fsdp"
device = "cpu"
evaluate_every = 10
evaluate_images = 20
sample_every = 20
sample_images = 4

[bundle]
model = "{folder}/run"
tokenizer = "{folder}/vq.safetensors"
out = "{folder}/model"
num_inference_steps = 4

[evaluate]
model = "{folder}/model"
out = "{folder}/evaluation"
images_per_class = 2
batch_size = 4
reference = "fashion-mnist:{data}"
judge = "{judge}"
reconstructed_images = 10
nats_images = 4
nats_steps = [4, 16]
nats_orders = ["locality"]
self_images = 4
"""


def test_a_recipe_goes_from_images_to_figures(tmp_path: Path) -> None:
    """Four commands of one file, all but the bundle with two processes; every part leaves what the next one reads."""
    torch.manual_seed(0)
    tokenizer = VQTokenizer(TokenizerConfig(32, (1, 1, 1, 1), 8, 16, 8, 1, 1))
    torch.nn.init.normal_(tokenizer.quantize.embedding.weight)
    tokenizer.save(tmp_path / "vq.safetensors")
    judge = DATA.with_name("judge.safetensors")
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(RECIPE.format(data=DATA, judge=judge, folder=tmp_path))
    for command, processes in (("cache-tokens", 2), ("train", 2), ("bundle", 1), ("evaluate", 2)):
        finish(start([command, "--config", str(recipe)], processes, threads=1))
    with (tmp_path / "run" / "log.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [10, 20]
    assert len(list((tmp_path / "run" / "samples").glob("*.png"))) == 1
    pipe = LPDPipeline.from_pretrained(tmp_path / "model")
    assert pipe.class_names[9] == "ankle boot"
    assert pipe(["bag"], seeds=1).images[0].size == (32, 32)
    assert len(list((tmp_path / "evaluation").rglob("*.png"))) == 2 * 10 + 1  # and the grid
    results = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())
    assert results["images"]["generated"] == 20
    assert "FD-judge" in results["measures"]
