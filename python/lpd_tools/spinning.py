"""How long a thread that waits for the others keeps a core busy before it sleeps."""

from __future__ import annotations

import os

# libgomp's own 300,000 rounds are milliseconds: where other programs want the cores, the thread that is waited for does
# not get one meanwhile. docs/guide/install.md has figures, of a thousand rounds too.
ROUNDS = "0"
_CHOSEN_BY = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")  # what libgomp reads, when torch loads it


def stop_spinning() -> None:
    """Lets them sleep at once, here and in the processes that this one starts, unless the environment says otherwise.

    Before torch is loaded.
    """
    if not any(name in os.environ for name in _CHOSEN_BY):
        os.environ["GOMP_SPINCOUNT"] = ROUNDS
