"""Argument checks: each returns a plain Python value, or raises TypeError or ValueError with the argument's name."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from contextlib import suppress
from numbers import Real
from typing import Any

import torch
from torch import Tensor

Grid = tuple[int, int]  # height, width, in cells


def as_int(value: object, name: str) -> int:
    """Returns an integer of any kind (numpy's and torch's too) as an int; TypeError for others, and for a bool."""
    if type(value) is int:
        return value
    # A tensor has __index__ whatever it holds, and True and False have one in every library.
    if hasattr(value, "__index__") and not isinstance(value, bool) and "bool" not in str(getattr(value, "dtype", "")):
        with suppress(TypeError):
            return operator.index(value)
    raise TypeError(f"{name} must be an integer, got {value!r}")


def as_real(value: Any, name: str) -> float:
    """Returns a real number of any kind (numpy's and torch's too) as a float; TypeError for others, and for a bool."""
    if type(value) is float:
        return value
    number = as_scalar(value)
    if not isinstance(number, bool) and isinstance(number, Real):
        return float(number)
    raise TypeError(f"{name} must be a number, got {value!r}")


def as_scalar(value: Any) -> Any:
    """Unwraps an array or tensor without dimensions; returns anything else as it is."""
    return value.item() if getattr(value, "ndim", None) == 0 else value


def as_positive_int(value: object, name: str) -> int:
    """Returns value as an int >= 1; ValueError for anything else, since such values come from files."""
    with suppress(TypeError):
        if (number := as_int(value, name)) >= 1:
            return number
    raise ValueError(f"{name} must be an integer >= 1, got {value!r}")


def as_grid(grid: Sequence[int], most_cells: int | None = None) -> Grid:
    """Returns grid as a tuple (JSON gives a list); ValueError unless it is two integers >= 1 with few enough cells."""
    if not isinstance(grid, Sequence) or len(grid) != 2:
        raise ValueError(f"grid must be two integers (height, width) >= 1, got {grid!r}")
    try:
        height, width = (as_positive_int(side, "side") for side in grid)
    except ValueError:
        raise ValueError(f"grid must be two integers (height, width) >= 1, got {grid!r}") from None
    if most_cells is not None and height * width > most_cells:
        raise ValueError(f"grid must have at most {most_cells} cells, got {height} x {width}")
    return height, width


def check_tensor(value: object, name: str, dtype: torch.dtype, shape: Sequence[int]) -> None:
    """Raises TypeError unless value is a tensor, ValueError unless it has that dtype and shape."""
    kind = str(dtype).removeprefix("torch.")
    if not isinstance(value, Tensor):
        article = "an" if kind.startswith("i") else "a"
        raise TypeError(f"{name} must be {article} {kind} tensor of shape {list(shape)}, got {type(value).__name__}")
    if value.dtype != dtype or tuple(value.shape) != tuple(shape):
        raise ValueError(f"{name} must be {kind} of shape {list(shape)}, got {value.dtype} {list(value.shape)}")


def per_image(value: Any, name: str, batch: int) -> list[Any]:
    """Returns one entry per image: the given list, or the one value repeated."""
    value = as_scalar(value)
    values = list(value) if isinstance(value, Iterable) and not isinstance(value, str) else [value] * batch
    if len(values) != batch:
        raise ValueError(f"{name} must be one value or one per label ({batch}), got {len(values)}")
    return values
