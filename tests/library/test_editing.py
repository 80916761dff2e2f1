"""Editing: what is known stays, what is drawn depends on the edit alone, and arguments are as people have them."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from recorder import Recorder
from torch import Tensor

from lpd_ext import editing, sampler
from lpd_ext.cuda_graphs import DecodeGraphs
from lpd_ext.linear import unpack
from lpd_ext.masks import masked_cells
from lpd_ext.pipeline import LPDPipeline
from lpd_ext.tokenizer import VQTokenizer

DATA = Path(__file__).parents[1] / "data" / "fashion_mnist"


@pytest.fixture(scope="module")
def pipe() -> LPDPipeline:
    return LPDPipeline.from_pretrained("fashion_mnist")


def real_picture(index: int) -> Image.Image:
    """A real picture that no training has seen, with its border."""
    fashion_mnist = pytest.importorskip("lpd_tools.data.fashion_mnist")
    source = fashion_mnist.FashionMNISTSource(fashion_mnist.load_fashion_mnist("test", DATA), "test")
    image: Image.Image = source.image(index).convert("RGB")
    return image


def box_mask(left: int, top: int, right: int, bottom: int, side: int = 32) -> Image.Image:
    mask = Image.new("L", (side, side))
    mask.paste(255, (left, top, right, bottom))
    return mask


CENTRE = box_mask(9, 8, 24, 22)


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image)


def test_known_pixels_stay_and_masked_ones_are_drawn(pipe: LPDPipeline) -> None:
    before = real_picture(14)
    out = pipe.inpaint(before, CENTRE, "ankle boot", seeds=1)
    (after,) = out.images
    hole = pixels(CENTRE) > 0
    assert (pixels(after)[~hole] == pixels(before)[~hole]).all()
    assert (pixels(after)[hole] != pixels(before)[hole]).mean() > 0.5
    again = pipe.inpaint(before, CENTRE, "ankle boot", seeds=1)
    assert torch.equal(again.tokens, out.tokens)
    assert not torch.equal(pipe.inpaint(before, CENTRE, "ankle boot", seeds=2).tokens, out.tokens)


def test_known_cells_keep_their_tokens(pipe: LPDPipeline) -> None:
    request = editing.plan_inpaint(pipe, real_picture(14), CENTRE, 9, seeds=1).request
    known = request.known_tokens
    assert known is not None
    free = masked_cells(torch.from_numpy(pixels(CENTRE) > 0)[None], 4)
    assert torch.equal(known.view(8, 8) < 0, free[0])
    assert free[0].nonzero().min(0).values.tolist() == [2, 2]  # pixel 9 is in the third cell
    assert free[0].nonzero().max(0).values.tolist() == [5, 5]
    out = pipe.inpaint(real_picture(14), CENTRE, 9, seeds=1)
    assert torch.equal(out.tokens.flatten(1)[known >= 0], known[known >= 0])
    assert out.tokens.min() >= 0


def test_what_is_under_the_mask_plays_no_part(pipe: LPDPipeline) -> None:
    """Nor does the picture that an edit made: edited again, it is the same."""
    before = real_picture(3)
    scribbled = before.copy()
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    scribbled.paste(Image.fromarray(noise), mask=CENTRE)
    wanted = pipe.inpaint(before, CENTRE, 1, seeds=5)
    for picture in (scribbled, wanted.images[0]):
        found = pipe.inpaint(picture, CENTRE, 1, seeds=5)
        assert torch.equal(found.tokens, wanted.tokens)
        assert (pixels(found.images[0]) == pixels(wanted.images[0])).all()


def many_edits() -> dict[str, Any]:
    """Edits that differ in everything: pictures, masks, labels, seeds, steps, guidance, order, filters."""
    masks = [CENTRE, box_mask(16, 0, 32, 32), box_mask(30, 30, 31, 31), box_mask(0, 5, 32, 32), box_mask(2, 2, 9, 30)]
    return {
        "images": [real_picture(i) for i in range(5)],
        "masks": masks,
        "class_labels": ["ankle boot", None, 1, "trouser", "shirt"],
        "seeds": [5, -1, 2**40, 8, 9],
        "num_inference_steps": [4, 7, 1, 20, 3],
        "guidance_scale": [1.0, 3.0, 4.0, 2.0, 8.0],
        "guidance_schedule": ["linear", "linear", "constant", "linear", "constant"],
        "order": ["locality", "random", "raster", "spiral", "locality"],
        "temperature": [1.0, 0.9, 1.0, 0.5, 0.9],
        "top_k": [0, 50, 0, 0, 0],
        "top_p": [1.0, 1.0, 1.0, 0.9, 1.0],
    }


@pytest.mark.parametrize("prefill_block", [None, 7])
def test_an_edit_is_the_same_alone_and_among_others(pipe: LPDPipeline, prefill_block: int | None) -> None:
    edits = many_edits()
    together = pipe.inpaint(**edits, prefill_block=prefill_block)
    for b in range(5):
        alone = pipe.inpaint(**{name: value[b] for name, value in edits.items()}, prefill_block=prefill_block)
        assert torch.equal(alone.tokens[0], together.tokens[b]), b
        assert (pixels(alone.images[0]) == pixels(together.images[b])).all()
    assert len({tuple(tokens.flatten().tolist()) for tokens in together.tokens}) == 5


def test_blocks_of_prefill(pipe: LPDPipeline) -> None:
    """Some rounding apart, blocks differ in what known cells see: in bundled weights, enough to change tokens."""
    one, many = (editing.plan_inpaint(pipe, real_picture(14), CENTRE, 9, seeds=1, prefill_block=n) for n in (None, 10))
    assert [schedule.prefill for schedule in one.request.schedules] == [(48,)]
    assert [schedule.prefill for schedule in many.request.schedules] == [(10, 10, 10, 10, 8)]
    assert torch.equal(one.request.orders, many.request.orders)
    assert one.request.num_groups == many.request.num_groups


def test_linear_guidance_counts_known_cells(pipe: LPDPipeline) -> None:
    """s(n) = 1 + (cfg - 1) n / N for the n-th cell of the order, in which known ones come first."""
    request = editing.plan_inpaint(pipe, real_picture(14), CENTRE, 9, seeds=1, guidance_scale=5.0).request
    seen: list[Tensor] = []
    real = sampler.ops.sample_step

    def recording(logits: Tensor, c: Tensor, u: Tensor, image: Tensor, n: Tensor, *rest: Any) -> None:
        seen.append(rest[2][image, n])  # of the table of guidance
        real(logits, c, u, image, n, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampler.ops, "sample_step", recording)
        sampler.generate(pipe.model, request)
    assert torch.allclose(torch.cat(seen), 1 + 4 * torch.arange(48, 64) / 64)


def test_one_picture_with_several_seeds_labels_or_masks(pipe: LPDPipeline) -> None:
    picture = real_picture(14)
    out = pipe.inpaint(picture, CENTRE, "bag", seeds=[4, 5, 6])
    assert out.seeds == [4, 5, 6]
    assert len({tuple(tokens.flatten().tolist()) for tokens in out.tokens}) == 3
    assert torch.equal(pipe.inpaint(picture, CENTRE, "bag", seeds=5).tokens[0], out.tokens[1])
    assert len(pipe.inpaint(picture, CENTRE, ["bag", 9], seeds=4).images) == 2
    assert len(pipe.inpaint(picture, [CENTRE, box_mask(0, 0, 4, 4)], "bag", seeds=4).images) == 2
    assert pipe.inpaint([], [], [], seeds=[]).images == []


def test_images_come_out_as_the_kind_that_went_in(pipe: LPDPipeline) -> None:
    picture = real_picture(14)
    wanted = pixels(pipe.inpaint(picture, CENTRE, 9, seeds=1).images[0])
    array = pipe.inpaint(pixels(picture), pixels(CENTRE), 9, seeds=1).images
    assert array.dtype == np.uint8
    assert (array[0] == wanted).all()
    floats = torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 127.5 - 1
    for mask in (torch.from_numpy(pixels(CENTRE) > 0), torch.from_numpy(pixels(CENTRE).copy())[None, None]):
        tensor = pipe.inpaint(floats[None], mask, 9, seeds=1).images
        assert torch.equal(tensor[0][:, ~(pixels(CENTRE) > 0)], floats[:, ~(pixels(CENTRE) > 0)])
        assert (VQTokenizer.to_pixels(tensor)[0].numpy() == wanted).all()
    assert isinstance(pipe.inpaint(pixels(picture), CENTRE, 9, seeds=1, output_type="pil").images[0], Image.Image)
    assert pipe.inpaint(picture, CENTRE, 9, seeds=1, output_type="tokens").images is None


def test_dilation_draws_cells_around(pipe: LPDPipeline) -> None:
    mask = box_mask(12, 12, 13, 13)
    counts = [
        int((editing.plan_inpaint(pipe, real_picture(14), mask, 9, seeds=1, dilate=by).request.known_tokens < 0).sum())
        for by in (0, 1, 2)
    ]
    assert counts == [1, 9, 25]
    out = pipe.inpaint(real_picture(14), mask, 9, seeds=1, dilate=2)  # pixels that are not masked stay all the same
    changed = (pixels(out.images[0]) != pixels(real_picture(14))).any(-1)
    assert changed.sum() <= 1


def test_feathered_and_bare_results(pipe: LPDPipeline) -> None:
    picture, hole = real_picture(14), pixels(CENTRE) > 0
    options: dict[str, Any] = {"seeds": 1, "output_type": "pt"}
    hard, soft, bare = (
        pipe.inpaint(picture, CENTRE, 9, **options, **how).images[0] for how in ({}, {"feather": 3}, {"paste": False})
    )
    before = torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 127.5 - 1
    assert torch.equal(bare[:, hole], hard[:, hole])
    assert torch.equal(bare[:, hole], soft[:, hole])
    column = 15  # under the hole, whose last row is 21: three quarters of the new picture, a half, a quarter, nothing
    for row, share in ((22, 0.75), (23, 0.5), (24, 0.25), (25, 0.0)):
        wanted = share * bare[:, row, column] + (1 - share) * before[:, row, column]
        assert torch.allclose(soft[:, row, column], wanted, atol=1e-6)
    assert torch.equal(hard[:, ~hole], before[:, ~hole])
    assert not torch.equal(bare[:, ~hole], before[:, ~hole])


def test_more_steps_than_cells_are_reduced_with_a_warning(pipe: LPDPipeline) -> None:
    mask = box_mask(8, 8, 16, 16)  # four cells
    with pytest.warns(UserWarning, match="edit 0 takes 4 steps, one per cell to draw, not 9"):
        request = editing.plan_inpaint(pipe, real_picture(14), mask, 9, seeds=1, num_inference_steps=9).request
    assert request.group_sizes == ((1, 1, 1, 1),)
    request = editing.plan_inpaint(pipe, real_picture(14), mask, 9, seeds=1).request  # nor a warning for the default
    assert request.group_sizes == ((1, 1, 1, 1),)
    request = editing.plan_inpaint(pipe, real_picture(14), mask, 9, seeds=1, group_sizes=[1, 3]).request
    assert request.group_sizes == ((1, 3),)


def test_outpainting_continues_the_picture(pipe: LPDPipeline) -> None:
    part = real_picture(14).crop((6, 4, 26, 32))
    out = pipe.outpaint(part, (6, 4, 6, 0), "ankle boot", seeds=[1, 2])
    for image in out.images:
        assert image.size == (32, 32)
        assert (pixels(image)[4:, 6:26] == pixels(part)).all()
    assert (pixels(out.images[0]) != pixels(out.images[1])).any()
    known = editing.plan_outpaint(pipe, part, (6, 4, 6, 0), 9, seeds=1).request.known_tokens
    assert known is not None
    assert (known.view(8, 8) >= 0).nonzero().min(0).values.tolist() == [1, 2]  # whole cells of the picture
    assert (known >= 0).sum() == 7 * 4
    small = part.resize((16, 16))
    assert pipe.outpaint([part, small], [(6, 4, 6, 0), 8], 9, seeds=1).tokens.shape == (2, 8, 8)
    resized = pipe.outpaint(real_picture(14), 8, "ankle boot", seeds=1, resize="stretch").images[0]
    assert resized.size == (32, 32)


def test_class_edit_is_drawn_with_the_new_label(pipe: LPDPipeline) -> None:
    new = pipe.class_edit(real_picture(14), CENTRE, "sandal", seeds=1)
    assert torch.equal(new.tokens, pipe.inpaint(real_picture(14), CENTRE, "sandal", seeds=1).tokens)
    assert not torch.equal(new.tokens, pipe.inpaint(real_picture(14), CENTRE, "ankle boot", seeds=1).tokens)


def test_variations_keep_their_share(pipe: LPDPipeline) -> None:
    picture = real_picture(14)
    whole = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 127.5 - 1
    tokens = pipe.tokenizer.encode(whole).flatten(1)
    drawing = editing.plan_variations(pipe, picture, [0.25, 0.75, 0.001], "ankle boot", seeds=[1, 1, 2])
    known = drawing.request.known_tokens
    assert known is not None
    assert (known >= 0).sum(1).tolist() == [16, 48, 1]
    assert (known[0] < 0)[known[1] < 0].all()  # one seed: what the smaller share keeps, the larger keeps too
    assert torch.equal(known[known >= 0], tokens.expand(3, -1)[known >= 0])
    out = pipe.variations(picture, 0.5, "ankle boot", seeds=[1, 2])
    assert (out.tokens[0] != out.tokens[1]).any()


def test_stream_and_callback(pipe: LPDPipeline) -> None:
    before, hole = pixels(real_picture(14)), pixels(CENTRE) > 0
    drawing = editing.plan_inpaint(pipe, real_picture(14), CENTRE, 9, seeds=1, num_inference_steps=4)
    previews = list(drawing.stream())
    assert [(preview.step, preview.num_steps) for preview in previews] == [(step, 4) for step in range(1, 5)]
    left = [int((preview.tokens < 0).sum()) for preview in previews]
    assert left == [16 - sum(drawing.request.group_sizes[0][:step]) for step in range(1, 5)]
    for preview in previews:
        assert (pixels(preview.images[0])[~hole] == before[~hole]).all()
    calls: list[tuple[int, int]] = []
    out = pipe.inpaint(
        real_picture(14), CENTRE, 9, seeds=1, num_inference_steps=4,
        callback_on_step_end=lambda step, total: calls.append((step, total)),
    )  # fmt: skip
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert torch.equal(out.tokens, previews[-1].tokens)
    assert (pixels(out.images[0]) == pixels(previews[-1].images[0])).all()


def test_previews_of_edits_that_end_at_different_steps(pipe: LPDPipeline) -> None:
    pictures = [real_picture(14), real_picture(1)]
    edits: dict[str, Any] = {"seeds": [1, 2], "num_inference_steps": [2, 5]}
    *_, last = editing.plan_inpaint(pipe, pictures, CENTRE, [9, 3], **edits).stream()
    out = pipe.inpaint(pictures, CENTRE, [9, 3], **edits)
    for preview, image in zip(last.images, out.images, strict=True):
        assert (pixels(preview) == pixels(image)).all()


def test_edits_on_every_backend_and_in_graphs(backend: torch.device) -> None:
    """The operators of each backend draw what the graphs, kept and replayed, draw; known tokens stay."""
    pipe = LPDPipeline.from_pretrained("fashion_mnist", device=backend)
    unpack(pipe.model)  # packed weights are for the CPU's own kernels
    recorder = Recorder()
    if backend.type == "cpu":
        pipe._graphs = DecodeGraphs(capture=recorder, device_type="cpu")
    names = ["images", "masks", "class_labels", "seeds", "num_inference_steps", "guidance_scale"]
    edits = {name: value[:2] for name, value in many_edits().items() if name in names}
    edits["num_inference_steps"] = [1, 2]
    for seeds in ([5, -1], [6, 7]):
        drawing = editing.plan_inpaint(pipe, **{**edits, "seeds": seeds}, prefill_block=30)
        known = drawing.request.known_tokens
        assert known is not None
        replayed = drawing.run("tokens").tokens.flatten(1)
        watched = drawing.run("tokens", callback_on_step_end=lambda *_: None).tokens.flatten(1)
        *_, eager = sampler.decode(pipe.model, drawing.request)
        assert torch.equal(replayed, eager)
        assert torch.equal(watched, eager)
        assert torch.equal(replayed[known >= 0], known[known >= 0])
    assert len(pipe._graphs) == 1
    if backend.type == "cpu":  # the whole, and each step
        num_steps = max(schedule.num_steps for schedule in drawing.request.schedules)
        assert num_steps == 4
        assert (recorder.captures, recorder.replays) == (1 + num_steps, 2 * (1 + num_steps))


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"masks": Image.new("L", (32, 28), 255)}, ValueError, "masks[0] has 32 x 28 pixels, but its picture has 32 x 32"),
    ({"masks": Image.new("L", (32, 32))}, ValueError, "masks[0] is empty: nothing is to be painted (white is)"),
    ({"masks": Image.new("L", (32, 32), 255)}, ValueError, "masks[0] leaves no cell of its picture"),
    ({"dilate": 4}, ValueError, "masks[0] leaves no cell of its picture"),
    ({"class_labels": 10}, ValueError, "labels[0] must be None or an integer in [0, 10), got 10"),
    ({"class_labels": "hat"}, ValueError, "'hat' is not a class name"),
    ({"class_labels": [1, 2], "seeds": [1, 2, 3]}, ValueError, "one entry per edit, got 2 class_labels, 3 seeds"),
    ({"dilate": -1}, ValueError, "dilate must be >= 0, got -1"),
    ({"feather": 1.5}, TypeError, "feather must be an integer, got 1.5"),
    ({"resize": "pad"}, ValueError, "resize must be None, 'stretch' or 'crop', got 'pad'"),
    ({"prefill_block": 0}, ValueError, "prefill_block must be >= 1, got 0"),
    ({"guidance_scale": math.inf}, ValueError, "guidance_scale[0] must be in [-1e+30, "),
    ({"output_type": "jpg"}, ValueError, "output_type must be 'pil'"),
    ({"group_sizes": [3]}, ValueError, "group_sizes[0] must sum to 16"),
    ({"num_inference_steps": 0}, ValueError, "num_inference_steps must be in [1, 16], got 0"),
    ({"group_sizes": [16], "num_inference_steps": 1}, ValueError, "exclude each other"),
    ({"order": "zigzag"}, ValueError, "got 'zigzag'"),
    ({"seeds": 1.5}, TypeError, "seeds must be an integer, got 1.5"),
]


@pytest.mark.parametrize(("changes", "error", "message"), BAD)
def test_bad_edits_are_refused_before_any_work(
    pipe: LPDPipeline, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    def worked(*arguments: object) -> None:
        raise AssertionError("the tokenizer worked")

    monkeypatch.setattr(pipe.tokenizer, "encode", worked)
    arguments = {"images": real_picture(14), "masks": CENTRE, "class_labels": 9, "seeds": 1, **changes}
    with pytest.raises(error, match=re.escape(message)):
        pipe.inpaint(**arguments)


@pytest.mark.parametrize(
    ("margins", "message"),
    [
        ((16, 0, 16, 0), "margins[0] = [16, 0, 16, 0] leave nothing of 32 x 32 pixels"),
        (40, "margins[0] = [40, 40, 40, 40] leave nothing"),
        (0, "margins[0] are all 0: there is nothing to paint"),
        (15, "margins[0] leaves no cell of its picture"),
        ([(1, 2)], "margins[0] must be a number or (left, top, right, bottom), got (1, 2)"),
        (-1, "margins must be >= 0, got -1"),
        (4, "images[0] within its margins must have 24 x 24 pixels, got 32 x 32: resize='stretch' or resize='crop'"),
    ],
)
def test_bad_margins(pipe: LPDPipeline, margins: Any, message: str) -> None:
    picture = real_picture(14).resize((2, 2)) if margins == 15 else real_picture(14)
    with pytest.raises(ValueError, match=re.escape(message)):
        pipe.outpaint(picture, margins, 9, seeds=1)


@pytest.mark.parametrize("keep", [0, 1, -0.5, float("nan")])
def test_bad_shares(pipe: LPDPipeline, keep: float) -> None:
    with pytest.raises(ValueError, match=re.escape("keep must be in (0, 1)")):
        pipe.variations(real_picture(14), keep, 9, seeds=1)
