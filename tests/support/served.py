"""A server of its own process, as a user starts it, on a free port of the loopback."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

LPD = str(Path(sys.executable).with_name("lpd"))


@contextmanager
def served(*options: str, patience: float = 60) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """`lpd serve` with these options: its address and its process, which is ended."""
    process = subprocess.Popen(
        [LPD, "serve", "--port", "0", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=sys.prefix,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert process.stdout is not None
    said = ""
    try:
        for line in process.stdout:
            said += line
            if found := re.search(r"listening on (http://[^/]+)/", line):
                break
        else:
            raise AssertionError(f"the server ended: {said}")
        until = time.monotonic() + patience
        while time.monotonic() < until:
            try:
                if httpx.get(f"{found[1]}/ready").status_code == 200:
                    break
            except httpx.ConnectError:
                time.sleep(0.05)
        yield found[1], process
    finally:
        process.kill()
        process.communicate()
