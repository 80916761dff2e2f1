"""PixelDecoder against the plain decoder: golden, bundled and odd tokenizers, shared weights, quality of bfloat16."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_tokenizer import golden, golden_state
from torch import Tensor

from lpd_ext import _C, LPDPipeline
from lpd_ext.bundled import bundled_model
from lpd_ext.pixel_decoder import PixelDecoder
from lpd_ext.tokenizer import TokenizerConfig, VQTokenizer


def random_tokenizer(config: TokenizerConfig, seed: int = 0) -> VQTokenizer:
    torch.manual_seed(seed)
    return VQTokenizer(config).eval().requires_grad_(False)


def random_features(tokenizer: VQTokenizer, batch: int, height: int, width: int) -> Tensor:
    tokens = torch.randint(tokenizer.config.codebook_size, (batch, height, width))
    return F.embedding(tokens, tokenizer.codes()).permute(0, 3, 1, 2)


def golden_tokenizer() -> VQTokenizer:
    return VQTokenizer.from_state_dict(golden_state())


def bundled_tokenizer() -> VQTokenizer:
    return VQTokenizer.from_file(bundled_model("fashion_mnist") / "tokenizer.safetensors")


def decibels(images: Tensor, expected: Tensor) -> float:
    """Peak signal-to-noise ratio of images in [-1, 1]."""
    return float(10 * torch.log10(4 / (images.clamp(-1, 1) - expected.clamp(-1, 1)).square().mean()))


@pytest.mark.parametrize(("tokens", "images"), [("indices", "reconstruction"), ("codes", "decoded")])
def test_golden_images(tokens: str, images: str, cpu_backend: torch.device) -> None:
    tensors, _ = golden()
    expected = tensors[images]
    tokenizer = golden_tokenizer()
    grid = tensors[tokens].long().view(len(expected), *(side // 16 for side in expected.shape[2:]))
    decoded = PixelDecoder(tokenizer).decode_features(F.embedding(grid, tokenizer.codes()).permute(0, 3, 1, 2))
    assert (decoded - expected).abs().max() <= 1e-4 * expected.abs().max()


CONFIGS = {
    "three levels": TokenizerConfig(32, (2, 1, 2), 32, 64, 4, 1, 2),
    "one level": TokenizerConfig(64, (1,), 16, 64, 8, 1, 1),
    "odd widths": TokenizerConfig(32, (1, 3), 20, 64, 3, 2, 4),  # z: not what conv3x3 takes
    "wide": TokenizerConfig(64, (2, 1), 48, 64, 8, 1, 3),
}


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 5), (5, 4, 2)])
@pytest.mark.parametrize("name", CONFIGS)
def test_as_accurate_as_the_plain_decoder(name: str, shape: tuple[int, int, int], cpu_backend: torch.device) -> None:
    tokenizer = random_tokenizer(CONFIGS[name])
    features = random_features(tokenizer, *shape)
    exact = copy.deepcopy(tokenizer).double().decode_features(features.double())
    plain = tokenizer.decode_features(features)
    fast = PixelDecoder(tokenizer).decode_features(features)
    assert fast.shape == plain.shape
    assert fast.is_contiguous()
    # Of one token, a group of GroupNorm is one pixel of a few channels, which may hardly differ.
    floor = (1e-4 if shape == (1, 1, 1) else 1e-5) * exact.abs().max()
    assert (fast - exact).abs().max() <= 2 * (plain - exact).abs().max() + floor


def test_bundled_images_keep_their_bytes() -> None:
    tokenizer = bundled_tokenizer()
    torch.manual_seed(1)
    features = random_features(tokenizer, 20, 7, 7)
    plain, fast = (f(features) for f in (tokenizer.decode_features, PixelDecoder(tokenizer).decode_features))
    before, after = (VQTokenizer.to_pixels(images).int() for images in (plain, fast))
    assert (before - after).abs().max() <= 1
    assert (before != after).float().mean() <= 1e-3


@pytest.mark.parametrize("make", [golden_tokenizer, bundled_tokenizer])
def test_bfloat16_keeps_40_decibels(make: type[VQTokenizer], cpu_backend: torch.device) -> None:
    tokenizer = make()
    torch.manual_seed(2)
    features = random_features(tokenizer, 2, 4, 4)
    expected = PixelDecoder(tokenizer).decode_features(features)
    decoded = PixelDecoder(tokenizer, torch.bfloat16).decode_features(features)
    assert 40 <= decibels(decoded, expected) <= 80


def test_the_gate_rejects_bfloat16_at_all_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = golden_tokenizer()
    features = random_features(tokenizer, 2, 4, 4)
    monkeypatch.setattr("lpd_ext.pixel_decoder._BFLOAT16_LEVELS", 5)
    decoded = PixelDecoder(tokenizer, torch.bfloat16).decode_features(features)
    assert decibels(decoded, PixelDecoder(tokenizer).decode_features(features)) < 40


def test_weights_are_shared_and_their_changes_seen(tmp_path: Path) -> None:
    tokenizer, other = random_tokenizer(CONFIGS["three levels"]), random_tokenizer(CONFIGS["three levels"], 1)
    features = random_features(tokenizer, 1, 4, 4)
    plain = tokenizer.decode_features(features)
    state = {name: value.clone() for name, value in tokenizer.state_dict().items()}
    decoder = PixelDecoder(tokenizer)
    first = decoder.decode_features(features)
    weight = tokenizer.decoder.conv_out.weight
    decoder.decode_features(features)
    assert tokenizer.decoder.conv_out.weight.data_ptr() == weight.data_ptr()
    assert weight.permute(2, 3, 1, 0).is_contiguous()
    # The tokenizer computes, holds and saves what it did.
    assert (tokenizer.decode_features(features) - plain).abs().max() <= 1e-5 * plain.abs().max()
    assert all(value.equal(state[name]) for name, value in tokenizer.state_dict().items())
    tokenizer.save(tmp_path / "tokenizer.safetensors", torch.float32)
    reloaded = VQTokenizer.from_file(tmp_path / "tokenizer.safetensors")
    assert PixelDecoder(reloaded).decode_features(features).equal(first)

    for assign in (False, True):
        tokenizer.load_state_dict(other.state_dict() if assign else state, assign=assign)
        expected = PixelDecoder(copy.deepcopy(other if assign else reloaded)).decode_features(features)
        assert decoder.decode_features(features).equal(expected)
    with torch.no_grad():
        tokenizer.decoder.conv_out.weight.mul_(2)
        tokenizer.decoder.conv_out.bias.zero_()
    expected = tokenizer.decode_features(features)
    assert (decoder.decode_features(features) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_batches_larger_than_a_slice(cpu_backend: torch.device) -> None:
    tokenizer = random_tokenizer(CONFIGS["three levels"])
    features = random_features(tokenizer, 9, 2, 3)
    together = PixelDecoder(tokenizer).decode_features(features)
    for i in (0, 4, 8):
        alone = PixelDecoder(tokenizer).decode_features(features[i : i + 1])
        torch.testing.assert_close(alone, together[i : i + 1], rtol=0, atol=1e-5)
    assert PixelDecoder(tokenizer).decode_features(features[:0]).shape == (0, 3, 8, 12)


def test_where_it_can_be_used() -> None:
    tokenizer = random_tokenizer(CONFIGS["one level"])
    before = _C.cpu_isa()
    try:
        for isa in _C.available_cpu_isas():
            _C.set_cpu_isa(isa)
            assert PixelDecoder.supports(tokenizer) == (isa != "scalar")
    finally:
        _C.set_cpu_isa(before)
    assert not PixelDecoder.supports(copy.deepcopy(tokenizer).double())
    assert not PixelDecoder.supports(copy.deepcopy(tokenizer).to("meta"))


def test_dtype_is_checked() -> None:
    tokenizer = random_tokenizer(CONFIGS["one level"])
    with pytest.raises(ValueError, match=r"dtype must be torch\.float32 or torch\.bfloat16, got torch\.float16"):
        PixelDecoder(tokenizer, torch.float16)


def test_pipeline_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = LPDPipeline.from_pretrained("fashion_mnist")
    options = {"seeds": 3, "num_inference_steps": 4}
    fast = pipe([1, 2], output_type="np", **options).images.astype(int)
    pipe.pixel_dtype = torch.bfloat16
    rounded = pipe([1, 2], output_type="np", **options).images.astype(int)
    monkeypatch.setattr(PixelDecoder, "supports", lambda tokenizer: False)
    plain = pipe([1, 2], output_type="np", **options).images.astype(int)
    assert abs(fast - plain).max() <= 1
    if _C.cpu_isa() != "scalar":
        assert 0 < abs(rounded - plain).max() <= 16
    with pytest.raises(ValueError, match=r"pixel_dtype must be torch\.float32 or torch\.bfloat16, got"):
        LPDPipeline(pipe.model, pipe.tokenizer, pixel_dtype=torch.float16)
