"""Opens a data set by the one string that names it on the command line."""

from __future__ import annotations

from collections.abc import Callable
from urllib.parse import parse_qsl

from lpd_tools.data import fashion_mnist, folders, huggingface
from lpd_tools.data.image_source import DataSet

Opener = Callable[[str, dict[str, str]], DataSet]
_KINDS: dict[str, tuple[Opener, dict[str, str]]] = {
    "fashion-mnist": (fashion_mnist.open_fashion_mnist, {}),
    "folder": (folders.open_folders, folders.OPTIONS),
    "hf": (huggingface.open_huggingface, huggingface.OPTIONS),
}


def open_data(spec: str) -> DataSet:
    """The data set that `spec` names, as DATA_HELP of `data.settings` describes.

    Nothing is fetched unless it is `hf:` with a hub name.

    Raises ValueError or FileNotFoundError naming what is wrong with the name or with the data.
    """
    kind, _, rest = spec.partition(":")
    if kind not in _KINDS:
        raise ValueError(f"data must begin with {', '.join(_KINDS)} and a colon, got {spec!r}")
    opener, allowed = _KINDS[kind]
    location, mark, query = rest.rpartition("?")
    if not mark or "=" not in query:  # a path may hold a question mark
        location, query = rest, ""
    given = dict(parse_qsl(query, keep_blank_values=True))
    for name in given:
        if name not in allowed:
            raise ValueError(f"data: {kind} has the options {', '.join(allowed) or 'none'}, got {name!r} in {spec!r}")
    if not location and kind != "fashion-mnist":
        raise ValueError(f"data: {spec!r} names no path; write {kind}:path")
    return opener(location, {**allowed, **given})
