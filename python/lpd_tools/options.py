"""Makes commands from functions: one that takes a config gets an option for each of its settings, and --config."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable
from dataclasses import is_dataclass
from types import GenericAlias
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from typer.core import TyperArgument, TyperCommand, TyperOption

from lpd_tools.settings import Setting, make_config, read_config, settings_of

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


class PlainTextCommand(TyperCommand):
    """A command whose help texts are shown literally: brackets in them are not markup."""

    def __init__(self, name: str | None, **options: Any) -> None:
        super().__init__(name, **options)
        self.help = escape(self.help or "")
        for item in self.params:
            if isinstance(item, (TyperArgument, TyperOption)) and item.help:
                item.help = escape(item.help)


def add_command(app: typer.Typer, function: Callable[..., None], panel: str | None = None) -> None:
    """Adds `function` to `app` as a command of its name, with its docstring as the help.

    A function of one config becomes a command with one option per setting, required ones first, and --config for a TOML
    file. An option on the command line wins over the file, and the file over the default.
    """
    name = function.__name__.replace("_", "-")
    config_class = _config_class(function)
    command = function if config_class is None else _with_options(function, config_class, name)
    app.command(name, cls=PlainTextCommand, help=inspect.getdoc(function), rich_help_panel=panel)(command)


def _config_class(function: Callable[..., None]) -> type[DataclassInstance] | None:
    """Returns the config class that is the function's only parameter, None for functions of other parameters."""
    kinds = [kind for name, kind in typing.get_type_hints(function).items() if name != "return"]
    return kinds[0] if len(kinds) == 1 and isinstance(kinds[0], type) and is_dataclass(kinds[0]) else None


def _with_options(
    function: Callable[..., None], config_class: type[DataclassInstance], name: str
) -> Callable[..., None]:
    settings = sorted(settings_of(config_class), key=lambda item: not item.required)
    parameters = [_parameter("ctx", typer.Context, inspect.Parameter.empty), *map(_option, settings)]
    help_text = f"TOML file with these settings, or with a table [{name}] of them; options win over it"
    parameters.append(_parameter("config", Annotated[str, typer.Option(help=help_text)], ""))

    def command(ctx: typer.Context, config: str, **options: Any) -> None:
        values = read_config(config, name, _that_read_files(ctx)) if config else {}
        given = {key for key in options if str(getattr(ctx.get_parameter_source(key), "name", "")) == "COMMANDLINE"}
        flags = {key: tuple(v) if isinstance(v, list) else v for key, v in options.items() if key in given}
        function(make_config(config_class, values, flags, config, name))

    command.__dict__["__signature__"] = inspect.Signature(parameters)
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command


def _that_read_files(ctx: typer.Context) -> list[str]:
    """Returns the commands that take --config; a file may have a table for each."""
    commands = getattr(ctx.find_root().command, "commands", {ctx.command.name: ctx.command})
    return [name for name, command in commands.items() if any(item.name == "config" for item in command.params)]


def _option(item: Setting) -> inspect.Parameter:
    # typer knows lists of any length, not tuples; a tuple keeps the frozen config hashable.
    kind = item.kind if item.element is None else GenericAlias(list, (item.element,))
    text = item.help if item.range is None else f"{item.help}; {item.range.interval}"
    if item.required:  # not required by typer: the file may have it
        return _parameter(item.name, Annotated[kind | None, typer.Option(help=f"{text}; required")], None)
    default = item.default if item.element is None else list(item.default)
    return _parameter(item.name, Annotated[kind, typer.Option(help=text)], default)


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
