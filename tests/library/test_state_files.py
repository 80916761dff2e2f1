"""Weight files: what is refused says why in one line, and files may be read by those whom their place lets."""

from __future__ import annotations

import argparse
import fractions
import os
import pickle
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lpd_ext.state_files import complete_file, read_metadata, read_state_dict, write_state_dict

ADVICE = "save the state dict alone, torch.save(model.state_dict(), path)"


class Command:
    """An object as a malicious pickle holds it."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("executed",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (Command(), "it pickles more than tensors: posix.mkdir"),
        (fractions.Fraction(1, 3), "it pickles more than tensors: fractions.Fraction"),
        (argparse.Namespace(command=Command()), "it pickles more than tensors: posix.mkdir"),  # itself allowed
    ],
    ids=["command", "fraction", "namespace"],
)
def test_a_refused_pickle_names_what_it_holds(
    content: object, reason: str, new_format: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not torch's advice to load it all the same, with the codes of a terminal."""
    monkeypatch.chdir(tmp_path)
    torch.save({"model": content}, "weights.pth", _use_new_zipfile_serialization=new_format)
    with pytest.raises(ValueError, match="is not a readable checkpoint") as raised:
        read_state_dict("weights.pth")
    assert str(raised.value) == f"path 'weights.pth' is not a readable checkpoint: {reason}; {ADVICE}"
    assert not Path("executed").exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "no weight file (EOFError)"),
        (b"hello", "no weight file (KeyError)"),
        (pickle.dumps([1, 2], protocol=4), f"it pickles more than tensors: operand 149; {ADVICE}"),
    ],
    ids=["empty", "text", "list"],
)
def test_other_files_are_refused_in_one_line(content: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match="is not a readable checkpoint") as raised:
        read_state_dict(tmp_path / "file")
    assert str(raised.value).endswith(f"is not a readable checkpoint: {reason}")


def test_equal_tensors_are_equal_bytes_in_every_process(tmp_path: Path) -> None:
    """safetensors keeps metadata in an order that each process, and each map, draws anew."""
    state = {"é b": torch.arange(3.0), "a": torch.ones(2, dtype=torch.int8)}
    metadata = {f"name {i}": f"välue {i}" for i in range(8)}
    contents = set()
    for i in range(8):
        write_state_dict(state, tmp_path / str(i), metadata=dict(sorted(metadata.items(), reverse=bool(i % 2))))
        contents.add((tmp_path / str(i)).read_bytes())
    assert len(contents) == 1
    read = read_state_dict(tmp_path / "0")
    assert all(torch.equal(read[name], state[name]) for name in state)
    assert read_metadata(tmp_path / "0") == {"format": "pt", **metadata}


@pytest.fixture
def private() -> Iterator[None]:
    before = os.umask(0o077)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def write(path: Path) -> None:
    with complete_file(path) as temporary:
        temporary.write_text("new")


def test_the_umask_decides_who_may_read_a_new_file(private: None, tmp_path: Path) -> None:
    write(tmp_path / "a")
    assert mode(tmp_path / "a") == 0o600
    os.umask(0o022)
    write(tmp_path / "b")
    assert mode(tmp_path / "b") == 0o644
    write(tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] in (["a", "b"], ["b", "a"])


@pytest.mark.parametrize("given", [0o600, 0o640, 0o666])
def test_a_file_that_is_written_anew_keeps_its_mode(given: int, tmp_path: Path) -> None:
    """While it is written too: nobody may read more than before."""
    (tmp_path / "a").write_text("old")
    (tmp_path / "a").chmod(given)
    with complete_file(tmp_path / "a") as temporary:
        assert mode(temporary) == 0o600
        temporary.write_text("new")
    assert mode(tmp_path / "a") == given
    assert (tmp_path / "a").read_text() == "new"
