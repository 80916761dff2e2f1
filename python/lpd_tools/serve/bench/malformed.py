"""Malformed requests: wrong types, huge numbers, decompression bombs, truncated files, clients that leave."""

from __future__ import annotations

import io
import json
import random
import socket
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import httpx
from PIL import Image

from lpd_tools.progress import track
from lpd_tools.serve.bench.settings import ServeBench
from lpd_tools.serve.child import served

_PARALLEL = 8
_SECONDS = 30.0  # after which an answer counts as none
_GOOD = {"prompt": "1", "seed": 5, "num_inference_steps": 4}
_NAMES = (
    *("prompt", "n", "size", "model", "seed", "num_inference_steps", "guidance_scale", "temperature", "top_k", "top_p"),
    *("order", "stream", "partial_images", "output_format", "output_compression", "response_format", "user", "x"),
)
_LETTERS = " A\0\n\ud7ff\ue000\U0001f600\u202e"
_PATHS = (
    *("/", "//", "/%2e%2e", "/v1", "/v1/images/generations/", "/v1/models/%00", "/v1/models/" + "x" * 3000),
    *("/metrics", "/ready"),
)
_HEAD = (
    "POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n"
)
# Every request must get one of these answers; a 500, or none, is a bug.
ALLOWED = frozenset({200, 307, 400, 404, 405, 408, 413, 429, 499})


def malformed(config: ServeBench) -> dict[str, Any]:
    """Sends them all, counts answers by status, and checks that a good request still gets the same answer."""
    options = ["--max-images", "4", "--max-waiting", "16", "--body-seconds", "2", "--max-body-bytes", "2000000"]
    with served(*options) as (address, process):
        before = _good_image(address)
        statuses: Counter[str] = Counter()
        with ThreadPoolExecutor(_PARALLEL) as pool:
            jobs = pool.map(lambda i: send(address, random.Random(f"{config.seed} {i}")), range(config.requests))
            for status in track(jobs, "malformed requests", config.requests):
                statuses[status] += 1
        slots_free = _idle(address)
        return {
            "requests": config.requests,
            "answers": dict(sorted(statuses.items())),
            "not allowed": sum(n for status, n in statuses.items() if status.isdigit() and int(status) not in ALLOWED),
            "no answer": statuses["none"],
            "slots free afterwards": slots_free,
            "same image afterwards": _good_image(address) == before,
            "alive": process.poll() is None,
        }


def _good_image(address: str) -> str:
    answer = httpx.post(f"{address}/v1/images/generations", json=_GOOD, timeout=_SECONDS)
    return str(answer.raise_for_status().json()["data"][0]["b64_json"])


def _idle(address: str) -> bool:
    until = time.monotonic() + _SECONDS
    while time.monotonic() < until:
        lines = httpx.get(f"{address}/metrics", timeout=_SECONDS).text.splitlines()
        values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        if float(values["lpd_images_running"]) == float(values["lpd_images_waiting"]) == 0:
            return True
        time.sleep(0.05)
    return False


def send(address: str, rng: random.Random) -> str:
    """Sends one request of any kind; returns its status, "left" if the client left, "none" without an answer."""
    kinds = (_send_json, _send_json, _send_json, _send_bytes, _send_form, _send_form, _send_path, _leave, _cut_body)
    try:
        return rng.choice(kinds)(address, rng)
    except (httpx.TimeoutException, TimeoutError):
        return "none"
    except (httpx.TransportError, OSError):
        return "left"  # the server closed on us, as after 413


def _value(rng: random.Random, depth: int = 0) -> Any:
    """Draws any JSON value, borderline ones included."""
    kind = rng.randrange(12 if depth < 3 else 9)
    if kind == 0:
        return None
    if kind == 1:
        return rng.random() < 0.5
    if kind == 2:
        return rng.randint(-5, 70)
    if kind == 3:
        return rng.choice((2**31, 2**53, 2**63, -(2**63), 10**30, 10**400))
    if kind == 4:
        return rng.choice((0.5, -1.0, 1e300, float("nan"), float("inf"), 1e-320))
    if kind == 5:
        return "".join(rng.choices(_LETTERS, k=rng.randint(0, 20)))
    if kind == 6:
        return rng.choice(("bag", "9", "none", "png", "webp", "locality", "32x32", "auto", "b64_json", "url", "-1"))
    if kind == 7:
        return "x" * rng.choice((1001, 100_000))
    if kind == 8:
        return rng.randint(1, 10)
    if kind == 9:
        return [_value(rng, depth + 1) for _ in range(rng.randint(0, 4))]
    if kind == 10:
        return {rng.choice(_NAMES): _value(rng, depth + 1) for _ in range(rng.randint(0, 4))}
    nested: Any = 1
    for _ in range(rng.choice((5, 300))):
        nested = [nested]
    return nested


def _body(rng: random.Random) -> dict[str, Any]:
    body: dict[str, Any] = {"prompt": "2", "num_inference_steps": rng.randint(1, 8)} if rng.random() < 0.8 else {}
    return body | {rng.choice(_NAMES): _value(rng) for _ in range(rng.randint(0, 3))}


def _post(address: str, rng: random.Random, path: str = "/v1/images/generations", **content: Any) -> str:
    headers = content.pop("headers", {})
    return str(httpx.post(f"{address}{path}", headers=headers, timeout=_SECONDS, **content).status_code)


def _send_json(address: str, rng: random.Random) -> str:
    text = json.dumps(_body(rng), ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    return _post(address, rng, content=text, headers={"Content-Type": "application/json"})


def _send_bytes(address: str, rng: random.Random) -> str:
    text = bytearray(json.dumps(_body(rng)).encode())
    for _ in range(rng.randint(1, 5)):
        text[rng.randrange(len(text))] = rng.randrange(256)
    if rng.random() < 0.3:
        text = text[: rng.randrange(len(text) + 1)]
    if rng.random() < 0.1:
        text = bytearray(rng.randbytes(rng.choice((0, 10, 3_000_000))))
    kind = rng.choice(("application/json", "application/json; charset=utf-16", "text/plain", "multipart/form-data", ""))
    return _post(address, rng, content=bytes(text), headers={"Content-Type": kind})


def _picture(rng: random.Random) -> bytes:
    file = io.BytesIO()
    kind = rng.randrange(6)
    if kind == 0:
        Image.new("1", (12_000, 12_000)).save(file, "PNG")
    elif kind == 1:
        Image.new(rng.choice(("L", "RGB", "RGBA", "P", "I;16", "CMYK")), (32, 32)).save(file, "TIFF")
    else:
        mode = rng.choice(("L", "RGB", "RGBA"))
        Image.new(mode, (rng.choice((32, 32, 1, 33)), 32), rng.choice((0, 255)) if mode == "L" else None).save(
            file, "PNG"
        )
    data = bytearray(file.getvalue())
    if kind == 4:
        data = data[: rng.randrange(len(data))]
    if kind == 5:
        for _ in range(8):
            data[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(data)


def _send_form(address: str, rng: random.Random) -> str:
    files = [(rng.choice(("image", "mask", "image[]", "other")), _picture(rng)) for _ in range(rng.randint(0, 4))]
    fields = {name: str(value)[:2000] for name, value in _body(rng).items()}
    if rng.random() < 0.5:
        files = [("image", _picture(rng)), ("mask", _picture(rng))]
    request = httpx.Request("POST", address, data=fields, files=files or {"image": b""})
    content = bytearray(request.read())
    if rng.random() < 0.3:
        content = content[: rng.randrange(len(content) + 1)]
    if rng.random() < 0.2:
        for _ in range(4):
            if content:
                content[rng.randrange(len(content))] = rng.randrange(256)
    headers = {"Content-Type": request.headers["content-type"]}
    return _post(address, rng, "/v1/images/edits", content=bytes(content), headers=headers)


def _send_path(address: str, rng: random.Random) -> str:
    path = rng.choice(_PATHS)
    method = rng.choice(("GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD", "PATCH", "BREW"))
    return str(httpx.request(method, f"{address}{path}", timeout=_SECONDS).status_code)


def _connect(address: str) -> socket.socket:
    host, port = address.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=_SECONDS)


def _leave(address: str, rng: random.Random) -> str:
    """Requests images and leaves at some stage of the answer."""
    body = {"prompt": "3", "num_inference_steps": 64, "guidance_scale": 3.0, "stream": rng.random() < 0.5}
    body |= {"partial_images": 3} if body["stream"] else {"n": rng.randint(1, 4)}
    text = json.dumps(body).encode()
    with _connect(address) as connection:
        connection.sendall(_HEAD.format(len(text)).encode() + text)
        if rng.random() < 0.7:
            connection.settimeout(rng.uniform(0.001, 0.2))
            with suppress(TimeoutError):
                connection.recv(rng.choice((1, 100, 100_000)))
    return "left"


def _cut_body(address: str, rng: random.Random) -> str:
    """Sends part of a request, then leaves or lets the server give up."""
    text = _HEAD.format(60).encode() + json.dumps(_GOOD).encode()[:50]
    if rng.random() < 0.2:
        text = rng.randbytes(rng.randint(1, 300)) + b"\r\n\r\n"
    with _connect(address) as connection:
        connection.sendall(text[: rng.randrange(1, len(text) + 1)])
        if rng.random() < 0.05:  # the slow client: two seconds each
            answer = connection.recv(12)
            return answer[9:12].decode("ascii", "replace") if len(answer) == 12 else "left"
    return "left"
