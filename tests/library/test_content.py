"""Tests of reading a file's content: whatever is wrong with it is a ValueError of one line that names the file."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from lpd_ext.content import content_of, read_json


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (KeyError("rows"), "'rows' is missing"),
        (ZeroDivisionError("division by zero"), "division by zero"),
        (RecursionError("maximum recursion depth exceeded"), "it is nested too deeply"),
        (RuntimeError("first line\nsecond line"), "first line"),
        (MemoryError(), "MemoryError"),
        (ValueError("a list:\n\tb"), "a list: b"),
    ],
)
def test_any_error_becomes_a_value_error_that_names_the_file(error: Exception, reason: str) -> None:
    with pytest.raises(ValueError, match="is no list") as raised, content_of("some/file", "is no list"):
        raise error
    assert str(raised.value) == f"path 'some/file' is no list: {reason}"
    assert raised.value.__cause__ is error


def test_a_sentence_that_names_the_file_already_stays() -> None:
    with pytest.raises(ValueError, match=r"^path 'a/b' is empty$"), content_of(Path("a/b")), content_of("a/b"):
        raise ValueError("path 'a/b' is empty")


def test_errors_of_the_system_stay_and_name_the_file() -> None:
    with pytest.raises(FileNotFoundError, match="other"), content_of("some/file"):
        Path("other").read_text(encoding="utf-8")
    with pytest.raises(OSError, match="some/file") as raised, content_of("some/file"):
        raise OSError(errno.EIO, "Input/output error")
    assert raised.value.errno == errno.EIO
    with pytest.raises(UserWarning, match="of a caller who made it an error"), content_of("some/file"):
        raise UserWarning("of a caller who made it an error")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"[" * 50_000, "it is nested too deeply"),
        (b'{"a": ' * 50_000, "it is nested too deeply"),
        (b"\xff", "it is no text in UTF-8"),
        (b"9" * 5_000, "Exceeds the limit"),
        (b"{", "Expecting property name"),
        (b"", "Expecting value"),
    ],
)
def test_json_that_is_none_is_refused(text: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(text)
    with pytest.raises(ValueError, match=rf"^path '.*a\.json' is not valid JSON: {reason}"):
        read_json(tmp_path / "a.json")


def test_no_more_of_a_file_is_read_than_one_of_its_kind_can_have(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b"[1, 2]  ")
    assert read_json(tmp_path / "a.json", largest=8) == [1, 2]
    (tmp_path / "a.json").write_bytes(b"[1, 2]   ")
    with pytest.raises(ValueError, match=r"a\.json' is larger than 0 MB"):
        read_json(tmp_path / "a.json", largest=8)
