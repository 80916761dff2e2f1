"""This process's place in a run: the only module that reads torchrun's environment variables."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable
from typing import NamedTuple


class Place(NamedTuple):
    """This process's number among those of the run and of its machine, and whether a launcher started it."""

    rank: int
    size: int
    local_rank: int
    launched: bool


def place() -> Place:
    """Returns the process's place; alone unless WORLD_SIZE is set, since RANK and LOCAL_RANK alone mean nothing.

    Raises ValueError for numbers that no launcher sets. A single process without LOCAL_RANK was not launched: some
    containers set WORLD_SIZE=1 for every program.
    """
    if "WORLD_SIZE" not in os.environ:
        return Place(0, 1, 0, launched=False)
    size = _number("WORLD_SIZE", None)
    if size < 1:
        raise ValueError(f"WORLD_SIZE must be at least 1, got {size}")
    rank, local_rank = _number("RANK", 0 if size == 1 else None), _number("LOCAL_RANK", 0)
    for name, value in (("RANK", rank), ("LOCAL_RANK", local_rank)):
        if not 0 <= value < size:
            raise ValueError(f"{name} must be in [0, WORLD_SIZE = {size}), got {value}")
    return Place(rank, size, local_rank, launched=size > 1 or "LOCAL_RANK" in os.environ)


def _number(name: str, default: int | None) -> int:
    text = os.environ.get(name)
    if text is None and default is not None:
        return default
    if text is None:
        raise ValueError(f"{name} must be set where WORLD_SIZE is: start the processes with torchrun")
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{name} must be a whole number, as torchrun sets it, got {text!r}") from None


def run_and_leave(command: Callable[[], None]) -> None:
    """Runs a command; one of several processes then ends without finalising Python.

    gloo's threads outlive the process group while FSDP2 holds it. A thread that drops its last tensor while Python is
    being finalised asks for the interpreter's lock, and the process dies of SIGABRT after its work is done.
    """
    try:
        command()
        status: str | int | None = 0
    except SystemExit as end:
        if "WORLD_SIZE" not in os.environ or isinstance(end.code, str):
            raise
        status = end.code
    if "WORLD_SIZE" in os.environ:
        # What finalising would do first, as multiprocessing ends its processes.
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(status or 0))
