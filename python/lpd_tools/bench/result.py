"""One timed thing, as a row of the JSON file that `lpd bench` writes and `lpd bench-tables` reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from lpd_tools.bench.timing import Times

# Keys of the file that are no Python names.
_KEYS = {"gigabytes_per_second": "GB/s", "gigaflops_per_second": "GFLOP/s"}
_ALWAYS = ("shape", "batch", "operator", "seconds")


@dataclass(frozen=True, kw_only=True)
class Result:
    """A timed function, its shape and its comparison; fields that are None do not apply and are not in the file."""

    shape: str | None = None
    step: int | None = None  # of the decoding, for an operator
    batch: int | None = None
    depth: int | None = None  # layers of a decode's model
    operator: str
    seconds: list[float]  # one entry per repeat
    plain_seconds: list[float] | None = None  # of the one thing that it is compared with, ...
    ratio: float | None = None  # ... and the median of those over its own
    gigabytes_per_second: float | None = None
    share: float | None = None  # of a copy's bytes per second
    gigaflops_per_second: float | None = None
    decibels: float | None = None  # PSNR to what the plain decoder makes
    ratios: dict[str, float] | None = None  # the medians of several baselines over its own, by their names
    note: str | None = None
    rounded: dict[str, Any] | None = None  # how far int8 is from float32
    peak_bytes: int | None = None

    @classmethod
    def against_plain(cls, operator: str, ours: Times, plain: Times, **more: Any) -> Result:
        """Makes a result with a plain-torch baseline."""
        ratio = plain.median / ours.median
        return cls(operator=operator, seconds=ours.seconds, plain_seconds=plain.seconds, ratio=ratio, **more)

    @classmethod
    def against(cls, operator: str, times: Times, baselines: Mapping[str, Times], **more: Any) -> Result:
        """Makes a result with several baselines, or none."""
        ratios = {name: baseline.median / times.median for name, baseline in baselines.items()}
        return cls(operator=operator, seconds=times.seconds, ratios=ratios, **more)

    @property
    def times(self) -> Times:
        """Times of the function."""
        return Times(self.seconds)

    @property
    def plain_times(self) -> Times:
        """Times of the plain-torch baseline; meaningless without one."""
        return Times(self.plain_seconds or [])

    def at(self, shape: str, batch: int, step: int | None = None, depth: int | None = None) -> Result:
        """Returns the result with the shape, step and batch of its measurement."""
        return replace(self, shape=shape, step=step, batch=batch, depth=depth)

    def to_json(self) -> dict[str, Any]:
        """The row of the file."""
        values = {_KEYS.get(item.name, item.name): getattr(self, item.name) for item in fields(self)}
        return {key: value for key, value in values.items() if value is not None}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Result:
        """Parses a row of a file, ignoring unknown keys; KeyError for a row that lacks a required one."""
        if missing := [key for key in _ALWAYS if key not in row]:
            raise KeyError(missing[0])
        keys = {item.name: _KEYS.get(item.name, item.name) for item in fields(cls)}
        return cls(**{name: row[key] for name, key in keys.items() if key in row})


def cell(value: float | None, form: str) -> str:
    """Formats a number for a table; empty for None."""
    return "" if value is None else format(value, form)
