"""`POST /v1/images/edits`: OpenAI's masks, streams, and files that are no pictures."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("openai")

import httpx
import openai
from lpd_tools.serve.child import served
from PIL import Image

from lpd_ext.pipeline import LPDPipeline

PATIENCE = 60
CLOTHES = ("--model", "fashion_mnist")


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with served(*CLOTHES, "--max-body-bytes", "300000") as (found, _):
        yield found


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=PATIENCE) as opened:
        yield opened


@pytest.fixture(scope="module")
def pipe() -> LPDPipeline:
    return LPDPipeline.from_pretrained("fashion_mnist")


@pytest.fixture(scope="module")
def picture(pipe: LPDPipeline) -> Image.Image:
    return pipe("sneaker", seeds=4).images[0]


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def right_half() -> Image.Image:
    """White where to paint, as diffusers has it."""
    mask = Image.new("L", (32, 32), 0)
    mask.paste(255, (16, 0, 32, 32))
    return mask


def transparent_right_half(image: Image.Image) -> Image.Image:
    """Transparent where to paint, as OpenAI has it."""
    image = image.convert("RGBA")
    image.putalpha(right_half().point(lambda white: 255 - white))
    return image


def test_an_edit_is_the_librarys_byte_for_byte(client: Any, pipe: LPDPipeline, picture: Image.Image) -> None:
    expected = pipe.inpaint(picture, right_half(), "sneaker", seeds=[3, 4], num_inference_steps=5)
    masks = {"white": png(right_half()), "transparent": png(transparent_right_half(Image.new("RGB", (32, 32))))}
    for mask in masks.values():
        answer = client.images.edit(
            image=png(picture),
            mask=mask,
            prompt="sneaker",
            n=2,
            size="32x32",
            extra_body={"seed": 3, "num_inference_steps": 5},
        )
        assert [base64.b64decode(image.b64_json) for image in answer.data] == list(map(png, expected.images))
        assert [image.seed for image in answer.data] == [3, 4]
    for image in expected.images:
        assert image.crop((0, 0, 16, 32)).tobytes() == picture.crop((0, 0, 16, 32)).tobytes()


def test_without_a_mask_the_images_transparent_parts_are_painted(client: Any, pipe: LPDPipeline) -> None:
    source = transparent_right_half(Image.new("RGB", (32, 32), "black"))
    answer = client.images.edit(image=png(source), prompt="7", extra_body={"seed": 1})
    expected = pipe.inpaint(source, right_half(), 7, seeds=1)
    assert base64.b64decode(answer.data[0].b64_json) == png(expected.images[0])


def test_a_stream_of_an_edit(client: Any, pipe: LPDPipeline, picture: Image.Image) -> None:
    events = list(
        client.images.edit(
            image=[png(picture)],
            mask=png(right_half()),
            prompt="bag",
            stream=True,
            partial_images=2,
            extra_body={"seed": 2, "num_inference_steps": 16},
        )
    )
    assert events[-1].type == "image_edit.completed"
    assert {event.type for event in events[:-1]} <= {"image_edit.partial_image"}
    expected = pipe.inpaint(picture, right_half(), "bag", seeds=2, num_inference_steps=16)
    assert base64.b64decode(events[-1].b64_json) == png(expected.images[0])
    for event in events:
        shown = Image.open(io.BytesIO(base64.b64decode(event.b64_json)))
        assert shown.crop((0, 0, 16, 32)).tobytes() == picture.crop((0, 0, 16, 32)).tobytes()


def test_bad_edits_are_400_and_say_why(address: str, picture: Image.Image) -> None:
    good: dict[str, Any] = {"image": png(picture), "mask": png(right_half())}
    bomb = Image.new("1", (10_000, 10_000))
    for files, fields, sentence in (
        (good, {"prompt": "shoe of a horse"}, "shoe of a horse"),
        (good, {}, "prompt"),
        (good, {"prompt": "bag", "n": "many"}, "n: "),
        (good, {"prompt": "bag", "n": "11"}, "n must be at most 10, got 11"),
        (good, {"prompt": "bag", "guidance_scale": "inf"}, "finite"),
        (good, {"prompt": "bag", "markers": "x"}, "Unknown parameter: 'markers'"),
        (good, {"prompt": "bag", "num_inference_steps": "0"}, "num_inference_steps"),
        ({"mask": good["mask"]}, {"prompt": "bag"}, "image must be one file, got 0"),
        ({"image": good["image"]}, {"prompt": "bag"}, "mask must be given, or the image must have transparent parts"),
        (good | {"mask": png(Image.new("L", (32, 32)))}, {"prompt": "bag"}, "is empty"),
        (good | {"mask": png(Image.new("L", (16, 32), 255))}, {"prompt": "bag"}, "has 16 x 32 pixels"),
        ({"image": png(Image.new("RGB", (30, 32))), "mask": png(Image.new("L", (30, 32), 255))}, {"prompt": "1"}, "30"),
        (good | {"image": b"no picture"}, {"prompt": "bag"}, "no image format"),
        (good | {"image": good["image"][:100]}, {"prompt": "bag"}, ""),
        (good | {"image": png(bomb)}, {"prompt": "bag"}, "pixels are more than"),
    ):
        answer = httpx.post(f"{address}/v1/images/edits", data=fields, files=files, timeout=PATIENCE)
        assert answer.status_code == 400, (fields, answer.text)
        assert sentence in answer.json()["error"]["message"]
    url = f"{address}/v1/images/edits"
    assert httpx.post(url, json={"prompt": "bag"}).status_code == 400
    answer = httpx.post(url, data={"prompt": "bag", "mask": "text"}, files={"image": good["image"]})
    assert answer.json()["error"]["message"] == "mask must be a file"
    cut = httpx.Request("POST", url, data={"prompt": "bag"}, files=good).read()
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    assert httpx.post(url, content=cut[: len(cut) // 2], headers=headers).status_code == 400
    many = [("image", good["image"]) for _ in range(5)]
    assert httpx.post(url, data={"prompt": "bag"}, files=many).status_code == 400
    assert httpx.post(url, data={"prompt": "bag"}, files={"image": b"x" * 400_000}).status_code == 413


def test_pictures_of_another_size_are_fitted_on_request(client: Any, picture: Image.Image) -> None:
    large = picture.resize((100, 80))
    mask = right_half().resize((100, 80))
    for resize in ("stretch", "crop"):
        answer = client.images.edit(image=png(large), mask=png(mask), prompt="3", extra_body={"resize": resize})
        shown = Image.open(io.BytesIO(base64.b64decode(answer.data[0].b64_json)))
        assert shown.size == (32, 32)
    with pytest.raises(openai.BadRequestError, match="100 x 80"):
        client.images.edit(image=png(large), mask=png(mask), prompt="3")
