"""The decodes that `lpd growth` measures: along the batch, the steps, the tokens and the size of the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lpd_ext.model import LPDConfig
from lpd_ext.schedule import group_sizes
from lpd_tools.bench.decode_work import FLOAT32, INT8, DecodeWork, count

DTYPES = (FLOAT32, INT8)


@dataclass(frozen=True)
class Point:
    """One decode: a model of V = 16384, its number format, and what is drawn."""

    dim: int
    depth: int
    heads: int
    dtype: str
    batch: int
    steps: int
    num_tokens: int

    @property
    def config(self) -> LPDConfig:
        side = round(self.num_tokens**0.5)
        return LPDConfig(self.dim, self.depth, self.heads, vocab_size=16384, num_classes=1000, grid=(side, side))

    def work(self) -> DecodeWork:
        return count(self.config, self.batch, group_sizes(self.num_tokens, self.steps), self.dtype)


@dataclass(frozen=True)
class Measured:
    """A row of the CSV file."""

    point: Point
    seconds: float
    runs: int
    peak_mb: float


@dataclass(frozen=True)
class Series:
    """Points that differ in one size only, drawn in one panel and fitted at the last points."""

    title: str
    axis: str  # of the panel: B, T, N or parameters
    along: Callable[[Point], float]
    points: tuple[Point, ...]
    fitted: int = 3
    shallow: bool = False  # fewer blocks than the model that it is named after


def _lpd_l(dtype: str, batch: int = 1, steps: int = 20, num_tokens: int = 256, depth: int = 24) -> Point:
    return Point(1024, depth, 16, dtype, batch, steps, num_tokens)


def all_series(dtype: str) -> list[Series]:
    """Returns the curves of one number format."""
    sizes = ((256, 24), (512, 24), (1024, 24), (1280, 36))
    return [
        Series(
            "lpd_l with 4 blocks",
            "B",
            lambda p: p.batch,
            tuple(_lpd_l(dtype, batch=b, depth=4) for b in (1, 2, 4, 8, 16, 32, 64)),
            shallow=True,
        ),
        Series("lpd_l", "B", lambda p: p.batch, tuple(_lpd_l(dtype, batch=b) for b in (1, 2, 4, 8))),
        Series("lpd_l", "T", lambda p: p.steps, tuple(_lpd_l(dtype, steps=t) for t in (8, 16, 20, 32, 64, 128, 256))),
        Series(
            "lpd_l", "N", lambda p: p.num_tokens, tuple(_lpd_l(dtype, num_tokens=n) for n in (64, 256, 1024)), fitted=2
        ),
        Series(
            "E = 256, 512, lpd_l, lpd_xl",
            "parameters",
            lambda p: p.work().parameters,
            tuple(Point(dim, depth, dim // 64, dtype, 1, 20, 256) for dim, depth in sizes),
        ),
    ]


def all_points() -> list[Point]:
    """Returns every point once, the short ones of a series first."""
    return list(dict.fromkeys(p for dtype in DTYPES for series in all_series(dtype) for p in series.points))
