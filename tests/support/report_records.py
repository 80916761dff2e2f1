"""The results of `make gpu-report`: lines of JSON, each on disk before the next thing is tried."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]
_ANSWERS = ("within_twice", "bits_equal", "graph_equals_eager")
_ERRORS = re.compile(r"SUMMARY: [1-9]")  # of compute-sanitizer's tools


class Records:
    """The file results.jsonl of a folder.

    A step's records lie between one with "step": "begin" or a later begin of it, and "end", which says how it ended.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "results.jsonl"

    def add(self, step: str, what: str, **values: Any) -> None:
        """Appends a record."""
        line = json.dumps({"step": step, "what": what, **values}, ensure_ascii=False)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())

    def read(self) -> list[Record]:
        """Returns all records; a last line that was cut off, as by a machine taken away, is left out."""
        if not self.path.exists():
            return []
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):  # so that the next record begins a line of its own
            os.truncate(self.path, len(whole))
        return [json.loads(line) for line in whole.splitlines()]


def replace_text(path: Path, text: str) -> None:
    """Writes a file as a whole: a call that is interrupted leaves the one that was there."""
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def identity(records: Sequence[Record]) -> Mapping[str, Any] | None:
    """Returns what the records are of: card, versions, and whether emulated."""
    return next((record["of"] for record in records if record["what"] == "report"), None)


def attempts(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Returns the records of the last attempt at each step, in the order in which the steps were first begun."""
    found: dict[str, list[Record]] = {}
    for record in records:
        if record["what"] == "begin":
            found[record["step"]] = []
        if record["step"] in found:
            found[record["step"]].append(record)
    return found


def ended(attempt: Sequence[Record]) -> Record | None:
    """Returns the record that says how an attempt ended; None if it was cut off."""
    return next((record for record in attempt if record["what"] == "end"), None)


def done(records: Sequence[Record]) -> set[str]:
    """Returns the steps that need not be done again: they came to their end and found nothing wrong."""
    ends = {step: ended(attempt) for step, attempt in attempts(records).items() if not wrong(attempt)}
    return {step for step, end in ends.items() if end is not None and end["status"] == "done"}


def wrong(attempt: Sequence[Record]) -> Counter[str]:
    """Counts what an attempt found wrong, by kind; a comparison fails if its answer is no."""
    counts: Counter[str] = Counter()
    for record in attempt:
        counts["failed tests"] += record["what"] == "failed test"
        counts["failed comparisons"] += sum(record.get(answer) is False for answer in _ANSWERS)
        if record["what"] == "sanitizer":
            counts["failed sanitizer runs"] += record.get("status", 0) != 0 or bool(_ERRORS.search(record["found"]))
    return +counts


def said_of(counts: Mapping[str, int]) -> str:
    """Returns counts of `wrong` in words, such as `failed tests: 3`; "" for none."""
    return ", ".join(f"{kind}: {count}" for kind, count in counts.items())
