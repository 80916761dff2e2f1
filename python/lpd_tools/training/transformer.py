"""Trains the LPD transformer on cached tokens: teacher-forced, random orders, a group-size table per step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lpd_ext.checkpoint import load_model, save_model
from lpd_ext.model import LPDConfig, LPDModel
from lpd_ext.schedule import group_sizes
from lpd_ext.tokenizer import VQTokenizer
from lpd_tools.data.fashion_mnist import step_generator
from lpd_tools.data.image_source import evenly_spaced
from lpd_tools.data.token_cache import TokenCache, file_hash, load_token_cache
from lpd_tools.processes import Processes, processes
from lpd_tools.settings import Range, fixed_settings
from lpd_tools.training.loop import Training
from lpd_tools.training.precision import autocast, autocast_dtype, training_modes
from lpd_tools.training.samples import draw_grid
from lpd_tools.training.settings import LPDTraining
from lpd_tools.training.shuffling import EpochShuffle
from lpd_tools.training.state import fill
from lpd_tools.training.task import Test


@dataclass(frozen=True)
class Batch:
    """The input of one forward pass: a function of (seed, step) and the images chosen."""

    tokens: Tensor  # int64 [B, N], raster order
    labels: Tensor  # int64 [B], -1 where dropped
    orders: Tensor  # int64 [B, N]
    group_sizes: list[int]

    def rows(self, rows: slice) -> Batch:
        """Some rows of it."""
        return Batch(self.tokens[rows], self.labels[rows], self.orders[rows], self.group_sizes)

    def to(self, device: torch.device) -> Batch:
        """The batch on a device."""
        return Batch(self.tokens.to(device), self.labels.to(device), self.orders.to(device), self.group_sizes)


def random_orders(batch: int, num_tokens: int, generator: torch.Generator) -> Tensor:
    """Uniformly random permutations int64 [batch, num_tokens]."""
    return torch.rand(batch, num_tokens, generator=generator).argsort(dim=1)


def make_batch(cache: TokenCache, index: Tensor, config: LPDTraining, step: int, rows: slice = slice(None)) -> Batch:
    """Rows of the batch of training images `index` [B] at `step`, its random choices made from (seed, step) alone.

    All rows are drawn, whichever are asked for, so that a row does not depend on the other processes.
    """
    generator = step_generator(config.seed, step)
    size, num_tokens = len(index), cache.num_tokens
    view = torch.randint(0, cache.train.views, (size,), generator=generator)[rows]
    dropped = (torch.rand(size, generator=generator) < config.label_drop)[rows]
    table = int(torch.randint(len(config.decoding_steps), (), generator=generator))
    keys = torch.rand(size, num_tokens, generator=generator)[rows]
    return Batch(
        tokens=cache.train.tokens(index[rows], view),
        labels=cache.train.labels[index[rows]].masked_fill(dropped, -1),
        orders=keys.argsort(dim=1),
        group_sizes=group_sizes(num_tokens, config.decoding_steps[table]),
    )


def batch_loss(model: nn.Module, batch: Batch, dropout: float = 0.0, attention_dropout: float = 0.0) -> Tensor:
    """Mean cross-entropy in nats over all B·N query rows."""
    logits = model(batch.tokens, batch.labels, batch.orders, batch.group_sizes, dropout, attention_dropout)
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
    device = model.pos_embed.device
    total = 0.0
    for part in torch.arange(len(tokens)).split(batch_size):
        batch = Batch(tokens[part], labels[part], orders[part], list(sizes)).to(device)
        total += batch_loss(model, batch).item() * len(part)
    return total / len(tokens)


class TransformerTask:
    """An LPD transformer with the tokens it learns; a `Task`."""

    name = "transformer"
    command = "train"

    def __init__(self, config: LPDTraining, cache: TokenCache, device: torch.device) -> None:
        self.config, self.cache, self.device = config, cache, device
        self.dtype = autocast_dtype(config.precision, device)
        self.network = initial_model(config, cache)
        self.blocks = list(self.network.blocks)
        self.shuffle = EpochShuffle(len(cache.train), config.batch_size, config.seed)

    def batch(self, step: int, rows: slice) -> Batch:
        """Returns the given rows of the batch of `step`."""
        return make_batch(self.cache, self.shuffle.batch(step), self.config, step, rows).to(self.device)

    def losses(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """The mean nats per token."""
        return {"loss": batch_loss(model, batch, self.config.dropout, self.config.attention_dropout)}

    def after_step(self, step: int) -> None:
        """Nothing is learnt but by gradients."""

    def test(self, average: Mapping[str, Tensor]) -> Test:
        """Nats per token of test images, at 10 steps (the loss) and at one token per step."""
        num_tokens = self.cache.num_tokens
        model = self._averaged(average)
        index = evenly_spaced(self.config.evaluate_images, len(self.cache.test))
        orders = random_orders(len(index), num_tokens, torch.Generator().manual_seed(0))
        tokens, labels = self.cache.test.tokens(index), self.cache.test.labels[index]
        row = {}
        few = min(10, num_tokens)
        with autocast(self.dtype, self.device):
            for steps in (few, num_tokens):
                sizes = group_sizes(num_tokens, steps)
                row[f"test_nats_{steps}_steps"] = nats_per_token(model, tokens, labels, orders, sizes)
        return Test(row[f"test_nats_{few}_steps"], row)

    def draw(self, average: Mapping[str, Tensor]) -> np.ndarray | None:
        """Images of all classes in turn, if there is a tokenizer."""
        if not self.config.tokenizer:
            return None
        tokenizer = VQTokenizer.from_file(self.config.tokenizer)
        return draw_grid(self._averaged(average), tokenizer, self.config.sample_images, self.config.sample_guidance)

    def state(self) -> dict[str, Any]:
        """The names of the classes, for `lpd export`: every random choice is a function of (seed, step)."""
        return {"class_names": list(self.cache.class_names)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Nothing to put back."""

    def export(self, average: Mapping[str, Tensor], out: Path) -> None:
        """Writes config.json and model.safetensors (fp16)."""
        extra = {"tokenizer_sha256": self.cache.tokenizer_hash, "class_names": list(self.cache.class_names)}
        save_model(self._averaged(average), out, extra=extra, dtype=torch.float16)

    def _averaged(self, average: Mapping[str, Tensor]) -> LPDModel:
        model = LPDModel(self.network.config).to(self.device)
        fill(model, average)
        return model.eval()


def model_sizes(config: LPDTraining, cache: TokenCache) -> LPDConfig:
    """The sizes of the transformer: the settings' and the tokens'."""
    return LPDConfig(
        config.dim,
        config.depth,
        config.heads,
        cache.vocab_size,
        cache.num_classes,
        cache.grid,
        mutual_visibility=config.mutual_visibility,
    )


def initial_model(config: LPDTraining, cache: TokenCache) -> LPDModel:
    """A model with random weights, or with those of `init_from`.

    Raises ValueError if that one has other sizes than asked for, the grid excepted.
    """
    sizes = model_sizes(config, cache)
    torch.manual_seed(config.seed)
    model = LPDModel(sizes)
    if config.init_from:
        source = load_model(config.init_from, grid=sizes.grid, heads=config.heads)
        for name, wanted in asdict(sizes).items():
            found = getattr(source.config, name)
            # A model trained with mutual visibility may go on without it, and the other way round.
            if found != wanted and name != "mutual_visibility":
                whose = "the tokens have" if name in ("vocab_size", "num_classes") else "the settings ask for"
                raise ValueError(f"init_from: {config.init_from!r} has {name} {found}, but {whose} {wanted}")
        fill(model, dict(source.named_parameters()))
    return model


def check(config: LPDTraining, cache: TokenCache, group: Processes) -> None:
    """ValueError naming the first setting that cannot work with the tokens."""
    if not config.decoding_steps:
        raise ValueError("decoding_steps must name at least one number of steps")
    config.check(len(cache.train), len(cache.test), decoding_steps=Range(1, cache.num_tokens))
    if config.tokenizer and not config.mutual_visibility:
        raise ValueError("tokenizer must be empty without mutual_visibility: such a model cannot draw pictures")
    group.share(config.batch_size)
    if config.tokenizer and file_hash(config.tokenizer) != cache.tokenizer_hash:
        raise ValueError(f"tokenizer {config.tokenizer!r} is not the one that made the tokens in {config.tokens!r}")


def train(config: LPDTraining) -> Path:
    """Trains, resuming exactly from the newest checkpoint in `out_dir` if there is one; returns `out_dir`.

    It then holds model.safetensors (averaged weights, fp16), config.json (with the SHA-256 of the tokenizer that made
    the tokens), log.csv, steps.csv and checkpoints. Under torchrun each process calls this. Raises ValueError for
    impossible settings, and for others than the training began with; TrainingStopped after SIGTERM or SIGINT.
    """
    with processes(config.device) as group, training_modes(group.device):
        cache = load_token_cache(config.tokens)
        check(config, cache, group)
        task = TransformerTask(config, cache, group.device)
        sizes = asdict(task.network.config)
        inputs = {"tokenizer_sha256": cache.tokenizer_hash, "tokens_sha256": cache.content_hash()}
        Training(task, config, group, sizes | fixed_settings(config) | inputs).run()
    return Path(config.out_dir)
