"""The one training loop: schedule, averages, tests, logs and checkpoints, for whatever `Task` it is given."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lpd_ext.content import content_of
from lpd_tools.processes import Processes
from lpd_tools.progress import track
from lpd_tools.training.checkpoints import CHECKPOINTS, CheckpointFolder
from lpd_tools.training.failure import TrainingDivergedError, first_failed, save_failure
from lpd_tools.training.gradients import add_gradients, clip_gradients, micro_batches, seed_step
from lpd_tools.training.logs import EVALUATIONS, STEPS, TrainingLogs
from lpd_tools.training.loop_settings import LoopSettings
from lpd_tools.training.parallel import parallelise
from lpd_tools.training.precision import autocast_dtype
from lpd_tools.training.state import TrainingState, parameter_groups
from lpd_tools.training.stopping import StopSignals, TrainingStopped
from lpd_tools.training.task import Task

_PROGRESS = {"done": int, "seconds": float, "best": float, "sums": dict, "counted": int}  # of what a checkpoint keeps
log = logging.getLogger(__name__)


class Training:
    """A running task: its state and progress. `fixed` are the settings that a resumed training must share.

    Made from the newest checkpoint in `out_dir`, if any. Raises ValueError and OSError as CheckpointFolder does.
    """

    def __init__(self, task: Task, settings: LoopSettings, group: Processes, fixed: Mapping[str, Any]) -> None:
        self.task, self.settings, self.group, self.fixed = task, settings, group, dict(fixed)
        self.first = group.is_first
        self.share = group.share(settings.batch_size)
        self.parts = micro_batches(self.share, settings.micro_batch_size)
        self.dtype = autocast_dtype(settings.precision, group.device)
        self.checkpoints = CheckpointFolder(Path(settings.out_dir) / CHECKPOINTS, settings.keep)
        stored = self.checkpoints.newest(fixed, warn=self.first)
        self.model = prepare(task, settings, group)
        groups = parameter_groups(task.network, settings.weight_decay)
        optimizer = torch.optim.AdamW(groups, betas=(settings.beta1, settings.beta2), fused=True)
        self.state = TrainingState(task.network, optimizer)
        self.done, self.seconds, self.best = 0, 0.0, math.inf
        self.sums: dict[str, float] = {}  # of losses, since the last row of log.csv, and over how many steps
        self.counted = 0
        if stored is not None:
            path, entries = stored
            with content_of(path, "does not fit this training"):
                self.state.restore(entries)
                task.restore(entries["task"])
                for name, value in check_progress(entries["progress"]).items():
                    setattr(self, name, value)
            if self.first:
                log.info("going on in %s after step %d of %d", settings.out_dir, self.done, settings.steps)
        check_same_start(self.done, group)
        self.begun = self.saved_at = time.monotonic()
        self.begun -= self.seconds

    def run(self) -> None:
        """Trains to the last step and exports the averaged weights.

        Raises TrainingStopped after SIGTERM or SIGINT, TrainingDivergedError for a loss that is no number.
        """
        settings, first, out = self.settings, self.first, Path(self.settings.out_dir)
        todo = range(self.done, settings.steps)
        if first:
            self.checkpoints.remove_unfinished()
        with (
            TrainingLogs(out, self.done, tensorboard=settings.tensorboard, enabled=first) as logs,
            StopSignals() as stop,
        ):
            shown: dict[str, float] = {}
            for step in track(todo, f"training the {self.task.name}", figures=shown) if first else todo:
                save_due = first and time.monotonic() - self.saved_at > settings.save_every_s
                losses, norm, stop_asked, save_due = self.step(step, stop, save_due)
                shown["loss"] = losses["loss"]
                last = self.done == settings.steps
                row = {"step": self.done, "seconds": self.seconds, "lr": settings.learning_rate_at(step)}
                if self.done % settings.log_every == 0 or last:
                    logs.row(STEPS, row | losses | {"gradient_norm": norm})
                is_best = False
                if self.done % settings.evaluate_every == 0 or last:
                    is_best = self.evaluate(logs, row)
                if settings.sample_every and (self.done % settings.sample_every == 0 or last):
                    average = self.state.gathered_average(first)
                    if first and (picture := self.task.draw(average)) is not None:
                        said = {"command": self.task.command, "step": self.done, **asdict(settings)}
                        logs.picture(picture, self.done, said)
                if save_due or stop_asked or is_best or last:
                    path = self.save(is_best)
                    if stop_asked and not last:
                        raise TrainingStopped(self.done, path)
        average = self.state.gathered_average(first)
        if first:
            self.task.export(average, out)

    def step(self, step: int, stop: StopSignals, save_due: bool) -> tuple[dict[str, float], float, bool, bool]:
        """One optimisation step: mean losses, gradient norm, and whether any process asked to stop or to save."""
        settings, group, task = self.settings, self.group, self.task
        for parameters in self.state.optimizer.param_groups:
            parameters["lr"] = settings.learning_rate_at(step)
        seed_step(settings.seed, step, group.rank)
        batch_of = partial(task.batch, step)
        own = add_gradients(self.model, self.parts, batch_of, task.losses, self.dtype, group.device)
        norm = clip_gradients(task.network, settings.clip)
        *sums, stops, saves = group.sum([*own.values(), stop.received, save_due])
        losses = {name: total / group.size for name, total in zip(own, sums, strict=True)}
        if not math.isfinite(losses["loss"]) or not math.isfinite(norm):
            failed = first_failed(group, own["loss"])
            batch, weights = batch_of(self.share), self.state.gathered_weights(group.rank == failed)
            file = save_failure(settings, group, failed, step, batch, weights, self.fixed)
            raise TrainingDivergedError(step, losses["loss"], norm, settings.learning_rate_at(step), file)
        self.state.optimizer.step()
        self.state.optimizer.zero_grad()
        self.state.update_average(settings.ema_decay, step)
        task.after_step(step)
        self.done, self.seconds, self.counted = step + 1, time.monotonic() - self.begun, self.counted + 1
        self.sums = {name: self.sums.get(name, 0.0) + loss for name, loss in losses.items()}
        return losses, norm, stops > 0, saves > 0

    def evaluate(self, logs: TrainingLogs, row: Mapping[str, float | int]) -> bool:
        """Writes a row of log.csv; returns whether its test loss is the best so far."""
        train = {f"train_{name}": total / self.counted for name, total in self.sums.items()}
        self.sums, self.counted = {}, 0
        average = self.state.gathered_average(self.first)
        test = self.task.test(average) if self.settings.evaluate_images and self.first else None
        logs.row(EVALUATIONS, {**row, **train, **(test.row if test else {})})
        # Only the first process knows the test loss; the others add nothing to it.
        loss = self.group.sum([test.loss if test else 0.0])[0] if self.settings.evaluate_images else math.inf
        if is_best := loss < self.best:  # never so for NaN
            self.best = loss
        return is_best

    def save(self, best: bool) -> Path:
        """Writes a checkpoint; every process must take part. Returns where it is, or the folder in other processes."""
        progress = {name: getattr(self, name) for name in _PROGRESS}
        entries = self.state.gathered(self.first)
        entries |= {"task": self.task.state(), "progress": progress, "settings": self.fixed}
        path = self.checkpoints.save(entries, self.done, best=best) if self.first else self.checkpoints.folder
        self.saved_at = time.monotonic()
        return path


def check_progress(progress: Mapping[str, Any]) -> dict[str, Any]:
    """Reads a training's progress from a checkpoint; ValueError or KeyError if it is missing or wrong."""
    for name, kind in _PROGRESS.items():
        if not isinstance(progress[name], kind):
            raise ValueError(f"progress must have a {name} that is {kind.__name__}, got {progress[name]!r}")
    return {name: progress[name] for name in _PROGRESS}


def prepare(task: Task, settings: LoopSettings, group: Processes) -> nn.Module:
    """Puts the network on its device; recomputation, compilation and distribution as the settings ask for."""
    network = task.network.to(group.device).train()
    for block in task.blocks:
        # Inside the hooks of FSDP2, which bring the weights of a block before its forward and backward passes.
        if settings.checkpoint_activations:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        if settings.compile_backend:
            block.forward = torch.compile(block.forward, backend=settings.compile_backend)
    return parallelise(network, task.blocks, group, settings.parallel)


def check_same_start(done: int, group: Processes) -> None:
    """ValueError unless all processes found the same checkpoint."""
    total, squares = group.sum([done, done * done])
    if total != done * group.size or squares != done * done * group.size:
        raise ValueError("out_dir must be the same folder for all processes: they see different checkpoints in it")
