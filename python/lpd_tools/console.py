"""What the programs say: text as it is, whatever brackets, colons and spaces a path in it holds."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from lpd_tools.launch import place


def new_console(stderr: bool = False) -> Console:
    """A console for which nothing in a text, in a table's cells too, is markup or the name of an emoji."""
    return Console(stderr=stderr, markup=False, emoji=False)


def say(text: str) -> None:
    """One line, however wide the terminal is. Once under torchrun."""
    if place().rank == 0:
        new_console().print(text, soft_wrap=True)


def say_skipped(count: int, path: Path) -> None:
    """How many images could not be read, if any, and where they are listed."""
    if count:
        say(f"skipped {count} images that cannot be read: {path} lists them")
