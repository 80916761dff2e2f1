"""Files that the programs read, damaged: one sentence that names the file, and never a result of damaged bytes."""

from __future__ import annotations

import gzip
import json
import random
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from little_space import little_space

pytest.importorskip("typer")
pytest.importorskip("matplotlib")

from fuzz_files import CONFIG, make_files, resume
from lpd_tools.cli import app
from lpd_tools.data.fashion_mnist import read_idx
from lpd_tools.data.icons import read_classes
from lpd_tools.data.token_cache import load_token_cache
from lpd_tools.evaluation.images import open_images
from lpd_tools.settings import read_config
from lpd_tools.training.checkpoints import CheckpointFolder, DamagedCheckpointError, read_checkpoint, write_pickle
from lpd_tools.training.curves import read_log
from lpd_tools.training.export import export
from lpd_tools.training.failure import read_failure
from lpd_tools.training.judge import load_judge
from lpd_tools.training.logs import drop_rows_after
from lpd_tools.training.settings import Export
from typer.testing import CliRunner

from lpd_ext.model import LPDModel


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_files(tmp_path)
    return tmp_path


def test_every_flip_in_the_weights_of_a_training_is_found(folder: Path) -> None:
    """torch writes checksums and does not compare them."""
    path = folder / "checkpoints" / "step_000000001.pt"
    valid, numbers = path.read_bytes(), random.Random(0)
    weights = torch.load(path, weights_only=True)["weights"]["content"]
    start = valid.index(weights.numpy().tobytes())
    for _ in range(50):
        changed = bytearray(valid)
        changed[start + numbers.randrange(weights.nbytes)] ^= 1 << numbers.randrange(8)
        path.write_bytes(changed)
        with pytest.raises(DamagedCheckpointError, match=r"step_000000001\.pt' .*checksum of its entry .* is wrong"):
            read_checkpoint(path)
    path.write_bytes(valid)
    resume(path)
    failed = bytearray((folder / "failed.pt").read_bytes())
    failed[len(failed) // 3] ^= 1
    (folder / "failed.pt").write_bytes(failed)
    with pytest.raises(ValueError, match=r"failed\.pt' is no file to replay: the checksum"):
        read_failure(folder / "failed.pt")


def test_checksums_are_written_whatever_the_process_has_set(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        path = CheckpointFolder(tmp_path).save({"settings": {}, "weight": torch.ones(3)}, 1)
        assert not torch.serialization.get_crc32_options()
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(read_checkpoint(path)["weight"], torch.ones(3))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda state: state["weights"].pop("norm.bias"), r"norm\.bias is missing"),
        (lambda state: state["average"].pop("content"), "content is missing"),
        (lambda state: state["weights"].update(surprise=torch.ones(1)), "surprise is unexpected"),
        (lambda state: state["weights"].update({"norm.bias": torch.ones(1)}), r"norm\.bias must have shape \[16\]"),
        (lambda state: state["weights"].update({"norm.bias": 3}), r"norm\.bias is missing"),
        (lambda state: state["moments"]["norm.bias"].pop("exp_avg"), "exp_avg is missing"),
        (lambda state: state["moments"].update(x={}), "'x' is missing"),
        (lambda state: state.pop("moments"), "'moments' is missing"),
        (lambda state: state.pop("progress"), "'progress' is missing"),
        (lambda state: state["progress"].update(done="x"), "done that is int, got 'x'"),
        (lambda state: state["progress"].pop("best"), "'best' is missing"),
        (lambda state: state.update(weights=None), "tensors by name are missing"),
    ],
)
def test_a_training_checkpoint_of_other_content_is_refused(
    change: Callable[[dict[str, Any]], Any], reason: str, folder: Path
) -> None:
    path = folder / "checkpoints" / "step_000000001.pt"
    state = torch.load(path, weights_only=True)
    change(state)
    write_pickle(state, path)
    with pytest.raises(ValueError, match=rf"step_000000001\.pt' .*{reason}"):
        resume(path)


def test_an_export_takes_no_memory_for_weights_that_are_not_there(folder: Path, tmp_path: Path) -> None:
    path = folder / "checkpoints" / "step_000000001.pt"
    state = torch.load(path, weights_only=True)
    state["settings"] = {**vars(CONFIG), "tokenizer_sha256": "0", "depth": 100, "dim": 2**16, "heads": 2**10}
    write_pickle(state, path)
    with at_once(), pytest.raises(ValueError, match=r"step_000000001\.pt' .*must have shape"):
        export(Export(checkpoint=str(path), out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


class at_once:  # reads as a function
    """Fails if the block takes much time or memory."""

    def __enter__(self) -> None:
        self.started, self.memory = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def __exit__(self, *error: object) -> None:
        assert time.process_time() - self.started < 8
        assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - self.memory) / 1024 < 300


def test_text_that_is_nested_too_deeply_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    for text in ("a = " + "[" * 50_000, "a = " + "{a=" * 50_000):
        path.write_text(text)
        for read in (lambda: read_config(path, "train", ("train",)), lambda: read_classes(str(path))):
            with at_once(), pytest.raises(ValueError, match=r"a\.toml' is no.* it is nested too deeply"):
                read()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda index: index["shards"]["train"][0].update(rows=None),
            "rows of a shard must be .* got None",
        ),
        (lambda index: index["shards"]["train"][0].update(bytes="9"), "bytes of a shard must be a whole number"),
        (lambda index: index["shards"]["train"][0].update(file=3), "file"),
        (lambda index: index["shards"].update(test=None), "not iterable"),
        (lambda index: index.update(class_names=[1, 2, 3]), "class_names must be a list of strings"),
        (lambda index: index.update(settings=3), "not iterable"),
        (lambda index: index["settings"].update(grid=[4]), "grid must be two integers"),
        (lambda index: index["settings"].update(vocab_size=-1), "vocab_size must be an integer >= 1"),
        (lambda index: index["settings"]["views"].update(train=None), "views must be an integer >= 1"),
    ],
)
def test_an_index_of_tokens_of_other_content_is_refused(
    change: Callable[[dict[str, Any]], Any], reason: str, folder: Path
) -> None:
    path = folder / "cache" / "index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=rf"index\.json' is no index of a token cache: .*{reason}"):
        load_token_cache(folder / "cache")


def test_a_compressed_file_is_unpacked_no_further_than_it_says(tmp_path: Path) -> None:
    path = tmp_path / "a-ubyte.gz"
    header = b"\0\0\x08\x03"
    start = gzip.compress(header + np.array([9, 9, 9], ">u4").tobytes())
    path.write_bytes(start + 10 * gzip.compress(bytes(1 << 26), 1))
    with at_once(), pytest.raises(ValueError, match=r"a-ubyte\.gz' announces shape \(9, 9, 9\) but holds more bytes"):
        read_idx(path)
    path.write_bytes(gzip.compress(header + np.array([2**31, 2**31, 4], ">u4").tobytes()))
    with at_once(), pytest.raises(ValueError, match=r"a-ubyte\.gz' announces shape .* more than its bytes can hold"):
        read_idx(path)


@pytest.mark.parametrize(
    "read", [load_judge, read_log, lambda path: drop_rows_after(path, 1), lambda path: open_images(str(path))]
)
def test_noise_is_refused_by_name(read: Callable[[Path], object], tmp_path: Path) -> None:
    path = tmp_path / "noise.npz"
    path.write_bytes(b"step,loss\n\xff,1\n" + bytes(range(256)))
    with pytest.raises(ValueError, match=r"noise\.npz"):
        read(path)


@pytest.mark.parametrize("command", [["orders"], ["sample", "1", "--steps", "2"]], ids=["orders", "sample"])
def test_a_picture_is_whole_or_not_there(command: list[str], tmp_path: Path) -> None:
    """A full disk left a picture of 0 bytes."""
    with little_space():
        result = CliRunner().invoke(app, [*command, "--output", str(tmp_path / "a.png")])
    assert result.exit_code == 2
    assert "File too large" in result.output
    assert "a.png" in result.output
    assert list(tmp_path.iterdir()) == []


def test_networks_of_checkpoints_are_float32(folder: Path, tmp_path: Path) -> None:
    from lpd_tools.training.state import filled

    weights = {name: value.detach() for name, value in LPDModel(CONFIG).named_parameters()}
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = filled(lambda: LPDModel(CONFIG), weights)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(value, weights[name]) for name, value in model.named_parameters())
