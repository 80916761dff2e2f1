"""Damaged files: valid ones of every kind, changed at random, must load whole or be refused by a sentence naming them.

`python tests/support/fuzz.py files --calls 100000` tries many.
"""

from __future__ import annotations

import atexit
import gzip
import json
import random
import re
import resource
import shutil
import tempfile
import time
import warnings
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lpd_tools.data.fashion_mnist import read_idx
from lpd_tools.data.token_cache import load_token_cache
from lpd_tools.data.token_shards import Shard, ShardEntry, file_hash, write_index, write_shard
from lpd_tools.evaluation.images import open_images, read_manifest
from lpd_tools.settings import make_config, read_config
from lpd_tools.study.points import Measured, Point
from lpd_tools.study.results import append_result, read_results
from lpd_tools.training.checkpoints import CheckpointFolder, DamagedCheckpointError, write_pickle
from lpd_tools.training.curves import read_log
from lpd_tools.training.failure import read_failure
from lpd_tools.training.judge import Judge, load_judge
from lpd_tools.training.logs import drop_rows_after
from lpd_tools.training.loop import check_progress
from lpd_tools.training.settings import LPDTraining
from lpd_tools.training.state import TrainingState, parameter_groups
from PIL import Image
from safetensors.torch import save_file

from lpd_ext.checkpoint import load_model
from lpd_ext.content import content_of
from lpd_ext.model import LPDConfig, LPDModel
from lpd_ext.pipeline import LPDPipeline, SamplingDefaults
from lpd_ext.state_files import read_state_dict
from lpd_ext.tokenizer import TokenizerConfig, VQTokenizer

SECONDS, MEGABYTES = 5.0, 500  # of the processor, and of memory beyond what the process had, for one file
CONFIG = LPDConfig(dim=16, depth=2, heads=2, vocab_size=32, num_classes=3, grid=(4, 4))
# Of weights that are numbers, but too large: said when something is drawn.
NOT_FINITE = re.compile("contain NaN or are -inf throughout|pixels that are not finite")


@dataclass(frozen=True)
class Kind:
    """A kind of file: its place in a folder of valid files, and what reads it there."""

    name: str
    file: str  # below the folder
    load: Callable[[Path], object]  # of the file


class NotRefusedError(AssertionError):
    """A damaged file did something else than to load or to be refused."""


def damage(content: bytes, numbers: random.Random) -> bytes:
    """The content with one to three changes: flips, cuts, stretches doubled, inserted or blank, other values."""
    for _ in range(numbers.choice((1, 1, 1, 2, 3))):
        content = numbers.choice((_flip, _flip, _cut, _double, _insert, _blank, _other_json, _other_json))(
            content, numbers
        )
    return content


def _place(content: bytes, numbers: random.Random) -> int:
    # Half of them near the beginning, where headers are.
    return numbers.randrange(max(1, min(len(content), 2048) if numbers.random() < 0.5 else len(content)))


def _flip(content: bytes, numbers: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(numbers.choice((1, 1, 4, 64))):
        if changed:
            changed[_place(content, numbers)] ^= 1 << numbers.randrange(8)
    return bytes(changed)


def _cut(content: bytes, numbers: random.Random) -> bytes:
    at = _place(content, numbers)
    return content[:at] if numbers.random() < 0.7 else content[at:]


def _double(content: bytes, numbers: random.Random) -> bytes:
    start = _place(content, numbers)
    stretch = content[start : start + numbers.choice((1, 8, 100, 5000))]
    return content[:start] + stretch * numbers.choice((2, 2, 3, 50)) + content[start + len(stretch) :]


def _insert(content: bytes, numbers: random.Random) -> bytes:
    at = _place(content, numbers)
    kinds = (b"[", b"{", b'"', b"\0", b"9", b"-1", b"1e999", b"\xff", b"\n", bytes([numbers.randrange(256)]))
    return content[:at] + numbers.choice(kinds) * numbers.choice((1, 1, 2, 9, 20_000)) + content[at:]


def _blank(content: bytes, numbers: random.Random) -> bytes:
    start, length = _place(content, numbers), numbers.choice((1, 8, 64, 4096))
    blank = numbers.choice((b"\0", b"\xff")) * len(content[start : start + length])
    return content[:start] + blank + content[start + length :]


def _other_json(content: bytes, numbers: random.Random) -> bytes:
    """Another value somewhere in a JSON file, or in the header of a safetensors file; a flip elsewhere."""
    header = int.from_bytes(content[:8], "little") if len(content) > 8 else 0
    framed = 0 < header <= len(content) - 8 and content[8:9] == b"{"
    try:
        value = json.loads(content[8 : 8 + header] if framed else content)
    except (ValueError, RecursionError):
        return _flip(content, numbers)
    text = json.dumps(_with_other_value(value, numbers)).encode()
    return len(text).to_bytes(8, "little") + text + content[8 + header :] if framed else text


def _with_other_value(value: Any, numbers: random.Random) -> Any:
    places: list[tuple[Any, Any]] = []

    def collect(inner: Any) -> None:
        for key in list(inner) if isinstance(inner, dict) else range(len(inner)) if isinstance(inner, list) else ():
            places.append((inner, key))
            collect(inner[key])

    collect(value)
    if not places:
        return numbers.choice(_VALUES)
    inner, key = numbers.choice(places)
    choice = numbers.random()
    if choice < 0.15:
        del inner[key]
    elif choice < 0.3:
        other, place = numbers.choice(places)
        if isinstance(other, (dict, list)) and (place in other if isinstance(other, dict) else place < len(other)):
            inner[key], other[place] = json.loads(json.dumps(other[place])), json.loads(json.dumps(inner[key]))
    elif isinstance(inner[key], (int, float)) and choice < 0.6:
        inner[key] = numbers.choice((-inner[key], inner[key] * 1000, inner[key] + 1, 2**31, 2**63, 0))
    else:
        inner[key] = numbers.choice(_VALUES)
    return value


_VALUES = (
    None, True, 0, -1, 1, 3, 2**31, 2**63, 10**30, 0.5, 1e308, float("inf"), float("nan"), "", "x", "../x", "1",
    [], [1], [[]], {}, {"x": 1}, "é" * 1000, [0] * 1000,
)  # fmt: skip


def make_files(folder: Path) -> list[Kind]:
    """Valid files of every kind in a folder, and what reads them."""
    torch.manual_seed(0)
    model, tokenizer = LPDModel(CONFIG).eval(), VQTokenizer(TokenizerConfig(32, (1, 1), 8, 32, 4, 1, 1)).eval()
    torch.nn.init.normal_(tokenizer.quantize.embedding.weight)
    pipe = LPDPipeline(model, tokenizer, SamplingDefaults(num_inference_steps=3, guidance_scale=2.0), ["a", "b", "c"])
    pipe.save_pretrained(folder / "model")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = {"model": state, "args": Namespace(lr=1e-3), "epoch": 3}
    torch.save(trainer, folder / "new.pth")
    torch.save(trainer, folder / "old.pth", _use_new_zipfile_serialization=False)
    (folder / "shards").mkdir()
    names = sorted(state)
    for number, part in enumerate((names[::2], names[1::2])):
        save_file({name: state[name] for name in part}, folder / "shards" / f"{number}.safetensors")
    weights = {name: f"{i % 2}.safetensors" for i, name in enumerate(names)}
    (folder / "shards" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    save_file(Judge().state_dict(), folder / "judge.safetensors")
    _write_training(model, folder)
    _write_cache(folder / "cache")
    _write_data(folder)
    return [
        Kind("config.json", "model/config.json", lambda path: draw(path.parent)),
        Kind("model.safetensors", "model/model.safetensors", lambda path: draw(path.parent)),
        Kind("int8", "model/model.safetensors", lambda path: load_model(path, heads=2, dtype="int8")),
        Kind("tokenizer.safetensors", "model/tokenizer.safetensors", lambda path: draw(path.parent)),
        Kind("torch file", "new.pth", lambda path: load_model(path, heads=2, packed=True)),
        Kind("old torch file", "old.pth", lambda path: load_model(path, heads=2)),
        Kind("index of shards", "shards/model.safetensors.index.json", read_state_dict),
        Kind("judge", "judge.safetensors", load_judge),
        Kind("training checkpoint", "checkpoints/step_000000001.pt", resume),
        Kind("failed step", "failed.pt", read_failure),
        Kind("index of tokens", "cache/index.json", lambda path: read_tokens(path.parent)),
        Kind("shard of tokens", "cache/train-00000.safetensors", lambda path: read_tokens(path.parent)),
        Kind("IDX", "labels-idx3-ubyte", read_idx),
        Kind("IDX, compressed", "images-idx3-ubyte.gz", read_idx),
        Kind("recipe", "recipe.toml", read_recipe),
        Kind("log", "log.csv", read_log),
        Kind("log that is gone on with", "log.csv", lambda path: drop_rows_after(path, 2)),
        Kind("study", "study.csv", lambda path: read_results(path, Measured)),
        Kind("manifest", "manifest.json", lambda path: read_manifest(path.parent)),
        Kind("picture", "pictures/a.png", lambda path: open_images(str(path.parent)).read([0])),
        Kind("sample batch", "samples.npz", lambda path: open_images(str(path)).read([0, 1])),
    ]  # fmt: skip


def _write_training(model: LPDModel, folder: Path) -> None:
    state = _training_state(model)
    sum(parameter.sum() for parameter in model.parameters()).backward()
    state.optimizer.step()
    progress = {"done": 1, "seconds": 1.0, "best": 2.0, "sums": {"loss": 1.0}, "counted": 1}
    entries = state.gathered() | {"task": {}, "progress": progress, "settings": {"dim": 16}}
    CheckpointFolder(folder / "checkpoints").save(entries, 1)
    weights = {name: value.detach() for name, value in model.named_parameters()}
    write_pickle({"format": 1, "kind": "x", "batch": {}, "weights": weights}, folder / "failed.pt")


def _training_state(model: LPDModel) -> TrainingState:
    return TrainingState(model, torch.optim.AdamW(parameter_groups(model, 0.1)))


def _write_cache(folder: Path) -> None:
    folder.mkdir()
    settings = {"grid": [4, 4], "vocab_size": 32, "image_size": 8, "tokenizer_sha256": "0" * 64}
    settings |= {"views": {"train": 2, "test": 1}}
    entries = {}
    for split, views in settings["views"].items():
        path = folder / f"{split}-00000.safetensors"
        tokens = torch.randint(32, (6, views, 4, 4)).to(torch.uint16)
        write_shard(path, Shard(tokens, torch.arange(6).int() % 3, torch.arange(6).int()), settings, [])
        entries[split] = [ShardEntry(path.name, 6, path.stat().st_size, file_hash(path))]
    write_index(folder, settings, ("a", "b", "c"), entries)


def _write_data(folder: Path) -> None:
    pixels = np.arange(4 * 7 * 7, dtype=np.uint8).reshape(4, 7, 7)
    content = b"\0\0\x08\x03" + np.array(pixels.shape, ">u4").tobytes() + pixels.tobytes()
    (folder / "labels-idx3-ubyte").write_bytes(content)
    (folder / "images-idx3-ubyte.gz").write_bytes(gzip.compress(content))
    recipe = '[train]\ntokens = "tokens"\nout_dir = "run"\ndim = 64\nbeta1 = 0.9\ndecoding_steps = [4, 16]\n'
    (folder / "recipe.toml").write_text(recipe)
    (folder / "log.csv").write_text("step,loss\n1,0.5\n2,0.25\n3,0.125\n")
    point = Point("mutual", "mutual", "locality", 10, 4.0, 1.0, 2, 0)
    append_result(folder / "study.csv", Measured(point, 100, 0.9, 1.5, 2.0, 2.5))
    (folder / "manifest.json").write_text(json.dumps({"settings": {"steps": 3}, "images": 2, "class_names": ["a"]}))
    (folder / "pictures").mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(
        folder / "pictures" / "a.png"
    )
    np.savez(folder / "samples.npz", np.zeros((3, 8, 8, 3), np.uint8), np.arange(3))


def draw(folder: Path) -> None:
    """Loads a pipeline and draws an image, whose pixels must be finite."""
    pipe = LPDPipeline.from_pretrained(folder)
    try:
        pixels = pipe([1], num_inference_steps=2, output_type="pt", seeds=1).images
    except RuntimeError as error:
        if not NOT_FINITE.search(str(error)):
            raise
        return
    if not bool(pixels.isfinite().all()):
        raise NotRefusedError("pixels are not finite")


def resume(path: Path) -> None:
    """Goes on from a training checkpoint."""
    state = _training_state(LPDModel(CONFIG))
    try:
        stored = CheckpointFolder(path.parent).newest({"dim": 16}, warn=False)
    except ValueError as error:
        if isinstance(error, DamagedCheckpointError) or str(path.parent) in str(error):
            raise ValueError(f"{path}: {error}") from error
        raise
    assert stored is not None
    with content_of(path):
        state.restore(stored[1])
        check_progress(stored[1]["progress"])


def read_tokens(folder: Path) -> None:
    """Reads a token cache, all tokens of it."""
    cache = load_token_cache(folder)
    for split in (cache.train, cache.test):
        split.tokens(torch.arange(len(split)))


def read_recipe(path: Path) -> None:
    """The settings of a training in a TOML file."""
    with content_of(path):
        make_config(LPDTraining, read_config(path, "train", ("train",)), {}, str(path), "train")


def try_file(kind: Kind, valid: bytes, folder: Path, numbers: random.Random) -> str:
    """Damages the file of that kind and reads it; "loaded" or "refused", NotRefusedError for anything else."""
    path = folder / kind.file
    path.write_bytes(damage(valid, numbers))
    started, memory = time.process_time(), peak_megabytes()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kind.load(path)
        outcome = "loaded"
    except (ValueError, OSError) as error:
        if path.parent.name not in str(error) and path.name not in str(error):
            raise NotRefusedError(f"the error does not name the file: {error}") from error
        outcome = "refused"
    except Exception as error:
        raise NotRefusedError(f"{type(error).__name__}: {error}") from error
    seconds, megabytes = time.process_time() - started, peak_megabytes() - memory
    if seconds > SECONDS or megabytes > MEGABYTES:
        raise NotRefusedError(f"{outcome} after {seconds:.1f} s and with {megabytes:.0f} MB")
    return outcome


def peak_megabytes() -> float:
    """The most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@cache
def _files() -> tuple[Path, list[Kind], dict[str, bytes]]:
    """This process's own folder of valid files, their kinds, and what they hold; checked to load as they are."""
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    kinds = make_files(folder)
    valid = {kind.file: (folder / kind.file).read_bytes() for kind in kinds}
    for kind in kinds:
        kind.load(folder / kind.file)
        (folder / kind.file).write_bytes(valid[kind.file])
    return folder, kinds, valid


def case(seed: int, index: int) -> str:
    """Damages and reads the file of that number, of one kind after the other; see `try_file`."""
    folder, kinds, valid = _files()
    kind = kinds[index % len(kinds)]
    try:
        return try_file(kind, valid[kind.file], folder, random.Random(f"{seed} {index}"))
    except NotRefusedError as error:
        raise NotRefusedError(f"{kind.name}: {error}") from error
    finally:
        (folder / kind.file).write_bytes(valid[kind.file])
