"""Checkpoints of a training on disk: atomic, the newest few and the best kept, damaged ones passed over."""

from __future__ import annotations

import os
import re
import shutil
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lpd_ext.content import content_of
from lpd_ext.state_files import complete_file

FORMAT = 2  # of the dict in the file
CHECKPOINTS = "checkpoints"  # the folder, in that of the training
BEST = "best.pt"
_NAME = re.compile(r"step_(\d{9})\.pt")


class DamagedCheckpointError(ValueError):
    """The file is cut short, or no checkpoint at all."""


class CheckpointFolder:
    """The checkpoints `step_000001200.pt` of one training, and `best.pt`."""

    def __init__(self, folder: str | Path, keep: int = 2) -> None:
        self.folder = Path(folder)
        self.keep = keep

    def save(self, state: Mapping[str, Any], step: int, *, best: bool = False) -> Path:
        """Writes the state after `step` steps; a crash at any moment leaves the older files as they were.

        Once it is on disk, older ones beyond the newest `keep` are removed, and those of later steps. Raises OSError if
        it could not be written, naming the newest checkpoint that is still there.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"step_{step:09d}.pt"
        try:
            with complete_file(path) as temporary:
                write_pickle({"format": FORMAT, **state}, temporary)
            if best:
                self._link_best(path)
            _sync_folder(self.folder)
        except (OSError, RuntimeError) as error:  # torch's own writer says a full disk by RuntimeError
            left = self.files()
            usable = f"{str(left[0])!r} is still there" if left else "there is none yet"
            raise OSError(f"checkpoint {str(path)!r} could not be written ({_first_line(error)}); {usable}") from error
        numbered = self._numbered()
        # Those of later steps are damaged: the training has begun from an older one.
        at = numbered.index(path)
        for old in numbered[:at] + numbered[at + self.keep :]:
            old.unlink(missing_ok=True)
        return path

    def newest(self, settings: Mapping[str, Any], warn: bool = True) -> tuple[Path, dict[str, Any]] | None:
        """The newest whole checkpoint and where it is, None if there is none; a damaged one is passed over, and told.

        Raises ValueError if all are damaged, or for a training that began with other `settings`.
        """
        files = self.files()
        for path in files:
            try:
                state = read_checkpoint(path)
            except DamagedCheckpointError as error:
                if warn:
                    warnings.warn(f"{error}; an older one is tried", stacklevel=2)
                continue
            check_settings(state["settings"], settings, path)
            return path, state
        if files:
            raise ValueError(f"no checkpoint in {str(self.folder)!r} can be read: start anew in another out_dir")
        return None

    def remove_unfinished(self) -> None:
        """Removes unfinished files of killed processes."""
        for path in self.folder.glob(".*.pt.*"):
            path.unlink(missing_ok=True)

    def files(self) -> list[Path]:
        """Lists the checkpoints in the order in which resuming tries them: newest first, then the best."""
        best = self.folder / BEST
        return self._numbered() + ([best] if best.is_file() else [])

    def _numbered(self) -> list[Path]:
        return sorted((path for path in self.folder.glob("step_*.pt") if _NAME.fullmatch(path.name)), reverse=True)

    def _link_best(self, path: Path) -> None:
        # A second name of the same file: no space, and it stays when the first is removed.
        link = self.folder / f".{BEST}.link"
        link.unlink(missing_ok=True)
        try:
            os.link(path, link)
        except OSError:  # not every file system knows links
            with complete_file(self.folder / BEST) as temporary:
                shutil.copyfile(path, temporary)
        else:
            link.replace(self.folder / BEST)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The dict in a checkpoint file; pickled code is never run (weights_only).

    Raises DamagedCheckpointError for a file that is cut short, changed or foreign.
    """
    try:
        with content_of(path, "is not a readable checkpoint"):
            state = read_pickle(path)
    except ValueError as error:
        raise DamagedCheckpointError(str(error)) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT or not isinstance(state.get("settings"), dict):
        raise DamagedCheckpointError(f"path {str(path)!r} holds no training checkpoint of this version")
    return state


def write_pickle(value: Mapping[str, Any], path: Path) -> None:
    """torch.save, with a CRC-32 of each entry of the file, whatever the process has set."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(True)
    try:
        torch.save(value, path)
    finally:
        torch.serialization.set_crc32_options(before)


def read_pickle(path: str | Path) -> Any:
    """Reads a file of `write_pickle`; raises any error if its bytes are no longer those written.

    torch does not check the checksums that it writes, so flipped bits would go unnoticed into the weights.
    """
    with zipfile.ZipFile(path) as file:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in file.infolist()):
            raise ValueError("it is compressed, which torch never does")
        if damaged := file.testzip():
            raise ValueError(f"the checksum of its entry {damaged} is wrong")
    # Memory-mapped: the processes of one machine share it, and each copies what it needs.
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def check_settings(began: Mapping[str, Any], settings: Mapping[str, Any], path: Path) -> None:
    """ValueError naming the first of `settings` that differs from those a training `began` with."""
    for name, value in settings.items():
        if began.get(name) != value:
            raise ValueError(
                f"{name} is {value!r}, but the training in {str(path)!r} began with {began.get(name)!r}: "
                "resume it with that, or start another in another out_dir"
            )


def _sync_folder(folder: Path) -> None:
    """Makes renames in a folder durable against a loss of power."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
