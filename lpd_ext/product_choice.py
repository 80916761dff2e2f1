"""The choice between our own products of few rows and the library's, by times on the GPU at hand, taken once.

The choice is per pair of layers, one that adds to the residual stream and the one after the next LayerNorm: what our
own product leaves for the other half of that LayerNorm is of no use to the library's.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from threading import RLock

import torch

from lpd_ext import product_table, products
from lpd_ext.modes import decoding_modes
from lpd_ext.product_check import check_pair
from lpd_ext.product_table import Card, ProductTimes
from lpd_ext.products import ROW_CLASSES, Pair, Product, Times

log = logging.getLogger(__name__)
# Our own pair must be faster by this: then noise has not decided, and a decode earns what folding its LayerNorms costs
# (5 us for a pair, 0.8 us of 16 earned in each step). Otherwise the library's products are used.
_FASTER_BY = 0.05
_LONGEST = 30.0  # seconds that a measurement may take; about one is expected
_lock = RLock()
_known: dict[Card, ProductTimes] = {}
_failed: set[tuple[Card, str]] = set()
_told: dict[tuple[Card, Pair], frozenset[int]] = {}


def row_class(rows: int) -> int | None:
    """Returns the class that so many rows belong to, the next number in ROW_CLASSES; None above the last."""
    return next((most for most in ROW_CLASSES if rows <= most), None)


def own_rows(pairs: Sequence[Pair], device: torch.device) -> list[frozenset[int]]:
    """Returns the classes of rows in which our own products of each pair are faster, after measuring what is not known.

    Empty for a device other than a GPU, and where measuring fails, which the log says.
    """
    card = product_table.card_of(device)
    if card is None:
        return [frozenset()] * len(pairs)
    with _lock:
        if _missing(card, pairs) and not (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
            with product_table.lock():  # processes that start together choose by the times of one of them
                _load(card).update(_read(card))
                _measure(card, pairs, device)
        chosen = [_faster(_load(card), pair) or frozenset() for pair in pairs]
        _tell(card, pairs, chosen)
        return chosen


def known_own_rows(pairs: Sequence[Pair], device: torch.device) -> list[frozenset[int] | None]:
    """Returns what `own_rows` does without measuring: None for a pair that is not known."""
    card = product_table.card_of(device)
    with _lock:
        if card is None:
            return [None] * len(pairs)
        chosen = [_faster(_load(card), pair) for pair in pairs]
        _tell(card, pairs, chosen)
        return chosen


def remember(product: Product, times: dict[int, Times], device: torch.device) -> None:
    """Keeps the times of a product by numbers of rows, ROW_CLASSES among them, for this process and the next ones."""
    card = product_table.card_of(device)
    if card is None:
        return
    with _lock, product_table.lock():
        _keep(card, product, times)


def _keep(card: Card, product: Product, times: dict[int, Times]) -> None:
    entry = {rows: (1e3 * times[rows].own, 1e3 * times[rows].library) for rows in ROW_CLASSES}
    _load(card)[product.name] = entry
    product_table.add(card, {product.name: entry})


def forget() -> None:
    """Makes this process read the file again."""
    with _lock:
        _known.clear()
        _failed.clear()
        _told.clear()


def _missing(card: Card, pairs: Sequence[Pair]) -> list[Product]:
    """Returns the products that have no times and have not failed."""
    distinct = dict.fromkeys(product for pair in pairs for product in pair)
    return [p for p in distinct if p.name not in _load(card) and (card, p.name) not in _failed]


def _load(card: Card) -> ProductTimes:
    if card not in _known:
        _known[card] = _read(card)
    return _known[card]


def _read(card: Card) -> ProductTimes:
    return {name: times for name, times in product_table.read(card).items() if set(times) >= set(ROW_CLASSES)}


def _measure(card: Card, pairs: Sequence[Pair], device: torch.device) -> None:
    """Checks and times what is missing."""
    missing, begun = _missing(card, pairs), time.monotonic()
    if not missing:
        return
    try:
        with decoding_modes(device):
            for pair in pairs:
                if not set(pair).isdisjoint(missing):
                    check_pair(pair, device)
            for product in missing:
                _keep(card, product, products.measure(product, device, begun + _LONGEST))
        log.info("timed %d products on %s in %.1f s", len(missing), card[0], time.monotonic() - begun)
    except Exception as error:  # such as too little memory: then the library's products are as good
        _failed.update((card, product.name) for product in missing)
        log.warning("our own products are not used, they could not be timed: %s", error)


def _tell(card: Card, pairs: Sequence[Pair], chosen: Sequence[frozenset[int] | None]) -> None:
    """Logs each choice when it is first made, for it is part of what draws a picture."""
    for pair, rows in zip(pairs, chosen, strict=True):
        if rows is not None and _told.get((card, pair)) != rows:
            _told[card, pair] = rows
            ours = f"our own at {', '.join(map(str, sorted(rows)))} rows" if rows else "the library's"
            log.info("products on %s for %s and %s: %s", card[0], pair[0].name, pair[1].name, ours)


def _faster(known: ProductTimes, pair: Pair) -> frozenset[int] | None:
    """Returns the classes of rows in which our own pair is faster; None for one that is not known."""
    if not all(product.name in known for product in pair):
        return None

    def total(rows: int, which: int) -> float:
        return sum(known[product.name][rows][which] for product in pair)

    return frozenset(rows for rows in ROW_CLASSES if total(rows, 0) < (1 - _FASTER_BY) * total(rows, 1))
