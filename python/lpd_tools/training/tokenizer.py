"""Trains the VQ tokenizer on images: reconstruction and commitment losses, moving-average codebook."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lpd_ext.tokenizer import AttnBlock, ResBlock, TokenizerConfig, VQTokenizer
from lpd_tools.data.fashion_mnist import BORDER, centre_grey, centre_psnr, from_pixels, step_generator
from lpd_tools.data.image_reader import ImageReader, write_skipped
from lpd_tools.data.image_source import DataSet, evenly_spaced
from lpd_tools.data.pixels import background_colour
from lpd_tools.data.reconstruction import reconstruct
from lpd_tools.data.sources import open_data
from lpd_tools.data.token_shards import SKIPPED_FILE, file_hash
from lpd_tools.pictures import psnr, tiled
from lpd_tools.processes import Processes, processes
from lpd_tools.settings import Range, fixed_settings
from lpd_tools.training.codebook import CodebookAverages
from lpd_tools.training.judge import Judge, load_judge, predict
from lpd_tools.training.loop import Training
from lpd_tools.training.precision import training_modes
from lpd_tools.training.settings import TokenizerTraining
from lpd_tools.training.shuffling import EpochShuffle
from lpd_tools.training.state import check_fits, fill
from lpd_tools.training.task import Test

RESULT = "tokenizer.safetensors"
_FASHION_MNIST = "fashion-mnist"  # the kind of data that the judge knows
_KEPT_BYTES = 2 << 30  # a data set that is no larger is read once and stays in memory


def tokenizer_sizes(config: TokenizerTraining) -> TokenizerConfig:
    """The sizes of the network."""
    return TokenizerConfig(
        config.ch,
        config.ch_mult,
        config.z_channels,
        config.codebook_size,
        config.codebook_dim,
        config.encoder_res_blocks,
        config.decoder_res_blocks,
    )


@dataclass(frozen=True)
class ImageBatch:
    """The input of one forward pass."""

    images: Tensor  # [B, 3, Hp, Wp] in [-1, 1]
    quantised: bool  # not yet in the warm-up, unless it starts from a tokenizer


class Autoencoder(nn.Module):
    """A tokenizer as it is trained: images to their reconstruction, features and codes in one pass."""

    def __init__(self, tokenizer: VQTokenizer, averages: CodebookAverages) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.averages = averages
        # Its codes are moving averages: no gradient reaches them.
        tokenizer.quantize.requires_grad_(False)

    def forward(self, images: Tensor, quantised: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Output [B, 3, Hp, Wp], features and their codes [B, d, h, w], and ids [B, h, w] (None: not quantised)."""
        features = self.tokenizer.features(images).float()
        codes, tokens = self.averages.nearest(features) if quantised else (features, None)
        # Straight-through: the decoder sees the codes, the encoder gets the decoder's gradient unchanged.
        output = self.tokenizer.decode_features(features + (codes - features).detach())
        return output.float(), features, codes.detach(), tokens


class TokenizerTask:
    """A VQ tokenizer with the images it learns; a `Task`."""

    name = "tokenizer"
    command = "train-tokenizer"

    def __init__(self, config: TokenizerTraining, data: DataSet, size: int, group: Processes) -> None:
        self.config, self.data, self.group = config, data, group
        background = background_colour(config.background)
        self.readers = {
            split: ImageReader(
                data.split(split),
                size,
                background,
                config.strict,
                keep=3 * size * size * len(data.split(split)) <= _KEPT_BYTES,
                split=split,
            )
            for split in ("train", "test")
        }
        torch.manual_seed(config.seed)
        self.averages = CodebookAverages(config.codebook_size, config.codebook_dim, group.device)
        self.network = Autoencoder(VQTokenizer(tokenizer_sizes(config)), self.averages)
        if config.init_from:
            source = initial_tokenizer(config)
            self.averages.start(source.codes())
            fill(self.network.tokenizer, source.state_dict())
        self.blocks = [module for module in self.network.modules() if isinstance(module, (ResBlock, AttnBlock))]
        self.judge = load_judge(config.judge).to(group.device) if config.judge else None
        self.shuffle = EpochShuffle(len(data.train), config.batch_size, config.seed)
        self._seen: list[tuple[Tensor, Tensor | None]] = []  # vectors [n, d] of this step, and their codes [n]

    def batch(self, step: int, rows: slice) -> ImageBatch:
        """Returns the given rows of the batch of `step`."""
        index, flip = self.shuffle.batch(step), None
        if self.config.mirror:
            generator = step_generator(self.config.seed, step, stream=2)
            flip = (torch.rand(len(index), generator=generator) < 0.5)[rows]
        images = self.readers["train"].images(index[rows], flip)
        quantised = step >= self.config.warmup_steps or bool(self.config.init_from)
        return ImageBatch(images.to(self.group.device), quantised)

    def losses(self, model: nn.Module, batch: ImageBatch) -> dict[str, Tensor]:
        """The weighted sum, squared error, commitment and (with a judge) perceptual loss."""
        config = self.config
        output, features, codes, tokens = model(batch.images, batch.quantised)
        vectors = features.detach().permute(0, 2, 3, 1).reshape(-1, config.codebook_dim)
        self._seen.append((vectors, None if tokens is None else tokens.flatten()))
        parts = {"mse": F.mse_loss(output, batch.images), "commitment": F.mse_loss(features, codes)}
        loss = parts["mse"] + config.commitment_weight * parts["commitment"]
        if self.judge is not None:
            parts["perceptual"] = perceptual_loss(self.judge, output, batch.images)
            loss = loss + config.perceptual_weight * parts["perceptual"]
        return {"loss": loss} | parts

    def after_step(self, step: int) -> None:
        """Moves the codebook by the vectors of all processes; initialises it when the warm-up ends."""
        config, averages = self.config, self.averages
        vectors = self.group.gather_rows(torch.cat([vectors for vectors, _ in self._seen]))
        chosen = [tokens for _, tokens in self._seen if tokens is not None]
        self._seen = []
        generator = step_generator(config.seed, step)
        if chosen:
            averages.update(vectors, self.group.gather_rows(torch.cat(chosen)), config.codebook_decay)
            # Codes revived late would have no time to settle.
            if step % config.revive_every == 0 and step < config.steps - config.decay_steps // 4:
                averages.revive(vectors, config.revive_below, generator)
        elif step + 1 >= config.warmup_steps:
            averages.initialise(vectors, generator)

    @torch.no_grad()
    def test(self, average: Mapping[str, Tensor]) -> Test:
        """Error of the reconstructed test images, the share recognised by the judge, use of the codebook."""
        pixels = self._test_pixels(self.config.evaluate_images)
        restored = reconstruct(self._averaged(average), pixels, self.group.device)
        row = {"perplexity": self.averages.perplexity(), "codes_used": self.averages.usage(self.config.revive_below)}
        if self.data.kind == _FASHION_MNIST and pixels.shape[2] == 32:
            # The black border is no feat, and all channels are grey.
            name, centre = "test_psnr_centre", slice(BORDER, -BORDER)
            row[name] = centre_psnr(from_pixels(restored), pixels[:, 0, centre, centre])
        else:
            name = "test_psnr"
            row[name] = psnr(restored.permute(0, 3, 1, 2).float(), pixels.float())
        if self.judge is not None:
            labels = self.data.test.labels[self.test_index(self.config.evaluate_images)]
            right = predict(self.judge, from_pixels(restored).to(self.group.device)).cpu() == labels
            row["test_recognised"] = float(right.float().mean())
        return Test(-row[name], row)

    def draw(self, average: Mapping[str, Tensor]) -> np.ndarray:
        """Test images, each with its reconstruction to the right."""
        pixels = self._test_pixels(18)
        restored = reconstruct(self._averaged(average), pixels, self.group.device)
        return tiled(torch.cat([pixels.permute(0, 2, 3, 1), restored], dim=2).numpy())

    def test_index(self, count: int) -> Tensor:
        """Indices of the test images for `count` of them, or of all if there are fewer."""
        return evenly_spaced(count, len(self.data.test))

    def _test_pixels(self, count: int) -> Tensor:
        return self.readers["test"].pixels(self.test_index(count))

    def state(self) -> dict[str, Any]:
        """Returns the averages behind the codebook, and the images that some process could not read."""
        found = self.group.gather({split: reader.unreadable for split, reader in self.readers.items()})
        for split, reader in self.readers.items():
            for theirs in found:
                reader.unreadable.update(theirs[split])
        unreadable = {split: dict(reader.unreadable) for split, reader in self.readers.items()}
        return {"count": self.averages.count, "total": self.averages.total, "unreadable": unreadable}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Puts them back."""
        for split, unreadable in state.get("unreadable", {}).items():  # older checkpoints have none
            self.readers[split].unreadable.update(unreadable)
        averages = {"count": self.averages.count, "total": self.averages.total}
        check_fits(averages, {name: state[name] for name in averages})
        self.averages.count.copy_(state["count"])
        self.averages.total.copy_(state["total"])

    def export(self, average: Mapping[str, Tensor], out: Path) -> None:
        """Writes tokenizer.safetensors (fp16), and the list of images that could not be read."""
        self._averaged(average).save(out / RESULT)
        if skipped := [entry for reader in self.readers.values() for entry in reader.skipped]:
            write_skipped(skipped, out / SKIPPED_FILE)

    def _averaged(self, average: Mapping[str, Tensor]) -> VQTokenizer:
        model = Autoencoder(VQTokenizer(tokenizer_sizes(self.config)), self.averages)
        fill(model, average)
        tokenizer = model.tokenizer.to(self.group.device).eval()
        tokenizer.quantize.embedding.weight.data.copy_(self.averages.codes())
        return tokenizer


def initial_tokenizer(config: TokenizerTraining) -> VQTokenizer:
    """The tokenizer that a training starts from; ValueError if it has other sizes than the settings ask for."""
    source = VQTokenizer.from_file(config.init_from)
    for name, wanted in asdict(tokenizer_sizes(config)).items():
        if (found := getattr(source.config, name)) != wanted:
            raise ValueError(f"init_from: {config.init_from!r} has {name} {found}, but the settings ask for {wanted}")
    return source


def perceptual_loss(judge: Judge, images: Tensor, target: Tensor) -> Tensor:
    """Mean over the judge's blocks of ‖φ(images) - φ(target)‖² / ‖φ(target)‖², the norms over all images together.

    So it is no mean over images: passes of fewer images add up to a slightly different loss.
    """
    with torch.no_grad():
        wanted = judge.maps(centre_grey(target))
    found = judge.maps(centre_grey(images))
    ratios = [F.mse_loss(a.float(), b.float()) / b.float().square().mean() for a, b in zip(found, wanted, strict=True)]
    return torch.stack(ratios).mean()


def train_tokenizer(config: TokenizerTraining) -> Path:
    """Trains, resuming exactly from the newest checkpoint in `out_dir`; returns `out_dir/tokenizer.safetensors`.

    Errors and torchrun as in `transformer.train`.
    """
    with processes(config.device) as group, training_modes(group.device):
        data = open_data(config.data)
        size = config.image_size or data.default_image_size
        if size % (stride := 2 ** (len(config.ch_mult) - 1)):
            raise ValueError(f"image_size must be a multiple of the tokenizer's stride {stride}, got {size}")
        if config.judge and (data.kind, size) != (_FASHION_MNIST, 32):
            raise ValueError(f"judge must be empty unless data is fashion-mnist at 32 pixels, got {config.data!r}")
        # The codebook is initialised from vectors of the warm-up, when that ends.
        config.check(len(data.train), len(data.test), warmup_steps=Range(1, config.steps))
        group.share(config.batch_size)
        task = TokenizerTask(config, data, size, group)
        inputs = {"judge_sha256": file_hash(config.judge) if config.judge else "", "data_sha256": data.fingerprint()}
        Training(task, config, group, fixed_settings(config) | inputs).run()
    return Path(config.out_dir) / RESULT
