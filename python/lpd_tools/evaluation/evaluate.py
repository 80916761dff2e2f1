"""How good a model with its tokenizer is on Fashion-MNIST: recognition, Fréchet distance, nats, PSNR."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lpd_ext.checkpoint import TOKENIZER_FILE, resolve_directory
from lpd_ext.orders import make_orders
from lpd_ext.pipeline import LPDPipeline, bundled_model
from lpd_ext.schedule import group_sizes
from lpd_ext.tokenizer import VQTokenizer
from lpd_tools.data.fashion_mnist import FASHION_MNIST_DIR, LabelledImages, from_pixels, load_fashion_mnist, to_images
from lpd_tools.data.token_cache import check_tokenizer
from lpd_tools.evaluation.metrics import centre_psnr, frechet_distance
from lpd_tools.progress import track
from lpd_tools.settings import setting
from lpd_tools.training.judge import Judge, grey, judge_features, load_judge, predict
from lpd_tools.training.transformer import nats_per_token


@dataclass(frozen=True)
class Evaluation:
    """What is measured; empty `model`: the bundled one; steps and guidance at 0: that model's defaults."""

    judge: str = setting(..., "a trained judge that was not used for tuning")
    model: str = setting("", "folder of the model (the bundled one if empty)")
    out: str = setting("", "JSON file to write")
    data_dir: str = setting(str(FASHION_MNIST_DIR), "folder of the Fashion-MNIST IDX files")
    images: int = setting(2000, "images to generate")
    num_inference_steps: int = setting(0, "decoding steps (0: the model's default)")
    guidance_scale: float = setting(0.0, "guidance (0: the model's default)")
    guidance_schedule: str = setting("", "linear or constant (empty: the model's default)")
    seed: int = setting(0, "seed of the first image")
    batch_size: int = setting(100, "images per batch")
    nats_images: int = setting(1000, "test images for the teacher-forced nats")
    nats_steps: tuple[int, ...] = setting((4, 6, 10, 16, 64), "numbers of steps for them")
    nats_orders: tuple[str, ...] = setting(("random", "locality", "raster"), "orders for them")


def generate(pipe: LPDPipeline, labels: Sequence[int], seed: int, batch_size: int = 100, **options: Any) -> Tensor:
    """Pixels uint8 [B, 32, 32, 3] of one generated image per label; image i has seed `seed + i`."""
    parts = []
    for start in track(range(0, len(labels), batch_size), "generating"):
        batch = list(labels[start : start + batch_size])
        seeds = list(range(seed + start, seed + start + len(batch)))
        parts.append(torch.from_numpy(pipe(batch, seeds=seeds, output_type="np", **options).images))
    return torch.cat(parts)


@torch.inference_mode()
def reconstruct(tokenizer: VQTokenizer, pixels: Tensor, batch_size: int = 250) -> Tensor:
    """Pixels uint8 [B, 32, 32, 3] of grey images uint8 [B, 28, 28], encoded and decoded."""
    return torch.cat(
        [
            VQTokenizer.to_pixels(tokenizer.decode(tokenizer.encode(to_images(batch))))
            for batch in track(pixels.split(batch_size), "reconstructing")
        ]
    )


def recognition(judge: Judge, images: Tensor, labels: Tensor, names: Sequence[str]) -> dict[str, float]:
    """Share of images [B, 1, 28, 28] that the judge reads as their label, over all ("all") and per class."""
    right = (predict(judge, images) == labels).float()
    rates = {"all": float(right.mean())}
    return rates | {name: float(right[labels == c].mean()) for c, name in enumerate(names)}


def balanced_sample(data: LabelledImages, count: int, classes: int, seed: int = 0) -> LabelledImages:
    """`count` random images, the same number of each class."""
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    chosen = torch.cat([order[data.labels[order] == c][: count // classes] for c in range(classes)])
    return LabelledImages(data.pixels[chosen], data.labels[chosen])


@torch.inference_mode()
def dependency_loss(pipe: LPDPipeline, tokens: Tensor, labels: Tensor, policy: str, steps: int, seed: int = 0) -> float:
    """Teacher-forced nats per image of real tokens int64 [B, N]: Σ -log p(token | groups before), unguided.

    Its rise over steps = N is what drawing tokens in parallel ignores.
    """
    defaults = pipe.defaults
    sizes = group_sizes(tokens.shape[1], steps)
    orders = make_orders(
        policy,
        [sizes] * len(tokens),
        pipe.model.config.grid,
        torch.arange(seed, seed + len(tokens)),
        proximity_threshold=defaults.proximity_threshold,
        repulsion_threshold=defaults.repulsion_threshold,
    )
    return nats_per_token(pipe.model, tokens, labels, orders, sizes) * tokens.shape[1]


def evaluate(config: Evaluation) -> dict[str, Any]:
    """All measures as a nested dict; also written to `config.out` (JSON) if that is given.

    Raises ValueError if the model was trained on the tokens of another tokenizer than the one beside it.
    """
    directory = resolve_directory(config.model) if config.model else bundled_model()
    check_tokenizer(directory, directory / TOKENIZER_FILE)
    pipe = LPDPipeline.from_pretrained(directory)
    judge = load_judge(config.judge)
    train, test = (load_fashion_mnist(split, config.data_dir) for split in ("train", "test"))
    names = pipe.class_names
    options: dict[str, Any] = {
        name: value
        for name in ("num_inference_steps", "guidance_scale", "guidance_schedule")
        if (value := getattr(config, name))
    }

    labels = torch.arange(config.images) % len(names)
    generated = from_pixels(generate(pipe, labels.tolist(), config.seed, config.batch_size, **options))
    sample = balanced_sample(train, config.images, len(names))
    restored_test = from_pixels(reconstruct(pipe.tokenizer, test.pixels))
    real = judge_features(judge, grey(test))

    def distance(images: Tensor) -> float:
        return frechet_distance(judge_features(judge, images), real)

    results: dict[str, Any] = {
        "sampling": asdict(pipe.defaults) | options | {"images": config.images, "seed": config.seed},
        "recognised": {
            "generated": recognition(judge, generated, labels, names),
            "reconstructed test set": recognition(judge, restored_test, test.labels, names),
            "real test set": recognition(judge, grey(test), test.labels, names),
        },
        "frechet_distance_to_test_set": {
            "generated": distance(generated),
            "reconstructed train images": distance(from_pixels(reconstruct(pipe.tokenizer, sample.pixels))),
            "real train images (the floor)": distance(grey(sample)),
        },
        "reconstruction_psnr_centre_db": centre_psnr(restored_test, test.pixels),
        "nats_per_test_image": nats_table(pipe, test, config),
    }
    if config.out:
        Path(config.out).write_text(json.dumps(results, indent=2) + "\n")
    return results


def nats_table(pipe: LPDPipeline, test: LabelledImages, config: Evaluation) -> dict[str, dict[str, float]]:
    """Dependency loss by order and number of steps, on the same test images."""
    with torch.inference_mode():
        pixels = test.pixels[: config.nats_images]
        tokens = torch.cat([pipe.tokenizer.encode(to_images(part)).flatten(1) for part in pixels.split(250)])
    labels = test.labels[: config.nats_images]
    cells = [(order, steps) for order in config.nats_orders for steps in config.nats_steps]
    table: dict[str, dict[str, float]] = {order: {} for order in config.nats_orders}
    for order, steps in track(cells, "teacher-forced nats"):
        table[order][str(steps)] = dependency_loss(pipe, tokens, labels, order, steps)
    return table
