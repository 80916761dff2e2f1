"""The file of measured times: what is written is read, and no state of the file or its folder stops a decode."""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lpd_ext import _C, product_table
from lpd_ext.product_table import Card

H200: Card = ("NVIDIA H200", "9.0", "570.124.06", "2.11.0+cu130", "0.1.0")
TIMES = {"normed 3072x1024 bfloat16": {16: (0.0021, 0.0034), 32: (0.003, 0.0029)}}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LPD_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def ignored(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def test_what_is_added_is_read(folder: Path) -> None:
    assert product_table.read(H200) == {}
    product_table.add(H200, TIMES)
    other = {"residual 1024x1024 float16": {16: (0.5, 0.25)}}
    product_table.add(H200, other)
    assert product_table.read(H200) == TIMES | other
    assert [file.name for file in folder.iterdir()] == ["product_times.json"]


@pytest.mark.parametrize("part", range(len(H200)))
def test_another_card_driver_or_version_has_times_of_its_own(part: int) -> None:
    other: Card = (*H200[:part], "other", *H200[part + 1 :])
    product_table.add(H200, TIMES)
    assert product_table.read(other) == {}
    product_table.add(other, {"normed 8x32 float16": {16: (1.0, 2.0)}})
    assert product_table.read(H200) == TIMES


def test_the_folder_is_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("LPD_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert product_table.path() == tmp_path / "lpd_ext" / "product_times.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert product_table.path() == tmp_path / "home" / ".cache" / "lpd_ext" / "product_times.json"


def test_a_user_without_a_home_has_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("LPD_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(product_table.Path, "home", no_home)
    product_table.add(H200, TIMES)
    assert product_table.read(H200) == {}


ROW = dict(zip(("card", "compute capability", "driver", "torch", "lpd_ext"), H200, strict=True))
DAMAGED = {
    "cut off": '{"format": 1, "cards": [{"card": "NVI',
    "no JSON": "\x80\x04K\x01.",
    "another format": json.dumps({"format": 2, "cards": []}),
    "foreign": json.dumps([1, 2, 3]),
    "no products": json.dumps({"format": 1, "cards": [ROW]}),
    "no times": json.dumps({"format": 1, "cards": [ROW | {"milliseconds": {"a": {"16": "fast"}}}]}),
    "one time": json.dumps({"format": 1, "cards": [ROW | {"milliseconds": {"a": {"16": [1.0]}}}]}),
    "no rows": json.dumps({"format": 1, "cards": [ROW | {"milliseconds": {"a": {"many": [1.0, 2.0]}}}]}),
    "times of zero": json.dumps({"format": 1, "cards": [ROW | {"milliseconds": {"a": {"16": [0.0, 1.0]}}}]}),
    "no numbers": json.dumps({"format": 1, "cards": [ROW | {"milliseconds": {"a": {"16": [float("nan"), 1.0]}}}]}),
    "a card without a driver": json.dumps({"format": 1, "cards": [ROW | {"driver": None, "milliseconds": {}}]}),
    "too deep": "[" * 100_000,
    "too large": json.dumps({"format": 1, "cards": [], "more": "x" * (1 << 20)}),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_or_foreign_file_is_ignored_with_a_warning_and_replaced(
    name: str, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder.mkdir()
    (folder / "product_times.json").write_text(DAMAGED[name], encoding="latin-1")
    assert product_table.read(H200) == {}
    (message,) = ignored(caplog)
    assert message.startswith(f"times of products are measured again, {folder / 'product_times.json'} is ignored: ")
    product_table.add(H200, TIMES)
    caplog.clear()
    assert product_table.read(H200) == TIMES
    assert ignored(caplog) == []


def test_nothing_in_the_file_is_executed(folder: Path, tmp_path: Path) -> None:
    folder.mkdir()
    mark = tmp_path / "mark"
    (folder / "product_times.json").write_bytes(f"cposix\nsystem\n(S'touch {mark}'\ntR.".encode())
    assert product_table.read(H200) == {}
    assert not mark.exists()


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LPD_CACHE_DIR", str(tmp_path / "file" / "below"))
    product_table.add(H200, TIMES)
    assert product_table.read(H200) == {}
    assert any(message.startswith("times of products are measured again by the next") for message in ignored(caplog))


def test_a_read_only_folder_is_read_and_told(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    product_table.add(H200, TIMES)

    def read_only(*_: object) -> int:
        raise OSError(30, "Read-only file system", "x")

    monkeypatch.setattr(os, "open", read_only)  # as of a user whom no permission stops, too
    product_table.add(H200, {"normed 8x32 float16": {16: (1.0, 2.0)}})
    assert any("Read-only file system" in message for message in ignored(caplog))
    assert product_table.read(H200) == TIMES


def test_the_file_stays_small() -> None:
    for i in range(20):
        product_table.add((f"card {i}", *H200[1:]), TIMES)
    assert product_table.read(("card 3", *H200[1:])) == {}
    assert product_table.read(("card 19", *H200[1:])) == TIMES
    product_table.add(H200, {f"normed {n}x32 float16": {16: (1.0, 2.0)} for n in range(200)})
    assert len(product_table.read(H200)) == 128
    place = product_table.path()
    assert place is not None
    assert place.stat().st_size < 1 << 20


def _add_many(process: int, count: int) -> None:
    for i in range(count):
        with product_table.lock():
            product_table.add(H200, {f"normed {process}x{i} float16": {16: (1.0 + process, 2.0 + i)}})


def test_two_processes_that_write_at_once_leave_a_whole_file(caplog: pytest.LogCaptureFixture) -> None:
    processes = [multiprocessing.get_context("fork").Process(target=_add_many, args=(p, 30)) for p in range(2)]
    for process in processes:
        process.start()
    while any(process.is_alive() for process in processes):
        for name, times in product_table.read(H200).items():
            process, i = map(int, name.split()[1].split("x"))
            assert times == {16: (1.0 + process, 2.0 + i)}
    assert [process.exitcode for process in processes] == [0, 0]
    assert ignored(caplog) == []
    last = product_table.read(H200)
    assert len(last) == 2 * 30


def test_a_process_that_keeps_the_lock_is_not_waited_for_for_ever(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(product_table, "_LONGEST_WAIT", 0.1)
    with product_table.lock(), product_table.lock():
        assert ignored(caplog) == ["another process has measured products for 0 s; not waiting longer"]
    with product_table.lock():
        assert len(ignored(caplog)) == 1


def test_drivers_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the sentences of NVIDIA's two kernel modules; without either by torch's CUDA."""
    file = tmp_path / "version"
    monkeypatch.setattr(product_table, "_DRIVER", file)
    for text in ("x86_64 Kernel Module  570.124.06  Wed", "Open Kernel Module for x86_64  570.124.06  Release Build"):
        file.write_text(f"NVRM version: NVIDIA UNIX {text}\nGCC version:  gcc version 12.3.0\n")
        assert product_table._driver() == "570.124.06"
    file.unlink()
    assert product_table._driver() == f"of CUDA {torch.version.cuda}"


def test_a_card_is_described_by_all_that_times_depend_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    properties = SimpleNamespace(name="NVIDIA H200", major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: {3: properties}[index])
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(product_table, "_DRIVER", tmp_path / "none")
    product_table._card.cache_clear()
    digest = hashlib.sha256(Path(_C.__file__).read_bytes()).hexdigest()
    wanted = (
        "NVIDIA H200",
        "9.0",
        f"of CUDA {torch.version.cuda}",
        torch.__version__,
        f"{_C.__version__} {digest[:12]}",
    )
    for device in ("cuda", "cuda:3"):
        assert product_table.card_of(torch.device(device)) == wanted
    product_table._card.cache_clear()


def test_other_devices_have_no_card() -> None:
    assert product_table.card_of(torch.device("cpu")) is None
