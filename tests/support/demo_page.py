"""`lpd demo` in a process of its own, as a user starts it, on a free port of the loopback."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LPD = str(Path(sys.executable).with_name("lpd"))


@contextmanager
def demo_page(*options: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The page's address and its process, which is ended."""
    process = subprocess.Popen(
        [LPD, "demo", "--port", "0", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=sys.prefix,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200"},
    )
    assert process.stdout is not None
    said = ""
    try:
        for line in process.stdout:
            said += line
            if found := re.search(r"open (http://\S+/) in a browser", line):
                break
        else:
            raise AssertionError(f"the page ended: {said}")
        yield found[1], process
    finally:
        process.kill()
        process.communicate()
