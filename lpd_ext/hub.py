"""Finds the files of a model by name: a path, the name of a bundled or a published model, or a hub id 'owner/name'.

Downloads go through huggingface_hub: its cache, progress bars, resumption, HF_HUB_OFFLINE, HF_ENDPOINT and tokens.
"""

from __future__ import annotations

import errno
import logging
import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from lpd_ext import published
from lpd_ext.bundled import BUNDLED, bundled_model
from lpd_ext.state_files import WEIGHT_SUFFIXES, shard_names

CONFIG_FILE = "config.json"
MODEL_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"  # the index of a sharded model
TOKENIZER_FILE = "tokenizer.safetensors"
PREVIEW_FILE = "preview.safetensors"
_TOKENIZERS = (TOKENIZER_FILE, published.TOKENIZER_FILE)
_LAST_CHECKPOINT = "checkpoint-last"  # the newest file of the published trainer
_CHECKPOINT = re.compile(r"best\.pt|step_\d{9}\.pt")  # as `lpd train` names them

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelFiles:
    """Local files of a model: a folder with a config.json or a weight file, and those of its helpers, if any."""

    model: Path
    tokenizer: Path | None = None
    preview: Path | None = None

    @property
    def weights(self) -> Path:
        """The weight file, or the index of a sharded one."""
        if self.model.is_file():
            return self.model
        one = self.model / MODEL_FILE
        return self.model / INDEX_FILE if not one.is_file() and (self.model / INDEX_FILE).is_file() else one


@dataclass(frozen=True)
class HubOptions:
    """The revision of a repository to load, and the token to access it."""

    revision: str | None = None
    token: str | bool | None = None


def find_model(name: str | Path, options: HubOptions | None = None) -> ModelFiles:
    """Returns the files of a model, downloading those that are neither local nor cached.

    Raises FileNotFoundError for an unknown name, ValueError if several files could be meant, ImportError without
    huggingface_hub, ConnectionError if the hub cannot be reached, and PermissionError for a repository that needs a
    token.
    """
    options = options or HubOptions()
    path = Path(name)
    if isinstance(name, str) and name in BUNDLED and not path.exists():
        path = bundled_model(name)
    if path.is_file():
        return ModelFiles(path)
    if path.is_dir():
        names = [item.name for item in path.iterdir() if item.is_file()]
        if is_training_folder(path) and MODEL_FILE not in names:
            raise FileNotFoundError(how_to_bundle(path))
        chosen = _choose(names, str(path), path.name)
        tokenizer = next((path / file for file in _TOKENIZERS if (path / file).is_file()), None)
        preview = path / PREVIEW_FILE if PREVIEW_FILE in names else None
        return ModelFiles(path if chosen is None else path / chosen, tokenizer, preview)
    repository = _repository(name)
    names = _list_files(repository, options)
    chosen = _choose(names, repository, repository.split("/")[1])
    tokenizer_name = next((file for file in _TOKENIZERS if file in names), None)
    if chosen is None:
        config = _download(repository, CONFIG_FILE, options)
        _download_weights(repository, MODEL_FILE if MODEL_FILE in names else INDEX_FILE, options)
        model = config.parent
    else:
        model = _download_weights(repository, chosen, options)
    tokenizer = None if tokenizer_name is None else _download(repository, tokenizer_name, options)
    preview = _download(repository, PREVIEW_FILE, options) if PREVIEW_FILE in names else None
    return ModelFiles(model, tokenizer, preview)


def is_training_folder(path: Path) -> bool:
    """Whether `lpd train` writes or wrote to the folder; `lpd bundle` makes a model of it."""
    return any(_CHECKPOINT.fullmatch(item.name) for item in (path / "checkpoints").glob("*.pt"))


def how_to_bundle(folder: Path) -> str:
    """Returns the error message for a training's folder passed as a model."""
    quoted, out = shlex.quote(str(folder)), shlex.quote(f"{folder.absolute().name}-model")
    return (
        f"{str(folder)!r} is the folder of a training, which has no tokenizer: "
        f"`lpd bundle --model {quoted} --tokenizer FILE --out {out}` makes a model of it, "
        "FILE being the tokenizer that its tokens are of"
    )


def find_tokenizer(name: str | Path, options: HubOptions | None = None) -> Path:
    """Finds a tokenizer's weight file by path, folder, bundled model or hub repository; errors as in `find_model`."""
    options = options or HubOptions()
    path = Path(name)
    if isinstance(name, str) and name in BUNDLED and not path.exists():
        path = bundled_model(name)
    if path.is_file():
        return path
    where = [item.name for item in path.iterdir()] if path.is_dir() else _list_files(_repository(name), options)
    file = next((file for file in _TOKENIZERS if file in where), None)
    if file is None:
        raise FileNotFoundError(f"{str(name)!r} has none of {', '.join(_TOKENIZERS)}, but {_shown(where)}")
    return path / file if path.is_dir() else _download(_repository(name), file, options)


def published_tokenizer() -> Path:
    """Returns the tokenizer of the published models, downloaded unless cached; errors as in `find_model`."""
    return _download(published.TOKENIZER_REPOSITORY, published.TOKENIZER_FILE, HubOptions())


def _repository(name: str | Path) -> str:
    """Returns the hub id of a name; FileNotFoundError for a name that can only be a local path."""
    text = str(name)
    if text in published.NAMES:
        return f"{published.OWNER}/{text}"
    parts = text.split("/")
    is_hub_id = len(parts) == 2 and all(parts) and parts[0] not in (".", "..", "~")
    meant_locally = isinstance(name, Path) or Path(text).suffix in WEIGHT_SUFFIXES or Path(parts[0]).is_dir()
    if meant_locally or not is_hub_id:
        raise FileNotFoundError(
            f"{text!r} is neither a local path nor a hub id of the form 'owner/name' nor one of the models "
            f"{', '.join((*BUNDLED, *published.NAMES))}"
        )
    return text


def _choose(names: Sequence[str], place: str, own_name: str) -> str | None:
    """Chooses the file with the model among those of a folder or repository; None for a folder with a config.json."""
    here = [name for name in names if "/" not in name]
    if CONFIG_FILE in here and (MODEL_FILE in here or INDEX_FILE in here):
        return None
    for name in (MODEL_FILE, INDEX_FILE):
        if name in here:
            return name
    others = (*_TOKENIZERS, PREVIEW_FILE)
    weights = sorted(n for n in here if PurePosixPath(n).suffix in WEIGHT_SUFFIXES and n not in others)
    if len(weights) == 1:
        return weights[0]
    named = [name for name in weights if PurePosixPath(name).stem in (own_name, _LAST_CHECKPOINT)]
    if len(named) == 1:
        return named[0]
    if not weights:
        raise FileNotFoundError(f"{place!r} holds no weights ({', '.join(WEIGHT_SUFFIXES)}), but {_shown(names)}")
    raise ValueError(f"{place!r} holds several weight files, name one of them: {_shown(weights)}")


def _shown(names: Sequence[str]) -> str:
    shown = sorted(names)[:12]
    return ", ".join(shown) + (f" and {len(names) - 12} more" if len(names) > 12 else "") or "nothing"


def _list_files(repository: str, options: HubOptions) -> list[str]:
    """Lists the files of a repository, or the cached ones if the hub cannot be reached."""
    with _explained(repository, options):
        from huggingface_hub import HfApi
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

        try:
            names: list[str] = HfApi().list_repo_files(repository, revision=options.revision, token=options.token)
            return names
        except (GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError):
            raise
        except Exception as error:
            if cached := _cached_files(repository, options.revision):
                log.info("%s: the cache is taken, the hub was not asked (%s)", repository, _first_line(error))
                return cached
            raise


def _cached_files(repository: str, revision: str | None) -> list[str]:
    from huggingface_hub import constants, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repositories = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except CacheNotFound:
        return []
    wanted = revision or "main"
    return [
        file.file_path.relative_to(state.snapshot_path).as_posix()
        for found in repositories
        if found.repo_id == repository
        for state in found.revisions
        if wanted in state.refs or state.commit_hash == wanted
        for file in state.files
    ]


def _download_weights(repository: str, name: str, options: HubOptions) -> Path:
    """Downloads a weight file, or an index and its shards."""
    path = _download(repository, name, options)
    if name == INDEX_FILE:
        for shard in shard_names(path):
            _download(repository, shard, options)
    return path


def _download(repository: str, name: str, options: HubOptions) -> Path:
    with _explained(repository, options, name):
        from huggingface_hub import HfApi

        path = Path(HfApi().hf_hub_download(repository, name, revision=options.revision, token=options.token))
        log.info("%s/%s: %s", repository, name, path)
        return path


@contextmanager
def _explained(repository: str, options: HubOptions, file: str | None = None) -> Iterator[None]:
    """Turns errors of the hub into Python's own, each one sentence."""
    try:
        from huggingface_hub import errors
    except ImportError as error:
        raise ImportError("loading from the hub needs huggingface_hub: pip install 'lpd-ext[hub]'") from error
    what = repository if file is None else f"{repository}/{file}"
    try:
        yield
    except errors.GatedRepoError as error:
        raise PermissionError(f"{repository!r} is open to those who asked for it: give token= after that") from error
    except errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{repository!r} is no repository of the hub, or a private one (give token=)"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(f"{repository!r} has no revision {options.revision!r}") from error
    except errors.LocalEntryNotFoundError as error:
        raise ConnectionError(
            f"the hub cannot be reached and {what!r} is not in the cache; `lpd fetch` fills it where there is a network"
        ) from error
    except errors.EntryNotFoundError as error:
        raise FileNotFoundError(f"{repository!r} has no file {file!r}") from error
    except (FileNotFoundError, ValueError):
        raise
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise OSError(errno.ENOSPC, f"no space left to download {what!r} to the cache") from error
        raise ConnectionError(f"the hub cannot be reached for {what!r}: {_first_line(error)}") from error
    except Exception as error:  # errors of whichever HTTP library huggingface_hub uses
        if not type(error).__module__.split(".")[0].startswith(("httpx", "requests", "urllib3", "httpcore")):
            raise
        raise ConnectionError(f"the hub cannot be reached for {what!r}: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
