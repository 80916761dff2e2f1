"""Output of the programs: text unchanged, whatever brackets, colons and spaces a path in it holds."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from rich.console import Console
from rich.text import Text

from lpd_tools.launch import place


def new_console(stderr: bool = False) -> Console:
    """Returns a console that takes nothing in a text or a table's cells for markup or the name of an emoji.

    In a file or a pipe a line has 120 columns, unless COLUMNS says otherwise: in 80 tables would lose digits.
    """
    console = Console(stderr=stderr, markup=False, emoji=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = 120
    return console


def say(text: str) -> None:
    """Prints one line, however wide the terminal is; under torchrun from the first process only."""
    if place().rank == 0:
        new_console().print(text, soft_wrap=True)


class ConsoleHandler(logging.Handler):
    """Shows log records on stderr, one per line; under torchrun those of the first process."""

    def emit(self, record: logging.LogRecord) -> None:
        """Prints the record."""
        try:
            text = self.format(record)
            line = Text.assemble(("warning:", "yellow"), " ", text) if record.levelno >= logging.WARNING else Text(text)
            new_console(stderr=True).print(line, soft_wrap=True)
        except Exception:
            self.handleError(record)


def show_logs(verbose: bool) -> None:
    """Shows the programs' logs and the library's warnings from now on; `verbose`: all of the library's logs."""
    for name, level in (("lpd_tools", logging.INFO), ("lpd_ext", logging.INFO if verbose else logging.WARNING)):
        logger = logging.getLogger(name)
        logger.setLevel(level)
        if place().rank == 0 and not any(isinstance(handler, ConsoleHandler) for handler in logger.handlers):
            logger.addHandler(ConsoleHandler())


def say_skipped(count: int, path: Path) -> None:
    """Prints how many images could not be read, if any, and where they are listed."""
    if count:
        say(f"skipped {count} images that cannot be read: {path} lists them")
