"""Run by a test in a process of its own: Ray Serve on this machine, one replica that becomes two and is killed.

Writes what it saw as JSON to the path in its argument. The load is bounded in count and time, on the loopback.
"""

from __future__ import annotations

import concurrent.futures
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import httpx
import ray
from lpd_tools.listening import listen
from lpd_tools.serve.ray import APP, app
from ray import serve

PATIENCE = 120


def drawing_processes() -> list[int]:
    listed = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True).stdout
    ours = [line.split() for line in listed.splitlines() if f"ray::ServeReplica:{APP}:Replica" in line]
    return [int(words[0]) for words in ours]


def main(result: Path) -> None:
    with listen("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    before = set(drawing_processes())  # of other sessions on this machine
    ray.init(num_cpus=4, include_dashboard=False, object_store_memory=100 << 20)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    arguments = {"model": "fashion_mnist", "max_replicas": "2", "max_images": "2", "max_waiting": "64"}
    arguments["cpus_per_replica"] = "0.5"
    serve.run(app(arguments), name=APP, route_prefix="/")
    url = f"http://127.0.0.1:{port}/v1/images/generations"

    def ask(seed: int, **more: Any) -> tuple[int, str]:
        body = {"prompt": "bag", "seed": seed, "num_inference_steps": 60, "guidance_scale": 3.0} | more
        answer = httpx.post(url, json=body, timeout=PATIENCE)
        picture = answer.json()["data"][0]["b64_json"] if answer.status_code == 200 else answer.text
        return answer.status_code, picture

    saw: dict[str, Any] = {"first": ask(0), "refused": ask(0, prompt="bagg")}
    body = {"prompt": "bag", "seed": 0, "num_inference_steps": 60, "guidance_scale": 3.0}
    with httpx.stream("POST", url, json=body | {"stream": True, "partial_images": 3}, timeout=PATIENCE) as stream:
        events = [line for line in stream.iter_lines() if line]
    saw["events"] = [line.removeprefix("event: ") for line in events if line.startswith("event: ")]
    saw["last"] = json.loads(events[-1].removeprefix("data: "))["b64_json"]
    saw["models"] = httpx.get(f"http://127.0.0.1:{port}/v1/models", timeout=PATIENCE).json()
    with concurrent.futures.ThreadPoolExecutor(24) as pool:
        # As long as one replica is behind, a second one is started.
        until, load = time.monotonic() + PATIENCE, [pool.submit(ask, seed) for seed in range(1000, 1024)]
        while len(set(drawing_processes()) - before) < 2 and time.monotonic() < until:
            load = [future for future in load if not future.done()]
            load += [pool.submit(ask, 1000) for _ in range(24 - len(load))]
            time.sleep(0.5)
        saw["replicas"] = len(set(drawing_processes()) - before)
        futures = [pool.submit(ask, seed) for seed in range(24)]
        time.sleep(0.5)
        victim = (set(drawing_processes()) - before).pop()
        os.kill(victim, signal.SIGKILL)
        saw["answers"] = [future.result() for future in futures]
        saw["load"] = [future.result()[0] for future in load]
    saw["again"] = [ask(seed) for seed in range(4)]
    saw["victim"] = victim
    result.write_text(json.dumps(saw), encoding="utf-8")
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
