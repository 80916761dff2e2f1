"""How long a thread that waits for the others keeps a core busy before it sleeps."""

from __future__ import annotations

import os

# Rounds, of about 20 ns. libgomp's own 300,000 are milliseconds: where other programs want the cores, the thread that
# is waited for does not get one meanwhile. That many is about what it takes to wake a thread that sleeps.
ROUNDS = "1000"
_CHOSEN_BY = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")  # what libgomp reads, when torch loads it


def bound_spinning() -> None:
    """Bounds it in this process and those it starts, unless the environment says otherwise; before torch is loaded."""
    if not any(name in os.environ for name in _CHOSEN_BY):
        os.environ["GOMP_SPINCOUNT"] = ROUNDS
