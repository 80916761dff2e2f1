"""Progress of anything longer than two seconds: a bar on a terminal, a line now and then in a file."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from lpd_tools.console import new_console

Item = TypeVar("Item")
SECONDS_BETWEEN_LINES = 30.0


def track(
    items: Sequence[Item] | Iterable[Item],
    description: str,
    total: int | None = None,
    figures: Mapping[str, float] | None = None,
) -> Iterator[Item]:
    """Yields the items under a bar with elapsed and remaining time; without a terminal, prints a line each half minute.

    figures: shown after each item, such as a loss that the caller keeps up to date.
    """
    console = new_console()
    if total is None and isinstance(items, Sequence):
        total = len(items)
    show = _bar if console.is_terminal else _lines
    yield from show(console, items, description, total, {} if figures is None else figures)


def _bar(
    console: Console, items: Iterable[Item], description: str, total: int | None, figures: Mapping[str, float]
) -> Iterator[Item]:
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}", markup=False),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(description, total=total, figures="")
        for item in items:
            yield item
            progress.update(task, advance=1, figures=", ".join(_parts(figures)))


def _lines(
    console: Console, items: Iterable[Item], description: str, total: int | None, figures: Mapping[str, float]
) -> Iterator[Item]:
    start = said = time.monotonic()
    for done, item in enumerate(items, start=1):
        yield item
        if (now := time.monotonic()) - said < SECONDS_BETWEEN_LINES:
            continue
        said = now
        of_total = f" of {total}" if total is not None else ""
        left = f", {_clock((now - start) / done * (total - done))} left" if total is not None else ""
        parts = [f"{description}: {done}{of_total}, {_clock(now - start)}{left}", *_parts(figures)]
        console.print(", ".join(parts), soft_wrap=True)
        console.file.flush()  # or the line would wait in a buffer for others


def _parts(figures: Mapping[str, float]) -> list[str]:
    return [f"{name} {value:.4g}" for name, value in figures.items()]


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
