"""Labels in, images out: the Python surface people use, on a small random model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from lpd_ext.drawing import Drawing
from lpd_ext.model import LPDConfig, LPDModel
from lpd_ext.pipeline import LPDPipeline, SamplingDefaults
from lpd_ext.request import DecodeRequest
from lpd_ext.tokenizer import TokenizerConfig, VQTokenizer


def small_pipeline() -> LPDPipeline:
    torch.manual_seed(0)
    model = LPDModel(LPDConfig(64, depth=2, heads=2, vocab_size=40, num_classes=3, grid=(4, 6))).eval()
    tokenizer = VQTokenizer(
        TokenizerConfig(ch=32, ch_mult=(1, 1), z_channels=8, codebook_size=40, codebook_dim=4,
                        encoder_res_blocks=1, decoder_res_blocks=1)
    ).eval()  # fmt: skip
    defaults = SamplingDefaults(num_inference_steps=4, guidance_scale=2.0, guidance_schedule="constant")
    return LPDPipeline(model, tokenizer, defaults, ["boot", "bag", "coat"])


@pytest.fixture(scope="module")
def pipe() -> LPDPipeline:
    return small_pipeline()


def test_output_types(pipe: LPDPipeline) -> None:
    out = pipe(["bag", 2, None], seeds=[1, 2, 3])
    assert [image.size for image in out.images] == [(12, 8)] * 3
    assert isinstance(out.images[0], Image.Image)
    assert out.tokens.shape == (3, 4, 6)
    assert out.seeds == [1, 2, 3]
    array = pipe([1, 2, None], seeds=[1, 2, 3], output_type="np").images
    assert array.dtype == np.uint8
    assert array.shape == (3, 8, 12, 3)
    assert (array[1] == np.asarray(out.images[1])).all()
    tensor = pipe([1, 2, None], seeds=[1, 2, 3], output_type="pt").images
    assert tensor.shape == (3, 3, 8, 12)
    assert (VQTokenizer.to_pixels(tensor).numpy() == array).all()
    bare = pipe([1, 2, None], seeds=[1, 2, 3], output_type="tokens")
    assert bare.images is None
    assert torch.equal(bare.tokens, out.tokens)


def test_pixels_are_the_tokenizers_reconstruction(pipe: LPDPipeline) -> None:
    out = pipe([0, 1], seeds=[5, 6], output_type="np")
    with torch.no_grad():
        wanted = VQTokenizer.to_pixels(pipe.tokenizer.decode(out.tokens)).numpy()
    assert (out.images == wanted).all()


def test_one_label_and_consecutive_seeds(pipe: LPDPipeline) -> None:
    assert pipe(1, seeds=7).seeds == [7]
    many = pipe([1, 1, 1], seeds=7)
    assert many.seeds == [7, 8, 9]
    assert torch.equal(pipe("bag", seeds=[9]).tokens[0], many.tokens[2])


def test_absent_seeds_are_drawn_and_reported(pipe: LPDPipeline) -> None:
    torch.manual_seed(3)
    out = pipe([0, 1])
    assert len(set(out.seeds)) == 2
    assert torch.equal(pipe([0, 1], seeds=out.seeds).tokens, out.tokens)


def test_every_option_reaches_its_image(pipe: LPDPipeline) -> None:
    request = pipe.prepare(
        [0, 1],
        num_inference_steps=[3, 24],
        guidance_scale=[1.0, 3],
        guidance_schedule="linear",
        temperature=0.5,
        top_k=[3, 0],
        top_p=0.9,
        order="raster",
        seeds=[4, 5],
    )
    assert [len(sizes) for sizes in request.group_sizes] == [3, 24]
    assert request.guidance_scale == (1.0, 3)
    assert request.guidance_schedule == ("linear", "linear")
    assert (request.temperature, request.top_k, request.top_p) == ((0.5, 0.5), (3, 0), (0.9, 0.9))
    assert torch.equal(request.orders, torch.arange(24).expand(2, -1))
    default = pipe.prepare(0, seeds=1)
    assert (default.guidance_scale, default.guidance_schedule) == ((2.0,), ("constant",))
    assert len(default.group_sizes[0]) == 4
    sizes = (1, 5, 8, 10)
    assert pipe.prepare([0, 1], group_sizes=sizes, seeds=1).group_sizes == (sizes, sizes)
    assert pipe.prepare([0, 1], group_sizes=[list(sizes), [24]], seeds=1).group_sizes == (sizes, (24,))


def test_stream_shows_each_group_and_ends_with_the_image(pipe: LPDPipeline) -> None:
    previews = list(pipe.stream([2], seeds=1))
    assert [(preview.step, preview.num_steps) for preview in previews] == [(step, 4) for step in range(1, 5)]
    drawn = [int((preview.tokens >= 0).sum()) for preview in previews]
    assert drawn == np.cumsum(pipe.prepare(2, seeds=1).group_sizes[0]).tolist()
    final = pipe(2, seeds=1)
    assert torch.equal(previews[-1].tokens, final.tokens)
    assert (np.asarray(previews[-1].images[0]) == np.asarray(final.images[0])).all()
    first = np.asarray(previews[0].images[0]).reshape(4, 2, 6, 2, 3).transpose(0, 2, 1, 3, 4)
    undrawn = previews[0].tokens[0].numpy() < 0
    assert (first[undrawn] == 128).all()  # round(127.5), to even
    assert (first[~undrawn] != 128).any()


def test_previews_are_made_of_what_changed(pipe: LPDPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    real = Drawing._decoded

    def counting(self: Drawing, tokens: torch.Tensor, *rest: Any) -> torch.Tensor:
        made.append(len(tokens))
        return real(self, tokens, *rest)

    monkeypatch.setattr(Drawing, "_decoded", counting)
    options: dict[str, Any] = {"num_inference_steps": [2, 5], "seeds": [1, 2]}
    every = list(pipe.stream([0, 1], **options))
    assert made == [2, 2, 1, 1, 1]
    made.clear()
    some = list(pipe.stream([0, 1], preview_every=3, **options))
    assert made == [2, 2, 1]  # after the first group, the third and the last
    assert some[1].images == some[0].images
    for first, second in zip(every, some, strict=True):
        assert torch.equal(first.tokens, second.tokens)
    final = pipe([0, 1], **options)
    for last in (every[-1], some[-1]):
        assert [image.tobytes() for image in last.images] == [image.tobytes() for image in final.images]
    with pytest.raises(ValueError, match="preview_every must be >= 1, got 0"):
        pipe.stream([0], preview_every=0)


def test_callback_counts_the_groups(pipe: LPDPipeline) -> None:
    calls: list[tuple[int, int]] = []
    pipe(0, seeds=0, callback_on_step_end=lambda step, total: calls.append((step, total)))
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_an_empty_batch_gives_an_empty_result(pipe: LPDPipeline) -> None:
    out = pipe([], seeds=[])
    assert out.images == []
    assert out.tokens.shape == (0, 4, 6)
    assert pipe([], output_type="np").images.shape == (0, 8, 12, 3)


def test_save_and_load(pipe: LPDPipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path)
    loaded = LPDPipeline.from_pretrained(tmp_path)
    assert (loaded.defaults, loaded.class_names) == (pipe.defaults, pipe.class_names)
    wanted = pipe([0, 1, 2], seeds=11, output_type="np")
    found = loaded([0, 1, 2], seeds=11, output_type="np")
    assert torch.equal(found.tokens, wanted.tokens)
    assert (found.images == wanted.images).all()
    with pytest.raises(ValueError, match="tokenizer must be given"):
        LPDPipeline.from_pretrained(tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    config["sampling"]["tempo"] = 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"unknown entries \['tempo'\]"):
        LPDPipeline.from_pretrained(tmp_path)


def test_tokenizer_and_model_must_agree(pipe: LPDPipeline) -> None:
    config = TokenizerConfig(ch=32, ch_mult=(1, 1), z_channels=8, codebook_size=41, codebook_dim=4)
    with pytest.raises(ValueError, match="tokenizer has 41 codes, but the model's vocabulary is 40"):
        LPDPipeline(pipe.model, VQTokenizer(config))


@pytest.mark.parametrize(
    ("labels", "options", "error", "message"),
    [
        ([3], {}, ValueError, r"labels\[0\] must be None or an integer in \[0, 3\), got 3"),
        (["hat"], {}, ValueError, "'hat' is not a class name; known are boot, bag, coat"),
        ([0, 1], {"seeds": [1]}, ValueError, "seeds must have one entry per label"),
        ([0, 1], {"temperature": [1.0]}, ValueError, r"temperature must be one value or one per label \(2\)"),
        ([0], {"temperature": "hot"}, TypeError, "temperature must be a number, got 'hot'"),
        ([0], {"temperature": -1.0}, ValueError, "temperature"),
        ([0], {"top_k": 1.5}, TypeError, "top_k must be an integer, got 1.5"),
        ([0], {"top_p": 0.0}, ValueError, "top_p"),
        ([0], {"num_inference_steps": 25}, ValueError, r"num_inference_steps must be in \[1, 24\], got 25"),
        ([0], {"num_inference_steps": 0}, ValueError, "0"),
        ([0], {"group_sizes": [1, 22]}, ValueError, "24"),
        ([0], {"group_sizes": [0, 24]}, ValueError, "0"),
        ([0], {"group_sizes": [24], "num_inference_steps": 1}, ValueError, "exclude each other"),
        ([0], {"order": "zigzag"}, ValueError, "zigzag"),
        ([0], {"order": torch.zeros(24, dtype=torch.int64)}, ValueError, "order"),
        ([0], {"output_type": "jpg"}, ValueError, "output_type must be 'pil'"),
        ([0], {"guidance_schedule": "cosine"}, ValueError, "guidance_schedule must be one of"),
        ([0, 1.0], {}, TypeError, r"class_labels\[1\] must be an integer, got 1\.0"),
        ([True], {}, TypeError, r"class_labels\[0\] must be an integer, got True"),
        (1.0, {}, TypeError, r"class_labels\[0\]"),
        ([0], {"seeds": 1.0}, TypeError, "seeds must be an integer, got 1.0"),
        ([0], {"seeds": True}, TypeError, "seeds must be an integer, got True"),
        ([0], {"seeds": [1.0]}, TypeError, r"seeds\[0\] must be an integer"),
        ([0], {"seeds": "1"}, TypeError, r"seeds\[0\] must be an integer"),
        ([0, 1], {"seeds": 2**63 - 1}, ValueError, r"seeds\[1\]"),
        ([0], {"num_inference_steps": True}, TypeError, "num_inference_steps must be an integer, got True"),
        ([0], {"num_inference_steps": 2.0}, TypeError, "num_inference_steps must be an integer"),
        ([0], {"top_k": True}, TypeError, "top_k must be an integer, got True"),
        ([0], {"temperature": True}, TypeError, "temperature must be a number, got True"),
        ([0], {"group_sizes": 24}, TypeError, "group_sizes must be a list of integers"),
        ([0, 1], {"group_sizes": [[12, 12], 24]}, TypeError, r"group_sizes\[1\] must be a list of integers, got 24"),
        ([0, 1], {"group_sizes": [24, [12, 12]]}, TypeError, r"group_sizes\[0\] must be a list of integers, got 24"),
        ([0, 1], {"order": ["locality", "zigzag"]}, ValueError, "order must be a permutation .* got 'zigzag'"),
        ([0], {"order": 5}, TypeError, "order must be a policy name, or the cells as integers, got 5"),
        ([0], {"repulsion_threshold": 1.5}, TypeError, "repulsion_threshold must be an integer, got 1.5"),
        ([0], {"repulsion_threshold": [1, 2]}, ValueError, r"repulsion_threshold must be one value or one per label"),
        ([0], {"repulsion_threshold": True}, TypeError, "repulsion_threshold must be an integer, got True"),
        ([0], {"order": "raster", "repulsion_threshold": -1}, ValueError, "repulsion_threshold must be >= 0"),
        ([0], {"proximity_threshold": "1"}, TypeError, "proximity_threshold must be a number, got '1'"),
    ],
)
def test_wrong_arguments_are_refused(
    pipe: LPDPipeline, labels: list[object], options: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        pipe(labels, **options)
    if "output_type" not in options:
        with pytest.raises(error, match=message):  # at the call, not at the first group
            pipe.stream(labels, **options)


def test_integers_may_be_numpys(pipe: LPDPipeline) -> None:
    def prepare(integer: Callable[[int], object]) -> DecodeRequest:
        options = {"num_inference_steps": integer(3), "top_k": [integer(3), integer(0)], "seeds": integer(7)}
        return pipe.prepare([integer(1), integer(2)], **options)

    wanted, found = prepare(int), prepare(np.int64)
    assert torch.equal(found.orders, wanted.orders)
    for name in ("labels", "top_k", "seeds", "group_sizes"):
        assert getattr(found, name) == getattr(wanted, name)
    assert pipe.prepare(np.int64(1), seeds=np.array([7])).seeds == (7,)


@pytest.mark.parametrize("scalar", [np.array, torch.tensor, np.int64])
def test_numbers_may_be_scalars_of_numpy_and_torch(pipe: LPDPipeline, scalar: Callable[[int], Any]) -> None:
    names = ("num_inference_steps", "guidance_scale", "temperature", "top_k", "top_p", "seeds", "repulsion_threshold")
    wanted = pipe.prepare(2, **dict.fromkeys(names, 1))
    found = pipe.prepare(scalar(2), **{name: scalar(1) for name in names})
    assert torch.equal(found.orders, wanted.orders)
    for name in ("labels", "group_sizes", "guidance_scale", "temperature", "top_k", "top_p", "seeds"):
        assert getattr(found, name) == getattr(wanted, name)


def test_settings_may_differ_from_image_to_image(pipe: LPDPipeline) -> None:
    options = {
        "order": ["locality", "random", "halton"],
        "repulsion_threshold": [1, 2, 1],
        "proximity_threshold": [1.0, 2.0, 0.5],
        "guidance_schedule": ["linear", "constant", "linear"],
        "guidance_scale": [3.0, 2.0, 4.0],
        "num_inference_steps": [3, 24, 5],
        "seeds": [5, 6, 7],
    }
    together = pipe([0, 1, 2], output_type="tokens", **options).tokens
    for b in range(3):
        alone = pipe(b, output_type="tokens", **{name: values[b] for name, values in options.items()}).tokens
        assert torch.equal(alone[0], together[b]), b


def test_seeds_that_are_drawn_survive_json_in_a_browser(pipe: LPDPipeline) -> None:
    seeds = pipe.prepare([None] * 1000, num_inference_steps=1, order="raster").seeds
    assert max(seeds) < 2**53
    assert max(seeds) > 2**50
    assert all(int(float(seed)) == seed for seed in seeds)


def test_results_are_ordinary_tensors(pipe: LPDPipeline) -> None:
    out = pipe([0], seeds=1, output_type="pt")
    before = out.tokens.clone(), out.images.clone()
    out.tokens.add_(1)
    out.images.add_(1)
    assert torch.equal(out.tokens, before[0] + 1)
    assert torch.equal(out.images, before[1] + 1)
    embedding = torch.randn(41, 2, requires_grad=True)
    torch.nn.functional.embedding(out.tokens, embedding).sum().backward()
    assert embedding.grad is not None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sampling": None}, "'sampling' must be a JSON object, got None"),
        ({"class_names": None}, "'class_names' must be a list of strings, got None"),
    ],
)
def test_a_bad_config_is_refused(pipe: LPDPipeline, tmp_path: Path, change: dict[str, object], message: str) -> None:
    pipe.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=message):
        LPDPipeline.from_pretrained(tmp_path)


def test_heads_of_a_single_file(pipe: LPDPipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path)
    save_file(load_file(tmp_path / "model.safetensors"), tmp_path / "bare.safetensors")
    options: dict[str, Any] = {"tokenizer": tmp_path / "tokenizer.safetensors", "grid": (4, 6)}
    for heads in (2, 4):
        loaded = LPDPipeline.from_pretrained(tmp_path / "bare.safetensors", heads=heads, **options)
        assert loaded.model.config.heads == heads
