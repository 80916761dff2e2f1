"""What a training learns: weights, their moving averages and the optimizer's moments; gathered, stored, put back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lpd_tools.training.parallel import part_like, whole


class TrainingState:
    """Weights, averages and optimizer of a network, whatever part of them each process holds.

    Stored they are whole tensors by parameter name, so any number of processes can go on from them.
    """

    def __init__(self, network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.weights = dict(network.named_parameters()) | dict(network.named_buffers())
        self.average = {name: value.detach().clone() for name, value in self.weights.items()}

    def update_average(self, decay: float, step: int) -> None:
        """average ← decay·average + (1 - decay)·weights, with less decay in the first steps.

        Early on, a long average would still hold the initial weights.
        """
        decay = min(decay, (step + 1) / (step + 10))
        with torch.no_grad():
            for name, value in self.weights.items():
                if value.is_floating_point():
                    self.average[name].lerp_(value, 1 - decay)
                else:
                    self.average[name].copy_(value)

    def gathered_weights(self, keep: bool = True) -> dict[str, Tensor]:
        """Whole weights on the CPU, by name; every process must ask, and gets none if it does not `keep` them."""
        return _gathered(self.weights, keep)

    def gathered_average(self, keep: bool = True) -> dict[str, Tensor]:
        """`gathered_weights` of the averages."""
        return _gathered(self.average, keep)

    def gathered(self, keep: bool = True) -> dict[str, Any]:
        """Everything to store; see `gathered_weights`."""
        moments = {
            name: _gathered(self.optimizer.state[p], keep)
            for name, p in self.weights.items()
            if p in self.optimizer.state
        }
        return {
            "weights": self.gathered_weights(keep),
            "average": self.gathered_average(keep),
            "moments": moments,
        }

    def restore(self, stored: Mapping[str, Any]) -> None:
        """Puts back what `gathered` gave."""
        with torch.no_grad():
            for target, source in ((self.weights, stored["weights"]), (self.average, stored["average"])):
                for name, value in target.items():
                    value.copy_(part_like(source[name], value))
        # load_state_dict puts everything on its device; it counts parameters in the order of the groups.
        names = {id(p): name for name, p in self.weights.items()}
        state = self.optimizer.state_dict()
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        state["state"] = {
            i: {
                key: part_like(value, p) if value.shape == p.shape else value.clone()
                for key, value in stored["moments"][names[id(p)]].items()
            }
            for i, p in enumerate(parameters)
            if names[id(p)] in stored["moments"]
        }
        self.optimizer.load_state_dict(state)


def _gathered(values: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    # One after the other: a GPU never holds more than one whole tensor beside its own parts.
    gathered = {}
    for name, value in values.items():
        full = whole(value.detach())
        if keep:
            gathered[name] = full.cpu()
    return gathered


def parameter_groups(network: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Weight decay on every trained parameter of two or more dimensions (embeddings too), none on the rest."""
    trained = [p for p in network.parameters() if p.requires_grad]
    matrices, vectors = [p for p in trained if p.ndim >= 2], [p for p in trained if p.ndim < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def fill(network: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Copies whole tensors, by name, into the parameters and buffers of a network."""
    with torch.no_grad():
        for name, value in [*network.named_parameters(), *network.named_buffers()]:
            value.copy_(values[name])
