"""Names of files and folders in data: hidden ones, and numbers."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

# What systems and programs leave in folders beside their names with a dot: resource forks, thumbnails, waste.
_LEFT_BY_OTHERS = frozenset({"__MACOSX", "@eaDir", "$RECYCLE.BIN", "lost+found", "Thumbs.db", "desktop.ini"})
_NUMBERS_BELOW = 2**31  # a longer row of digits is a date or a serial number


def is_hidden(name: str) -> bool:
    """Whether a file or folder of that name is never data, such as `.ipynb_checkpoints`, `.git` and `__MACOSX`."""
    return name.startswith(".") or name in _LEFT_BY_OTHERS


def visible(folder: Path) -> list[Path]:
    """Returns the content of a folder without hidden names, sorted by name."""
    return sorted(path for path in folder.iterdir() if not is_hidden(path.name))


def pictures_below(top: Path, suffixes: Collection[str]) -> Iterator[Path]:
    """The files of these suffixes in a folder and those below it, in no order; nothing hidden, no folder twice."""
    seen = set()
    for folder, below, files in os.walk(top, onerror=_raise, followlinks=True):
        status = Path(folder).stat()
        if (status.st_dev, status.st_ino) in seen:  # by a link that leads back
            below.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        below[:] = [name for name in below if not is_hidden(name)]
        for name in files:
            path = Path(folder, name)
            if not is_hidden(name) and path.suffix.lower() in suffixes:
                yield path


def _raise(error: OSError) -> None:
    raise error


def whole_numbers(names: Iterable[str]) -> list[int] | None:
    """Converts names to numbers if all are distinct whole numbers; else returns None."""
    names = list(names)
    if not all(name.isascii() and name.isdecimal() for name in names):
        return None
    numbers = [int(name) for name in names]
    return numbers if len(set(numbers)) == len(numbers) and max(numbers, default=0) < _NUMBERS_BELOW else None


def in_order(names: Iterable[str]) -> list[str]:
    """Class names in the order of their labels: by number where all are whole numbers, else as text."""
    names = sorted(names)
    numbers = whole_numbers(names)
    return names if numbers is None else [name for _, name in sorted(zip(numbers, names, strict=True))]
