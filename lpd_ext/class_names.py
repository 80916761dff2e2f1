"""Looks up classes by name."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches

_SHOWN = 20  # names that an error lists


def find_class(name: str, class_names: Sequence[str]) -> int:
    """Returns the index of the class with this name or comma-separated synonym, in any case.

    Raises ValueError, with suggestions, if no class or several have the name.
    """
    if list(class_names).count(name) == 1:
        return class_names.index(name)
    wanted = " ".join(name.lower().split())
    synonyms = [[word.strip().lower() for word in full.split(",")] for full in class_names]
    found = [index for index, words in enumerate(synonyms) if wanted in words or wanted == class_names[index].lower()]
    if len(found) == 1:
        return found[0]
    if found:
        several = ", ".join(f"{index} ({class_names[index]})" for index in found)
        raise ValueError(f"class_labels: {name!r} names several classes, give the index of one: {several}")
    if len(class_names) <= _SHOWN:
        known = ", ".join(class_names) or "none: this model has no class names"
        raise ValueError(f"class_labels: {name!r} is not a class name; known are {known}")
    near = get_close_matches(wanted, [word for words in synonyms for word in words], n=5)
    meant = f"did you mean {' or '.join(map(repr, near))}?" if near else f"this model has {len(class_names)} classes"
    raise ValueError(f"class_labels: {name!r} is not a class name; {meant}")


def short_name(name: str) -> str:
    """Returns the first of a class's synonyms, for captions."""
    return name.split(",")[0].strip()
