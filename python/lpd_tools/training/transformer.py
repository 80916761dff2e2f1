"""Trains the LPD transformer on cached tokens: teacher-forced, random orders, a group-size table per step."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from lpd_ext.checkpoint import save_model
from lpd_ext.model import LPDConfig, LPDModel
from lpd_ext.schedule import group_sizes
from lpd_tools.data.fashion_mnist import epoch_batches, step_generator
from lpd_tools.data.token_cache import TokenCache, load_token_cache
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
    update_ema,
)


@dataclass(frozen=True)
class LPDTraining:
    """How an LPD transformer is trained.

    On resuming, `steps` and `decay_steps` may change (the decay moves with them), and what changes no weight.
    """

    tokens: str = setting(..., "token cache to train on")
    out_dir: str = setting(..., "folder of state, log and result")
    dim: int = setting(192, "width E")
    depth: int = setting(6, "blocks L")
    heads: int = setting(6, "attention heads H")
    seed: int = setting(0, "random seed")
    steps: int = setting(3700, "optimisation steps")
    batch_size: int = setting(64, "images per step")
    learning_rate: float = setting(1.5e-3, "peak learning rate")
    warmup_steps: int = setting(200, "linear warm-up")
    decay_steps: int = setting(2000, "cosine decay to zero over the last steps")
    weight_decay: float = setting(0.02, "AdamW weight decay of parameters with two or more dimensions")
    label_drop: float = setting(0.1, "share of labels replaced by the unconditional one")
    dropout: float = setting(0.0, "after proj, GELU and fc2")
    clip: float = setting(1.0, "gradient norm limit")
    ema_decay: float = setting(0.998, "decay of the averaged weights")
    decoding_steps: tuple[int, ...] = setting(
        (6, 8, 10, 12, 16, 24, 32, 64), "numbers of steps T whose group-size tables are trained"
    )
    precision: str = setting("auto", "auto, fp32 or bf16")
    save_every_s: float = setting(180.0, "seconds between saves of the training state")
    evaluate_every: int = setting(500, "steps between rows of the log")
    evaluate_images: int = setting(500, "test images in a row of the log")


@dataclass(frozen=True)
class Batch:
    """What one optimisation step sees; a function of (seed, step) and the images chosen."""

    tokens: Tensor  # int64 [B, N], raster order
    labels: Tensor  # int64 [B], -1 where dropped
    orders: Tensor  # int64 [B, N]
    group_sizes: list[int]


def random_orders(batch: int, num_tokens: int, generator: torch.Generator) -> Tensor:
    """Uniformly random permutations int64 [batch, num_tokens]."""
    return torch.rand(batch, num_tokens, generator=generator).argsort(dim=1)


def make_batch(cache: TokenCache, index: Tensor, config: LPDTraining, step: int) -> Batch:
    """The batch of training images `index` [B] at `step`, all its random choices made from (seed, step)."""
    generator = step_generator(config.seed, step)
    size, num_tokens = len(index), cache.num_tokens
    view = torch.randint(0, cache.train.views, (size,), generator=generator)
    dropped = torch.rand(size, generator=generator) < config.label_drop
    table = int(torch.randint(len(config.decoding_steps), (), generator=generator))
    return Batch(
        tokens=cache.train.tokens(index, view),
        labels=cache.train.labels[index].masked_fill(dropped, -1),
        orders=random_orders(size, num_tokens, generator),
        group_sizes=group_sizes(num_tokens, config.decoding_steps[table]),
    )


def batch_loss(model: LPDModel, batch: Batch, dropout: float = 0.0) -> Tensor:
    """Mean cross-entropy in nats over all B·N query rows."""
    logits = model(batch.tokens, batch.labels, batch.orders, batch.group_sizes, dropout)
    return F.cross_entropy(logits.float().flatten(0, 1), batch.tokens.gather(1, batch.orders).flatten())


@torch.no_grad()
def nats_per_token(
    model: LPDModel,
    tokens: Tensor,
    labels: Tensor,
    orders: Tensor,
    sizes: Sequence[int],
    batch_size: int = 125,
) -> float:
    """Teacher-forced mean nats per token of tokens [B, N] drawn in `orders` [B, N] with group `sizes`."""
    model.eval()
    total = 0.0
    for part in torch.arange(len(tokens)).split(batch_size):
        batch = Batch(tokens[part], labels[part], orders[part], list(sizes))
        total += batch_loss(model, batch).item() * len(part)
    return total / len(tokens)


def parameter_groups(model: LPDModel, weight_decay: float) -> list[dict[str, object]]:
    """Weight decay on every parameter of two or more dimensions (embeddings too), none on the rest."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def check_settings(config: LPDTraining, cache: TokenCache) -> None:
    """ValueError naming the first setting that cannot work with the tokens."""
    if not config.decoding_steps:
        raise ValueError("decoding_steps must name at least one number of steps")
    check_ranges(
        config,
        decoding_steps=(1, cache.num_tokens),
        batch_size=(1, len(cache.train)),
        evaluate_images=(1, len(cache.test)),
        evaluate_every=(1, math.inf),
        save_every_s=(0, math.inf),
        steps=(1, math.inf),
        warmup_steps=(0, math.inf),
        decay_steps=(0, math.inf),
        seed=(0, 2**32),
        label_drop=(0, 1),
        dropout=(0, 1),
        ema_decay=(0, 1),
        learning_rate=(0, math.inf),
        weight_decay=(0, math.inf),
        clip=(0, math.inf),
    )


def train(config: LPDTraining) -> Path:
    """Trains, resuming exactly from `out_dir/state.pt` if there; writes the averaged weights to `out_dir`.

    Returns `out_dir`, which then holds model.safetensors (fp16), config.json (with the SHA-256 of the tokenizer that
    made the tokens), log.csv and state.pt. Raises ValueError for impossible settings, and for others than the training
    began with.
    """
    out = Path(config.out_dir)
    cache = load_token_cache(config.tokens)
    check_settings(config, cache)
    settings = fixed_settings(config, tokenizer_sha256=cache.tokenizer_hash, tokens_sha256=cache.content_hash())
    dtype = autocast_dtype(config.precision)
    torch.manual_seed(config.seed)
    model = LPDModel(LPDConfig(config.dim, config.depth, config.heads, cache.vocab_size, cache.num_classes, cache.grid))
    optimizer = torch.optim.AdamW(parameter_groups(model, config.weight_decay), betas=(0.9, 0.95), fused=True)
    average = {name: value.detach().clone() for name, value in model.state_dict().items()}
    start, seconds = 0, 0.0
    state = load_state(out / "state.pt", settings)
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        average, start, seconds = state["average"], int(state["step"]), float(state["seconds"])
    drop_rows_after(out / "log.csv", start)
    batches = epoch_batches(len(cache.train), config.batch_size, config.seed, start)
    saved_at = time.monotonic()
    begun = saved_at - seconds
    total, counted = 0.0, 0

    for step in track(range(start, config.steps), "training the transformer"):
        rate = learning_rate(step, config.steps, config.learning_rate, config.warmup_steps, config.decay_steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        model.train()
        batch = make_batch(cache, next(batches), config, step)
        # Dropout draws from the global generator: seeding it per step makes resuming exact.
        torch.manual_seed(config.seed * 1_000_003 + step)
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            loss = batch_loss(model, batch, config.dropout)
        if not math.isfinite(loss.item()):
            raise RuntimeError(f"loss is {loss.item()} at step {step}: lower learning_rate ({rate:g})")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        # Early on, a long average would still hold the initial weights.
        update_ema(average, model, min(config.ema_decay, (step + 1) / (step + 10)))
        total, counted, done = total + loss.item(), counted + 1, step + 1

        if done % config.evaluate_every == 0 or done == config.steps:
            row = {
                "step": done,
                "seconds": time.monotonic() - begun,
                "lr": rate,
                "train_nats": total / counted,
            }
            append_csv(out / "log.csv", row | validate(model, average, cache, config))
            total, counted = 0.0, 0
        if time.monotonic() - saved_at > config.save_every_s or done == config.steps:
            weights = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "average": average}
            progress = {"settings": settings, "step": done, "seconds": time.monotonic() - begun}
            save_state({**weights, **progress}, out / "state.pt")
            saved_at = time.monotonic()

    model.load_state_dict(average)
    save_model(model, out, extra={"tokenizer_sha256": cache.tokenizer_hash}, dtype=torch.float16)
    return out


def validate(model: LPDModel, average: dict[str, Tensor], cache: TokenCache, config: LPDTraining) -> dict[str, float]:
    """Nats per token of the averaged weights on test images, at 10 steps and at one token per step."""
    count, num_tokens = config.evaluate_images, cache.num_tokens
    dtype = autocast_dtype(config.precision)
    copy = LPDModel(model.config)
    copy.load_state_dict(average)
    orders = random_orders(count, num_tokens, torch.Generator().manual_seed(0))
    row = {}
    for steps in (min(10, num_tokens), num_tokens):
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            row[f"test_nats_{steps}_steps"] = nats_per_token(
                copy,
                cache.test.tokens(torch.arange(count)),
                cache.test.labels[:count],
                orders,
                group_sizes(num_tokens, steps),
            )
    return row
