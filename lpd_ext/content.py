"""Reads files that may be damaged or hostile: faults in their content become a ValueError with the file's name.

Sizes are bounded before anything is read, and callers need not know what a parser may raise.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_LARGEST_TEXT = 64 << 20  # bytes; the index of a token cache of ten thousand shards has two millions

_LONGEST_REASON = 2000  # characters


@contextmanager
def content_of(path: str | Path, fault: str = "cannot be used") -> Iterator[None]:
    """Turns any error in the block into ValueError "path 'x' `fault`: why", as a fault of the file's content.

    Errors of the system keep their type, with the file's name; a ValueError that names the file stays as it is.
    """
    try:
        yield
    except Warning:  # a caller's filter turned the warning into an error
        raise
    except Exception as error:  # a damaged file can raise anything
        if isinstance(error, OSError):
            if error.errno is None or error.filename is not None:
                raise
            raise OSError(error.errno, error.strerror, str(path)) from error
        if isinstance(error, ValueError) and str(path) in str(error):
            raise
        raise ValueError(f"path {str(path)!r} {fault}: {reason(error)}") from error


def read_text(path: str | Path, largest: int = _LARGEST_TEXT) -> str:
    """Reads a UTF-8 file; ValueError for another encoding, and for more than `largest` bytes.

    Call it inside a `content_of` block.
    """
    with Path(path).open("rb") as file:
        content = file.read(largest + 1)
    if len(content) > largest:
        raise ValueError(f"path {str(path)!r} is larger than {largest >> 20} MB")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"it is no text in UTF-8: {error}") from error


def read_json(path: str | Path, fault: str = "is not valid JSON", largest: int = _LARGEST_TEXT) -> Any:
    """Parses a JSON file; ValueError if it is not JSON or has more than `largest` bytes, see `content_of`."""
    with content_of(path, fault):
        return json.loads(read_text(path, largest))


def reason(error: BaseException) -> str:
    """Returns in one line why a file cannot be read, without torch's advice to load it unsafely."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if text.startswith("Weights only load failed"):
        refused = re.search(r"[Uu]nsupported (?:global: )?(?:GLOBAL )?(operand \d+|[\w.]+)", text)
        what = f": {refused[1]}" if refused else ""
        return f"it pickles more than tensors{what}; save the state dict alone, torch.save(model.state_dict(), path)"
    if isinstance(error, KeyError):
        return f"{text} is missing"
    if isinstance(error, ValueError):  # by this library, may list several mismatches
        return textwrap.shorten(text, _LONGEST_REASON, placeholder=" ...") or type(error).__name__
    return text.splitlines()[0] if text else type(error).__name__
