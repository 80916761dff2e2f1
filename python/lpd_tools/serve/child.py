"""A server as a process of its own, on a free port of the loopback: for load tests."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import httpx


@contextmanager
def served(
    *options: str, environment: Mapping[str, str] | None = None, patience: float = 60
) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Runs `lpd serve` with these options; yields its address and its process, and ends it. Raises RuntimeError."""
    process = subprocess.Popen(
        [str(Path(sys.executable).with_name("lpd")), "serve", "--port", "0", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=sys.prefix,  # a folder without unbuilt sources
        env={**os.environ, **(environment or {})},
    )
    try:
        yield _address(process, time.monotonic() + patience), process
    finally:
        process.kill()
        process.communicate()


def _address(process: subprocess.Popen[str], until: float) -> str:
    """Waits until the server takes requests; returns its address."""
    assert process.stdout is not None
    said = ""
    for line in process.stdout:
        said += line
        if found := re.search(r"listening on (http://[^/]+)/", line):
            break
    else:
        raise RuntimeError(f"the server did not start: {said}")
    while time.monotonic() < until:
        try:
            if httpx.get(f"{found[1]}/ready").status_code == httpx.codes.OK:
                return found[1]
        except httpx.TransportError:
            pass
        time.sleep(0.05)
    raise RuntimeError(f"the server is not ready: {said}")
