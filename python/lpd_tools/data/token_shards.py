"""The files of a token cache: shards of tokens, whole or absent, and an index with their sizes and checksums."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lpd_ext.content import content_of, read_json
from lpd_ext.state_files import complete_file, write_text
from lpd_tools.data.image_reader import Skipped

FORMAT = "lpd-token-cache 1"
INDEX_FILE = "index.json"
SKIPPED_FILE = "skipped.csv"
SPLITS = ("train", "test")
_NO_SHARD = "is no whole shard of a token cache"


@dataclass(frozen=True)
class Shard:
    """The encoded pictures of a stretch of a split, without those that could not be read."""

    tokens: Tensor  # [rows, views, h, w], of the narrowest type; view 1 is mirrored left to right
    labels: Tensor  # int32 [rows]
    index: Tensor  # int32 [rows], which pictures of the source they are


@dataclass(frozen=True)
class ShardEntry:
    """A shard's entry in the index."""

    file: str
    rows: int
    bytes: int
    sha256: str

    def __post_init__(self) -> None:
        if not isinstance(self.file, str) or not isinstance(self.sha256, str):
            raise ValueError(f"a shard must have the names file and sha256, got {self.file!r} and {self.sha256!r}")
        for name in ("rows", "bytes"):
            if not isinstance(value := getattr(self, name), int) or isinstance(value, bool) or value < 0:
                raise ValueError(f"{name} of a shard must be a whole number, got {value!r}")


def shard_name(split: str, number: int) -> str:
    """The file name of a shard."""
    return f"{split}-{number:05d}.safetensors"


def narrow_type(vocab_size: int) -> torch.dtype:
    """The narrowest of uint16 and int32 that holds the tokens 0 ... vocab_size - 1."""
    return torch.uint16 if vocab_size <= 2**16 else torch.int32


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    state = hashlib.sha256()
    with Path(path).open("rb") as file:
        while part := file.read(1 << 20):
            state.update(part)
    return state.hexdigest()


def write_shard(path: Path, shard: Shard, settings: Mapping[str, Any], skipped: list[Skipped]) -> None:
    """Writes a shard with the settings it was made with, so that `path` is whole or absent."""
    # One entry: safetensors writes several in no fixed order, and the same shard must be the same bytes.
    notes = json.dumps({"settings": settings, "skipped": skipped}, sort_keys=True)
    with complete_file(path) as temporary:
        save_file(asdict(shard), temporary, metadata={"shard": notes})


def read_notes(path: Path) -> tuple[dict[str, Any], list[Skipped], int]:
    """Settings, skipped pictures and number of rows of a shard; ValueError if it is damaged or none."""
    with content_of(path, _NO_SHARD):
        with safe_open(path, "pt") as file:
            notes = json.loads((file.metadata() or {})["shard"])
            rows = file.get_slice("labels").get_shape()[0]
        return dict(notes["settings"]), [Skipped(*entry) for entry in notes["skipped"]], rows


def read_shard(path: Path) -> Shard:
    """A shard, memory-mapped: its tokens are read from disk when they are used."""
    with content_of(path, _NO_SHARD), safe_open(path, "pt") as file:
        return Shard(**{name: file.get_tensor(name) for name in ("tokens", "labels", "index")})


def write_index(
    folder: Path, settings: Mapping[str, Any], class_names: tuple[str, ...], shards: Mapping[str, list[ShardEntry]]
) -> None:
    """Writes the index, which makes the folder a token cache."""
    content = {
        "format": FORMAT,
        "settings": settings,
        "class_names": class_names,
        "shards": {split: [asdict(entry) for entry in entries] for split, entries in shards.items()},
    }
    write_text(folder / INDEX_FILE, json.dumps(content, indent=1, sort_keys=True) + "\n")


def read_index(folder: Path) -> tuple[dict[str, Any], tuple[str, ...], dict[str, list[ShardEntry]]]:
    """Settings, class names and shards of a token cache; ValueError for a damaged or foreign index."""
    path = folder / INDEX_FILE
    with content_of(path, "is no index of a token cache"):
        content = read_json(path, "is no index of a token cache")
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']!r}, not {FORMAT!r}")
        shards = {split: [ShardEntry(**entry) for entry in content["shards"][split]] for split in SPLITS}
        names = content["class_names"]
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"class_names must be a list of strings, got {names!r}")
        return dict(content["settings"]), tuple(names), shards
