"""The results of a study: a CSV file with a row per measured point, and the models and settings behind them."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import astuple, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, get_type_hints

from lpd_ext.content import content_of, read_json, read_text
from lpd_ext.state_files import write_text

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


class AtPoint(Protocol):
    """A dataclass of a `point`, itself a dataclass, and its measurements."""

    @property
    def point(self) -> DataclassInstance: ...


Result = TypeVar("Result", bound=AtPoint)


def read_results(path: Path, kind: type[Result]) -> dict[Any, Result]:
    """Reads results by point (none if the file is missing or empty); ValueError for other columns or a broken row."""
    if not path.exists() or path.stat().st_size == 0:
        return {}
    with content_of(path, "is no CSV file"):
        rows = list(csv.reader(read_text(path).splitlines()))
    make: Callable[..., Result] = kind
    types = get_type_hints(kind)
    make_point = types.pop("point")
    point_types = get_type_hints(make_point)
    columns = [*point_types, *types]
    if not rows or rows[0] != columns:
        raise ValueError(f"out: {str(path)!r} is no file of this study: its columns must be {', '.join(columns)}")
    found = {}
    for number, row in enumerate(rows[1:], start=2):
        try:
            cells = dict(zip(columns, row, strict=True))
            point = make_point(**{name: of(cells[name]) for name, of in point_types.items()})
            found[point] = make(point, **{name: of(cells[name]) for name, of in types.items()})
        except ValueError as error:
            raise ValueError(f"out: line {number} of {str(path)!r} is no whole row: {error}") from error
    return found


def append_result(path: Path, result: AtPoint) -> None:
    """Appends a row, after a header if it is the first; it is on disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists() or path.stat().st_size == 0
    names = [name for name in get_type_hints(type(result)) if name != "point"]
    with path.open("a", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow([*(field.name for field in fields(result.point)), *names])
        values = [getattr(result, name) for name in names]
        writer.writerow([*astuple(result.point), *(f"{v:.6g}" if isinstance(v, float) else v for v in values)])
        file.flush()
        os.fsync(file.fileno())


def note_beginning(path: Path, depends_on: Mapping[str, Any]) -> None:
    """Writes the models and settings behind the results; ValueError if existing results began with other values."""
    noted = dict(depends_on)
    if path.exists():
        before = read_json(path)
        if not isinstance(before, dict):
            raise ValueError(f"path {str(path)!r} must hold what a study began with, got {type(before).__name__}")
        for name, value in depends_on.items():
            # A model added later, such as a twin, has points of its own.
            if name in before and before[name] != value:
                raise ValueError(f"{name} is {value!r}, but the results in {str(path)!r} began with {before[name]!r}")
        noted = before | noted
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(noted, indent=2) + "\n")
