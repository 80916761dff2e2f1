"""Runs the chosen parts, prints what they found and writes it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lpd_ext.pipeline import LPDPipeline
from lpd_tools.checks import check_output
from lpd_tools.console import say
from lpd_tools.machine import machine
from lpd_tools.serve.bench.engine import first_preview, throughput
from lpd_tools.serve.bench.malformed import malformed
from lpd_tools.serve.bench.overload import overload
from lpd_tools.serve.bench.settings import ServeBench


def run(pipe: LPDPipeline, config: ServeBench) -> dict[str, Any]:
    """Returns the results by part; also writes them to `output`."""
    if config.output:
        check_output(Path(config.output), ".json")
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "throughput": lambda: throughput(pipe, config),
        "preview": lambda: first_preview(pipe, config),
        "overload": lambda: overload(pipe, config),
        "malformed": lambda: malformed(config),
    }
    found: dict[str, Any] = {"machine": machine(pipe.model.pos_embed.device)}
    for part in config.part:
        found[part] = parts[part]()
        say(f"{part}: {json.dumps(found[part], indent=1)}")
    if config.output:
        Path(config.output).parent.mkdir(parents=True, exist_ok=True)
        Path(config.output).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found
