"""The state of a training: weights, moving averages and the optimizer's moments, gathered, stored and restored."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lpd_tools.training.parallel import part_like, whole

Network = TypeVar("Network", bound=nn.Module)


class TrainingState:
    """Weights, averages and optimizer of a network, replicated or sharded over processes.

    They are stored as whole tensors by parameter name, so any number of processes can resume.
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
        """Gathers whole weights on the CPU, by name; every process must call this, and gets none without `keep`."""
        return _gathered(self.weights, keep)

    def gathered_average(self, keep: bool = True) -> dict[str, Tensor]:
        """`gathered_weights` of the averages."""
        return _gathered(self.average, keep)

    def gathered(self, keep: bool = True) -> dict[str, Any]:
        """Gathers everything to store; see `gathered_weights`."""
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
        """Restores the result of `gathered`; ValueError or KeyError if it does not fit, before anything changes."""
        check_fits(self.weights, stored["weights"])
        check_fits(self.average, stored["average"])
        for name, moments in stored["moments"].items():
            check_fits(dict.fromkeys(("exp_avg", "exp_avg_sq"), self.weights[name]), moments, beside=("step",))
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
    """Copies whole tensors, by name, into the parameters and buffers of a network; ValueError unless all fit."""
    own = dict(network.named_parameters()) | dict(network.named_buffers())
    check_fits(own, values)
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(values[name])


def filled(make: Callable[[], Network], values: Mapping[str, Tensor]) -> Network:
    """A network with whole tensors by name; ValueError, before it has any memory, unless all fit."""
    with torch.device("meta"):
        network = make().float()  # not in the default dtype, which a caller may have changed
    check_fits(dict(network.named_parameters()) | dict(network.named_buffers()), values)
    network.to_empty(device="cpu")
    fill(network, values)
    return network


def check_fits(own: Mapping[str, Tensor], values: Mapping[str, Any], beside: Collection[str] = ()) -> None:
    """ValueError unless `values`, as a file gives them, are tensors of the names and shapes of `own`, and of `beside`.

    copy_ would spread a smaller one.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"tensors by name are missing, got {type(values).__name__}")
    for name in [*own, *beside]:
        if not isinstance(values.get(name), Tensor):
            raise ValueError(f"{name} is missing")
        if name in own and values[name].shape != own[name].shape:
            raise ValueError(f"{name} must have shape {list(own[name].shape)}, got {list(values[name].shape)}")
        if values[name].nbytes > values[name].untyped_storage().nbytes():
            raise ValueError(f"{name} stands for more memory than the file holds")
    if unknown := [name for name in values if name not in own and name not in beside]:
        raise ValueError(f"{unknown[0]} is unexpected")
