"""Settings of the programs: frozen dataclasses whose fields know their help text, range and whether they may change.

A command's options, the keys of its TOML table, the checks of its values and what a resumed training must share with
its beginning all follow from the fields.
"""

from __future__ import annotations

import math
import sys
import typing
from collections.abc import Collection, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, TypeVar

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Config = TypeVar("Config", bound="DataclassInstance")
_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}


@dataclass(frozen=True)
class Range:
    """The numbers from `low` to `high`, both in it unless `open_low` or `open_high`; NaN is in no range."""

    low: float
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, number: float) -> bool:
        high_enough = self.low < number if self.open_low else self.low <= number
        return high_enough and (number < self.high if self.open_high else number <= self.high)

    def __str__(self) -> str:
        return self.interval if math.isinf(self.high) else f"in {self.interval}"

    @property
    def interval(self) -> str:
        """Returns the range for readers: "[0, 1)", or "at least 1"."""
        if math.isinf(self.high):
            return f"{'above' if self.open_low else 'at least'} {self.low}"
        return f"{'(' if self.open_low else '['}{self.low}, {self.high}{')' if self.open_high else ']'}"


ANY_AMOUNT = Range(0)
AT_LEAST_ONE = Range(1)
SHARE = Range(0, 1)


def setting(
    default: Any, help_text: str | None = None, *, range: Range | None = None, resumable: bool | None = None
) -> Any:
    """Makes a dataclass field with a default (... for none), the help text of its option, and a range.

    range: of a number, of each entry of a tuple, or of a value that is not None. resumable: whether a training may go
    on with another value (by default it may not). A subclass with another default repeats only what differs.
    """
    given = {"help": help_text, "range": range, "resumable": resumable}
    metadata = {name: value for name, value in given.items() if value is not None}
    return field(metadata=metadata) if default is ... else field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Setting:
    """A field of a config with its metadata."""

    name: str
    kind: Any  # its type
    default: Any  # MISSING if it must be given
    help: str
    range: Range | None
    resumable: bool

    @property
    def required(self) -> bool:
        """Whether the setting has no default."""
        return self.default is MISSING

    @property
    def element(self) -> type | None:
        """The type of a tuple's entries; None if the setting is not a tuple."""
        return typing.get_args(self.kind)[0] if typing.get_origin(self.kind) is tuple else None


def settings_of(config_class: type[DataclassInstance]) -> list[Setting]:
    """Returns the settings of a config class, in the order of its fields."""
    types = typing.get_type_hints(config_class)
    found = []
    for item in fields(config_class):
        said: dict[str, Any] = {"help": "", "range": None, "resumable": False}
        for base in reversed(config_class.__mro__):
            if item.name in (own := vars(base).get("__dataclass_fields__", {})):
                said |= own[item.name].metadata
        found.append(Setting(item.name, types[item.name], item.default, **said))
    return found


class Settings:
    """Base of the configs: construction fails if a value is out of its range."""

    def __post_init__(self) -> None:
        check_ranges(self)


def check_ranges(config: Any, **ranges: Range) -> None:
    """Raises ValueError with the first setting of `config` that is out of its range, or of its range in `ranges`.

    `ranges` is for ranges that depend on other settings or on data.
    """
    for item in settings_of(type(config)):
        allowed, value = ranges.pop(item.name, item.range), getattr(config, item.name)
        if allowed is None or value is None:
            continue
        for number in value if isinstance(value, tuple) else (value,):
            if number not in allowed:
                raise ValueError(f"{item.name} must be {allowed}, got {number}")
    if ranges:
        raise TypeError(f"{type(config).__name__} has no setting {', '.join(ranges)}")


def fixed_settings(config: Any, **inputs: Any) -> dict[str, Any]:
    """Returns the `inputs` and the settings that are not resumable, which a resumed training must share."""
    values = asdict(config)
    return inputs | {item.name: values[item.name] for item in settings_of(type(config)) if not item.resumable}


def read_config(path: str | Path, command: str, commands: Collection[str]) -> dict[str, Any]:
    """Reads the settings of `command` from a TOML file: its top level, or its table if the file has one per command.

    Raises FileNotFoundError, or ValueError for a file that is not TOML or has tables with names not in `commands`.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"config must be a TOML file, but there is none at {str(path)!r}")
    from lpd_ext.content import content_of, read_text  # with torch, which `lpd --help` does not wait for

    with content_of(path, "is not valid TOML"):
        values: dict[str, Any] = tomllib.loads(read_text(path))
    tables = [name for name, value in values.items() if isinstance(value, dict)]
    if not tables:
        return values
    if unknown := [name for name in tables if name not in commands]:
        allowed = ", ".join(sorted(commands))
        raise ValueError(f"config {str(path)!r} has a table [{unknown[0]}]; a table may be named {allowed}")
    if loose := [name for name in values if name not in tables]:
        raise ValueError(f"config {str(path)!r} has both tables and, outside them, the key {loose[0]!r}")
    return dict(values.get(command, {}))


def make_config(
    config_class: type[Config], values: Mapping[str, Any], flags: Mapping[str, Any], path: str, command: str
) -> Config:
    """Makes a config from the `values` in the file `path` and the `flags`, which win.

    Raises ValueError with the name of an unknown key, a value of another type or out of its range, or a required
    setting that is missing.
    """
    known = {item.name: item for item in settings_of(config_class)}
    for key in values:
        if key not in known:
            raise ValueError(
                f"config {path!r} sets {key!r}, which is no setting of {command}; allowed are {', '.join(known)}"
            )
    read = {key: _converted(value, known[key].kind, f"config {path!r}: {key}") for key, value in values.items()}
    merged = {**read, **flags}
    for item in known.values():
        if item.required and item.name not in merged:
            raise ValueError(
                f"{item.name} is missing: give --{item.name.replace('_', '-')}, or set it in a file given by --config"
            )
    return config_class(**merged)


def _converted(value: Any, kind: Any, where: str) -> Any:
    """Converts a TOML value to a setting's type; ValueError, starting with `where`, if it has another type."""
    if isinstance(kind, UnionType):  # a number or None, which TOML cannot express
        (kind,) = (member for member in typing.get_args(kind) if member is not type(None))
    if typing.get_origin(kind) is tuple:
        element = typing.get_args(kind)[0]
        if not isinstance(value, list):
            raise ValueError(f"{where} must be a list, each entry {_KINDS[element]}, got {value!r}")
        return tuple(_converted(entry, element, where) for entry in value)
    # bool is an int to Python; a whole number is a good float.
    fits = isinstance(value, (int, float) if kind is float else kind) and (kind is bool or not isinstance(value, bool))
    if not fits:
        raise ValueError(f"{where} must be {_KINDS[kind]}, got {value!r}")
    return kind(value)
