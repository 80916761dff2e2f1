"""The interface between the training loop and the networks that it trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor, nn


@dataclass(frozen=True)
class Test:
    """A row of log.csv, and its number that decides the best checkpoint: smaller is better."""

    loss: float
    row: dict[str, float]


class Task(Protocol):
    """A network with its data and losses; every random choice is a function of (seed, step, row of the batch)."""

    @property
    def name(self) -> str:
        """The name of the trained network, in a word."""

    @property
    def command(self) -> str:
        """The name of the command that trains it."""

    @property
    def network(self) -> nn.Module:
        """The module whose parameters are optimised."""

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The network's repeated parts: units of recomputation, compilation and FSDP2."""

    def batch(self, step: int, rows: slice) -> Any:
        """Returns the given rows of the batch of optimisation step `step`, a dataclass of tensors."""

    def losses(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        """Means over the batch by name, "loss" the one to minimise.

        `model` is `network`, or what stands for it between processes.
        """

    def after_step(self, step: int) -> None:
        """Updates the parts that are not learnt by gradients."""

    def test(self, average: Mapping[str, Tensor]) -> Test:
        """Measures the averaged weights on test images."""

    def draw(self, average: Mapping[str, Tensor]) -> np.ndarray | None:
        """Draws a picture uint8 [height, width, 3] with the averaged weights, if possible."""

    def state(self) -> dict[str, Any]:
        """Returns the state beyond the weights that resuming needs; every process must call this."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restores that state."""

    def export(self, average: Mapping[str, Tensor], out: Path) -> None:
        """Writes the result."""
