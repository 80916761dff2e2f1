"""What the training loop asks of that which it trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor, nn


@dataclass(frozen=True)
class Test:
    """A row of log.csv, and the number in it by which the best checkpoint is chosen: the smaller the better."""

    loss: float
    row: dict[str, float]


class Task(Protocol):
    """A network with its data and losses; every random choice is a function of (seed, step, row of the batch)."""

    @property
    def name(self) -> str:
        """What is trained, in a word."""

    @property
    def command(self) -> str:
        """The name of the command that trains it."""

    @property
    def network(self) -> nn.Module:
        """The module whose parameters are optimised."""

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """Its repeated parts: units of recomputation, compilation and FSDP2."""

    def batch(self, step: int, rows: slice) -> Any:
        """Those rows of the batch of optimisation step `step`, a dataclass of tensors."""

    def losses(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        """Means over the batch by name, "loss" the one to minimise.

        `model` is `network`, or what stands for it between processes.
        """

    def after_step(self, step: int) -> None:
        """What is learnt otherwise than by gradients."""

    def test(self, average: Mapping[str, Tensor]) -> Test:
        """Measures the averaged weights on test images."""

    def draw(self, average: Mapping[str, Tensor]) -> np.ndarray | None:
        """A picture uint8 [height, width, 3] of what the averaged weights draw, if it can be."""

    def state(self) -> dict[str, Any]:
        """What else than weights a resumed training needs; every process asks."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Puts that back."""

    def export(self, average: Mapping[str, Tensor], out: Path) -> None:
        """Writes the result."""
