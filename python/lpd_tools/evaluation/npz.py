"""Arrays of .npz files, read without executing what is in them."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
from numpy.lib import format as npy

from lpd_ext.content import content_of


def read_names(path: str | Path) -> list[str]:
    """The names of an .npz file's arrays, which are not read."""
    with content_of(path, "is no readable .npz file"), zipfile.ZipFile(path) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist()]


def read_arrays(path: str | Path, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Reads the named arrays that an .npz file has, without pickles. ValueError for a damaged file."""
    with content_of(path, "is no readable .npz file"), np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in names if name in file.files}


def mapped_array(path: Path, name: str) -> np.ndarray | None:
    """An array of an uncompressed .npz file, memory-mapped: sample batches are larger than memory; else None."""
    with content_of(path, "is no readable .npz file"), zipfile.ZipFile(path) as archive, path.open("rb") as file:
        if f"{name}.npy" not in archive.namelist():
            return None
        entry = archive.getinfo(f"{name}.npy")
        if entry.compress_type != zipfile.ZIP_STORED:
            return None
        file.seek(entry.header_offset + 26)  # the local header's lengths of name and extra field
        lengths = file.read(4)
        file.seek(int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little"), 1)
        version = npy.read_magic(file)
        read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, fortran, dtype = read_header(file)
        if fortran or dtype.hasobject:
            return None
        return np.memmap(path, dtype, "r", file.tell(), shape)
