"""The parts of `make gpu-report` beside its measures: the build and its note, the programs of a step, the records."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import time
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
import report_identity
import report_programs
from report_identity import commit, is_built, mark_built
from report_programs import Command, python_path
from report_records import Records, done, replace_text, wrong

SUPPORT = Path(report_programs.__file__).parent
CARD = {"card": "NVIDIA H200", "compute capability": "9.0", "driver": "570"}


@pytest.fixture
def records(tmp_path: Path) -> Records:
    return Records(tmp_path)


def test_what_is_not_committed_has_another_name(tmp_path: Path) -> None:
    (tmp_path / "csrc").mkdir()
    source, page = tmp_path / "csrc" / "source.cu", tmp_path / "page.md"
    source.write_text("one")
    without_git = commit(tmp_path)
    assert without_git.startswith("unknown-")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "one"]):
        subprocess.run([*git, *arguments], check=True)
    committed = commit(tmp_path)
    page.write_text("tables")
    assert commit(tmp_path) == committed
    names = {without_git, committed}
    for text in ("two", "three"):
        source.write_text(text)
        names.add(commit(tmp_path))
    (tmp_path / "csrc" / "new.cu").touch()
    names.add(commit(tmp_path))
    assert len(names) == 5
    assert sum(name.startswith(f"{committed}-dirty-") for name in names) == 3


def test_a_build_is_noted_when_it_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = tmp_path / "site"
    site.mkdir()
    statuses, noted = [0, 1, 0, 0], []

    class Cmake:
        def __init__(self, *_: Any) -> None:
            noted.append(is_built(site, of))

        def wait(self, seconds: float) -> int:
            return statuses.pop(0)

    monkeypatch.setattr(report_identity, "gpu", lambda: CARD)
    monkeypatch.setattr(report_identity, "commit", lambda root: "abc")  # sources may be edited while tests run
    monkeypatch.setattr(report_programs, "Command", Cmake)
    monkeypatch.setattr(report_programs, "SITE", site)
    monkeypatch.setattr(report_programs, "BUILT", tmp_path)
    monkeypatch.setattr(shutil, "which", lambda *_, **__: "cmake")
    pybind11 = ModuleSpec("pybind11", None, origin=str(tmp_path / "pybind11" / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: pybind11)
    of = report_identity.machine(dry_run=False)
    mark_built(site, of)
    with pytest.raises(RuntimeError, match="failed: cmake --build"):
        report_programs.build(False, tmp_path, 60, lambda *_, **__: None)
    assert not is_built(site, of)
    report_programs.build(False, tmp_path, 60, lambda *_, **__: None)
    assert is_built(site, of)
    assert not any(noted)
    assert len(noted) == 4


def test_a_module_that_was_deleted_is_not_in_what_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_programs, "SITE", tmp_path / "site")
    monkeypatch.setattr(report_programs, "BUILT", tmp_path)
    (tmp_path / "_C.so").touch()
    deleted = tmp_path / "site" / "lpd_ext" / "deleted.py"
    deleted.parent.mkdir(parents=True)
    deleted.touch()
    report_programs.install()
    assert not deleted.exists()
    assert {"ops.py", "_C.so"} <= {path.name for path in deleted.parent.iterdir()}


def test_no_place_is_searched_for_modules_that_nobody_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONPATH", raising=False)
    assert python_path(Path("/a")) == "/a"
    assert python_path() == ""
    monkeypatch.setenv("PYTHONPATH", "/b:")
    assert python_path(Path("/a")) == "/a:/b"


def test_which_runs_of_sanitizers_are_wrong() -> None:
    def is_wrong(**values: Any) -> bool:
        return bool(wrong([{"what": "sanitizer", "tool": "memcheck", "found": ""} | values]))

    assert not is_wrong(status=0, found="ERROR SUMMARY: 0 errors; 12 passed in 3 s")
    assert not is_wrong(found="not installed")
    assert is_wrong(status=0, found="ERROR SUMMARY: 0 errors; ERROR SUMMARY: 3 errors")
    assert is_wrong(status=9, found="")
    assert is_wrong(status="no time left")


def test_programs_of_a_step_end_with_it(tmp_path: Path) -> None:
    """A child of the step's process, and a child of that."""
    mark = tmp_path / "mark"
    child = f"import time, pathlib; time.sleep(4); pathlib.Path({str(mark)!r}).touch()"
    program = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    step = (
        f"import sys; sys.path.insert(0, {str(SUPPORT)!r}); import report_programs, pathlib\n"
        f"report_programs.Command([sys.executable, '-c', {program!r}], pathlib.Path({str(tmp_path / 'log')!r})).wait(9)"
    )
    assert Command([sys.executable, "-c", step], tmp_path / "log", own_group=True).wait(2.0) is None
    time.sleep(5)
    assert (tmp_path / "log").read_text().count("$ ") == 2  # both were begun
    assert not mark.exists()


def test_what_a_program_of_a_step_started_ends_with_it(tmp_path: Path) -> None:
    """As a test under compute-sanitizer when its time is over, and the step goes on."""
    mark = tmp_path / "mark"
    child = f"import time, pathlib; time.sleep(4); pathlib.Path({str(mark)!r}).touch()"
    program = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    outer = f"import subprocess, sys; print('begun', flush=True); subprocess.run([sys.executable, '-c', {program!r}])"
    assert Command([sys.executable, "-c", outer], tmp_path / "log").wait(2.0) is None
    time.sleep(5)
    assert "\nbegun" in (tmp_path / "log").read_text()
    assert not mark.exists()


@pytest.mark.parametrize("torn", ['{"step": "checks", "wha', '{"step": "checks", "what": "µ'])
def test_a_record_that_was_cut_off_is_left_out(torn: str, records: Records) -> None:
    records.add("checks", "begin")
    with records.path.open("ab") as file:
        file.write(torn.encode()[: -1 if torn.endswith("µ") else None])
    assert [record["what"] for record in records.read()] == ["begin"]
    records.add("checks", "end", status="done", seconds=1.0)
    assert [record["what"] for record in records.read()] == ["begin", "end"]
    assert done(records.read()) == {"checks"}


FAILING = """
import os

def test_good():
    pass

def test_bad():
    assert 1 == 2

def test_end_of_the_process():
    os._exit(3)
"""


def test_a_failing_test_is_on_record_before_the_next_one_begins(records: Records, tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(FAILING)
    environment = {"LPD_REPORT_FOLDER": str(tmp_path), "LPD_REPORT_STEP": "tests", "PYTHONPATH": str(SUPPORT)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "report_plugin", "test_it.py"]
    status = subprocess.run(command, cwd=tmp_path, env=os.environ | environment, capture_output=True)
    assert status.returncode == 3
    (found,) = records.read()
    assert (found["step"], found["what"]) == ("tests", "failed test")
    assert found["name"] == "test_it.py::test_bad"
    assert found["said"] == "E       assert 1 == 2"


def test_a_page_that_cannot_be_written_whole_stays_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    page.write_text("before")
    with pytest.raises(UnicodeEncodeError):
        replace_text(page, "x" * 100_000 + "\ud800")
    assert page.read_text() == "before"
    replace_text(page, "after")
    assert page.read_text() == "after"
    assert [path.name for path in tmp_path.iterdir()] == ["page.md"]
