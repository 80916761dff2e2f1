"""Frozen dataclass configs as command-line options: name, type, default and help are written once."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable
from dataclasses import MISSING, field, fields
from types import GenericAlias
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Config = TypeVar("Config", bound="DataclassInstance")


def setting(default: Any, help_text: str) -> Any:
    """A dataclass field with its default (... for none) and the help text of its command-line option."""
    metadata = {"help": help_text}
    return field(metadata=metadata) if default is ... else field(default=default, metadata=metadata)


def add_command(
    app: typer.Typer, name: str, config_class: type[Config], run: Callable[[Config], None], help_text: str
) -> None:
    """Adds command `name`: one option per field of `config_class`, then `run(config)`."""
    types = typing.get_type_hints(config_class)
    parameters = []
    for item in fields(config_class):
        is_tuple = typing.get_origin(types[item.name]) is tuple
        # typer knows lists of any length, not tuples; a tuple keeps the frozen config hashable.
        kind = GenericAlias(list, typing.get_args(types[item.name])[:1]) if is_tuple else types[item.name]
        default: Any = inspect.Parameter.empty
        if item.default is not MISSING:
            default = list(item.default) if is_tuple else item.default
        option = typer.Option(help=item.metadata.get("help", ""))
        parameters.append(
            inspect.Parameter(
                item.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option]
            )
        )

    def command(**options: Any) -> None:
        values = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
        run(config_class(**values))

    command.__dict__["__signature__"] = inspect.Signature(parameters)
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    app.command(name, help=help_text)(command)
