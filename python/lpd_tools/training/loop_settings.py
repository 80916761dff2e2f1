"""The settings that every training shares, and the learning rate they ask for."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from lpd_tools.settings import check_ranges, setting
from lpd_tools.training.precision import check_backend, check_precision

PARALLEL = ("ddp", "fsdp")
# A resumed training may change what leaves every optimisation step as it was, how long it goes on, and its precision.
_PLACES = ("out_dir", "tokens", "data", "judge", "tokenizer", "init_from")
_MACHINE = ("device", "parallel", "micro_batch_size", "checkpoint_activations", "compile_backend", "precision")
_REPORTS = ("strict", "save_every_s", "keep", "log_every", "tensorboard", "evaluate_every", "evaluate_images")
_SAMPLES = ("sample_every", "sample_images", "sample_guidance")
FREE_ON_RESUMING = (*_PLACES, *_MACHINE, *_REPORTS, *_SAMPLES, "steps", "decay_steps")


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """What the loop of `training.loop` needs to know, whatever it trains."""

    out_dir: str = setting(..., "folder of checkpoints, logs and result")
    seed: int = setting(0, "random seed")
    steps: int = setting(1000, "optimisation steps")
    batch_size: int = setting(64, "images per optimisation step, over all processes")
    micro_batch_size: int = setting(0, "images per forward pass of a process; gradients add up (0: its whole share)")
    learning_rate: float = setting(1e-3, "peak learning rate")
    learning_rate_batch: int = setting(
        0, "images per step that learning_rate is meant for; it grows in proportion to batch_size (0: as it stands)"
    )
    min_learning_rate: float = setting(0.0, "learning rate at the end of the decay, as it stands")
    warmup_steps: int = setting(100, "linear warm-up from 0")
    decay_steps: int = setting(500, "cosine decay to min_learning_rate over the last steps")
    beta1: float = setting(0.9, "AdamW: decay of the mean gradient")
    beta2: float = setting(0.95, "AdamW: decay of the mean squared gradient")
    weight_decay: float = setting(0.0, "AdamW weight decay of parameters with two or more dimensions")
    clip: float = setting(1.0, "gradient norm limit (0: none)")
    ema_decay: float = setting(0.0, "decay of the averaged weights (0: no averaging)")
    precision: str = setting("auto", "fp32, bf16 (autocast) or auto (bf16 where the hardware is faster with it)")
    device: str = setting("", "cpu or cuda (empty: cuda if there is one)")
    parallel: str = setting("ddp", "ddp or fsdp (FSDP2), between the processes of torchrun")
    checkpoint_activations: bool = setting(False, "compute activations of a block again in backward instead of keeping")
    compile_backend: str = setting("", "torch.compile the blocks with this backend, say inductor (empty: do not)")
    save_every_s: float = setting(180.0, "seconds between checkpoints")
    keep: int = setting(2, "newest checkpoints to keep, beside the best")
    log_every: int = setting(10, "steps between rows of steps.csv")
    evaluate_every: int = setting(500, "steps between rows of log.csv")
    evaluate_images: int = setting(500, "most test images in a row of log.csv (0: no test)")
    sample_every: int = setting(500, "steps between pictures in samples/ (0: none)")
    tensorboard: bool = setting(True, "write TensorBoard logs too")

    def check(self, images: int, test_images: int, **ranges: tuple[float, float]) -> None:
        """ValueError naming the first setting that cannot work with so many images; `ranges` adds or narrows some."""
        if images < 1:
            raise ValueError("the data set holds no training images")
        any_number, share = (0, math.inf), (0, 1)
        rates = ("learning_rate", "min_learning_rate", "learning_rate_batch")
        common: dict[str, tuple[float, float]] = {
            "batch_size": (1, images),
            "micro_batch_size": (0, self.batch_size),
            "evaluate_images": (0, math.inf if test_images else 0),
            "seed": (0, 2**32),
        }
        common |= dict.fromkeys(("steps", "keep", "log_every", "evaluate_every"), (1, math.inf))
        times = ("warmup_steps", "decay_steps", "save_every_s", "sample_every")
        common |= dict.fromkeys((*rates, *times, "weight_decay", "clip"), any_number)
        common |= dict.fromkeys(("beta1", "beta2", "ema_decay"), share)
        check_ranges(self, **(common | ranges))
        if self.parallel not in PARALLEL:
            raise ValueError(f"parallel must be ddp or fsdp, got {self.parallel!r}")
        check_precision(self.precision)
        check_backend(self.compile_backend)

    def peak_learning_rate(self) -> float:
        """learning_rate, scaled from learning_rate_batch to batch_size images per step if that is given."""
        scale = self.batch_size / self.learning_rate_batch if self.learning_rate_batch else 1.0
        return self.learning_rate * scale

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of optimisation step `step` (from 0)."""
        peak = self.peak_learning_rate()
        return learning_rate(step, self.steps, peak, self.warmup_steps, self.decay_steps, self.min_learning_rate)


def learning_rate(step: int, steps: int, peak: float, warmup: int, decay: int, floor: float = 0.0) -> float:
    """Linear from 0 over `warmup` steps, constant `peak`, cosine to `floor` over the last `decay` of `steps`."""
    if step < warmup:
        return peak * step / warmup
    remaining = max(steps - step, 0)
    if remaining >= decay:
        return peak
    return floor + (peak - floor) * 0.5 * (1 - math.cos(math.pi * remaining / decay))


def fixed_settings(config: Any, **inputs: Any) -> dict[str, Any]:
    """What a resumed training must share with its beginning: its `inputs`, and the settings of `config` that count."""
    return inputs | {name: value for name, value in asdict(config).items() if name not in FREE_ON_RESUMING}
