"""`lpd serve`, driven by OpenAI's own client: images, streams, refusals, clients that leave, an end in order."""

from __future__ import annotations

import base64
import concurrent.futures
import contextlib
import io
import json
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("httpx")
pytest.importorskip("openai")

import httpx
import openai
from lpd_tools.cli import app
from lpd_tools.extras import missing_from_extras
from lpd_tools.serve.child import served
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from typer.testing import CliRunner

from lpd_ext.pipeline import LPDPipeline

PATIENCE = 60
CLOTHES = ("--model", "fashion_mnist")
LIMITS = ("--max-images", "4", "--max-waiting", "8", "--max-body-bytes", "100000", "--body-seconds", "2")


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with served(*CLOTHES, *LIMITS) as (found, _):
        yield found


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=PATIENCE) as opened:
        yield opened


@pytest.fixture(scope="module")
def pipe() -> LPDPipeline:
    return LPDPipeline.from_pretrained("fashion_mnist")


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def picture_of(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text)))


def metric(address: str, name: str, **labels: str) -> float:
    """The value of a sample at /metrics."""
    for family in text_string_to_metric_families(httpx.get(f"{address}/metrics").text):
        for sample in family.samples:
            if sample.name == name and labels.items() <= sample.labels.items():
                return sample.value
    return 0.0


def wait_until(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_images_are_those_of_the_library_byte_for_byte(client: Any, pipe: LPDPipeline) -> None:
    sampling: dict[str, Any] = {"num_inference_steps": 12, "guidance_scale": 3.0, "temperature": 0.9, "top_k": 40}
    answer = client.images.generate(
        model="fashion_mnist",
        prompt="ankle boot",
        n=3,
        size="32x32",
        response_format="b64_json",
        extra_body={"seed": 7} | sampling,
    )
    expected = pipe(["ankle boot"] * 3, seeds=7, **sampling)
    assert [base64.b64decode(image.b64_json) for image in answer.data] == list(map(png, expected.images))
    assert [image.seed for image in answer.data] == [7, 8, 9]
    assert answer.size == "32x32"
    assert answer.output_format == "png"
    assert answer.usage.output_tokens == 3 * 64


@pytest.mark.parametrize(("kind", "mime"), [("png", "PNG"), ("webp", "WEBP"), ("jpeg", "JPEG")])
def test_formats(client: Any, pipe: LPDPipeline, kind: str, mime: str) -> None:
    answer = client.images.generate(prompt="3", output_format=kind, extra_body={"seed": 1})
    picture = picture_of(answer.data[0].b64_json)
    assert picture.format == mime
    (expected,) = pipe(3, seeds=1).images
    if kind != "jpeg":  # lossless
        assert picture.convert("RGB").tobytes() == expected.convert("RGB").tobytes()
    smaller = client.images.generate(prompt="3", output_format=kind, output_compression=10, extra_body={"seed": 1})
    assert (len(smaller.data[0].b64_json) < len(answer.data[0].b64_json)) == (kind != "png")


def test_a_stream_shows_the_image_forming(client: Any, pipe: LPDPipeline) -> None:
    options: dict[str, Any] = {"seed": 5, "num_inference_steps": 30}
    events = list(client.images.generate(prompt="bag", stream=True, partial_images=2, extra_body=options))
    assert len(events) in (2, 3)  # a preview that is late gives way to the next one
    assert {event.type for event in events[:-1]} == {"image_generation.partial_image"}
    assert [event.partial_image_index for event in events[:-1]] == list(range(len(events) - 1))
    last = events[-1]
    assert last.type == "image_generation.completed"
    assert base64.b64decode(last.b64_json) == png(pipe("bag", seeds=5, num_inference_steps=30).images[0])
    assert last.usage.output_tokens == 64
    assert all(picture_of(event.b64_json).size == (32, 32) for event in events)
    (only,) = client.images.generate(prompt="bag", stream=True, extra_body={"seed": 5})
    assert only.type == "image_generation.completed"


def test_models(client: Any) -> None:
    (model,) = client.models.list().data
    assert model.id == "fashion_mnist"
    assert model.class_names[9] == "ankle boot"
    assert client.models.retrieve("fashion_mnist").id == "fashion_mnist"
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.models.retrieve("dall-e-3")


@pytest.mark.parametrize(
    ("change", "param", "message"),
    [
        ({"prompt": "boot of an ankel"}, None, "boot of an ankel"),
        ({"prompt": "10"}, None, r"labels\[0\] must be None or an integer in \[0, 10\), got 10"),
        ({"prompt": ""}, "prompt", "at least 1 character"),
        ({"prompt": None}, "prompt", "valid string"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 11}, "n", "n must be at most 10, got 11"),
        ({"n": 10**30}, "n", "n must be at most 10"),
        ({"n": "two"}, "n", "valid integer"),
        ({"n": 2, "stream": True}, "n", "n must be 1 with stream, got 2"),
        ({"size": "1024x1024"}, "size", "size must be '32x32' or 'auto', got '1024x1024'"),
        ({"response_format": "url"}, "response_format", "b64_json"),
        ({"output_format": "gif"}, "output_format", "png"),
        ({"background": "transparent"}, "background", "opaque"),
        ({"partial_images": 4, "stream": True}, "partial_images", "less than or equal to 3"),
        ({"partial_images": 2}, "partial_images", "needs stream"),
        ({"num_inference_steps": 65}, None, r"num_inference_steps must be in \[1, 64\], got 65"),
        ({"guidance_scale": -1e7}, "guidance_scale", "greater than or equal to -1000000"),
        ({"temperature": float("nan")}, "temperature", "finite number"),
        ({"temperature": float("inf")}, "temperature", "finite number"),
        ({"order": "sideways"}, None, "sideways"),
        ({"seed": 2**53}, "seed", "less than"),
        ({"steps": 3}, "steps", "Unknown parameter: 'steps'"),
    ],
)
def test_what_cannot_be_drawn_is_a_400_that_says_why(
    address: str, change: dict[str, Any], param: str | None, message: str
) -> None:
    body = json.dumps({"prompt": "bag"} | change)
    answer = httpx.post(f"{address}/v1/images/generations", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert re.search(message, error["message"]), error


def test_other_refusals(client: Any, address: str) -> None:
    with pytest.raises(openai.BadRequestError, match="1024x1024"):
        client.images.generate(prompt="bag", size="1024x1024")
    with pytest.raises(openai.NotFoundError) as found:
        client.images.generate(model="gpt-image-2", prompt="bag")
    assert found.value.code == "model_not_found"
    url = f"{address}/v1/images/generations"
    assert httpx.get(url).status_code == 405
    assert httpx.get(f"{address}/v1/nothing").json()["error"]["message"] == "Not Found"
    for content in (b"", b"{", b"[" * 90000, b'{"prompt": ' + b"1" * 5000 + b"}", b"\xff\xfe", b"null", b"[]"):
        answer = httpx.post(url, content=content, headers={"Content-Type": "application/json"})
        assert answer.status_code == 400, content[:20]
        assert answer.json()["error"]["message"]
    answer = httpx.post(url, content=b" " * 100001)
    assert (answer.status_code, answer.json()["error"]["type"]) == (413, "invalid_request_error")
    answer = httpx.post(url, content=(b" " * 1000 for _ in range(101)))  # without Content-Length
    assert answer.status_code == 413


def test_a_body_that_dribbles_is_given_up(address: str) -> None:
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE) as slow:
        slow.sendall(b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n{")
        assert slow.recv(1000).startswith(b"HTTP/1.1 408")


def slow_socket(address: str) -> socket.socket:
    host, port = address.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=PATIENCE)


@pytest.mark.parametrize("sent", [b"", b"P", b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\n"])
def test_a_head_that_does_not_come_is_given_up(address: str, sent: bytes) -> None:
    with slow_socket(address) as slow:
        begun = time.monotonic()
        slow.sendall(sent)
        answer = b""
        while part := slow.recv(1000):
            answer += part
        assert 1.5 < time.monotonic() - begun < 20
        if not sent:  # as of browsers that connect ahead
            assert answer == b""
            return
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 408 Request Timeout")
        assert json.loads(body)["error"]["message"] == "the request's head did not arrive within 2 seconds"


def test_a_head_that_dribbles_is_given_up_and_so_is_the_second_of_a_connection(address: str) -> None:
    with slow_socket(address) as slow:
        slow.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        first = b""
        while not first.endswith(b'{"status":"ok"}'):
            first += slow.recv(1000)
        begun = time.monotonic()
        slow.settimeout(0.3)
        answer = b""
        for letter in b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"x" * 100:
            try:
                slow.sendall(bytes([letter]))
                answer = slow.recv(1000)
            except TimeoutError:
                continue
            break
        assert answer.startswith(b"HTTP/1.1 408")
        assert 1.5 < time.monotonic() - begun < 20


def read_answer(connection: socket.socket) -> bytes:
    """Reads one response with a Content-Length."""
    answer = b""
    while b"\r\n\r\n" not in answer:
        answer += connection.recv(10_000)
    head, _, body = answer.partition(b"\r\n\r\n")
    (length,) = re.findall(rb"(?i)content-length: (\d+)", head)
    while len(body) < int(length):
        body += connection.recv(100_000)
    return answer


def test_answers_and_pauses_between_requests_may_take_longer_than_a_head() -> None:
    body = json.dumps({"prompt": "1", "n": 8, "num_inference_steps": 64, "guidance_scale": 3.0}).encode()
    head = f"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
    options = ("--max-images", "1", "--body-seconds", "0.2")
    with served(*CLOTHES, *options) as (address, _), slow_socket(address) as connection:
        for _ in range(2):
            connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
            assert read_answer(connection).startswith(b"HTTP/1.1 200")
            time.sleep(0.5)


def test_a_body_after_a_refused_key_gets_no_second_answer(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("key\n")
    options = ("--api-keys", str(tmp_path / "keys"), "--body-seconds", "0.2")
    with served(*CLOTHES, *options) as (address, _), slow_socket(address) as connection:
        connection.sendall(b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\n")
        answer = read_answer(connection)
        assert answer.startswith(b"HTTP/1.1 401")
        assert b"connection: close" in answer.lower()
        with contextlib.suppress(OSError):  # closed by then
            connection.sendall(b"{}  ")
        with contextlib.suppress(ConnectionResetError):
            assert connection.recv(1000) == b""


def test_more_than_may_wait_is_429(client: Any, address: str) -> None:
    def ask(seed: int) -> Any:
        options = {"seed": seed, "num_inference_steps": 64, "guidance_scale": 4.0}
        try:
            return client.images.generate(prompt="1", n=4, extra_body=options)
        except openai.RateLimitError as error:
            return error

    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(ask, range(12)))
    refused = [answer for answer in answers if isinstance(answer, openai.RateLimitError)]
    assert 0 < len(refused) < 12
    for error in refused:
        assert int(error.response.headers["retry-after"]) >= 1
        assert "images wait already" in str(error)
    assert metric(address, "lpd_answers_total", route="/v1/images/generations", status="429") >= len(refused)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_gives_its_places_back(address: str, client: Any, stream: bool) -> None:
    def leave() -> None:
        body = {"prompt": "2", "num_inference_steps": 64, "guidance_scale": 4.0, "n": 1 if stream else 8}
        url = f"{address}/v1/images/generations"
        with httpx.stream("POST", url, json=body | {"stream": stream}, timeout=0.05) as answer:
            answer.read()

    for _ in range(3):
        with pytest.raises(httpx.ReadTimeout):
            leave()
    wait_until(lambda: metric(address, "lpd_images_running") == metric(address, "lpd_images_waiting") == 0)
    assert client.images.generate(prompt="2").data


def test_health_and_metrics(address: str, client: Any) -> None:
    assert httpx.get(f"{address}/health").json() == {"status": "ok"}
    assert httpx.get(f"{address}/ready").status_code == 200
    before = metric(address, "lpd_images_total"), metric(address, "lpd_step_images_sum")
    client.images.generate(prompt="4", n=2, extra_body={"num_inference_steps": 6})
    assert metric(address, "lpd_images_total") == before[0] + 2
    assert metric(address, "lpd_step_images_sum") == before[1] + 2 * 6
    assert metric(address, "lpd_cache_slots") == 4
    assert metric(address, "lpd_cache_bytes") == 2 * 6 * 8 * 192 * 64 * 4


def test_keys(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("first-key\n\nsecond-key\n")
    with served(*CLOTHES, "--api-keys", str(tmp_path / "keys")) as (address, _):
        for key in ("first-key", "second-key"):
            with openai.OpenAI(base_url=f"{address}/v1", api_key=key) as client:
                assert client.images.generate(prompt="1").data
        for key in ("first-ke", "first-key2", "none"):
            refused = pytest.raises(openai.AuthenticationError)
            with openai.OpenAI(base_url=f"{address}/v1", api_key=key) as client, refused as error:
                client.models.list()
            assert error.value.code == "invalid_api_key"
        assert httpx.get(f"{address}/metrics").status_code == 401
        assert httpx.get(f"{address}/health").status_code == 200


def test_sigterm_answers_what_is_under_way_and_ends_with_0() -> None:
    with (
        served(*CLOTHES, "--max-images", "1") as (address, process),
        openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client,
        concurrent.futures.ThreadPoolExecutor(3) as pool,
    ):
        options: dict[str, Any] = {"prompt": "1", "extra_body": {"num_inference_steps": 64, "guidance_scale": 3.0}}
        under_way = [pool.submit(client.images.generate, n=6, **options) for _ in range(2)]
        wait_until(lambda: metric(address, "lpd_images_running") == 1)
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: bool(httpx.get(f"{address}/ready").status_code == 503))
        with pytest.raises(openai.InternalServerError, match="shutting down") as refused:
            client.images.generate(**options)
        assert refused.value.status_code == 503
        assert [len(future.result(PATIENCE).data) for future in under_way] == [6, 6]
        assert process.wait(PATIENCE) == 0


def test_what_cannot_start_ends_with_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for options, sentence in (
            (["--port", str(port)], f"cannot listen on host '127.0.0.1', port {port}: Address already in use"),
            (["--port", "0", "--host", "no.such.host.invalid"], "cannot listen on host 'no.such.host.invalid'"),
            (["--port", "0", "--model", str(tmp_path / "nothing")], "nothing"),
            (["--port", "0", "--api-keys", str(tmp_path / "empty")], "api_keys must name a file with one key a line"),
            (["--port", "0", "--api-keys", str(tmp_path / "none")], "No such file"),
            (["--max-images", "0"], "max_images must be at least 1, got 0"),
        ):
            ended = CliRunner(env={"COLUMNS": "200", "TERM": "dumb"}).invoke(app, ["serve", *options])
            assert ended.exit_code == 2
            assert ended.stderr.startswith("error: ")
            assert sentence in ended.stderr


def test_a_library_that_is_missing_is_named_with_its_extra() -> None:
    sentence = missing_from_extras(ModuleNotFoundError("No module named 'uvicorn'", name="uvicorn"))
    assert sentence == "lpd serve needs uvicorn, which the [serve] extra brings: pip install 'lpd-ext[serve]'"
    assert missing_from_extras(ModuleNotFoundError("No module named 'numpy'", name="numpy")) is None
