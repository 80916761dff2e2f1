"""Output files of the commands that draw: they never replace a file unless told to."""

from __future__ import annotations

from itertools import count
from pathlib import Path

from lpd_tools.checks import check_output


def picture_files(output: Path | None, default: str, images: int = 1, *, force: bool) -> list[Path]:
    """Returns the PNG files to write, one for each image.

    Without `output` they are named after the default, or without `force` after the first of default-2, default-3, ...
    that is free. Raises ValueError with the name of a file that cannot be written, or that exists without `force`.
    """
    if output is None:
        output = Path(default) if force else _first_free(Path(default), images)
    files = numbered(output, images)
    for path in files:
        check_output(path, ".png")
        check_overwrite(path, force)
    return files


def _first_free(path: Path, images: int) -> Path:
    names = (path if i == 1 else path.with_name(f"{path.stem}-{i}{path.suffix}") for i in count(1))
    return next(name for name in names if not any(file.exists() for file in numbered(name, images)))


def numbered(output: Path, images: int) -> list[Path]:
    """Returns the file, or for several images numbered ones beside it: out_1.png, out_2.png, ..."""
    if images == 1:
        return [output]
    digits = len(str(images))
    return [output.with_name(f"{output.stem}_{i + 1:0{digits}}{output.suffix}") for i in range(images)]


def check_overwrite(path: Path, force: bool, name: str = "output") -> None:
    """Raises ValueError if a file exists and is not to be overwritten."""
    if path.exists() and not force:
        raise ValueError(f"{name} {str(path)!r} exists: --force overwrites it")
