"""The page of `lpd demo` in headless Chromium: `make test-web`. Each step of the engine is slowed, to be watched."""

from __future__ import annotations

import io
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("gradio")
pytest.importorskip("playwright")

import uvicorn
from lpd_tools.listening import listen
from lpd_tools.web.page import COMPARED
from lpd_tools.web.server import create_app
from lpd_tools.web.studio import Studio
from lpd_tools.web.watch import StepClock
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

from lpd_ext.bundled import DEFAULT_MODEL
from lpd_ext.engine import StepReport
from lpd_ext.pipeline import LPDPipeline

CHROMIUM = os.environ.get("LPD_CHROMIUM") or next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), "")
SCREENSHOT = os.environ.get("LPD_SCREENSHOT")  # where to write one
PATIENCE = 60.0
pytestmark = [
    pytest.mark.skipif(not CHROMIUM, reason="no Chromium: Debian has it as `chromium`"),
    pytest.mark.filterwarnings("default"),  # those of Gradio and pandas, whose server runs in this process
]
expect.set_options(timeout=1000 * PATIENCE)


@dataclass
class Server:
    """A page that is served, its studio, and how long each step is made to take."""

    address: str
    studio: Studio
    pace: float = 0.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    measured = StepClock.on_step

    def slowly(clock: StepClock, report: StepReport) -> None:
        measured(clock, report)
        time.sleep(found.pace)

    with pytest.MonkeyPatch.context() as patch, listen("127.0.0.1", 0) as bound:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("gradio")))
        patch.setattr(StepClock, "on_step", slowly)
        with Studio(LPDPipeline.from_pretrained(), DEFAULT_MODEL, max_images=3) as studio:
            found = Server("http://{}:{}/".format(*bound.getsockname()), studio)
            running = uvicorn.Server(
                uvicorn.Config(create_app(studio), log_level="critical", timeout_graceful_shutdown=1)
            )
            thread = threading.Thread(target=running.run, kwargs={"sockets": [bound]})
            thread.start()
            yield found
            running.should_exit = True
            thread.join(PATIENCE)
            assert not thread.is_alive()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        # Chromium's sandbox needs rights that containers do not have; the editor draws by WebGL, here on the CPU.
        options = ["--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        yield opened
        opened.close()


@pytest.fixture
def visitor(server: Server, browser: Browser) -> Iterator[Callable[[], Page]]:
    """Opens the page for one more visitor; no visitor's console may have an error, and none may ask another host."""
    complaints: list[str] = []
    contexts = []

    def hear(kind: str, text: str) -> None:
        if kind == "error":
            complaints.append(text)

    def asked(url: str) -> None:
        if not url.startswith((server.address, "data:", "blob:")):
            complaints.append(f"asked {url}")

    def open_page() -> Page:
        contexts.append(browser.new_context(viewport={"width": 1180, "height": 900}))
        page = contexts[-1].new_page()
        page.on("console", lambda message: hear(message.type, message.text))
        page.on("pageerror", lambda error: hear("error", str(error)))
        page.on("request", lambda request: asked(request.url))
        page.goto(server.address)
        expect(page.locator("button#draw")).to_be_visible()
        return page

    server.pace = 0.0
    yield open_page
    server.pace = 0.0
    for context in contexts:
        context.close()
    assert complaints == []


def status(page: Page) -> Any:
    return page.locator("#status textarea, #status input").first


def tab(page: Page, name: str) -> None:
    page.get_by_role("tab", name=name).click()


def set_steps(page: Page, steps: int) -> None:
    number = page.locator("#steps input[type=number]")
    number.fill(str(steps))
    number.press("Enter")


def gallery(page: Page) -> list[Image.Image]:
    """Its pictures as their files are, newest first."""
    urls = [image.get_attribute("src") for image in page.locator("#gallery .grid-wrap img").all()]
    return [Image.open(io.BytesIO(page.request.get(url).body())) for url in urls if url]


def draw(page: Page, steps: int = 4) -> None:
    """One more picture."""
    set_steps(page, steps)
    count = page.locator("#gallery .grid-wrap img").count()
    page.locator("button#draw").click()
    expect(page.locator("#gallery .grid-wrap img")).to_have_count(count + 1)
    expect(status(page)).to_have_value(re.compile(rf"Drawn in .*: {steps} steps"))


def test_a_picture_forms_and_lands_in_the_visitors_own_gallery(server: Server, visitor: Callable[[], Page]) -> None:
    page, other = visitor(), visitor()
    server.pace = 0.15
    set_steps(page, 16)
    page.locator("button#draw").click()
    seen, said = set(), set()
    until = time.monotonic() + PATIENCE
    while "Drawn" not in (now := status(page).input_value()):
        assert time.monotonic() < until
        said.add(now)
        if picture := page.locator("#picture img").all():
            seen.add(picture[0].get_attribute("src"))
        time.sleep(0.05)
    assert len(seen) > 3
    assert sum(bool(re.fullmatch(r"Step \d+ of 16, [0-9.]+ ms per step", text)) for text in said) > 3
    expect(page.locator("#gallery .grid-wrap img")).to_have_count(1)
    (drawn,) = gallery(page)
    assert drawn.size == (64, 64)
    assert drawn.text["lpd:steps"] == "16"
    assert drawn.text["lpd:seed"] == page.locator("#seed input").input_value()
    server.pace = 0.0
    draw(other)
    expect(other.locator("#gallery .grid-wrap img")).to_have_count(1)
    assert gallery(other)[0].text["lpd:steps"] == "4"
    expect(page.locator("#gallery .grid-wrap img")).to_have_count(1)


def test_what_is_painted_over_is_drawn_anew(visitor: Callable[[], Page]) -> None:
    page = visitor()
    draw(page)
    tab(page, "Inpaint")
    page.locator("button#take").click()
    canvas = page.locator("#editor canvas").first
    expect(canvas).to_be_visible()
    page.wait_for_timeout(1000)  # the editor lays itself out
    box = canvas.bounding_box()
    assert box is not None
    across = [box["x"] + box["width"] * part for part in (0.45, 0.55)]
    middle = box["y"] + box["height"] / 2
    page.mouse.move(across[0], middle)
    page.mouse.down()
    page.mouse.move(across[1], middle, steps=8)
    page.mouse.up()
    page.locator("button#inpaint").click()
    expect(page.locator("#gallery .grid-wrap img")).to_have_count(2)
    after, before = gallery(page)
    assert after.text["lpd:command"] == '"demo inpaint"'
    rows, columns = (np.asarray(after) != np.asarray(before)).any(-1).nonzero()
    assert len(rows) > 0
    # What is not painted is as it was, to the pixel: the stroke is far from the picture's edges.
    assert min(rows.min(), columns.min()) >= 8
    assert max(rows.max(), columns.max()) < 56


def test_cancel_frees_the_place(server: Server, visitor: Callable[[], Page]) -> None:
    first, second = visitor(), visitor()
    server.pace = 0.3
    tab(first, "Compare orders")
    set_steps(first, 64)
    first.locator("button#compare").click()
    expect(status(first)).to_have_value(re.compile("Step"))
    set_steps(second, 64)
    second.locator("button#draw").click()
    expect(status(second)).to_have_value(re.compile("Waiting"))
    first.locator("button#cancel").click()
    expect(status(first)).to_have_value(re.compile(r"Cancelled after step \d+ of 64\."))
    expect(status(second)).to_have_value(re.compile("Step"))
    second.locator("button#cancel").click()
    expect(status(second)).to_have_value(re.compile("Cancelled after"))
    wait_until(lambda: server.studio.engine.num_running == 0)


def test_a_page_that_is_closed_frees_its_place(server: Server, visitor: Callable[[], Page]) -> None:
    for pace in (0.3, 5.0):  # while previews come, and while none does
        page = visitor()
        server.pace = pace
        set_steps(page, 64)
        page.locator("button#draw").click()
        wait_until(lambda: server.studio.engine.num_running == 1)
        drawn_before = server.studio.engine.num_running
        page.context.close()
        wait_until(lambda: server.studio.engine.num_running == 0)
        assert (drawn_before, server.studio.engine.num_waiting) == (1, 0)
        server.pace = 0.0


def wait_until(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + PATIENCE / 4  # in which 64 steps are not drawn
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_an_error_is_a_sentence(visitor: Callable[[], Page]) -> None:
    page = visitor()
    tab(page, "Inpaint")
    page.locator("button#inpaint").click()
    sentence = "there is no picture to paint on: upload one, or take one that was drawn here"
    expect(status(page)).to_have_value(f"Error: {sentence}")
    expect(page.get_by_text(sentence, exact=True)).to_be_visible()
    draw_tab = page.get_by_role("tab", name="Draw")
    draw_tab.click()
    draw(page)  # nothing is broken


def test_orders_are_compared_side_by_side(server: Server, visitor: Callable[[], Page]) -> None:
    page = visitor()
    page.locator("#class input").click()
    page.get_by_role("option", name="clock").click()
    expect(page.locator("#class input")).to_have_value("clock")
    for _ in range(3):
        draw(page, steps=20)
    tab(page, "Compare orders")
    server.pace = 0.4
    page.locator("button#compare").click()
    expect(status(page)).to_have_value(re.compile("Step (?:9|10|11) of 20"))
    for order in COMPARED:
        expect(page.locator(f"#compared-{order} img")).to_be_visible()
    if SCREENSHOT:
        page.screenshot(path=SCREENSHOT)
        assert Path(SCREENSHOT).stat().st_size < 300_000
    server.pace = 0.0
    expect(page.locator("#gallery .grid-wrap img")).to_have_count(6)
    newest = gallery(page)[:3]
    assert {picture.text["lpd:class"] for picture in newest} == {'"clock"'}
    assert [picture.text["lpd:order"] for picture in newest] == [f'"{order}"' for order in COMPARED]
    assert len({picture.text["lpd:seed"] for picture in newest}) == 1
