"""Says which extra to install when a library that only training and evaluation use is missing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def train_extra(purpose: str) -> Iterator[None]:
    """Turns the ImportError of an import inside the block into one that names the library and its extra."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{purpose} needs {error.name}, which the [train] extra brings: pip install 'lpd-ext[train]'",
            name=error.name,
        ) from error
