"""The VQ tokenizer against the published implementation, its state-dict layout and its errors."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from lpd_ext.tokenizer import TokenizerConfig, VQTokenizer, infer_config

GOLDEN = Path(__file__).parents[1] / "data" / "vq_golden.safetensors"
SMALL = TokenizerConfig(32, (1, 2), 32, codebook_size=16, codebook_dim=4, encoder_res_blocks=1, decoder_res_blocks=2)


@cache
def golden() -> tuple[dict[str, Tensor], dict[str, object]]:
    with safe_open(GOLDEN, "pt") as file:
        return load_file(GOLDEN), json.loads(file.metadata()["spec"])


def golden_state() -> dict[str, Tensor]:
    return {name.removeprefix("model."): t.float() for name, t in golden()[0].items() if name.startswith("model.")}


@pytest.fixture(scope="module")
def published() -> VQTokenizer:
    return VQTokenizer.from_state_dict(golden_state())


@pytest.fixture(scope="module")
def small() -> VQTokenizer:
    torch.manual_seed(0)
    return VQTokenizer(SMALL).eval().requires_grad_(False)


def test_golden_tokens(published: VQTokenizer) -> None:
    tensors, _ = golden()
    tokens = published.encode(tensors["image"])
    assert tokens.dtype == torch.int64
    assert torch.equal(tokens.flatten(1), tensors["indices"].long())


@pytest.mark.parametrize(("tokens", "images"), [("indices", "reconstruction"), ("codes", "decoded")])
def test_golden_images(published: VQTokenizer, tokens: str, images: str) -> None:
    tensors, _ = golden()
    expected = tensors[images]
    error = (published.decode(tensors[tokens].long()) - expected).abs().max()
    assert error <= 1e-4 * expected.abs().max()


def test_golden_sizes_are_inferred() -> None:
    spec = golden()[1]
    config = infer_config(golden_state())
    assert list(config.ch_mult) == spec["ch_mult"]
    assert (config.ch, config.z_channels) == (spec["ch"], spec["z_channels"])
    assert (config.codebook_size, config.codebook_dim) == (spec["codebook_size"], spec["codebook_embed_dim"])
    assert (config.encoder_res_blocks, config.decoder_res_blocks) == (2, 3)
    assert config.stride == 16


def test_full_published_size() -> None:
    with torch.device("meta"):
        state = VQTokenizer(TokenizerConfig()).state_dict()
    assert len(state) == 343  # the published file counts quantize.codebook_used too
    assert sum(value.numel() for value in state.values()) == pytest.approx(71.9e6, rel=1e-3)


def test_other_sizes_are_inferred(small: VQTokenizer, tmp_path: Path) -> None:
    small.save(tmp_path / "tokenizer.safetensors", torch.float32)
    loaded = VQTokenizer.from_file(tmp_path / "tokenizer.safetensors")
    assert loaded.config == SMALL
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    assert torch.equal(loaded.encode(images), small.encode(images))


def test_unused_count_of_the_published_file_is_ignored() -> None:
    state = golden_state() | {"quantize.codebook_used": torch.zeros(65536)}
    assert VQTokenizer.from_state_dict(state).config.codebook_size == 256


def test_published_pickle(published: VQTokenizer, tmp_path: Path) -> None:
    torch.save({"model": published.state_dict()}, tmp_path / "vq.pt")
    loaded = VQTokenizer.from_file(tmp_path / "vq.pt")
    assert torch.equal(loaded.codes(), published.codes())


def test_grid_need_not_be_square(published: VQTokenizer) -> None:
    tokens = published.encode(torch.rand(1, 3, 32, 64) * 2 - 1)
    assert tokens.shape == (1, 2, 4)
    assert published.decode(tokens).shape == (1, 3, 32, 64)


def test_flat_tokens_are_a_square_grid(small: VQTokenizer) -> None:
    tokens = torch.randint(16, (2, 3, 3))
    assert torch.equal(small.decode(tokens.flatten(1)), small.decode(tokens))


def test_nearest_code_in_float64(small: VQTokenizer) -> None:
    features = torch.nn.functional.normalize(torch.randn(2, 4, 3, 5), dim=1)
    rows = features.permute(0, 2, 3, 1).reshape(-1, 1, 4).double()
    distance = (rows - small.codes().double()).square().sum(-1)
    assert torch.equal(small.nearest(features).flatten(), distance.argmin(-1))


def test_codebook_length_does_not_matter(small: VQTokenizer) -> None:
    scaled = VQTokenizer.from_state_dict(small.state_dict())
    scaled.quantize.embedding.weight.mul_(torch.linspace(0.5, 20, 16)[:, None])
    images, tokens = torch.rand(2, 3, 8, 8) * 2 - 1, torch.arange(16).view(1, 4, 4)
    assert torch.equal(scaled.encode(images), small.encode(images))
    assert torch.allclose(scaled.decode(tokens), small.decode(tokens), atol=1e-5)


def test_to_pixels_rounds_and_clips() -> None:
    images = torch.tensor([-2.0, -1.0, 0.0, 3 / 255 - 1 + 0.4 / 127.5, 1.0, 7.0]).view(1, 1, 1, 6).expand(1, 3, 1, 6)
    pixels = VQTokenizer.to_pixels(images)
    assert pixels.dtype == torch.uint8
    assert pixels.shape == (1, 1, 6, 3)
    assert pixels[0, 0, :, 0].tolist() == [0, 0, 128, 2, 255, 255]


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (torch.zeros(1, 3, 9, 8), ValueError, "multiples of 2"),
        (torch.zeros(1, 1, 8, 8), ValueError, r"\[B, 3, Hp, Wp\]"),
        (torch.zeros(3, 8, 8), ValueError, r"\[B, 3, Hp, Wp\]"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), TypeError, "uint8"),
    ],
)
def test_bad_images(small: VQTokenizer, images: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        small.encode(images)


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        (torch.full((1, 2, 2), 16), ValueError, r"\[0, 16\), got 16"),
        (torch.full((1, 2, 2), -1), ValueError, "got -1"),
        (torch.zeros(1, 5, dtype=torch.int64), ValueError, "square N, got 5"),
        (torch.zeros(4, dtype=torch.int64), ValueError, "got shape"),
        (torch.zeros(1, 2, 2), TypeError, "float32"),
    ],
)
def test_bad_tokens(small: VQTokenizer, tokens: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        small.decode(tokens)


def test_empty_batch(small: VQTokenizer) -> None:
    assert small.encode(torch.zeros(0, 3, 8, 8)).shape == (0, 4, 4)
    assert small.decode(torch.zeros(0, 4, 4, dtype=torch.int64)).shape == (0, 3, 8, 8)


def test_foreign_state_is_refused(small: VQTokenizer) -> None:
    with pytest.raises(ValueError, match=r"encoder\.conv_in\.weight"):
        VQTokenizer.from_state_dict({"weight": torch.zeros(1)})
    for name, shape in [
        ("quantize.embedding.weight", (16,)),
        ("encoder.conv_in.weight", ()),
        ("encoder.conv_in.weight", (0, 3, 3, 3)),
        ("encoder.conv_blocks.0.res.0.conv2.weight", (32,)),
        ("encoder.conv_out.weight", (32, 1)),
    ]:
        with pytest.raises(ValueError, match=f"{name}' must have"):
            infer_config(small.state_dict() | {name: torch.zeros(shape)})
    state = dict(small.state_dict())
    del state["decoder.mid.1.q.bias"]
    with pytest.raises(ValueError, match=r"decoder\.mid\.1\.q\.bias"):
        VQTokenizer.from_state_dict(state)


@pytest.mark.parametrize(
    "change", [{"ch": 48}, {"ch_mult": ()}, {"codebook_dim": 0}, {"codebook_dim": True}, {"decoder_res_blocks": -1}]
)
def test_bad_sizes(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        TokenizerConfig(**change)


@pytest.mark.parametrize(("codes", "width"), [(512, 16), (300, 8), (7, 3)])
def test_vectors_of_tokens_are_rows_of_the_codes(codes: int, width: int) -> None:
    tokenizer = VQTokenizer(TokenizerConfig(32, (1, 2), 32, codes, width, 1, 1))
    tokens = torch.randint(codes, (2, 5, 3), generator=torch.Generator().manual_seed(0))
    assert torch.equal(tokenizer.vectors(tokens), tokenizer.codes()[tokens])
