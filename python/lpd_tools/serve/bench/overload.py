"""Overload: accepted requests must be answered correctly, and the others told when to retry."""

from __future__ import annotations

import asyncio
import base64
import io
import random
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

from lpd_ext.pipeline import LPDPipeline
from lpd_tools.serve.bench.engine import Call, mixed_calls
from lpd_tools.serve.bench.settings import ServeBench
from lpd_tools.serve.child import served
from lpd_tools.serve.pictures import encode

_DISTINCT = 64  # requests, each sent many times
_CALIBRATION = 6  # requests per place of the engine, sent to find the capacity


def overload(pipe: LPDPipeline, config: ServeBench) -> dict[str, Any]:
    """Sends twice the requests per second that the server can answer; compares all answers with the library's."""
    calls = mixed_calls(pipe, _DISTINCT, config.seed)
    expected = [pipe(**call).images[0] for call in calls]
    options = ["--max-images", str(config.max_images), "--max-waiting", str(2 * config.max_images)]
    for name in ("model", "dtype", "device"):
        if value := getattr(config, name):
            options += [f"--{name}", value]
    with served(*options) as (address, process):
        capacity = asyncio.run(_capacity(address, calls, config.max_images))
        before = resident_bytes(process.pid)
        found = asyncio.run(_offer(address, calls, expected, 2 * capacity, config))
        after = resident_bytes(process.pid)
        return found | {
            "capacity, requests per second": capacity,
            "resident bytes before": before,
            "resident bytes after": after,
            "alive": process.poll() is None,
        }


def resident_bytes(pid: int) -> int:
    """Returns the resident memory of a process."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) << 10
    raise RuntimeError(f"process {pid} has ended")


def body_of(call: Call) -> dict[str, Any]:
    """Returns the request of an image."""
    sampling = {"seed": call["seeds"], **{key: call[key] for key in ("num_inference_steps", "guidance_scale")}}
    return {"prompt": str(call["class_labels"])} | sampling


async def _ask(client: httpx.AsyncClient, call: Call) -> httpx.Response:
    return await client.post("/v1/images/generations", json=body_of(call))


def _client(address: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=address, timeout=300, limits=httpx.Limits(max_connections=None))


async def _capacity(address: str, calls: list[Call], places: int) -> float:
    """Measures the requests per second that keep the server busy without refusals."""
    async with _client(address) as client:
        await asyncio.gather(*(_ask(client, call) for call in calls[:4]))
        count = _CALIBRATION * places
        todo = [calls[i % len(calls)] for i in range(count)]
        begun = time.perf_counter()

        async def work() -> None:
            while todo:
                (await _ask(client, todo.pop())).raise_for_status()

        await asyncio.gather(*(work() for _ in range(2 * places)))  # all places taken, and as many waiting
        return count / (time.perf_counter() - begun)


async def _offer(
    address: str, calls: list[Call], expected: list[Image.Image], rate: float, config: ServeBench
) -> dict[str, Any]:
    """Sends requests at a fixed rate, whatever the answers."""
    rng = random.Random(config.seed)
    pictures = [encode(image, "png") for image in expected]
    seconds: list[float] = []
    counts = {"answered": 0, "wrong": 0, "429 with Retry-After": 0, "others": 0}

    async def one(client: httpx.AsyncClient, index: int) -> None:
        begun = time.perf_counter()
        try:
            answer = await _ask(client, calls[index])
        except httpx.TransportError:
            counts["others"] += 1
            return
        if answer.status_code == httpx.codes.OK:
            seconds.append(time.perf_counter() - begun)
            counts["answered"] += 1
            counts["wrong"] += not _same(base64.b64decode(answer.json()["data"][0]["b64_json"]), pictures[index])
        elif answer.status_code == httpx.codes.TOO_MANY_REQUESTS and int(answer.headers.get("retry-after", 0)) >= 1:
            counts["429 with Retry-After"] += 1
        else:
            counts["others"] += 1

    async with _client(address) as client:
        tasks = []
        clock = asyncio.get_running_loop().time
        due = clock()
        end = due + config.load_seconds
        while due < end:
            await asyncio.sleep(max(0.0, due - clock()))
            tasks.append(asyncio.create_task(one(client, rng.randrange(len(calls)))))
            due += rng.expovariate(rate)  # from when it was due, not from when it was sent
        await asyncio.gather(*tasks)
    p50, p99 = np.quantile(seconds, (0.5, 0.99)).tolist() if seconds else (0.0, 0.0)
    return counts | {"sent": len(tasks), "p50 seconds": p50, "p99 seconds": p99}


def _same(found: bytes, wanted: bytes) -> bool:
    """Whether two files are the same, or at least their pixels."""
    if found == wanted:
        return True
    images = [Image.open(io.BytesIO(data)).convert("RGB").tobytes() for data in (found, wanted)]
    return images[0] == images[1]
