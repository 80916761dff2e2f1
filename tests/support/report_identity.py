"""The card, versions and sources that results of `make gpu-report` are of, and the note that a build leaves of them."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
BUILT = ROOT / "build" / "for_gpu"
SITE = BUILT / "site"
SOURCES = ("CMakeLists.txt", "cmake", "csrc", "lpd_ext", "python/lpd_tools", "pyproject.toml")


def machine(dry_run: bool) -> dict[str, Any]:
    """Returns what results are of if they are found now; RuntimeError without a GPU."""
    card = {"card": "emulated", "compute capability": "9.0", "driver": "none"} if dry_run else gpu()
    versions = {"torch": importlib.metadata.version("torch"), "lpd_ext": f"{version()} ({commit(ROOT)})"}
    return card | versions | {"emulated": dry_run}


def commit(root: Path) -> str:
    """Returns the commit, with a digest of the sources if they are not those of the commit, or if there is no git."""
    try:
        described = _git(root, "describe", "--always").strip()
        changed = _git(root, "status", "--porcelain", "--untracked-files=all", "--", *SOURCES)
    except (OSError, subprocess.CalledProcessError):
        return f"unknown-{_digest(root)}"
    return f"{described}-dirty-{_digest(root)}" if changed else described


def _git(root: Path, *arguments: str) -> str:
    return subprocess.run(["git", "-C", str(root), *arguments], check=True, capture_output=True, text=True).stdout


def _digest(root: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(path for source in SOURCES for path in [root / source, *(root / source).rglob("*")]):
        if path.is_file() and path.suffix not in (".pyc", ".so"):
            digest.update(f"{path.relative_to(root)}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()[:12]


def is_built(site: Path, of: Mapping[str, Any]) -> bool:
    """Whether the library in a folder was built from these sources, for this card and torch."""
    try:
        return json.loads(_stamp(site).read_text(encoding="utf-8")) == of
    except (OSError, ValueError):
        return False


def mark_built(site: Path, of: Mapping[str, Any] | None) -> None:
    """Notes what the library in a folder is built from; None while it is not complete."""
    if of is None:
        _stamp(site).unlink(missing_ok=True)
    else:
        _stamp(site).write_text(json.dumps(of), encoding="utf-8")


def _stamp(site: Path) -> Path:
    return site / "built_from.json"


def gpu() -> dict[str, str]:
    """Returns name, compute capability and driver of the first GPU; RuntimeError without one."""
    query = ["nvidia-smi", "--query-gpu=name,compute_cap,driver_version", "--format=csv,noheader"]
    try:
        line = subprocess.run(query, check=True, capture_output=True, text=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError) as error:
        raise RuntimeError("no NVIDIA GPU was found; --dry-run takes the emulator in its place") from error
    return dict(zip(("card", "compute capability", "driver"), line.split(", "), strict=True))


def version() -> str:
    """Returns the version in pyproject.toml."""
    found = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert found is not None
    return found[1]
