"""Reads token caches: the tokens of a data set, so that training reads tokens and never pixels."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lpd_ext.checkpoint import read_config
from lpd_ext.checks import as_grid, as_positive_int
from lpd_ext.content import content_of
from lpd_ext.hub import CONFIG_FILE
from lpd_tools.data.token_shards import (
    INDEX_FILE,
    SPLITS,
    Shard,
    ShardEntry,
    narrow_type,
    read_index,
    read_shard,
)
from lpd_tools.data.token_shards import file_hash as file_hash  # callers know it as a function of this module


class TokenSplit:
    """Encoded pictures of a train or test set, in memory-mapped shards."""

    def __init__(self, shards: Iterable[Shard], views: int, num_tokens: int) -> None:
        shards = list(shards)
        self.views = views  # 2 where each picture has its mirror image beside it, else 1
        self.labels = torch.cat([shard.labels for shard in shards]).long()  # int64 [images]
        self._num_tokens = num_tokens
        self._shards = [shard.tokens.flatten(2) for shard in shards]
        self._ends = torch.tensor([len(shard.labels) for shard in shards]).cumsum(0)

    def __len__(self) -> int:
        return len(self.labels)

    def tokens(self, index: Tensor, view: Tensor | int = 0) -> Tensor:
        """Tokens int64 [B, N], in raster order, of the images `index` [B]; view 1 is mirrored left to right.

        IndexError for images and views that there are not.
        """
        view = torch.as_tensor(view).expand(len(index))
        for name, values, count in (("index", index, len(self)), ("view", view, self.views)):
            if len(values) and not 0 <= int(values.min()) <= int(values.max()) < count:
                raise IndexError(f"{name} must be in [0, {count}), got {int(values.min())} to {int(values.max())}")
        result = torch.empty(len(index), self._num_tokens, dtype=torch.int64)
        shards = torch.bucketize(index, self._ends, right=True)
        for number in shards.unique().tolist():
            rows = shards == number
            start = int(self._ends[number - 1]) if number else 0
            result[rows] = self._shards[number][index[rows] - start, view[rows]].long()
        return result


@dataclass(frozen=True)
class TokenCache:
    """The tokens of a data set, train images with their mirror images, and what they were made with."""

    train: TokenSplit
    test: TokenSplit
    grid: tuple[int, int]
    vocab_size: int
    class_names: tuple[str, ...]
    tokenizer_hash: str
    image_size: int
    checksums: tuple[str, ...]  # SHA-256 of each training shard

    @property
    def num_tokens(self) -> int:
        """N = h * w."""
        return self.grid[0] * self.grid[1]

    @property
    def num_classes(self) -> int:
        """C."""
        return len(self.class_names)

    def content_hash(self) -> str:
        """Returns a SHA-256 of the training tokens and labels, made from the shards' checksums in the index."""
        return hashlib.sha256("\n".join(self.checksums).encode()).hexdigest()


def check_tokenizer(model: str | Path, tokenizer: str | Path) -> None:
    """Raises ValueError if config.json of the folder `model` names another tokenizer than the file `tokenizer`."""
    check_trained_with(read_config(Path(model)), tokenizer, str(Path(model) / CONFIG_FILE))


def check_trained_with(config: Mapping[str, Any], tokenizer: str | Path, where: str) -> None:
    """`check_tokenizer` of a parsed config.json, or what stands for one in the file `where`."""
    trained_with = config.get("tokenizer_sha256")
    if trained_with is not None and trained_with != file_hash(tokenizer):
        raise ValueError(
            f"tokenizer {str(tokenizer)!r} is not the one whose tokens {where!r} was trained on "
            f"(SHA-256 {trained_with[:12]}...)"
        )


def load_token_cache(path: str | Path, tokenizer: str | Path | None = None) -> TokenCache:
    """Opens the token cache in the folder `path`; reads labels at once and tokens when they are used.

    Raises FileNotFoundError if there is none, ValueError for files whose sizes or headers are wrong or that are missing
    (`lpd check-tokens` reads their content), and for tokens of another tokenizer than the file `tokenizer`.
    """
    folder = Path(path)
    if folder.is_file():
        raise ValueError(f"path: {str(path)!r} is a file; token caches are folders made by `lpd cache-tokens`")
    if not (folder / INDEX_FILE).is_file():
        raise FileNotFoundError(
            f"path: no token cache at {str(path)!r}; make one, or finish one, with `lpd cache-tokens`"
        )
    settings, class_names, entries = read_index(folder)
    with content_of(folder / INDEX_FILE, "is no index of a token cache"):
        grid = as_grid(settings["grid"])
        vocab_size, image_size = (as_positive_int(settings[name], name) for name in ("vocab_size", "image_size"))
        tokenizer_hash = str(settings["tokenizer_sha256"])
        views = {split: as_positive_int(settings["views"][split], "views") for split in SPLITS}
    if tokenizer is not None and file_hash(tokenizer) != tokenizer_hash:
        raise ValueError(f"tokenizer {str(tokenizer)!r} is not the one that made the tokens in {str(path)!r}")
    dtype = narrow_type(vocab_size)
    splits = {
        split: TokenSplit(
            (_open_shard(folder, entry, (views[split], *grid), dtype, len(class_names)) for entry in entries[split]),
            views[split],
            grid[0] * grid[1],
        )
        for split in SPLITS
        if _has_rows(folder, split, entries[split])
    }
    return TokenCache(
        train=splits["train"],
        test=splits["test"],
        grid=grid,
        vocab_size=vocab_size,
        class_names=class_names,
        tokenizer_hash=tokenizer_hash,
        image_size=image_size,
        checksums=tuple(entry.sha256 for entry in entries["train"]),
    )


def _has_rows(folder: Path, split: str, entries: list[ShardEntry]) -> bool:
    if sum(entry.rows for entry in entries) == 0:
        raise ValueError(f"{str(folder / INDEX_FILE)!r} lists no {split} images")
    return True


def _open_shard(
    folder: Path, entry: ShardEntry, shape: tuple[int, int, int], dtype: torch.dtype, num_classes: int
) -> Shard:
    path = folder / entry.file
    if path.parent != folder or not path.is_file():
        raise ValueError(f"{str(path)!r} is missing, which {INDEX_FILE} lists")
    if path.stat().st_size != entry.bytes:
        raise ValueError(f"{str(path)!r} has {path.stat().st_size} bytes, but {entry.bytes} in {INDEX_FILE}")
    shard = read_shard(path)
    counts = [tuple(shard.labels.shape), tuple(shard.index.shape)]
    if shard.tokens.shape != (entry.rows, *shape) or shard.tokens.dtype != dtype or counts != [(entry.rows,)] * 2:
        raise ValueError(
            f"{str(path)!r} holds tokens {tuple(shard.tokens.shape)} {shard.tokens.dtype}, "
            f"but {(entry.rows, *shape)} {dtype} in {INDEX_FILE}"
        )
    # Labels of -1 would train silently as images without a class.
    if entry.rows and not 0 <= int(shard.labels.min()) <= int(shard.labels.max()) < num_classes:
        raise ValueError(f"{str(path)!r} has labels outside [0, {num_classes})")
    return shard
