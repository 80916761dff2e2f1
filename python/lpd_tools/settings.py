"""Frozen dataclass configs as command-line options and TOML keys: name, type, default and help are written once."""

from __future__ import annotations

import inspect
import sys
import typing
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, field, fields
from pathlib import Path
from types import GenericAlias
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Config = TypeVar("Config", bound="DataclassInstance")
_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}


def setting(default: Any, help_text: str) -> Any:
    """A dataclass field with its default (... for none) and the help text of its command-line option."""
    metadata = {"help": help_text}
    return field(metadata=metadata) if default is ... else field(default=default, metadata=metadata)


def check_ranges(config: Any, **ranges: tuple[float, float]) -> None:
    """ValueError naming the first setting (or entry of a tuple) of `config` outside its closed range."""
    for name, (low, high) in ranges.items():
        value = getattr(config, name)
        for number in value if isinstance(value, tuple) else (value,):
            if not low <= number <= high:
                raise ValueError(f"{name} must be in [{low}, {high}], got {number}")


def add_command(
    app: typer.Typer, name: str, config_class: type[Config], run: Callable[[Config], None], help_text: str
) -> None:
    """Adds command `name`: one option per field of `config_class`, --config for a TOML file, then `run(config)`.

    An option on the command line wins over the file, and the file over the default.
    """
    types = typing.get_type_hints(config_class)
    parameters = [_parameter("ctx", typer.Context, inspect.Parameter.empty)]
    for item in fields(config_class):
        element = _element(types[item.name])
        # typer knows lists of any length, not tuples; a tuple keeps the frozen config hashable.
        kind = types[item.name] if element is None else GenericAlias(list, (element,))
        text = item.metadata.get("help", "")
        if item.default is MISSING:  # not for typer to demand: the file may have it
            option = typer.Option(help=text, show_default="required")
            parameters.append(_parameter(item.name, Annotated[kind | None, option], None))
        else:
            default = item.default if element is None else list(item.default)
            parameters.append(_parameter(item.name, Annotated[kind, typer.Option(help=text)], default))
    option = typer.Option(help=f"TOML file with these settings, or with a table [{name}] of them; options win over it")
    parameters.append(_parameter("config", Annotated[str, option], ""))

    def command(ctx: typer.Context, config: str, **options: Any) -> None:
        commands = {info.name for info in app.registered_commands if info.name}
        values = read_config(config, name, commands) if config else {}
        given = {key for key in options if str(getattr(ctx.get_parameter_source(key), "name", "")) == "COMMANDLINE"}
        flags = {key: tuple(v) if isinstance(v, list) else v for key, v in options.items() if key in given}
        run(make_config(config_class, values, flags, config, name))

    command.__dict__["__signature__"] = inspect.Signature(parameters)
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    app.command(name, help=help_text)(command)


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _element(kind: Any) -> type | None:
    """The type of a tuple's elements; None for a type that is no tuple."""
    return typing.get_args(kind)[0] if typing.get_origin(kind) is tuple else None


def read_config(path: str | Path, command: str, commands: Collection[str]) -> dict[str, Any]:
    """The settings of `command` in a TOML file: its top level, or its table where the file has one per command.

    Raises FileNotFoundError, or ValueError for a file that is no TOML or has tables of other names than `commands`.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"config must be a TOML file, but there is none at {str(path)!r}")
    try:
        values: dict[str, Any] = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:  # TOMLDecodeError and UnicodeDecodeError are both
        raise ValueError(f"config {str(path)!r} is not valid TOML: {error}") from error
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
    """A config of the `values` in the file `path` and of the `flags`, which win.

    Raises ValueError naming a key that is unknown, a value of another type, or a required setting that neither gives.
    """
    types = typing.get_type_hints(config_class)
    names = [item.name for item in fields(config_class)]
    for key in values:
        if key not in names:
            raise ValueError(
                f"config {path!r} sets {key!r}, which is no setting of {command}; allowed are {', '.join(names)}"
            )
    read = {key: _converted(value, types[key], f"config {path!r}: {key}") for key, value in values.items()}
    merged = {**read, **flags}
    for item in fields(config_class):
        if item.default is MISSING and item.name not in merged:
            raise ValueError(
                f"{item.name} is missing: give --{item.name.replace('_', '-')}, or set it in a file given by --config"
            )
    return config_class(**merged)


def _converted(value: Any, kind: Any, where: str) -> Any:
    """A TOML value as a setting's type; ValueError, starting with `where`, if it is of another."""
    element = _element(kind)
    if element is not None:
        if not isinstance(value, list):
            raise ValueError(f"{where} must be a list, each entry {_KINDS[element]}, got {value!r}")
        return tuple(_converted(entry, element, where) for entry in value)
    # bool is an int to Python; a whole number is a good float.
    fits = isinstance(value, (int, float) if kind is float else kind) and (kind is bool or not isinstance(value, bool))
    if not fits:
        raise ValueError(f"{where} must be {_KINDS[kind]}, got {value!r}")
    return kind(value)
