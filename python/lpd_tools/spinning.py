"""Stops waiting threads from spinning: how long they keep a core busy before they sleep."""

from __future__ import annotations

import os

# libgomp's default of 300,000 rounds takes milliseconds, in which the thread that is waited for may not get a core.
# docs/guide/install.md has figures, of a thousand rounds too.
ROUNDS = "0"
_CHOSEN_BY = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")  # what libgomp reads, when torch loads it


def stop_spinning() -> None:
    """Lets threads sleep at once, here and in child processes, unless the environment says otherwise.

    Call it before torch is loaded.
    """
    if not any(name in os.environ for name in _CHOSEN_BY):
        os.environ["GOMP_SPINCOUNT"] = ROUNDS
