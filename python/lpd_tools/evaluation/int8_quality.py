"""Measures how far int8 weights move a model from float32: argmaxes, divergence, recognition, Fréchet distance."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor

from lpd_ext.model import LPDModel
from lpd_ext.orders import make_orders
from lpd_ext.pipeline import LPDPipeline
from lpd_ext.quantize import quantize
from lpd_ext.schedule import group_sizes
from lpd_ext.state_files import write_text
from lpd_tools.bench.cases import SHAPES
from lpd_tools.bench.decode import Decode, distance
from lpd_tools.data.fashion_mnist import from_pixels, load_fashion_mnist, to_images
from lpd_tools.data.model_files import model_files
from lpd_tools.evaluation.generate import draw
from lpd_tools.evaluation.metrics import frechet_distance
from lpd_tools.evaluation.settings import Int8Quality
from lpd_tools.models import load_pipeline
from lpd_tools.progress import track
from lpd_tools.training.judge import grey, judge_features, load_judge, predict

FLOAT32: Final = "float32"
INT8: Final = "int8"


@torch.inference_mode()
def compare_forced(
    exact: LPDModel, rounded: LPDModel, tokens: Tensor, labels: Tensor, orders: Tensor, sizes: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Per image, teacher-forced: share of positions with the same argmax [B], and mean divergence in nats [B].

    tokens int64 [B, N] in raster order, labels int64 [B], orders int64 [B, N], group sizes of N.
    """
    same, nats = [], []
    for part in torch.arange(len(tokens)).split(125):
        batch = (tokens[part], labels[part], orders[part], sizes)
        p, q = (model(*batch).log_softmax(-1) for model in (exact, rounded))
        same.append((p.argmax(-1) == q.argmax(-1)).float().mean(1))
        nats.append((p.exp() * (p - q)).sum(-1).mean(1))
    return torch.cat(same), torch.cat(nats)


def forced_by_order(pipes: dict[str, LPDPipeline], config: Int8Quality) -> dict[str, dict[str, float]]:
    """Agreement of the argmaxes with its standard error over images, and divergence, of each order."""
    pipe = pipes[FLOAT32]
    test = load_fashion_mnist("test", config.data_dir)
    pixels, labels = test.pixels[: config.forced_images], test.labels[: config.forced_images]
    with torch.inference_mode():
        tokens = torch.cat([pipe.tokenizer.encode(to_images(part)).flatten(1) for part in pixels.split(250)])
    sizes = group_sizes(tokens.shape[1], config.num_inference_steps)
    rows = {}
    for name in track(config.forced_orders, "teacher-forced"):
        orders = make_orders(
            name,
            [sizes] * len(tokens),
            pipe.model.config.grid,
            torch.arange(len(tokens)),
            proximity_threshold=pipe.defaults.proximity_threshold,
            repulsion_threshold=pipe.defaults.repulsion_threshold,
        )
        same, nats = compare_forced(pipe.model, pipes[INT8].model, tokens, labels, orders, sizes)
        error = float(same.std() / len(same) ** 0.5)
        rows[name] = {"agreement": float(same.mean()), "standard_error": error, "nats": float(nats.mean())}
    return rows


def drawn_by_seed(pipes: dict[str, LPDPipeline], config: Int8Quality) -> dict[str, dict[str, dict[str, float]]]:
    """Returns, per seed and for float32 and int8, the share recognised and the Fréchet distance to the test set."""
    judge = load_judge(config.judge)
    real = judge_features(judge, grey(load_fashion_mnist("test", config.data_dir)))
    labels = torch.arange(config.images) % pipes[FLOAT32].model.config.num_classes
    rows: dict[str, dict[str, dict[str, float]]] = {}
    for seed in config.seeds:
        rows[str(seed)] = {}
        for name, pipe in pipes.items():
            steps = config.num_inference_steps
            images = from_pixels(draw(pipe, labels.tolist(), seed, num_inference_steps=steps))
            rows[str(seed)][name] = {
                "recognised": float((predict(judge, images) == labels).float().mean()),
                "frechet_distance": frechet_distance(judge_features(judge, images), real),
            }
    return rows


def lpd_l_at_random(depth: int) -> dict[str, Any]:
    """Cosine of the rows that leave each block, divergence and agreement of the logits, of random weights."""
    decode = Decode.at_random(next(iter(SHAPES.values())), 1, torch.device("cpu"), torch.float32, depth)
    rounded = Decode.at_random(decode.shape, 1, torch.device("cpu"), torch.float32, depth).model
    quantize(rounded)
    return distance(decode, rounded)


def int8_quality(config: Int8Quality) -> dict[str, Any]:
    """Returns all measures as a nested dict; also writes them to `config.out` (JSON) if given."""
    files = model_files(config.model)
    pipes = {name: load_pipeline(files.model, files.tokenizer, name) for name in (FLOAT32, INT8)}
    results: dict[str, Any] = {"teacher_forced": forced_by_order(pipes, config)}
    if config.seeds:
        results["drawn"] = drawn_by_seed(pipes, config)
    if config.lpd_l_depth:
        results["lpd_l_random_weights"] = lpd_l_at_random(config.lpd_l_depth)
    if config.out:
        write_text(config.out, json.dumps(results, indent=2) + "\n")
    return results
