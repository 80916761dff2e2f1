"""The preview decoder: what it computes, its files, and which previews are its own."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from test_pipeline import small_pipeline
from torch import Tensor

from lpd_ext import editing
from lpd_ext.drawing import Drawing
from lpd_ext.engine import Engine
from lpd_ext.hub import PREVIEW_FILE
from lpd_ext.pipeline import LPDPipeline
from lpd_ext.preview_decoder import PreviewDecoder
from lpd_ext.tokenizer import VQTokenizer


@pytest.fixture
def pipe() -> LPDPipeline:
    pipe = small_pipeline()
    torch.manual_seed(1)
    pipe.preview_decoder = PreviewDecoder(4, 2, width=8).eval().requires_grad_(False)
    return pipe


def by_hand(decoder: PreviewDecoder, pipe: LPDPipeline, tokens: Tensor) -> np.ndarray:
    """Previews uint8 [B, H, W, 3] of grids with undrawn cells, by convolutions and explicit places of pixels."""
    drawn = (tokens >= 0).float()
    x = torch.cat([pipe.tokenizer.codes()[tokens.clamp(min=0)] * drawn[..., None], drawn[..., None]], 3)
    for weight, bias in ((decoder.weight1, decoder.bias1), (decoder.weight2, decoder.bias2)):
        kernel = weight.permute(3, 2, 0, 1)
        x = F.conv2d(x.permute(0, 3, 1, 2), kernel, bias, padding=1).relu().permute(0, 2, 3, 1)
    images = torch.zeros(len(tokens), 3, 2 * tokens.shape[1], 2 * tokens.shape[2])
    for channel in range(3):
        for dy in range(2):
            for dx in range(2):
                cells = x @ decoder.head[:, dy, dx, channel] + decoder.head_bias[dy, dx, channel]
                images[:, channel, dy::2, dx::2] = cells * drawn
    return VQTokenizer.to_pixels(images).numpy()


def test_stream_shows_the_preview_decoders_pixels_and_ends_with_the_exact_image(pipe: LPDPipeline) -> None:
    options: dict[str, Any] = {"seeds": [1, 2], "num_inference_steps": [3, 5]}
    shown = list(pipe.stream([0, 1], **options))
    assert pipe.preview_decoder is not None
    exact = pipe([0, 1], **options).images
    near = []  # images shown as previews
    for preview in shown:
        wanted = by_hand(pipe.preview_decoder, pipe, preview.tokens)
        for row, image in enumerate(preview.images):
            if (preview.tokens[row] >= 0).all():
                assert image.tobytes() == exact[row].tobytes()
                continue
            near.append(row)
            # one apart where a half is rounded
            assert np.abs(np.asarray(image).astype(int) - wanted[row].astype(int)).max() <= 1
    assert near == [0, 1, 0, 1, 1, 1]  # of 3 and 5 steps
    plain = LPDPipeline(pipe.model, pipe.tokenizer, pipe.defaults, pipe.class_names)
    for mine, others in zip(
        pipe.stream([0, 1], exact_previews=True, **options), plain.stream([0, 1], **options), strict=True
    ):
        assert [image.tobytes() for image in mine.images] == [image.tobytes() for image in others.images]


def test_images_of_parts_are_exact_as_soon_as_they_are_whole_and_tensors_follow(pipe: LPDPipeline) -> None:
    pipe.max_images = 1
    options: dict[str, Any] = {"seeds": [1, 2], "num_inference_steps": 3}
    exact = pipe([0, 1], **options).images
    _, _, third, fourth, _, last = pipe.stream([0, 1], **options)
    assert third.images[0].tobytes() == fourth.images[0].tobytes() == exact[0].tobytes()
    assert [image.tobytes() for image in last.images] == [image.tobytes() for image in exact]
    assert pipe.preview_decoder is not None
    drawing = pipe.drawing(pipe.prepare([0, 1], **options))
    wanted = by_hand(pipe.preview_decoder, pipe, fourth.tokens)
    tensor = drawing.images(fourth.tokens, "pt", approximate=True)
    assert np.abs(VQTokenizer.to_pixels(tensor).numpy().astype(int) - wanted.astype(int)).max() <= 1
    assert drawing.images(fourth.tokens[:0], "np", approximate=True).shape == (0, 8, 12, 3)


def test_previews_of_an_edit_keep_the_known_pixels(pipe: LPDPipeline) -> None:
    (image,) = pipe(1, seeds=3).images
    mask = np.zeros((8, 12), bool)
    mask[2:6, 4:8] = True
    shown = list(editing.plan_inpaint(pipe, image, mask, 2, seeds=1).stream())
    assert len(shown) > 2
    for preview in shown:
        assert (np.asarray(preview.images[0])[~mask] == np.asarray(image)[~mask]).all()
    assert shown[-2].images[0].tobytes() != shown[-1].images[0].tobytes()


def test_an_engine_shows_its_previews_and_delivers_exact_images(
    pipe: LPDPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    decoded, previewed = Drawing._decoded, Drawing._previewed

    def seen_exact(self: Drawing, tokens: Tensor, *rest: Any) -> Tensor:
        made.append("exact")
        return decoded(self, tokens, *rest)

    def seen_preview(self: Drawing, tokens: Tensor, *rest: Any) -> Tensor:
        made.append("preview")
        return previewed(self, tokens, *rest)

    monkeypatch.setattr(Drawing, "_decoded", seen_exact)
    monkeypatch.setattr(Drawing, "_previewed", seen_preview)
    with Engine(pipe, max_images=2) as engine:
        handle = engine.submit(pipe.prepare(1, seeds=4, num_inference_steps=6), previews=2)
        previews = list(handle.previews())
        (image,) = handle.result().images
    assert made.count("exact") == 1
    assert made.count("preview") >= len(previews) >= 1
    assert pipe.preview_decoder is not None
    for preview in previews:
        wanted = by_hand(pipe.preview_decoder, pipe, preview.tokens[None])
        assert np.abs(np.asarray(preview.picture).astype(int) - wanted[0].astype(int)).max() <= 1
    monkeypatch.undo()
    assert image.tobytes() == pipe(1, seeds=4, num_inference_steps=6).images[0].tobytes()


def test_a_pixel_depends_on_near_cells_alone() -> None:
    torch.manual_seed(0)
    decoder, codebook = PreviewDecoder(4, 2, width=16), torch.randn(6, 4)
    tokens = torch.randint(0, 5, (1, 9, 9))
    before = decoder(tokens, codebook)
    assert before.shape == (1, 3, 18, 18)
    tokens[0, 4, 4] = 5
    moved = (decoder(tokens, codebook) != before).any(1)[0].reshape(9, 2, 9, 2).any(3).any(1)
    assert moved[2:7, 2:7].all()
    moved[2:7, 2:7] = False
    assert not moved.any()


def test_a_folder_carries_its_preview_decoder(pipe: LPDPipeline, tmp_path: Path) -> None:
    assert pipe.preview_decoder is not None
    pipe.save_pretrained(tmp_path / "model")
    loaded = LPDPipeline.from_pretrained(tmp_path / "model")
    assert loaded.preview_decoder is not None
    for name, value in pipe.preview_decoder.state_dict().items():
        assert torch.equal(loaded.preview_decoder.state_dict()[name], value)
    assert copy.deepcopy(loaded).preview_decoder is not None
    # Another tokenizer's pixels are not those that it was trained for.
    pipe.tokenizer.save(tmp_path / "other.safetensors")
    other = LPDPipeline.from_pretrained(tmp_path / "model", tokenizer=tmp_path / "other.safetensors")
    assert other.preview_decoder is None
    same = tmp_path / "model" / ".." / "model" / "tokenizer.safetensors"
    assert LPDPipeline.from_pretrained(tmp_path / "model", tokenizer=same).preview_decoder is not None
    other.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model" / PREVIEW_FILE).exists()
    # Beside a weight file of any name, it is not taken for the model.
    pipe.save_pretrained(tmp_path / "published")
    (tmp_path / "published" / "model.safetensors").rename(tmp_path / "published" / "weights.safetensors")
    (tmp_path / "published" / "config.json").unlink()
    beside = LPDPipeline.from_pretrained(tmp_path / "published", grid=(4, 6), heads=2)
    assert beside.preview_decoder is not None


def test_wrong_files_and_sizes_are_named(pipe: LPDPipeline, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be of the tokenizer's code length and stride, 4 and 2, got 5 and 2"):
        LPDPipeline(pipe.model, pipe.tokenizer, preview_decoder=PreviewDecoder(5, 2))
    with pytest.raises(ValueError, match="got 4 and 4"):
        LPDPipeline(pipe.model, pipe.tokenizer, preview_decoder=PreviewDecoder(4, 4))
    pipe.save_pretrained(tmp_path)
    path = tmp_path / PREVIEW_FILE
    good = load_file(path)
    for bad, sentence in (
        ({"x": torch.zeros(1)}, "it has no weight1"),
        (good | {"head": torch.zeros(12)}, "it has no weight1"),
        (good | {"head": torch.zeros(8, 0, 0, 3)}, "its cells 0 pixels a side"),
        (good | {"weight1": torch.zeros(3, 3, 1, 8)}, "its codes have 0 numbers"),
        (good | {"weight1": torch.zeros(1, 1, 5, 2000)}, "its width is 2000"),
        (good | {"weight2": torch.zeros(3, 3, 7, 8)}, "size mismatch"),
        (good | {"weight1": torch.zeros(0, 0, 2**40, 8)}, "weight1"),
        (good | {"head_bias": torch.full((2, 2, 3), torch.nan)}, "head_bias has numbers that are not finite"),
        ({name: value for name, value in good.items() if name != "bias2"}, "Missing key"),
    ):
        save_file(bad, path)
        with pytest.raises(ValueError, match="preview decoder") as error:
            LPDPipeline.from_pretrained(tmp_path)
        assert sentence in str(error.value)
        assert str(path) in str(error.value)


def test_saved_weights_are_rounded_to_float16(tmp_path: Path) -> None:
    torch.manual_seed(0)
    decoder = PreviewDecoder(3, 4, width=8)
    decoder.save(tmp_path / "p.safetensors", {"psnr": "20"})
    loaded = PreviewDecoder.from_file(tmp_path / "p.safetensors")
    assert (loaded.codebook_dim, loaded.stride, len(loaded.bias1)) == (3, 4, 8)
    for name, value in decoder.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value.half().float())
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
