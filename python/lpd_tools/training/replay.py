"""Computes again the step in which a training of the transformer found no finite loss or gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lpd_ext.content import content_of
from lpd_ext.model import LPDModel
from lpd_tools.checks import check_device
from lpd_tools.training.export import sizes_in
from lpd_tools.training.failure import read_failure
from lpd_tools.training.gradients import add_gradients, micro_batches, seed_step
from lpd_tools.training.precision import autocast_dtype
from lpd_tools.training.settings import LPDTraining, Replay
from lpd_tools.training.state import filled
from lpd_tools.training.transformer import Batch, batch_loss


@dataclass(frozen=True)
class ReplayedStep:
    """The result: the loss, the first module whose output is not finite, the parameters whose gradient is not."""

    step: int
    loss: float
    first_output: str | None
    gradients: list[str]

    def __str__(self) -> str:
        named = ", ".join(self.gradients[:5]) + (", ..." if len(self.gradients) > 5 else "")
        return (
            f"step {self.step}: loss {self.loss:g}; first output that is not finite: {self.first_output or 'none'}; "
            f"gradients that are not: {named or 'none'}"
        )


def replay(config: Replay) -> ReplayedStep:
    """Repeats the step with its batch, weights and random numbers; ValueError for a file of another kind."""
    failure = read_failure(config.file)
    if failure["kind"] != LPDTraining.__name__:
        raise ValueError(f"file must be of a training of the transformer, got {failure['kind']} in {config.file!r}")
    device = check_device(config.device)
    with content_of(config.file, "is no file to replay"):
        settings = LPDTraining(**failure["settings"])
        sizes = sizes_in(failure["sizes"])
        model = filled(lambda: LPDModel(sizes), failure["weights"]).to(device)
        batch = Batch(**failure["batch"])
        seed_step(settings.seed, failure["step"], failure["rank"])
    dtype = autocast_dtype(config.precision or settings.precision, device)
    parts = micro_batches(slice(0, len(batch.labels)), settings.micro_batch_size)
    with first_output_not_finite(model) as found:
        losses = add_gradients(
            model,
            parts,
            lambda rows: batch.rows(rows).to(device),
            lambda module, part: {"loss": batch_loss(module, part, settings.dropout, settings.attention_dropout)},
            dtype,
            device,
        )
    gradients = [n for n, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    return ReplayedStep(failure["step"], losses["loss"], found[0] if found else None, gradients)


@contextmanager
def first_output_not_finite(model: nn.Module) -> Iterator[list[str]]:
    """Collects the names of the modules whose forward output is not finite, in the order of the pass."""
    found: list[str] = []

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and not torch.isfinite(output).all():
                found.append(name)

        return hook

    hooks = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    try:
        yield found
    finally:
        for handle in hooks:
            handle.remove()
