"""Reading and writing weight files: safetensors, and published pickles without ever executing what is in them."""

from __future__ import annotations

import argparse
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
# Entries of trainers' files that hold a state dict, and those that hold an average of it.
_MODELS = ("model", "state_dict", "module")
_AVERAGED = ("model_ema", "ema", "ema_state_dict")
_DEEPEST = 3  # wrappers within wrappers
_PREFIXES = re.compile(r"^((module|_orig_mod)\.)+|(?<=\.)_orig_mod\.")
_INDEX_SUFFIX = ".index.json"


def read_state_dict(path: str | Path, ema: bool = False) -> dict[str, Tensor]:
    """Tensors by name from a safetensors file, the index of several, or a torch file; memory-mapped.

    Of a torch file that holds more than one state dict, as trainers write them, the model's is taken, or with `ema` the
    averaged one. Prefixes that wrappers leave (module., _orig_mod.) are dropped. A file is safetensors by its content,
    whatever its name. What was read of it stays in memory as long as one of the tensors lives: the mapping is theirs
    together. Raises FileNotFoundError, or ValueError for a file that is truncated, foreign, or pickles more than
    tensors and settings.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"path must be a weight file, but there is none at {str(path)!r}")
    if path.name.endswith(_INDEX_SUFFIX):
        state: dict[str, Tensor] = {}
        for name in shard_names(path):
            state |= read_state_dict(path.with_name(name))
        return without_prefixes(state)
    try:
        if _is_safetensors(path):
            return without_prefixes(load_file(path))
        # The published trainer pickles its arguments beside the weights; nothing else that is no tensor is accepted.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except Exception as error:  # a damaged pickle can raise anything
        raise ValueError(f"path {str(path)!r} is not a readable checkpoint: {_reason(error)}") from error
    return without_prefixes(_model_of(content, path, ema))


def _model_of(content: object, path: Path, ema: bool) -> dict[str, Tensor]:
    """The state dict in what a torch file holds: that itself, or an entry of one of the names that trainers use."""
    if ema and not (isinstance(content, Mapping) and any(name in content for name in _AVERAGED)):
        raise ValueError(f"path {str(path)!r} must have an entry {' or '.join(_AVERAGED)} for ema, {_found(content)}")
    names = _AVERAGED if ema else (*_MODELS, *_AVERAGED)
    for _ in range(_DEEPEST):
        inner = next((name for name in names if isinstance(content, Mapping) and _is_dict(content.get(name))), None)
        if inner is None:
            break
        assert isinstance(content, Mapping)
        content, names = content[inner], _MODELS
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(
            f"path {str(path)!r} must hold a state dict of tensors, at the top or under {' or '.join(_MODELS)}, "
            f"{_found(content)}"
        )
    return dict(content)


def _is_dict(value: object) -> bool:
    return isinstance(value, Mapping)


def _found(content: object) -> str:
    if isinstance(content, Mapping):
        kinds = [f"{name} ({type(value).__name__})" for name, value in list(content.items())[:8]]
        return f"got {', '.join(kinds) or 'an empty one'}"
    return f"got {type(content)}"


def without_prefixes(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state with the names of what was wrapped: by DistributedDataParallel, torch.compile, or both."""
    return {_PREFIXES.sub("", name): tensor for name, tensor in state.items()}


def shard_names(index: Path) -> list[str]:
    """Files of a model that lies in several, from the index beside them; ValueError if it is no such index."""
    try:
        files = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        names = sorted(set(files))
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise ValueError(f"path {str(index)!r} is no index of safetensors files: {_reason(error)}") from error
    if not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise ValueError(f"path {str(index)!r} must name files beside it, got {names}")
    return names


def read_metadata(path: str | Path) -> dict[str, str]:
    """The metadata of a readable safetensors file; empty for one without, and for torch files."""
    if not _is_safetensors(Path(path)):
        return {}
    with safe_open(path, "pt") as file:
        return dict(file.metadata() or {})


def write_state_dict(
    state: Mapping[str, Tensor],
    path: str | Path,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write tensors as safetensors (floats in dtype, if given), replacing path only when the file is complete."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    if dtype is not None:
        tensors = {name: value.to(dtype) if value.is_floating_point() else value for name, value in tensors.items()}
    # safetensors refuses tensors that share memory (views into one table), so those are copied apart.
    tensors = {name: value.clone() if value._base is not None else value for name, value in tensors.items()}
    with complete_file(path) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt", **(metadata or {})})


@contextmanager
def complete_file(path: str | Path) -> Iterator[Path]:
    """A temporary file beside path, which takes path's place when the block ends well and vanishes when it does not."""
    path = Path(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _is_safetensors(path: Path) -> bool:
    # A little-endian header length in 8 bytes (the format allows 100 MB), then the header, a JSON object.
    with path.open("rb") as file:
        start = file.read(9)
    return start[8:] == b"{" and int.from_bytes(start[:8], "little") <= 100_000_000


def _is_zip(path: Path) -> bool:
    # Only torch's zip format can be memory-mapped; older files are plain pickles.
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _reason(error: BaseException) -> str:
    """Why a file could not be read, in one line; of what torch refuses, what that is."""
    text = str(error).strip()
    if refused := re.search(r"GLOBAL (\S+)", text):
        return f"it holds a {refused[1]}, which is no weight: save the state dict alone, torch.save(model.state_dict())"
    lines = text.splitlines()
    return lines[0] if lines else type(error).__name__
