"""The results of `make gpu-report`: lines of JSON, each on disk before the next thing is tried."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]


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
        lines = self.path.read_text(encoding="utf-8").split("\n")
        whole, torn = lines[:-1], lines[-1]
        if torn:  # made whole, so that the next record begins a line of its own
            self.path.write_text("".join(line + "\n" for line in whole), encoding="utf-8")
        return [json.loads(line) for line in whole]


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
    """Returns the steps that need not be done again."""
    ends = {step: ended(attempt) for step, attempt in attempts(records).items()}
    return {step for step, end in ends.items() if end is not None and end["status"] == "done"}
