"""Times of products that were measured on this machine's GPUs, in a file of the user's cache directory.

$LPD_CACHE_DIR/product_times.json, or that of $XDG_CACHE_HOME/lpd_ext, or of ~/.cache/lpd_ext. A file that cannot be
read is as good as none, and one that cannot be written is measured again by the next process; the log says so.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from fcntl import LOCK_EX, LOCK_NB, flock
from functools import cache
from hashlib import sha256
from json import dumps
from math import inf
from pathlib import Path
from typing import IO

import torch

from lpd_ext import _C
from lpd_ext.content import read_json, reason
from lpd_ext.state_files import write_text

Card = tuple[str, str, str, str, str]  # the values of _CARD_KEYS
Milliseconds = tuple[float, float]  # of our own product, and of the library's
ProductTimes = dict[str, dict[int, Milliseconds]]  # by name and number of rows

log = logging.getLogger(__name__)
_CARD_KEYS = ("card", "compute capability", "driver", "torch", "lpd_ext")
_FORMAT = 1
_LARGEST = 1 << 20  # bytes of the file
_MOST_CARDS = 16  # with their versions; the one written longest ago goes first
_MOST_PRODUCTS = 128
_LONGEST_WAIT = 60.0  # seconds; a measurement ends after half of that
_DRIVER = Path("/proc/driver/nvidia/version")


def path() -> Path | None:
    """Returns where the file is, whether it exists or not; None for a user without a home."""
    if folder := os.environ.get("LPD_CACHE_DIR"):
        return Path(folder) / "product_times.json"
    try:
        cache_folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        return None
    return cache_folder / "lpd_ext" / "product_times.json"


def card_of(device: torch.device) -> Card | None:
    """Returns what times on a GPU depend on; None for other devices, on which nothing is measured."""
    if device.type != "cuda":
        return None
    index = torch.cuda.current_device() if device.index is None else device.index
    return _card(index)


@cache
def _card(index: int) -> Card:
    properties = torch.cuda.get_device_properties(index)
    return properties.name, f"{properties.major}.{properties.minor}", _driver(), str(torch.__version__), _build()


@cache
def _build() -> str:
    """Returns the version, and what tells builds of it apart: their kernels may differ."""
    return f"{_C.__version__} {sha256(Path(str(_C.__file__)).read_bytes()).hexdigest()[:12]}"


def _driver() -> str:
    try:
        found = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)", _DRIVER.read_text(encoding="utf-8"))
    except OSError:
        found = None
    return found[1] if found else f"of CUDA {torch.version.cuda}"


@contextmanager
def lock() -> Iterator[None]:
    """Keeps the file to this process, by another one beside it; waits while others have it, but not for ever.

    Where no such file can be had, nothing is kept either, so there is nothing to wait for.
    """
    with ExitStack() as stack:
        place = path()
        try:
            if place is not None:
                place.parent.mkdir(parents=True, exist_ok=True)
                _wait_for(stack.enter_context(place.with_suffix(".lock").open("w")))
        except OSError as error:
            log.debug("times of products are measured without a lock: %s", error)
        yield


def _wait_for(file: IO[str]) -> None:
    end = time.monotonic() + _LONGEST_WAIT
    while True:
        try:
            return flock(file, LOCK_EX | LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > end:
                log.warning("another process has measured products for %.0f s; not waiting longer", _LONGEST_WAIT)
                return None
            time.sleep(0.05)


def read(card: Card) -> ProductTimes:
    """Returns the times in the file that were measured on this card with these versions."""
    return _read().get(card, {})


def add(card: Card, times: Mapping[str, Mapping[int, Milliseconds]]) -> None:
    """Adds times to those in the file, which is replaced as a whole.

    Of two processes that write at the same moment without `lock` one may miss what the other adds.
    """
    place = path()
    if place is None:
        return
    cards = _read()
    merged = cards.pop(card, {}) | {name: dict(by_rows) for name, by_rows in times.items()}
    cards[card] = dict(list(merged.items())[-_MOST_PRODUCTS:])
    rows = [
        dict(zip(_CARD_KEYS, key, strict=True)) | {"milliseconds": products}
        for key, products in list(cards.items())[-_MOST_CARDS:]
    ]
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        write_text(place, dumps({"format": _FORMAT, "cards": rows}, indent=1) + "\n")
    except OSError as error:
        log.warning("times of products are measured again by the next process, they cannot be kept: %s", error)


def _read() -> dict[Card, ProductTimes]:
    """Returns all cards of the file."""
    place = path()
    try:
        if place is None or not place.exists():
            return {}
        content = read_json(place, "holds no times of products", _LARGEST)
        if content["format"] != _FORMAT:
            raise ValueError(f"its format is {content['format']!r}, not {_FORMAT}")
        return dict(_entry(row) for row in content["cards"])
    except Exception as error:  # whatever is wrong with a cache, it is no reason not to decode
        log.warning("times of products are measured again, %s is ignored: %s", place, reason(error))
        return {}


def _entry(row: Mapping[str, object]) -> tuple[Card, ProductTimes]:
    card, capability, driver, torch_version, version = (_text(row[key]) for key in _CARD_KEYS)
    products = row["milliseconds"]
    if not isinstance(products, dict):
        raise ValueError(f"milliseconds must be by product, got {products!r}")
    times = {
        name: {int(rows): _times(pair) for rows, pair in by_rows.items()}
        for name, by_rows in list(products.items())[-_MOST_PRODUCTS:]
    }
    return (card, capability, driver, torch_version, version), times


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"a card is described by text, got {value!r}")
    return value


def _times(pair: tuple[float, float]) -> Milliseconds:
    own, library = map(float, pair)
    if not (0 < own < inf and 0 < library < inf):
        raise ValueError(f"times must be positive, got {pair!r}")
    return own, library
