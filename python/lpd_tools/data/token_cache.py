"""Encodes a data set once, so that training reads tokens and never pixels."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lpd_ext.checkpoint import CONFIG_FILE, read_config
from lpd_ext.state_files import complete_file
from lpd_ext.tokenizer import VQTokenizer
from lpd_tools.data.fashion_mnist import FASHION_MNIST_DIR, load_fashion_mnist, to_images
from lpd_tools.progress import track
from lpd_tools.settings import setting


@dataclass(frozen=True)
class TokenCaching:
    """Which tokenizer to run and where the tokens go (a safetensors file)."""

    tokenizer: str = setting(..., "tokenizer weights")
    out: str = setting(..., "safetensors file to write")
    data_dir: str = setting(str(FASHION_MNIST_DIR), "folder of the Fashion-MNIST IDX files")
    batch_size: int = setting(250, "images per forward pass")


@dataclass(frozen=True)
class TokenSplit:
    """Encoded images of a train or test set: tokens [images, views, N] and labels int64 [images]."""

    encoded: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def views(self) -> int:
        """2 where each image has its mirror image beside it, else 1."""
        return self.encoded.shape[1]

    def tokens(self, index: Tensor, view: Tensor | int = 0) -> Tensor:
        """Tokens int64 [B, N], in raster order, of the images `index` [B]; view 1 is mirrored left to right."""
        return self.encoded[index, view].long()


@dataclass(frozen=True)
class TokenCache:
    """The tokens of a data set, train images with their mirror images, and what they were made with."""

    train: TokenSplit
    test: TokenSplit
    grid: tuple[int, int]
    vocab_size: int
    num_classes: int
    tokenizer_hash: str

    @property
    def num_tokens(self) -> int:
        """N = h * w."""
        return self.grid[0] * self.grid[1]

    def content_hash(self) -> str:
        """SHA-256 of the training tokens and labels, in hexadecimal."""
        parts = (self.train.encoded, self.train.labels)
        return hashlib.sha256(b"".join(part.contiguous().numpy().tobytes() for part in parts)).hexdigest()


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def check_tokenizer(model: str | Path, tokenizer: str | Path) -> None:
    """ValueError if config.json of the folder `model` names another tokenizer than the file `tokenizer`."""
    trained_with = read_config(Path(model)).get("tokenizer_sha256")
    if trained_with is not None and trained_with != file_hash(tokenizer):
        raise ValueError(
            f"tokenizer {str(tokenizer)!r} is not the one whose tokens {str(Path(model) / CONFIG_FILE)!r} "
            f"was trained on (SHA-256 {trained_with[:12]}...)"
        )


@torch.no_grad()
def cache_tokens(config: TokenCaching) -> Path:
    """Writes tokens and labels of the train set, its mirror image and the test set; returns the path."""
    tokenizer = VQTokenizer.from_file(config.tokenizer)
    arrays: dict[str, Tensor] = {}
    for split in ("train", "test"):
        data = load_fashion_mnist(split, config.data_dir)
        tokens = []
        for pixels in track(data.pixels.split(config.batch_size), f"encoding {split}"):
            images = to_images(pixels)
            views = (images, images.flip(3)) if split == "train" else (images,)
            tokens.append(torch.stack([tokenizer.encode(view) for view in views], dim=1))
        narrow = torch.int16 if tokenizer.config.codebook_size <= 2**15 else torch.int32
        arrays[f"{split}.tokens"] = torch.cat(tokens).to(narrow)
        arrays[f"{split}.labels"] = data.labels.to(torch.int16)
    metadata = {
        "tokenizer_sha256": file_hash(config.tokenizer),
        "vocab_size": str(tokenizer.config.codebook_size),
        "layout": "tokens [images, views, h, w]; view 1 of train is mirrored left to right",
    }
    Path(config.out).parent.mkdir(parents=True, exist_ok=True)
    with complete_file(config.out) as temporary:
        save_file(arrays, temporary, metadata=metadata)
    return Path(config.out)


def load_token_cache(path: str | Path) -> TokenCache:
    """The tokens written by `cache_tokens`; FileNotFoundError, or ValueError for a damaged or foreign file."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"path: no token cache at {str(path)!r}; make one with `lpd cache-tokens`")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            encoded = [file.get_tensor(f"{split}.tokens") for split in ("train", "test")]
            labels = [file.get_tensor(f"{split}.labels").long() for split in ("train", "test")]
        vocab_size, tokenizer_hash = int(metadata["vocab_size"]), metadata["tokenizer_sha256"]
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"path {str(path)!r} is no whole token cache: {error}") from error
    train, test = (TokenSplit(e.flatten(2), kind) for e, kind in zip(encoded, labels, strict=True))
    return TokenCache(
        train=train,
        test=test,
        grid=(encoded[0].shape[2], encoded[0].shape[3]),
        vocab_size=vocab_size,
        num_classes=int(train.labels.max()) + 1,
        tokenizer_hash=tokenizer_hash,
    )
