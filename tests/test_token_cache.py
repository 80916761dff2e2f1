"""The token cache: what it holds, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("rich")

from lpd_tools.data.fashion_mnist import load_fashion_mnist, to_images
from lpd_tools.data.token_cache import TokenCaching, cache_tokens, file_hash, load_token_cache

from lpd_ext.tokenizer import TokenizerConfig, VQTokenizer

DATA = Path(__file__).parent / "data" / "fashion_mnist"
SIZES = TokenizerConfig(32, (1, 1), 8, 16, 8, 1, 2)


@pytest.fixture(scope="module")
def cache_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokens")
    torch.manual_seed(0)
    model = VQTokenizer(SIZES)
    torch.nn.init.normal_(model.quantize.embedding.weight)
    model.save(folder / "tokenizer.safetensors")
    caching = TokenCaching(str(folder / "tokenizer.safetensors"), str(folder / "tokens.safetensors"), str(DATA))
    return cache_tokens(caching)


def test_cached_tokens_are_those_of_the_images(cache_path: Path) -> None:
    cache = load_token_cache(cache_path)
    tokenizer_path = cache_path.with_name("tokenizer.safetensors")
    tokenizer = VQTokenizer.from_file(tokenizer_path)
    images = to_images(load_fashion_mnist("train", DATA).pixels[50:58])
    with torch.no_grad():
        assert torch.equal(cache.train.tokens(torch.arange(50, 58)), tokenizer.encode(images).flatten(1))
        assert torch.equal(cache.train.tokens(torch.arange(50, 58), 1), tokenizer.encode(images.flip(3)).flatten(1))
    assert cache.test.encoded.shape == (300, 1, 256)
    assert (cache.grid, cache.vocab_size) == ((16, 16), 16)
    assert cache.tokenizer_hash == file_hash(tokenizer_path)
    assert torch.equal(cache.test.labels, load_fashion_mnist("test", DATA).labels)
    with pytest.raises(FileNotFoundError, match="cache-tokens"):
        load_token_cache(cache_path.with_name("none"))


def test_damaged_and_foreign_caches_are_refused(cache_path: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "cut"
    damaged.write_bytes(cache_path.read_bytes()[:-1])
    for path in (damaged, cache_path.with_name("tokenizer.safetensors")):
        with pytest.raises(ValueError, match=f"{path.name}' is no whole token cache"):
            load_token_cache(path)


def test_large_vocabularies_fit_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = VQTokenizer(dataclasses.replace(SIZES, codebook_size=2**15 + 1))
    tokenizer.save(tmp_path / "tokenizer.safetensors")
    monkeypatch.setattr(VQTokenizer, "encode", lambda self, images: torch.full((len(images), 2, 2), 2**15))
    path = tmp_path / "tokens"
    cache = load_token_cache(cache_tokens(TokenCaching(str(tmp_path / "tokenizer.safetensors"), str(path), str(DATA))))
    assert cache.train.encoded.unique().tolist() == [2**15]
    assert cache.test.encoded.unique().tolist() == [2**15]
    assert {p.name for p in tmp_path.iterdir()} == {"tokenizer.safetensors", "tokens"}
