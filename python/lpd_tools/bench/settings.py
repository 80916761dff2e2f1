"""Settings of the benchmarks. Imports no heavy library: `lpd --help` must be quick."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from lpd_tools.settings import ANY_AMOUNT, AT_LEAST_ONE, Settings, setting


@dataclass(frozen=True)
class Growth(Settings):
    """Settings of `lpd growth`."""

    out: str = setting("docs/results/growth", "folder of growth.csv, growth_machine.json and growth.png")
    threads: int = setting(2, "threads of each decode", range=AT_LEAST_ONE)
    minutes: float = setting(
        1e9, "start no further point after this time; run the command again to go on", range=ANY_AMOUNT
    )


@dataclass(frozen=True)
class BenchCheck(Settings):
    """Settings of `lpd bench-check`."""

    ratios: str = setting("docs/results/bench_ratios.json", "JSON file of the committed ratios, by processor")
    write: bool = setting(False, "write this processor's ratios instead of comparing with them")


class Part(str, Enum):
    """The parts of `lpd bench`."""

    operators = "operators"
    decode = "decode"
    tokenizer = "tokenizer"
    image = "image"
    training = "training"
    host = "host"
    products = "products"
    preview = "preview"


@dataclass(frozen=True)
class Bench:
    """Settings of `lpd bench`; None means the default."""

    parts: list[Part] | None = None
    device: str = "cpu"
    shapes: list[str] | None = None
    step: int | None = None
    batches: list[int] | None = None
    repeats: int = 30
    decodes: int = 3
    baselines: list[str] | None = None
    depth: int | None = None
    output: Path | None = None
