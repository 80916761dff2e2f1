"""The settings that every training shares, and the learning rate they ask for."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lpd_tools.settings import ANY_AMOUNT, AT_LEAST_ONE, SHARE, Range, Settings, check_ranges, setting

PARALLEL = ("ddp", "fsdp")


@dataclass(frozen=True, kw_only=True)
class LoopSettings(Settings):
    """Settings of the loop of `training.loop`, whatever it trains.

    A resumed training may change its length, its precision, and settings that leave every optimisation step as it was.
    """

    out_dir: str = setting(..., "folder of checkpoints, logs and result", resumable=True)
    seed: int = setting(0, "random seed", range=Range(0, 2**32))
    steps: int = setting(1000, "optimisation steps", range=AT_LEAST_ONE, resumable=True)
    batch_size: int = setting(64, "images per optimisation step, over all processes", range=AT_LEAST_ONE)
    micro_batch_size: int = setting(
        0,
        "images per forward pass of a process; gradients add up (0: its whole share)",
        range=ANY_AMOUNT,
        resumable=True,
    )
    learning_rate: float = setting(1e-3, "peak learning rate", range=ANY_AMOUNT)
    learning_rate_batch: int = setting(
        0,
        "batch size that learning_rate is for; the rate scales linearly with batch_size (0: no scaling)",
        range=ANY_AMOUNT,
    )
    min_learning_rate: float = setting(0.0, "learning rate at the end of the decay, as it stands", range=ANY_AMOUNT)
    warmup_steps: int = setting(100, "linear warm-up from 0", range=ANY_AMOUNT)
    decay_steps: int = setting(
        500, "cosine decay to min_learning_rate over the last steps", range=ANY_AMOUNT, resumable=True
    )
    beta1: float = setting(0.9, "AdamW: decay of the mean gradient", range=SHARE)
    beta2: float = setting(0.95, "AdamW: decay of the mean squared gradient", range=SHARE)
    weight_decay: float = setting(0.0, "AdamW weight decay of parameters with two or more dimensions", range=ANY_AMOUNT)
    clip: float = setting(1.0, "gradient norm limit (0: none)", range=ANY_AMOUNT)
    ema_decay: float = setting(0.0, "decay of the averaged weights (0: no averaging)", range=SHARE)
    precision: str = setting(
        "auto", "fp32, bf16 (autocast) or auto (bf16 where the hardware is faster with it)", resumable=True
    )
    device: str = setting("", "cpu or cuda (empty: cuda if there is one)", resumable=True)
    parallel: str = setting("ddp", "ddp or fsdp (FSDP2), between the processes of torchrun", resumable=True)
    checkpoint_activations: bool = setting(
        False, "recompute a block's activations in backward to save memory", resumable=True
    )
    compile_backend: str = setting(
        "", "torch.compile the blocks with this backend, say inductor (empty: do not)", resumable=True
    )
    save_every_s: float = setting(180.0, "seconds between checkpoints", range=ANY_AMOUNT, resumable=True)
    keep: int = setting(2, "newest checkpoints to keep, beside the best", range=AT_LEAST_ONE, resumable=True)
    log_every: int = setting(10, "steps between rows of steps.csv", range=AT_LEAST_ONE, resumable=True)
    evaluate_every: int = setting(500, "steps between rows of log.csv", range=AT_LEAST_ONE, resumable=True)
    evaluate_images: int = setting(
        500, "most test images in a row of log.csv (0: no test)", range=ANY_AMOUNT, resumable=True
    )
    sample_every: int = setting(500, "steps between pictures in samples/ (0: none)", range=ANY_AMOUNT, resumable=True)
    tensorboard: bool = setting(True, "write TensorBoard logs too", resumable=True)

    def check(self, images: int, test_images: int, **ranges: Range) -> None:
        """Raises ValueError with the first setting that cannot work with so many images; `ranges` narrows others."""
        from lpd_tools.training.precision import check_backend, check_precision  # torch, which --help does not need

        if images < 1:
            raise ValueError("the data set holds no training images")
        check_ranges(
            self,
            batch_size=Range(1, images),
            micro_batch_size=Range(0, self.batch_size),
            evaluate_images=ANY_AMOUNT if test_images else Range(0, 0),
            **ranges,
        )
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
