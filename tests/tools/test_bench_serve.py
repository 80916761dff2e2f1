"""`lpd bench-serve` in small: what it reports, and that the server bears what it is given."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("typer")

from lpd_tools.cli import app
from lpd_tools.serve.bench.engine import mixed_calls
from typer.testing import CliRunner

from lpd_ext.pipeline import LPDPipeline


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    output = tmp_path_factory.mktemp("bench") / "new folder" / "serve.json"
    small = {"images": 12, "rounds": 1, "max-images": 4, "load-seconds": 2, "requests": 150, "output": output}
    options = [text for name, value in small.items() for text in (f"--{name}", str(value))]
    result = CliRunner(env={"COLUMNS": "200", "TERM": "dumb"}).invoke(app, ["bench-serve", *options])
    assert result.exit_code == 0, result.output
    figures: dict[str, Any] = json.loads(Path(output).read_text(encoding="utf-8"))
    assert set(figures) == {"machine", "throughput", "preview", "overload", "malformed"}
    return figures


def test_the_engines_pictures_are_those_drawn_one_at_a_time(found: dict[str, Any]) -> None:
    throughput = found["throughput"]
    assert throughput["equal pictures"] == throughput["images"] == 12
    rates = throughput["images per second"]
    assert min(rates.values()) > 0
    processor = throughput["processor milliseconds per image, least"]
    assert processor.keys() == rates.keys()
    assert min(processor.values()) > 0.1
    best = throughput["best fixed batch"]
    assert rates[best] == max(rate for name, rate in rates.items() if name.startswith("batches"))
    assert throughput["engine / best fixed batch"] == pytest.approx(rates["engine"] / rates[best])
    assert throughput["engine / batches of 4"] == pytest.approx(rates["engine"] / rates["batches of 4"])
    assert throughput["engine / one at a time"] == pytest.approx(rates["engine"] / rates["one at a time"])
    assert found["preview"]["median milliseconds"] > 0


def test_what_an_overloaded_server_takes_is_right(found: dict[str, Any]) -> None:
    overload = found["overload"]
    assert overload["answered"] > 0
    assert overload["429 with Retry-After"] > 0
    assert overload["wrong"] == overload["others"] == 0
    assert overload["answered"] + overload["429 with Retry-After"] == overload["sent"]
    assert overload["alive"]
    assert overload["resident bytes after"] < 1.2 * overload["resident bytes before"]


def test_malformed_requests_leave_no_trace(found: dict[str, Any]) -> None:
    malformed = found["malformed"]
    assert sum(malformed["answers"].values()) == 150
    assert malformed["answers"]["400"] > 30
    assert malformed["not allowed"] == malformed["no answer"] == 0, malformed["answers"]
    assert malformed["slots free afterwards"]
    assert malformed["same image afterwards"]
    assert malformed["alive"]


def test_mixed_calls_are_of_all_kinds() -> None:
    pipe = LPDPipeline.from_pretrained("fashion_mnist")
    calls = mixed_calls(pipe, 200, 0)
    assert {call["num_inference_steps"] for call in calls} == set(range(5, 21))
    assert {call["guidance_scale"] for call in calls} == {1.0, 3.0}
    assert calls == mixed_calls(pipe, 200, 0)
    assert calls != mixed_calls(pipe, 200, 1)
