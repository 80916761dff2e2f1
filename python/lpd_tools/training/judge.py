"""The judge: a small classifier, trained on real images only, that recognises what a generated image shows."""

from __future__ import annotations

import itertools
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lpd_ext.content import content_of
from lpd_ext.state_files import read_state_dict, write_state_dict
from lpd_tools.checks import check_finite
from lpd_tools.data.fashion_mnist import (
    LabelledImages,
    centre_grey,
    load_fashion_mnist,
    step_generator,
    to_images,
)
from lpd_tools.progress import track
from lpd_tools.training.logs import append_csv, drop_rows_after
from lpd_tools.training.loop_settings import learning_rate
from lpd_tools.training.precision import autocast, autocast_dtype, training_modes
from lpd_tools.training.settings import JudgeTraining
from lpd_tools.training.shuffling import EpochShuffle


class Judge(nn.Module):
    """Grey images [B, 1, 28, 28] in [-1, 1] to class logits [B, C]; features are the 128 values before."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        widths = (1, 32, 64, 128)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2))
            for a, b in itertools.pairwise(widths)
        )
        self.fc = nn.Linear(128 * 3 * 3, 128)
        self.head = nn.Linear(128, classes)

    def maps(self, x: Tensor) -> list[Tensor]:
        """The outputs of the three blocks: [B, 32, 14, 14], [B, 64, 7, 7], [B, 128, 3, 3]."""
        outputs = []
        for block in self.blocks:
            x = block(x)
            outputs.append(x)
        return outputs

    def features(self, x: Tensor) -> Tensor:
        """Features [B, 128]."""
        return F.relu(self.fc(self.maps(x)[-1].flatten(1)))

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(self.features(x), 0.3, self.training)
        logits: Tensor = self.head(x)
        return logits


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images [B, 1, 28, 28], half of them mirrored, the batch shifted by up to two pixels each way."""
    flip = torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5
    images = torch.where(flip, images.flip(3), images)
    dy, dx = torch.randint(0, 5, (2,), generator=generator).tolist()
    return F.pad(images, (2, 2, 2, 2), value=-1.0)[:, :, dy : dy + 28, dx : dx + 28]


@training_modes(torch.device("cpu"))
def train_judge(config: JudgeTraining) -> float:
    """Trains a judge, writes it to `config.out` (with a CSV log beside it); returns the test accuracy."""
    train, test = (load_fashion_mnist(split, config.data_dir) for split in ("train", "test"))
    torch.manual_seed(config.seed)
    model = Judge()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=config.weight_decay)
    device = torch.device("cpu")
    dtype = autocast_dtype(config.precision, device)
    shuffle = EpochShuffle(len(train), config.batch_size, config.seed)
    per_epoch = shuffle.per_epoch
    steps = config.epochs * per_epoch
    log = Path(config.out).with_suffix(".csv")
    drop_rows_after(log, 0)  # of a judge that this one takes the place of
    accuracy = total = 0.0
    shown: dict[str, float] = {}
    for step in track(range(steps), "training the judge", figures=shown):
        model.train()
        index = shuffle.batch(step)
        images = augment(grey(train, index), step_generator(config.seed, step))
        torch.manual_seed(step)
        optimizer.param_groups[0]["lr"] = learning_rate(
            step, steps, config.learning_rate, warmup=per_epoch // 2, decay=steps
        )
        with autocast(dtype, device):
            logits = model(images)
        loss = F.cross_entropy(logits.float(), train.labels[index], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        shown["loss"] = loss.item()
        total += shown["loss"]
        if (step + 1) % per_epoch == 0:
            accuracy = float((predict(model, grey(test)) == test.labels).float().mean())
            row = {
                "epoch": (step + 1) // per_epoch,
                "train_loss": total / per_epoch,
                "test_accuracy": accuracy,
            }
            append_csv(log, row)
            total = 0.0
    metadata = {k: str(v) for k, v in asdict(config).items() if k not in ("out", "data_dir")}
    write_state_dict(model.state_dict(), config.out, metadata=metadata)
    return accuracy


def grey(data: LabelledImages, index: Tensor | None = None) -> Tensor:
    """Judge input [B, 1, 28, 28] of the images at `index` (all of them by default)."""
    return centre_grey(to_images(data.pixels if index is None else data.pixels[index]))


def load_judge(path: str | Path) -> Judge:
    """A trained judge, in evaluation mode."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"path: no judge at {str(path)!r}; train one with `lpd train-judge`")
    judge = Judge()
    with content_of(path, "holds no judge"):
        judge.load_state_dict(read_state_dict(path))
    return judge.eval().requires_grad_(False)


@torch.no_grad()
def predict(judge: Judge, images: Tensor, batch_size: int = 500) -> Tensor:
    """Predicted labels int64 [B], on the CPU, of grey images [B, 1, 28, 28] on any device.

    ValueError where the judge's answers are not finite: NaN would count as a class.
    """
    judge.eval()
    device = judge.fc.weight.device
    logits = torch.cat([judge(batch.to(device)).cpu() for batch in images.split(batch_size)])
    check_finite(logits, "the judge's logits")
    return logits.argmax(1)


@torch.no_grad()
def judge_features(judge: Judge, images: Tensor, batch_size: int = 500) -> Tensor:
    """Features [B, 128], on the CPU, of grey images [B, 1, 28, 28] on any device; ValueError unless all are finite."""
    judge.eval()
    device = judge.fc.weight.device
    features = torch.cat([judge.features(batch.to(device)).cpu() for batch in images.split(batch_size)])
    check_finite(features, "the judge's features")
    return features
