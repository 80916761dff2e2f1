"""Trains the VQ tokenizer on Fashion-MNIST: reconstruction and commitment losses, moving-average codebook."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lpd_ext.tokenizer import TokenizerConfig, VQTokenizer
from lpd_tools.data.fashion_mnist import (
    FASHION_MNIST_DIR,
    LabelledImages,
    centre_grey,
    epoch_batches,
    from_pixels,
    load_fashion_mnist,
    step_generator,
    to_images,
)
from lpd_tools.data.token_cache import file_hash
from lpd_tools.evaluation.metrics import centre_psnr
from lpd_tools.progress import track
from lpd_tools.settings import setting
from lpd_tools.training.checkpointing import (
    append_csv,
    autocast_dtype,
    check_ranges,
    drop_rows_after,
    fixed_settings,
    learning_rate,
    load_state,
    save_state,
)
from lpd_tools.training.judge import Judge, load_judge, predict


@dataclass(frozen=True)
class TokenizerTraining:
    """How a tokenizer is trained.

    On resuming, `steps` and `decay_steps` may change (the decay moves with them), and what changes no weight.
    """

    out_dir: str = setting(..., "folder of state, log and result")
    data_dir: str = setting(str(FASHION_MNIST_DIR), "folder of the Fashion-MNIST IDX files")
    judge: str = setting("", "a trained judge: switches on the perceptual loss and logs how many it recognises")
    perceptual_weight: float = setting(0.05, "weight of the perceptual loss")
    ch: int = setting(32, "base width")
    ch_mult: tuple[int, ...] = setting((1, 1, 2), "width of each resolution as a multiple of ch, highest first")
    z_channels: int = setting(32, "width between encoder and codebook")
    codebook_size: int = setting(512, "number of codes V")
    codebook_dim: int = setting(8, "length of a code")
    encoder_res_blocks: int = setting(1, "residual blocks per resolution")
    decoder_res_blocks: int = setting(2, "residual blocks per resolution")
    seed: int = setting(0, "random seed")
    steps: int = setting(5300, "optimisation steps")
    batch_size: int = setting(32, "images per step")
    learning_rate: float = setting(8e-4, "peak learning rate")
    warmup_steps: int = setting(100, "linear warm-up, not quantised; the codebook is initialised at its end")
    decay_steps: int = setting(2500, "cosine decay to zero over the last steps")
    commitment_weight: float = setting(0.025, "weight of the commitment loss")
    codebook_decay: float = setting(0.99, "decay of the moving averages that make the codebook")
    revive_every: int = setting(20, "steps between replacements of dead codes")
    revive_below: float = setting(0.05, "a code used less than this share of the mean is dead")
    clip: float = setting(1.0, "gradient norm limit")
    precision: str = setting("auto", "auto, fp32 or bf16")
    save_every_s: float = setting(180.0, "seconds between saves of the training state")
    evaluate_every: int = setting(500, "steps between rows of the log")
    evaluate_images: int = setting(1000, "test images in a row of the log")

    def sizes(self) -> TokenizerConfig:
        """The sizes of the network."""
        return TokenizerConfig(
            self.ch,
            self.ch_mult,
            self.z_channels,
            self.codebook_size,
            self.codebook_dim,
            self.encoder_res_blocks,
            self.decoder_res_blocks,
        )


class CodebookAverages:
    """Moving averages of how often each code is chosen [V], and of the sum of those vectors [V, d]."""

    def __init__(self, size: int, dim: int) -> None:
        self.count = torch.ones(size)
        self.total = torch.zeros(size, dim)

    def initialise(self, vectors: Tensor, generator: torch.Generator) -> None:
        """Codes become randomly chosen vectors [n, d]."""
        size = len(self.count)
        chosen = torch.randint(len(vectors), (size,), generator=generator)
        self.count.fill_(len(vectors) / size)
        self.total.copy_(vectors[chosen] * self.count[:, None])

    def update(self, vectors: Tensor, tokens: Tensor, decay: float) -> None:
        """Takes in the vectors [n, d] and the codes [n] that they chose."""
        size = len(self.count)
        self.count.lerp_(torch.bincount(tokens, minlength=size).float(), 1 - decay)
        self.total.lerp_(torch.zeros_like(self.total).index_add_(0, tokens, vectors), 1 - decay)

    def revive(self, vectors: Tensor, below: float, generator: torch.Generator) -> int:
        """Codes with less than `below` of the fair share become random vectors; returns how many did."""
        dead = self.count < below * self.count.mean()
        number = int(dead.sum())
        chosen = torch.randint(len(vectors), (number,), generator=generator)
        self.count[dead] = self.count.mean()
        self.total[dead] = vectors[chosen] * self.count[dead, None]
        return number

    def codes(self) -> Tensor:
        """Unit-length codes [V, d]."""
        return F.normalize(self.total, dim=1)

    def perplexity(self) -> float:
        """2^entropy of code use: V if all codes are used alike."""
        p = self.count / self.count.sum()
        return float(torch.exp(-(p * p.clamp_min(1e-12).log()).sum()))


def perceptual_loss(judge: Judge, images: Tensor, target: Tensor) -> Tensor:
    """Mean over the judge's blocks of ‖φ(images) - φ(target)‖² / ‖φ(target)‖²."""
    with torch.no_grad():
        wanted = judge.maps(centre_grey(target))
    found = judge.maps(centre_grey(images))
    ratios = [F.mse_loss(a.float(), b.float()) / b.float().square().mean() for a, b in zip(found, wanted, strict=True)]
    return torch.stack(ratios).mean()


def train_tokenizer(config: TokenizerTraining) -> Path:
    """Trains, resuming from `out_dir/state.pt` if there; returns `out_dir/tokenizer.safetensors`."""
    out = Path(config.out_dir)
    train, test = (load_fashion_mnist(split, config.data_dir) for split in ("train", "test"))
    check_ranges(
        config,
        batch_size=(1, len(train)),
        evaluate_images=(1, math.inf),
        evaluate_every=(1, math.inf),
        revive_every=(1, math.inf),
        save_every_s=(0, math.inf),
        steps=(1, math.inf),
        warmup_steps=(0, math.inf),
        decay_steps=(0, math.inf),
        seed=(0, 2**32),
        codebook_decay=(0, 1),
        learning_rate=(0, math.inf),
        clip=(0, math.inf),
    )
    judge = load_judge(config.judge) if config.judge else None
    settings = fixed_settings(config, judge_sha256=file_hash(config.judge) if config.judge else "")
    dtype = autocast_dtype(config.precision)
    torch.manual_seed(config.seed)
    model = VQTokenizer(config.sizes())
    averages = CodebookAverages(config.codebook_size, config.codebook_dim)
    trained = [p for name, p in model.named_parameters() if not name.startswith("quantize.")]
    optimizer = torch.optim.Adam(trained, betas=(0.9, 0.99))
    start, seconds = restore(out / "state.pt", settings, model, averages, optimizer)
    drop_rows_after(out / "log.csv", start)
    batches = epoch_batches(len(train), config.batch_size, config.seed, start)
    saved_at = time.monotonic()
    begun = saved_at - seconds
    sums, counted = torch.zeros(3), 0

    for step in track(range(start, config.steps), "training the tokenizer"):
        images = to_images(train.pixels[next(batches)])
        rate = learning_rate(step, config.steps, config.learning_rate, config.warmup_steps, config.decay_steps)
        optimizer.param_groups[0]["lr"] = rate
        quantised = step >= config.warmup_steps
        generator = step_generator(config.seed, step)
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            features = model.features(images).float()
            vectors = features.detach().permute(0, 2, 3, 1).reshape(-1, config.codebook_dim)
            if step == config.warmup_steps:
                averages.initialise(vectors, generator)
            codes, tokens = nearest_codes(averages, features) if quantised else (features, None)
            # Straight-through: the decoder sees the codes, the encoder gets the decoder's gradient unchanged.
            output = model.decode_features(features + (codes - features).detach())
            parts = [F.mse_loss(output.float(), images), F.mse_loss(features, codes.detach())]
            seen = perceptual_loss(judge, output, images) if judge else torch.zeros(())
        loss = parts[0] + config.commitment_weight * parts[1] + config.perceptual_weight * seen
        if not math.isfinite(loss.item()):
            raise RuntimeError(f"loss is {loss.item()} at step {step}: lower learning_rate ({rate:g})")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, config.clip)
        optimizer.step()
        sums, counted = sums + torch.stack([*parts, seen]).detach(), counted + 1

        if tokens is not None:
            averages.update(vectors, tokens.flatten(), config.codebook_decay)
            if step % config.revive_every == 0 and step < config.steps - config.decay_steps // 4:
                averages.revive(vectors, config.revive_below, generator)
        done = step + 1
        if done % config.evaluate_every == 0 or done == config.steps:
            model.quantize.embedding.weight.data.copy_(averages.codes())
            psnr, recognised = evaluate_reconstruction(model, test, config.evaluate_images, judge)
            mse, commitment, seen_mean = (sums / counted).tolist()
            row = {"step": done, "seconds": time.monotonic() - begun, "mse": mse, "commitment": commitment}
            row |= {"perceptual": seen_mean, "perplexity": averages.perplexity(), "lr": rate}
            append_csv(out / "log.csv", row | {"test_psnr_centre": psnr, "test_recognised": recognised})
            sums, counted = torch.zeros(3), 0
        if time.monotonic() - saved_at > config.save_every_s or done == config.steps:
            save(out / "state.pt", settings, model, averages, optimizer, done, time.monotonic() - begun)
            saved_at = time.monotonic()

    model.quantize.embedding.weight.data.copy_(averages.codes())
    model.save(out / "tokenizer.safetensors")
    return out / "tokenizer.safetensors"


def nearest_codes(averages: CodebookAverages, features: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest codes [B, d, h, w] of unit-length features [B, d, h, w], and their ids [B, h, w]."""
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        codes = averages.codes()
        tokens = (features.permute(0, 2, 3, 1) @ codes.T).argmax(-1)
        return F.embedding(tokens, codes).permute(0, 3, 1, 2), tokens


@torch.no_grad()
def evaluate_reconstruction(
    model: VQTokenizer, test: LabelledImages, count: int, judge: Judge | None
) -> tuple[float, float]:
    """PSNR in dB of the first `count` test images, encoded and decoded, and the share recognised (or -1)."""
    pixels, labels = test.pixels[:count], test.labels[:count]
    outputs = [model.to_pixels(model.decode(model.encode(to_images(part)))) for part in pixels.split(250)]
    restored = from_pixels(torch.cat(outputs))
    recognised = float((predict(judge, restored) == labels).float().mean()) if judge else -1.0
    return centre_psnr(restored, pixels), recognised


def save(
    path: Path,
    settings: dict[str, Any],
    model: VQTokenizer,
    averages: CodebookAverages,
    optimizer: torch.optim.Optimizer,
    step: int,
    seconds: float,
) -> None:
    """Writes the training state atomically."""
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "seconds": seconds}
    save_state(state | {"settings": settings, "count": averages.count, "total": averages.total}, path)


def restore(
    path: Path,
    settings: dict[str, Any],
    model: VQTokenizer,
    averages: CodebookAverages,
    optimizer: torch.optim.Optimizer,
) -> tuple[int, float]:
    """Loads the training state if there is one; returns the step to go on from and the seconds spent so far."""
    state = load_state(path, settings)
    if state is None:
        return 0, 0.0
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    averages.count, averages.total = state["count"], state["total"]
    return int(state["step"]), float(state["seconds"])
