"""`lpd demo` without a browser: what a visitor is shown, what is theirs alone, and what ends a drawing."""

from __future__ import annotations

import asyncio
import io
import json
import re
import signal
import socket
from collections.abc import AsyncGenerator, Awaitable, Iterator
from contextlib import aclosing
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("gradio")

import httpx
from demo_page import demo_page
from lpd_tools.cli import app
from lpd_tools.extras import missing_from_extras
from lpd_tools.web.page import COMPARED, build_page, choice
from lpd_tools.web.painted import enlarged, fitted
from lpd_tools.web.studio import Studio
from lpd_tools.web.visit import Choice, Visit
from lpd_tools.web.watch import Shown
from PIL import Image
from typer.testing import CliRunner

from lpd_ext.bundled import bundled_model
from lpd_ext.engine import EngineFullError
from lpd_ext.pipeline import LPDPipeline

BAG = Choice(label=8, steps=12, guidance=4.0, temperature=1.0, order="locality", seed=3)
OPTIONS = {"num_inference_steps": 12, "guidance_scale": 4.0, "temperature": 1.0}
PATIENCE = 60.0
# Gradio leaves the event loops that it makes to the garbage collector.
pytestmark = pytest.mark.filterwarnings("default::ResourceWarning", "default::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def pipe() -> LPDPipeline:
    return LPDPipeline.from_pretrained("fashion_mnist")


@pytest.fixture
def studio(pipe: LPDPipeline) -> Iterator[Studio]:
    with Studio(pipe, "small", max_images=3, max_waiting=2) as studio:
        yield studio


async def watch(begun: Awaitable[AsyncGenerator[Shown, None]]) -> list[Shown]:
    async with aclosing(await begun) as frames:
        return [shown async for shown in frames]


def painting(picture: Image.Image, box: tuple[int, int, int, int]) -> dict[str, Any]:
    """Returns the mask as gr.ImageEditor gives it: the box, in pixels of the picture, painted white."""
    layer = Image.new("RGBA", picture.size, (0, 0, 0, 0))
    layer.paste((255, 255, 255, 255), box)
    return {"background": picture.convert("RGBA"), "layers": [layer], "composite": picture}


def differing(first: Image.Image, second: Image.Image) -> int:
    return int((np.asarray(first.convert("RGB")) != np.asarray(second.convert("RGB"))).any(-1).sum())


def test_a_picture_forms_group_by_group_and_is_the_librarys(studio: Studio, pipe: LPDPipeline) -> None:
    visit = Visit()
    frames = asyncio.run(watch(studio.draw(visit, replace(BAG, steps=64))))
    assert frames[0].status == "Beginning."
    steps = [
        int(found[1]) for shown in frames if (found := re.match(r"Step (\d+) of 64, [0-9.]+ ms per", shown.status))
    ]
    assert steps == sorted(set(steps))
    assert len(steps) > 1
    forming = [shown for shown in frames if shown.status != "Beginning."]
    drawn = [differing(shown.pictures[0], frames[0].pictures[0]) for shown in forming]
    assert all(before < after for before, after in pairwise(drawn))
    assert [shown.finished for shown in frames] == [False] * (len(frames) - 1) + [True]
    assert re.fullmatch(r"Drawn in [0-9.]+ s: 64 steps, [0-9.]+ ms each\.", frames[-1].status)
    (kept,) = visit.entries
    assert differing(kept.picture, pipe(8, seeds=3, **OPTIONS | {"num_inference_steps": 64}).images[0]) == 0
    assert not visit.is_drawing()


def test_pictures_in_the_gallery_carry_their_settings(studio: Studio) -> None:
    visit = Visit()
    asyncio.run(watch(studio.draw(visit, replace(BAG, seed=None, label=None, steps=1))))
    (kept,) = visit.entries
    texts = {
        name: json.loads(text) for name, text in Image.open(io.BytesIO(as_gradio_writes(kept.picture))).text.items()
    }
    assert texts.pop("lpd:seed") == kept.choice.seed
    of_defaults = ("top_k", "top_p", "guidance_schedule", "proximity", "repulsion")
    assert {name: texts.pop(f"lpd:{name}") for name in of_defaults} == {
        "top_k": 0, "top_p": 1.0, "guidance_schedule": "linear", "proximity": 1.0, "repulsion": 2
    }  # fmt: skip
    assert texts == {
        "lpd:command": "demo draw",
        "lpd:class": "any class",
        "lpd:label": None,
        "lpd:steps": 1,
        "lpd:guidance": 4.0,
        "lpd:temperature": 1.0,
        "lpd:order": "locality",
    }
    assert kept.caption == f"any class, 1 step, guidance 4, temperature 1, locality, seed {kept.choice.seed}"


def as_gradio_writes(picture: Image.Image) -> bytes:
    """The file of what a gallery or a picture shows."""
    from gradio.processing_utils import encode_pil_to_bytes

    return encode_pil_to_bytes(picture, "png")


def test_pictures_saved_from_the_page_are_drawn_again(pipe: LPDPipeline, tmp_path: Path) -> None:
    """By `lpd sample --like`, equal to the pixel: drawn ones, large as they are shown too, and inpainted ones."""
    visit = Visit()
    with Studio(pipe, "small", of_model={"model": str(bundled_model("fashion_mnist")), "dtype": None}) as studio:
        shown = asyncio.run(watch(studio.compare(visit, replace(BAG, temperature=0.8), ["random", "outward"])))
        asyncio.run(watch(studio.inpaint(visit, BAG, painting(enlarged(visit.entries[0].picture), (64, 64, 200, 160)))))
    saved = {"inpainted": visit.entries[0].picture, "random": visit.entries[1].picture}
    saved |= {"outward": visit.entries[2].picture, "large": shown[-1].pictures[1]}
    drawn = saved | {"large": visit.entries[2].picture}
    assert saved["large"].size == (256, 256)
    for name, picture in saved.items():
        (tmp_path / f"{name}.png").write_bytes(as_gradio_writes(picture))
        again = tmp_path / f"{name}_again.png"
        ended = CliRunner().invoke(app, ["sample", "--like", str(tmp_path / f"{name}.png"), "--output", str(again)])
        assert ended.exit_code == 0, ended.output
        assert differing(Image.open(again), drawn[name]) == 0, name
    large = tmp_path / "larger.png"
    large.write_bytes(as_gradio_writes(enlarged(visit.entries[0].picture)))
    ended = CliRunner(env={"COLUMNS": "300"}).invoke(app, ["sample", "--like", str(large), "--output", "x.png"])
    assert "the file has 256 x 256 pixels, but the model draws 32 x 32" in ended.stderr


def test_orders_are_compared_with_one_seed(studio: Studio, pipe: LPDPipeline) -> None:
    visit = Visit()
    frames = asyncio.run(watch(studio.compare(visit, replace(BAG, seed=None), COMPARED)))
    assert len(frames[-1].pictures) == 3
    assert [kept.choice.order for kept in visit.entries] == list(COMPARED)
    (seed,) = {kept.choice.seed for kept in visit.entries}
    expected = pipe(8, seeds=seed, order="raster", **OPTIONS).images[0]
    assert differing(visit.entries[2].picture, expected) == 0


def test_what_is_painted_over_is_drawn_anew_and_the_rest_stays(studio: Studio, pipe: LPDPipeline) -> None:
    visit, picture = Visit(), pipe(8, seeds=1).images[0]
    frames = asyncio.run(watch(studio.inpaint(visit, BAG, painting(enlarged(picture), (128, 100, 200, 160)))))
    (kept,) = visit.entries
    mask = Image.new("L", picture.size)
    mask.paste(255, (16, 100 // 8, 25, 20))
    expected = pipe.inpaint(picture, mask, 8, seeds=3, **OPTIONS | {"num_inference_steps": 6})
    assert differing(kept.picture, expected.images[0]) == 0
    assert 0 < differing(kept.picture, picture) <= 9 * 8
    assert kept.choice.steps == 6  # of 12: there are so many cells
    assert kept.caption.endswith("seed 3, inpainted")
    # Known cells are grey, as the picture is, from the beginning; what the order says of the others is blue.
    first = np.asarray(frames[0].pictures[0]).astype(int)
    blue = first[..., 2] - first[..., 0]
    assert blue[100:160, 130:220].min() > 10
    assert np.median(abs(blue[:96])) < 10


@pytest.mark.parametrize("size", [(300, 200), (64, 64), (31, 77)])
def test_pictures_of_any_size_can_be_painted_on(size: tuple[int, int]) -> None:
    picture = Image.new("RGB", size, (200, 100, 0))
    pixels, mask = fitted(painting(picture, (size[0] // 2, 0, size[0], size[1])), (32, 32))
    assert pixels.shape == (3, 32, 32)
    assert mask[:, 17:].all()
    assert not mask[:, :15].any()


def test_enlarging_for_the_editor_loses_nothing(pipe: LPDPipeline) -> None:
    picture = pipe(2, seeds=0).images[0]
    large = enlarged(picture)
    assert large.size == (256, 256)
    pixels, mask = fitted(painting(large, (15, 16, 17, 17)), (32, 32))
    assert ((pixels + 1) * 127.5).round().byte().permute(1, 2, 0).numpy().tobytes() == picture.tobytes()
    assert mask.nonzero().tolist() == [[2, 1], [2, 2]]


def test_cancel_ends_it_and_frees_the_place(studio: Studio) -> None:
    async def draw_and_cancel() -> list[Shown]:
        visit, frames = Visit(), []
        assert not visit.cancel()
        async for shown in await studio.draw(visit, replace(BAG, steps=64)):
            frames.append(shown)
            if shown.status.startswith("Step") and visit.is_drawing():
                visit.cancel()
        assert visit.entries == []
        return frames

    frames = asyncio.run(draw_and_cancel())
    assert re.fullmatch(r"Cancelled after step \d+ of 64\.", frames[-1].status)
    assert not frames[-1].finished
    asyncio.run(free(studio))


async def free(studio: Studio) -> None:
    async def until_free() -> None:
        while studio.engine.num_running or studio.engine.num_waiting:
            await asyncio.sleep(0.01)

    await asyncio.wait_for(until_free(), PATIENCE)


def test_a_page_that_is_closed_frees_the_place(studio: Studio) -> None:
    async def leave() -> None:
        visit = Visit()
        frames = await studio.draw(visit, replace(BAG, steps=64))
        await anext(frames)
        await frames.aclose()
        assert visit.handle is not None
        assert visit.handle.cancelled()
        await free(studio)

    asyncio.run(leave())


def test_visitors_see_only_their_own(studio: Studio) -> None:
    """And draw together; whoever waits is told so, and hears when it is their turn."""
    visits = [Visit() for _ in range(5)]

    async def all_draw() -> list[list[Shown]]:
        begun = [studio.draw(visit, replace(BAG, label=i, seed=i, steps=64)) for i, visit in enumerate(visits)]
        return await asyncio.gather(*map(watch, begun))

    frames = asyncio.run(all_draw())
    assert [[kept.choice.label for kept in visit.entries] for visit in visits] == [[i] for i in range(5)]
    assert [shown[0].status for shown in frames[:3]] == ["Beginning."] * 3
    for shown in frames[3:]:
        assert re.fullmatch(r"Waiting: its turn comes in \d+ steps\.", shown[0].status)
        assert shown[-1].finished


def test_one_visitor_draws_one_thing_at_a_time_and_too_many_are_told_so(studio: Studio) -> None:
    async def crowd() -> None:
        long, visit = replace(BAG, steps=64), Visit()
        frames = [await studio.compare(visit, long, COMPARED)]
        with pytest.raises(ValueError, match="a picture of yours is being drawn: wait for it, or cancel it"):
            await studio.draw(visit, BAG)
        frames += [await studio.draw(Visit(), long) for _ in range(2)]
        with pytest.raises(EngineFullError, match="2 images wait already"):
            await studio.draw(Visit(), long)
        for begun in frames:
            await anext(begun)
            await begun.aclose()

    asyncio.run(crowd())


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"steps": 65}, r"num_inference_steps must be in \[1, 64\], got 65"),
        ({"order": "zigzag"}, "got 'zigzag'"),
        ({"label": 10}, "got 10"),
        ({"seed": 2**63}, "seeds"),
    ],
)
def test_a_wrong_choice_is_refused(changed: dict[str, Any], sentence: str, studio: Studio) -> None:
    visit = Visit()
    with pytest.raises(ValueError, match=sentence):
        asyncio.run(watch(studio.draw(visit, replace(BAG, **changed))))
    assert visit == Visit()


def test_an_empty_mask_is_refused(studio: Studio) -> None:
    picture = Image.new("RGB", (256, 256))
    for value, sentence in (
        (None, "there is no picture to paint on"),
        ({"background": None, "layers": [], "composite": None}, "there is no picture to paint on"),
        ({"background": picture, "layers": [], "composite": picture}, "nothing is painted"),
        (painting(picture, (0, 0, 256, 256)), "leaves no cell"),
    ):
        with pytest.raises(ValueError, match=sentence):
            asyncio.run(watch(studio.inpaint(Visit(), BAG, value)))


def handler(studio: Studio, name: str) -> Any:
    """The function behind a button of the page."""
    page = build_page(studio)
    (found,) = [
        function.fn
        for function in page.fns.values()
        for block, event in function.targets
        if event == "click" and page.blocks[block].elem_id == name
    ]
    return found


def test_the_page_says_a_refusal_in_its_status_and_in_a_message(studio: Studio) -> None:
    import gradio

    async def click() -> None:
        frames = handler(studio, "draw")(Visit(), 8, 12, 4.0, 1.0, "locality", 0.5, False)
        (status,) = (await anext(frames)).values()
        assert status == "Error: seed must be a whole number, got 0.5"
        with pytest.raises(gradio.Error, match="must be a whole number"):
            await anext(frames)

    asyncio.run(click())


def test_closing_the_pages_generator_cancels(studio: Studio) -> None:
    """Does what Gradio does when a page is closed."""

    async def leave() -> None:
        visit = Visit()
        frames = handler(studio, "compare")(visit, 8, 64, 4.0, 1.0, "locality", 0, True)
        await anext(frames)
        assert visit.is_drawing()
        await frames.aclose()
        assert not visit.is_drawing()

    asyncio.run(leave())


def test_the_controls_are_a_choice() -> None:
    assert choice(8, 12.0, 4.0, 1.0, "locality", 3.0, False) == BAG
    assert choice(-1, 12, 4.0, 1.0, "locality", None, True) == replace(BAG, label=None, seed=None)


def test_the_page_asks_no_other_host_and_ends_in_order() -> None:
    with demo_page("--max-images", "1") as (address, process):
        answer = httpx.get(address)
        assert answer.status_code == 200
        policy = answer.headers["content-security-policy"]
        assert "default-src 'self'" in policy
        assert "http" not in policy
        loaded = re.findall(r'<(?:script|link|img|iframe)\b[^>]*?(?:src|href)="([^"]+)"', answer.text)
        assert loaded
        assert [url for url in loaded if re.match(r"(?:https?:)?//", url)] == []
        styles = [httpx.get(address + "theme.css").raise_for_status().text]
        styles += [httpx.get(address + url.removeprefix("./")).text for url in loaded if url.endswith(".css")]
        for style in styles:
            assert not re.search(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//", style)
        assert '"analytics_enabled":false' in answer.text.replace(" ", "").replace("False", "false")
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0


def test_what_cannot_start_ends_with_a_sentence(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for options, sentence in (
            (["--port", str(port)], f"cannot listen on host '127.0.0.1', port {port}: Address already in use"),
            (["--port", "0", "--model", str(tmp_path / "nothing")], "nothing"),
            (["--port", "0", "--device", "tpu"], "device must be one of"),
            (["--port", "0", "--max-images", "0"], "max_images must be at least 1, got 0"),
        ):
            ended = CliRunner(env={"COLUMNS": "200", "TERM": "dumb"}).invoke(app, ["demo", *options])
            assert ended.exit_code == 2
            assert ended.stderr.startswith("error: ")
            assert sentence in ended.stderr


def test_the_extra_is_named() -> None:
    sentence = missing_from_extras(ModuleNotFoundError("No module named 'gradio'", name="gradio"))
    assert sentence == "lpd demo needs gradio, which the [web] extra brings: pip install 'lpd-ext[web]'"
