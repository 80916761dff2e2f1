"""Encodes a data set once, shard by shard; an interrupted run continues, with the same result."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lpd_ext.picture import UnreadableImageError
from lpd_ext.tokenizer import VQTokenizer
from lpd_tools.checks import check_device
from lpd_tools.data.image_reader import Skipped, write_skipped
from lpd_tools.data.image_source import DataSet, few
from lpd_tools.data.names import visible
from lpd_tools.data.pixels import background_colour, square_pixels, to_input
from lpd_tools.data.settings import TokenCaching
from lpd_tools.data.sources import open_data
from lpd_tools.data.token_shards import (
    SKIPPED_FILE,
    SPLITS,
    Shard,
    ShardEntry,
    file_hash,
    narrow_type,
    read_notes,
    read_shard,
    shard_name,
    write_index,
    write_shard,
)
from lpd_tools.launch import place
from lpd_tools.progress import track

# Files of a token cache, and what a process that dies while writing leaves of them.
_OURS = re.compile(r"(index\.json|skipped\.csv|(train|test)-\d{5,}\.safetensors)$|\.(index|skipped|train|test)[.-]")


class Stretch(NamedTuple):
    """Consecutive images of a split: a batch, or a shard."""

    split: str
    start: int
    stop: int


@dataclass(frozen=True)
class Pixels:
    """A batch as a worker read it."""

    pixels: Tensor  # uint8 [B, 3, S, S]
    index: Tensor  # int64 [B]
    skipped: list[Skipped]


class PixelBatches(Dataset[Pixels]):
    """Reads one batch per item, leaving out and listing unreadable pictures."""

    def __init__(self, data: DataSet, size: int, background: tuple[int, int, int], strict: bool) -> None:
        self.data, self.size, self.background, self.strict = data, size, background, strict

    def __getitem__(self, batch: Stretch) -> Pixels:
        source = self.data.split(batch.split)
        pixels, index, skipped = [], [], []
        for i in range(batch.start, batch.stop):
            try:
                pixels.append(square_pixels(source.image(i), self.size, self.background))
                index.append(i)
            except UnreadableImageError as error:
                skipped.append(Skipped(batch.split, source.name(i), str(error)))
                if self.strict:
                    break
        stacked = torch.stack(pixels) if pixels else torch.empty(0, 3, self.size, self.size, dtype=torch.uint8)
        return Pixels(stacked, torch.tensor(index, dtype=torch.int64), skipped)


@dataclass(frozen=True)
class CachingResult:
    """The folder, whether the cache is complete (or other processes still work on it), and the skipped pictures."""

    path: Path
    complete: bool
    skipped: list[Skipped]


def cache_tokens(config: TokenCaching) -> Path:
    """Writes the token cache of a data set, going on where an earlier call stopped; returns its folder."""
    return run_caching(config).path


def run_caching(config: TokenCaching) -> CachingResult:
    """Writes train images, their mirror images and test images as tokens; under torchrun each process does its share.

    The last process to finish writes the index. Raises ValueError for wrong settings, a folder begun with other
    settings, damaged shards and, with `strict`, unreadable images; nothing written before is lost.
    """
    here = place()
    device = check_device(config.device)
    if device.type == "cuda" and not config.device and here.size > 1:
        device = torch.device("cuda", here.local_rank)
    background = background_colour(config.background)
    tokenizer = VQTokenizer.from_file(config.tokenizer).to(device)
    out = Path(config.out)
    _check_folder(out)
    data = open_data(config.data)
    settings = _settings(config, tokenizer, data, background, device)
    shards = [
        (out / shard_name(split, number), Stretch(split, start, min(start + config.shard_size, len(data.split(split)))))
        for split in SPLITS
        for number, start in enumerate(range(0, len(data.split(split)), config.shard_size))
    ]
    for path, _ in shards:
        if path.exists():
            check_settings(path, settings, config.strict)
    out.mkdir(parents=True, exist_ok=True)
    todo = [shard for shard in shards[here.rank :: here.size] if not shard[0].exists()]
    batches = PixelBatches(data, settings["image_size"], background, config.strict)
    _encode_shards(todo, batches, tokenizer, settings, config)
    if not all(path.exists() for path, _ in shards):
        return CachingResult(out, complete=False, skipped=[])
    return CachingResult(out, complete=True, skipped=_finish(out, shards, settings, data))


def check_settings(path: Path, settings: dict[str, Any], strict: bool) -> None:
    """ValueError unless the shard was made with these settings and, with `strict`, from all its images."""
    began, skipped, _ = read_notes(path)
    for name, value in settings.items():
        if began.get(name) != value:
            raise ValueError(
                f"{name} is {value!r}, but {str(path)!r} was made with {began.get(name)!r}: "
                "go on with that, or write to another folder"
            )
    if strict and skipped:
        raise ValueError(_unreadable(skipped[0]))


def _settings(
    config: TokenCaching, tokenizer: VQTokenizer, data: DataSet, background: tuple[int, int, int], device: torch.device
) -> dict[str, Any]:
    """Returns everything that determines the bytes of the shards."""
    size, stride = config.image_size or data.default_image_size, tokenizer.config.stride
    if size % stride:
        raise ValueError(f"image_size must be a multiple of {stride}, the stride of the tokenizer, got {size}")
    return {
        "tokenizer_sha256": file_hash(config.tokenizer),
        "vocab_size": tokenizer.config.codebook_size,
        "grid": [size // stride, size // stride],
        "views": {"train": 2 if config.mirror else 1, "test": 1},  # an image and, if 2, its mirror image
        "data": data.kind,
        "data_sha256": data.fingerprint(),
        "image_size": size,
        "background": list(background),
        "batch_size": config.batch_size,
        "shard_size": config.shard_size,
        "device": device.type,
    }


def _check_folder(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise ValueError(f"out: {str(out)!r} is a file; token caches are folders")
    entries = [path.name for path in visible(out)] if out.is_dir() else []
    strange = [name for name in entries if not _OURS.match(name)]
    if strange:
        raise ValueError(f"out: {str(out)!r} is no token cache, it holds {few(strange)}; name a new or empty folder")


@torch.no_grad()
def _encode_shards(
    todo: list[tuple[Path, Stretch]],
    reader: PixelBatches,
    tokenizer: VQTokenizer,
    settings: dict[str, Any],
    config: TokenCaching,
) -> None:
    # Batches do not cross shards, so a shard is the same whichever were there before.
    batches = [
        Stretch(shard.split, start, min(start + config.batch_size, shard.stop))
        for _, shard in todo
        for start in range(shard.start, shard.stop, config.batch_size)
    ]
    workers = min(config.workers, len(batches))
    loader = DataLoader(reader, batch_size=None, sampler=batches, num_workers=workers, collate_fn=_as_it_is)
    read: Iterator[Pixels] = iter(track(loader, "encoding", total=len(batches)))
    device = next(tokenizer.parameters()).device
    for path, shard in todo:
        number = settings["views"][shard.split]
        tokens = [torch.empty(0, number, *settings["grid"], dtype=torch.int64)]
        index, skipped = [torch.empty(0, dtype=torch.int64)], []
        for _ in range(shard.start, shard.stop, config.batch_size):
            batch = next(read)
            skipped += batch.skipped
            if skipped and config.strict:
                raise ValueError(_unreadable(skipped[0]))
            if len(batch.index):
                images = to_input(batch.pixels.to(device))
                views = (images, images.flip(3))[:number]
                tokens.append(torch.stack([tokenizer.encode(view) for view in views], dim=1).cpu())
                index.append(batch.index)
        which = torch.cat(index)
        labels = reader.data.split(shard.split).labels[which]
        narrow = torch.cat(tokens).to(narrow_type(settings["vocab_size"]))
        write_shard(path, Shard(narrow, labels.int(), which.int()), settings, skipped)
    next(read, None)  # lets the progress bar end


def _as_it_is(batch: Any) -> Any:
    return batch


def _finish(out: Path, shards: list[tuple[Path, Stretch]], settings: dict[str, Any], data: DataSet) -> list[Skipped]:
    """Writes the list of skipped images and the index of the shards, which are all there."""
    entries: dict[str, list[ShardEntry]] = {split: [] for split in SPLITS}
    skipped: list[Skipped] = []
    labels: dict[str, list[Tensor]] = {split: [] for split in SPLITS}
    for path, shard in track(shards, "checksums"):
        _, left_out, rows = read_notes(path)
        skipped += left_out
        labels[shard.split].append(read_shard(path).labels)
        entries[shard.split].append(ShardEntry(path.name, rows, path.stat().st_size, file_hash(path)))
    if skipped:
        write_skipped(skipped, out / SKIPPED_FILE)
    for split in SPLITS:
        there = set(torch.cat(labels[split]).unique().tolist())
        wanted = set(data.split(split).labels.unique().tolist())
        if there != wanted:
            names = [data.class_names[label] for label in sorted(wanted - there)]
            raise ValueError(
                f"data: no {split} image of {few(names)} can be read (see {str(out / SKIPPED_FILE)!r}); "
                f"mend the data and delete {str(out)!r}"
            )
    write_index(out, settings, data.class_names, entries)
    for path, _ in shards:
        for leftover in out.glob(f".{path.name}.*"):  # left by killed processes
            leftover.unlink(missing_ok=True)
    return skipped


def _unreadable(image: Skipped) -> str:
    return f"image {image.name!r} of the {image.split} split cannot be read: {image.reason}"
