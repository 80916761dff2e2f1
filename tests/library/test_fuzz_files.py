"""Thousands of damaged files of every kind: each loads, or is refused by a sentence that names it (fuzz_files.py)."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("typer")
pytest.importorskip("matplotlib")

import fuzz
import fuzz_files
from fuzz_files import Kind, NotRefusedError, make_files, try_file

FILES, SEED, KINDS = 2520, 16, 21


def test_damaged_files_load_or_are_refused() -> None:
    outcomes = fuzz.fuzz("files", FILES, seed=SEED)
    assert sum(outcomes.values()) == FILES
    assert outcomes["loaded"] > 0.05 * FILES
    assert outcomes["refused"] > 0.5 * FILES


def test_every_kind_is_refused(tmp_path: Path) -> None:
    kinds = make_files(tmp_path)
    assert len(kinds) == KINDS
    for kind in kinds:
        valid = (tmp_path / kind.file).read_bytes()
        outcomes = {try_file(kind, valid, tmp_path, random.Random(seed)) for seed in range(20)}
        assert "refused" in outcomes, kind.name
        (tmp_path / kind.file).write_bytes(valid)


def too_much_memory(path: Path) -> None:
    bytearray(b"x") * (700 << 20)


def too_long(path: Path) -> None:
    sum(range(20_000_000))


def a_crash(path: Path) -> None:
    raise KeyError(path)


def no_name(path: Path) -> None:
    raise ValueError("something is wrong")


@pytest.mark.parametrize("load", [too_much_memory, too_long, a_crash, no_name])
def test_what_is_neither_is_found(
    load: Callable[[Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fuzz_files, "SECONDS", 0.05)
    (tmp_path / "folder").mkdir()
    with pytest.raises(NotRefusedError):
        try_file(Kind("planted", "folder/file", load), b"content", tmp_path, random.Random(0))
