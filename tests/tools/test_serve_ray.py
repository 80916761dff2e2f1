"""Ray Serve: the same API over replicas that are added while images wait, and replaced when they are killed."""

from __future__ import annotations

import base64
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("fastapi")
if not any((Path(folder) / "ray" / "serve").is_dir() for folder in sys.path):
    pytest.skip("ray is not installed", allow_module_level=True)

from lpd_ext.pipeline import LPDPipeline

SESSION = Path(__file__).parents[1] / "support" / "ray_session.py"
# Ray's own modules warn of this and that; a process of its own keeps that apart.
POLICY = """
import json, sys
from types import SimpleNamespace
from lpd_tools.serve.ray import read_arguments, replicas_for_waiting
def policy(waiting, low=1, high=4):
    context = SimpleNamespace(aggregated_metrics=waiting and {"waiting": waiting}, capacity_adjusted_min_replicas=low,
                              capacity_adjusted_max_replicas=high)
    return replicas_for_waiting(context, images_per_replica=8)[0]
waiting = ({"a": 0}, {"a": 8}, {"a": 9}, {"a": 9, "b": 9}, {"a": 90}, None)
found = [*map(policy, waiting), policy({"a": 0}, low=2)]
config = read_arguments({"replicas": "2", "max_images": "3", "cpus_per_replica": "0.5", "model": "lpd_l_256"})
errors = []
for wrong in ({"replica": "2"}, {"replicas": "many"}, {"replicas": "0"}):
    try:
        read_arguments(wrong)
    except ValueError as error:
        errors.append(str(error))
print(json.dumps([found, [config.replicas, config.max_images, config.cpus_per_replica, config.model], errors]))
"""


def run(*arguments: str, timeout: float) -> str:
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    ended = subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        cwd=sys.prefix,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    return ended.stdout


def test_replicas_are_counted_by_the_images_that_wait_and_arguments_are_read() -> None:
    found, config, errors = json.loads(run("-c", POLICY, timeout=120).splitlines()[-1])
    assert found == [1, 1, 2, 3, 4, 1, 2]
    assert config == [2, 3, 0.5, "lpd_l_256"]
    assert "replica is no argument of this application" in errors[0]
    assert errors[1].startswith("replicas: ")
    assert errors[2] == "replicas must be at least 1, got 0"


@pytest.fixture(scope="module")
def saw(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    path = tmp_path_factory.mktemp("ray") / "saw.json"
    run(str(SESSION), str(path), timeout=500)
    return SimpleNamespace(**json.loads(path.read_text()))


def test_pictures_are_the_librarys(saw: Any) -> None:
    file = io.BytesIO()
    LPDPipeline.from_pretrained("fashion_mnist")("bag", seeds=0, num_inference_steps=60, guidance_scale=3.0).images[
        0
    ].save(file, "PNG")
    assert saw.first == [200, base64.b64encode(file.getvalue()).decode()]
    assert saw.models["data"][0]["id"] == "fashion_mnist"


def test_streams_and_refusals_pass_through(saw: Any) -> None:
    assert saw.events[-1] == "image_generation.completed"
    assert set(saw.events[:-1]) <= {"image_generation.partial_image"}
    assert saw.last == saw.first[1]
    assert saw.refused[0] == 400
    assert "bagg" in json.loads(saw.refused[1])["error"]["message"]


def test_a_replica_is_added_while_images_wait(saw: Any) -> None:
    assert saw.replicas == 2


def test_a_replica_that_is_killed_costs_no_request(saw: Any) -> None:
    assert [status for status, _ in saw.answers] == [200] * 24
    assert len({picture for _, picture in saw.answers}) == 24
    assert saw.answers[0] == saw.first
    assert saw.again == saw.answers[:4]
    assert set(saw.load) <= {200, 429}
