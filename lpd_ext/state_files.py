"""Reads and writes weight files: safetensors, and published pickles without executing anything in them."""

from __future__ import annotations

import argparse
import errno
import json
import os
import re
import secrets
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lpd_ext.content import content_of, read_json

WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
# Entries of trainers' files that hold a state dict, and those that hold an average of it.
_MODELS = ("model", "state_dict", "module")
_AVERAGED = ("model_ema", "ema", "ema_state_dict")
_DEEPEST = 3  # wrappers within wrappers
_PREFIXES = re.compile(r"^((module|_orig_mod)\.)+|(?<=\.)_orig_mod\.")
_INDEX_SUFFIX = ".index.json"
_MOST_SHARED = 4  # how often tensors may use the bytes of a file; tied embeddings use some twice


def read_state_dict(path: str | Path, ema: bool = False) -> dict[str, Tensor]:
    """Reads tensors by name from a safetensors file, the index of a sharded one, or a torch file; memory-mapped.

    From a trainer's file with several state dicts, takes the model's, or with `ema` the averaged one. Drops the
    prefixes that wrappers add (module., _orig_mod.). Recognises safetensors by content, whatever the file's name. The
    mapping, and what was read of it, stays in memory as long as one of the tensors lives. Raises FileNotFoundError, or
    ValueError for a file that is truncated, foreign, or pickles more than tensors and settings.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"path must be a weight file, but there is none at {str(path)!r}")
    if path.name.endswith(_INDEX_SUFFIX):
        state: dict[str, Tensor] = {}
        with content_of(path):
            for name in shard_names(path):
                state |= read_state_dict(path.with_name(name))
            return without_prefixes(state)
    with content_of(path, "is not a readable checkpoint"):
        if _is_safetensors(path):
            return without_prefixes(load_file(path, "cpu"))
        # The published trainer pickles its arguments beside the weights; nothing else but tensors is accepted.
        with torch.serialization.safe_globals([argparse.Namespace]):
            try:
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
            except (LookupError, EOFError) as error:  # an opcode that pickle does not have
                raise ValueError(f"no weight file ({type(error).__name__})") from error
            except Warning as error:  # of an odd pickle, if the caller turns warnings into errors
                raise ValueError(str(error)) from error
        return without_prefixes(_checked(_model_of(content, path, ema), path.stat().st_size))


def _model_of(content: object, path: Path, ema: bool) -> dict[str, Tensor]:
    """Finds the state dict in a torch file's content: the content itself, or an entry with a name trainers use."""
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


def _checked(state: Mapping[str, Tensor], size: int) -> Mapping[str, Tensor]:
    """Checks the state dict of a torch file of that many bytes; ValueError for tensors larger than the file.

    With strides of 0, or views of one storage, a small file could stand for any amount of memory.
    """
    total = 0
    for name, tensor in state.items():
        if not isinstance(name, str):
            raise ValueError(f"it has a tensor without a name, {name!r}")
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
            raise ValueError(f"{name} is no plain tensor")
        total += tensor.nbytes
        if tensor.nbytes > tensor.untyped_storage().nbytes() or total > _MOST_SHARED * size:
            raise ValueError(f"{name} stands for more memory than the file holds")
    return state


def _is_dict(value: object) -> bool:
    return isinstance(value, Mapping)


def _found(content: object) -> str:
    if isinstance(content, Mapping):
        kinds = [f"{name} ({type(value).__name__})" for name, value in list(content.items())[:8]]
        return f"got {', '.join(kinds) or 'an empty one'}"
    return f"got {type(content)}"


def without_prefixes(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Removes the prefixes of DistributedDataParallel and torch.compile from the names of a state dict.

    Raises ValueError if two tensors would get the same name.
    """
    plain: dict[str, Tensor] = {}
    for name, tensor in state.items():
        inner = _PREFIXES.sub("", name)
        if inner in plain:
            raise ValueError(f"{inner} is there twice, once as that of a wrapped module")
        plain[inner] = tensor
    return plain


def shard_names(index: Path) -> list[str]:
    """Returns the files of a sharded model from its index; ValueError if the file is not such an index."""
    with content_of(index, "is no index of safetensors files"):
        names = sorted(set(read_json(index, "is no index of safetensors files")["weight_map"].values()))
        if not all(isinstance(name, str) and Path(name).name == name and _INDEX_SUFFIX not in name for name in names):
            raise ValueError(f"it must name files beside it, got {names}")
        return names


def read_metadata(path: str | Path) -> dict[str, str]:
    """Reads the metadata of a safetensors file; empty without metadata, and for torch files."""
    if not _is_safetensors(Path(path)):
        return {}
    with content_of(path, "is not a readable checkpoint"), safe_open(path, "pt") as file:
        return dict(file.metadata() or {})


def write_state_dict(
    state: Mapping[str, Tensor],
    path: str | Path,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes tensors as safetensors (floats in dtype, if given), replacing path only when the file is complete.

    Equal tensors and metadata give equal bytes. Drops the prefixes that wrappers add; see `without_prefixes`.
    """
    with complete_file(path) as temporary:
        write_tensors(state, temporary, dtype, metadata)


def write_tensors(
    state: Mapping[str, Tensor],
    temporary: Path,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes the content of `write_state_dict` to a file of `complete_files`."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in without_prefixes(state).items()}
    if dtype is not None:
        tensors = {name: value.to(dtype) if value.is_floating_point() else value for name, value in tensors.items()}
    # safetensors refuses tensors that share memory (views into one table), so these are copied.
    tensors = {name: value.clone() if value._base is not None else value for name, value in tensors.items()}
    save_file(tensors, temporary, metadata={"format": "pt", **(metadata or {})})
    _sort_metadata(temporary)


def write_text(path: str | Path, text: str) -> None:
    """Writes text in UTF-8, replacing path only when the file is complete."""
    with complete_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def complete_file(path: str | Path) -> Iterator[Path]:
    """A temporary file beside path that replaces it if the block succeeds and is deleted if it does not.

    It gets the permissions of the file it replaces, else those of the umask. Errors of the system are an OSError with
    path's name.
    """
    with complete_files(path) as (temporary,):
        yield temporary


@contextmanager
def complete_files(*paths: str | Path) -> Iterator[list[Path]]:
    """Temporary files as in `complete_file` that take their places together, once all are on disk."""
    places = [Path(path) for path in paths]
    temporaries: list[Path] = []
    modes: list[int] = []
    try:
        for path in places:
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
            mode = stat.S_IMODE(path.stat().st_mode) if path.exists() else None
            temporaries.append(path.with_name(f".{path.name}.{secrets.token_hex(4)}"))
            flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY
            os.close(os.open(temporaries[-1], flags, 0o666 if mode is None else 0o600))
            modes.append(stat.S_IMODE(temporaries[-1].stat().st_mode) if mode is None else mode)
        yield list(temporaries)
        for temporary, mode in zip(temporaries, modes, strict=True):
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.chmod(mode)  # of a new file too: safetensors replaces it by one that only its owner may read
        for temporary, path in zip(temporaries, places, strict=True):
            temporary.replace(path)
    except (OSError, SafetensorError) as error:
        named = _naming(error, {str(t): path for t, path in zip(temporaries, places, strict=False)}, places[0])
        if named is error:
            raise
        raise named from error
    finally:
        for temporary in temporaries:
            temporary.unlink(missing_ok=True)


def _naming(error: OSError | SafetensorError, places: Mapping[str, Path], first: Path) -> Exception:
    """Renames the file in an OSError from the temporary one to the one to be written."""
    number = getattr(error, "errno", None)
    if isinstance(error, SafetensorError) and (found := re.search(r"os error (\d+)", str(error))):
        number = int(found[1])
    if number is None:
        return error
    filename = getattr(error, "filename", None)
    if filename is not None and str(filename) not in places:  # another file, read in the same block
        return error
    return OSError(number, os.strerror(number), str(places.get(str(filename), first)))


def _sort_metadata(path: Path) -> None:
    """Sorts the metadata of a safetensors file by name, since their order differs from process to process."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= length:  # equal, unless a name has characters that safetensors escapes differently
            file.seek(8)
            file.write(text.ljust(length))


def _is_safetensors(path: Path) -> bool:
    # A little-endian header length in 8 bytes (the format allows 100 MB), then the header, a JSON object.
    with path.open("rb") as file:
        start = file.read(9)
    return start[8:] == b"{" and int.from_bytes(start[:8], "little") <= 100_000_000


def _is_zip(path: Path) -> bool:
    # Only torch's zip format can be memory-mapped; older files are plain pickles.
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"
