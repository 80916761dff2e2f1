"""The token cache: what it holds, going on after being stopped, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

pytest.importorskip("typer")
pytest.importorskip("rich")

from lpd_tools.data import token_caching
from lpd_tools.data.fashion_mnist import load_fashion_mnist, to_images
from lpd_tools.data.token_cache import TokenSplit, file_hash, load_token_cache
from lpd_tools.data.token_caching import TokenCaching, cache_tokens, run_caching
from lpd_tools.data.token_check import TokenCheck, check_tokens
from lpd_tools.data.token_shards import (
    Shard,
    ShardEntry,
    narrow_type,
    read_index,
    read_notes,
    read_shard,
    write_index,
    write_shard,
)

from lpd_ext.tokenizer import TokenizerConfig, VQTokenizer

DATA = Path(__file__).parents[1] / "data" / "fashion_mnist"
SIZES = TokenizerConfig(32, (1, 1, 1), 8, 64, 8, 1, 1)


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.safetensors"
    torch.manual_seed(0)
    model = VQTokenizer(SIZES)
    torch.nn.init.normal_(model.quantize.embedding.weight)
    model.save(path)
    return path


def caching(tokenizer: Path, out: Path, **changes: object) -> TokenCaching:
    config = TokenCaching(str(tokenizer), str(out), f"fashion-mnist:{DATA}", batch_size=40, shard_size=64, workers=0)
    return dataclasses.replace(config, **changes)


@pytest.fixture(scope="module")
def cache_path(tokenizer_path: Path) -> Path:
    return cache_tokens(caching(tokenizer_path, tokenizer_path.with_name("tokens")))


@pytest.fixture
def copied(cache_path: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(cache_path, tmp_path / "copied"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_cached_tokens_are_those_of_the_images(cache_path: Path, tokenizer_path: Path) -> None:
    cache = load_token_cache(cache_path, tokenizer_path)
    tokenizer = VQTokenizer.from_file(tokenizer_path)
    # Images of all four shards, both sides of each border, in no order.
    index = torch.tensor([199, 0, 63, 64, 65, 127, 128, 129, 191, 192, 64])
    images = to_images(load_fashion_mnist("train", DATA).pixels[index])
    with torch.no_grad():
        plain, mirrored = (tokenizer.encode(view).flatten(1) for view in (images, images.flip(3)))
    assert (plain == mirrored).float().mean() < 0.9
    assert torch.equal(cache.train.tokens(index), plain)
    assert torch.equal(cache.train.tokens(index, 1), mirrored)
    view = torch.tensor([1, 0, 1, 1, 0, 0, 1, 0, 0, 1, 0])
    assert torch.equal(cache.train.tokens(index, view), torch.where(view[:, None] == 1, mirrored, plain))
    assert cache.train.tokens(index).dtype == torch.int64
    assert (len(cache.train), cache.train.views, len(cache.test), cache.test.views) == (200, 2, 300, 1)
    assert (cache.grid, cache.num_tokens, cache.vocab_size, cache.num_classes) == ((8, 8), 64, 64, 10)
    assert (cache.image_size, cache.class_names[9]) == (32, "ankle boot")
    assert cache.tokenizer_hash == file_hash(tokenizer_path)
    for split, part in (("train", cache.train), ("test", cache.test)):
        assert torch.equal(part.labels, load_fashion_mnist(split, DATA).labels)
    for wrong, views in ((200, 0), (-1, 0), (0, 2)):
        with pytest.raises(IndexError, match=r"must be in \[0, (200|2)\), got"):
            cache.train.tokens(torch.tensor([0, wrong]), views)


def test_without_mirror_images(cache_path: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    plain = load_token_cache(cache_tokens(caching(tokenizer_path, tmp_path / "plain", mirror=False)))
    both = load_token_cache(cache_path)
    assert (plain.train.views, both.train.views, plain.test.views) == (1, 2, 1)
    index = torch.arange(200)
    assert torch.equal(plain.train.tokens(index), both.train.tokens(index))
    assert torch.equal(plain.test.tokens(index), both.test.tokens(index))
    with pytest.raises(ValueError, match=r"views is .* but .* was made with"):
        cache_tokens(caching(tokenizer_path, tmp_path / "plain"))


def test_files_of_a_cache(cache_path: Path) -> None:
    shards = [f"{split}-{n:05d}.safetensors" for split, count in (("test", 5), ("train", 4)) for n in range(count)]
    assert sorted(contents(cache_path)) == ["index.json", *shards]
    _, _, entries = read_index(cache_path)
    assert [entry.rows for entry in entries["train"]] == [64, 64, 64, 8]
    for entry in entries["train"] + entries["test"]:
        assert (entry.bytes, entry.sha256) == (
            (cache_path / entry.file).stat().st_size,
            file_hash(cache_path / entry.file),
        )


def test_workers_change_nothing(cache_path: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    assert contents(cache_tokens(caching(tokenizer_path, tmp_path / "out", workers=2))) == contents(cache_path)


@pytest.mark.parametrize(("vocab_size", "dtype"), [(2**16, torch.uint16), (2**16 + 1, torch.int32)])
def test_tokens_are_stored_narrow_and_come_back_whole(vocab_size: int, dtype: torch.dtype) -> None:
    assert narrow_type(vocab_size) == dtype
    tokens = torch.tensor([0, 2**15, vocab_size - 1]).view(3, 1, 1, 1).to(dtype)
    split = TokenSplit([Shard(tokens, torch.zeros(3).int(), torch.arange(3).int())], 1, 1)
    assert split.tokens(torch.arange(3)).flatten().tolist() == [0, 2**15, vocab_size - 1]


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's count of resident pages")
def test_loading_reads_no_tokens(copied: Path) -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE")

    settings, names, entries = read_index(copied)
    path = copied / "train-00000.safetensors"
    rows = 200_000
    tokens = torch.zeros(rows, 2, 8, 8, dtype=torch.uint16)  # 51 MB
    tokens[-1] = 7
    write_shard(path, Shard(tokens, torch.zeros(rows).int(), torch.arange(rows).int()), settings, [])
    del tokens
    entries["train"] = [ShardEntry(path.name, rows, path.stat().st_size, file_hash(path))]
    write_index(copied, settings, names, entries)
    before = resident()
    cache = load_token_cache(copied)
    # The labels take 3 MB, as they are stored and as int64, and a little is read ahead.
    assert resident() - before < 20e6
    assert cache.train.tokens(torch.tensor([0, rows - 1]), 1).tolist() == [[0] * 64, [7] * 64]


# stopped and resumed


def kill_after(calls: int) -> Callable[[VQTokenizer, Tensor], Tensor]:
    encode = VQTokenizer.encode
    done = 0

    def dying(self: VQTokenizer, images: Tensor) -> Tensor:
        nonlocal done
        done += 1
        if done > calls:
            os.kill(os.getpid(), signal.SIGKILL)
        return encode(self, images)

    return dying


def test_killed_and_resumed_is_the_same_to_the_byte(cache_path: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); import test_token_cache as t; from pathlib import Path\n"
        "t.VQTokenizer.encode = t.kill_after(7)\n"
        "t.cache_tokens(t.caching(Path(sys.argv[2]), Path(sys.argv[3])))"
    )
    arguments = [sys.executable, "-c", script, str(Path(__file__).parent), str(tokenizer_path), str(out)]
    # Elsewhere: a checkout has the sources of lpd_ext, but not what was built of them.
    assert subprocess.run(arguments, check=False, cwd=tmp_path).returncode == -signal.SIGKILL
    # Two batches to a shard, two views of a batch: the eighth call is the last of the second shard.
    assert sorted(contents(out)) == ["train-00000.safetensors"]
    with pytest.raises(FileNotFoundError, match="finish one, with `lpd cache-tokens`"):
        load_token_cache(out)
    # A process that dies while it writes leaves a part under another name.
    (out / ".train-00001.safetensors.abc").write_bytes(b"part")
    first = (out / "train-00000.safetensors").stat()
    cache_tokens(caching(tokenizer_path, out))
    again = (out / "train-00000.safetensors").stat()
    assert (again.st_mtime_ns, again.st_ino) == (first.st_mtime_ns, first.st_ino)
    assert contents(out) == contents(cache_path)


def test_a_complete_cache_is_not_made_again(
    copied: Path, tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(copied)
    monkeypatch.setattr(VQTokenizer, "encode", None)
    assert run_caching(caching(tokenizer_path, copied)).complete
    assert contents(copied) == before


def test_a_rank_alone_leaves_no_shard_to_others(
    cache_path: Path, tokenizer_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert run_caching(caching(tokenizer_path, tmp_path / "out")).complete
    assert contents(tmp_path / "out") == contents(cache_path)


def test_processes_share_the_shards(
    cache_path: Path, tokenizer_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    first = run_caching(caching(tokenizer_path, tmp_path / "out"))
    assert not first.complete
    # Shards 1, 3, 5 and 7 of the nine: four of train and five of test.
    numbers = {"train": (1, 3), "test": (1, 3)}
    expected = [f"{split}-{n:05d}.safetensors" for split in ("test", "train") for n in numbers[split]]
    assert sorted(contents(tmp_path / "out")) == expected
    monkeypatch.setenv("RANK", "0")
    assert run_caching(caching(tokenizer_path, tmp_path / "out")).complete
    assert contents(tmp_path / "out") == contents(cache_path)


def test_going_on_with_other_settings_is_refused(
    cache_path: Path, copied: Path, tokenizer_path: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.safetensors"
    VQTokenizer(SIZES).save(other)
    with pytest.raises(ValueError, match=r"tokenizer_sha256 is '.*', but '.*train-00000.safetensors' was made with '"):
        cache_tokens(caching(other, copied))
    fewer = Path(shutil.copytree(DATA, tmp_path / "fewer"))
    for kind in ("images-idx3", "labels-idx1"):
        shutil.copy(DATA / f"train-{kind}-ubyte.gz", fewer / f"t10k-{kind}-ubyte.gz")
    changes = {"data": f"fashion-mnist:{fewer}", "image_size": 64, "background": "black", "batch_size": 41}
    names = {"data": "data_sha256", "image_size": "grid"}
    for name, value in changes.items():
        with pytest.raises(ValueError, match=f"{names.get(name, name)} is .*, but"):
            cache_tokens(caching(tokenizer_path, copied, **{name: value}))
    assert contents(copied) == contents(cache_path)


# damaged and foreign


def test_damaged_caches_are_refused(copied: Path, cache_path: Path, tokenizer_path: Path) -> None:
    shard = copied / "train-00002.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=r"train-00002.safetensors' has \d+ bytes, but \d+ in index.json"):
        load_token_cache(copied)
    with pytest.raises(ValueError, match=r"train-00002.safetensors' is no whole shard"):
        cache_tokens(caching(tokenizer_path, copied))
    shard.unlink()
    with pytest.raises(ValueError, match=r"train-00002.safetensors' is missing"):
        load_token_cache(copied)
    shutil.copy(copied / "train-00003.safetensors", shard)
    settings, names, entries = read_index(copied)
    entries["train"][2] = dataclasses.replace(entries["train"][2], bytes=shard.stat().st_size)
    write_index(copied, settings, names, entries)
    with pytest.raises(ValueError, match=r"holds tokens \(8, 2, 8, 8\) torch.uint16, but \(64, 2, 8, 8\)"):
        load_token_cache(copied)
    for text, problem in (("{", "is no index"), ("[]", "is no index"), ('{"format": "x"}', "its format is 'x'")):
        (copied / "index.json").write_text(text)
        with pytest.raises(ValueError, match=f"index.json' .*{problem}"):
            load_token_cache(copied)


@pytest.mark.parametrize("label", [-1, 10])
def test_labels_that_are_no_classes_are_refused(copied: Path, label: int) -> None:
    """All of -1 would train silently as images without a class."""

    def rewritten(**changes: Tensor) -> None:
        path = copied / "train-00001.safetensors"
        settings, skipped, _ = read_notes(path)
        write_shard(path, dataclasses.replace(read_shard(path), **changes), settings, skipped)
        index = json.loads((copied / "index.json").read_text())
        index["shards"]["train"][1]["bytes"] = path.stat().st_size
        (copied / "index.json").write_text(json.dumps(index))

    rewritten(labels=torch.full((64,), label).int())
    with pytest.raises(ValueError, match=r"train-00001.safetensors' has labels outside \[0, 10\)"):
        load_token_cache(copied)
    rewritten(labels=torch.zeros(64).int())
    load_token_cache(copied)
    for name in ("labels", "index"):
        rewritten(**{"labels": torch.zeros(64).int(), "index": torch.arange(64).int(), name: torch.zeros(63).int()})
        with pytest.raises(ValueError, match=r"train-00001.safetensors' holds tokens .* but"):
            load_token_cache(copied)


def test_a_changed_byte_is_found_by_the_full_check(copied: Path, tokenizer_path: Path) -> None:
    assert check_tokens(TokenCheck(str(copied), str(tokenizer_path))) == 500
    shard = copied / "test-00004.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    load_token_cache(copied)
    with pytest.raises(ValueError, match=r"test-00004.safetensors' is damaged: its SHA-256"):
        check_tokens(TokenCheck(str(copied)))
    index = json.loads((copied / "index.json").read_text())
    index["shards"]["test"][4]["sha256"] = file_hash(shard)
    index["settings"]["vocab_size"] = 60
    (copied / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"train-00000.safetensors' has tokens outside \[0, 60\)"):
        check_tokens(TokenCheck(str(copied)))


def test_content_hash_follows_the_training_shards(copied: Path, cache_path: Path) -> None:
    whole = load_token_cache(cache_path).content_hash()
    assert load_token_cache(copied).content_hash() == whole
    settings, names, entries = read_index(copied)
    entries["train"][3] = dataclasses.replace(entries["train"][3], sha256="0" * 64)
    write_index(copied, settings, names, entries)
    assert load_token_cache(copied).content_hash() != whole


def test_foreign_places_are_refused(cache_path: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no token cache at .*none'; make one"):
        load_token_cache(tmp_path / "none")
    with pytest.raises(ValueError, match="is a file; token caches are folders"):
        load_token_cache(tokenizer_path)
    with pytest.raises(ValueError, match="is a file; token caches are folders"):
        cache_tokens(caching(tokenizer_path, tokenizer_path))
    for hidden in (".DS_Store", "__MACOSX"):  # a folder that looks empty is
        (tmp_path / "fresh" / hidden).mkdir(parents=True)
    assert contents(cache_tokens(caching(tokenizer_path, tmp_path / "fresh"))).keys() >= contents(cache_path).keys()
    shutil.rmtree(tmp_path / "fresh")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"is no token cache, it holds 'notes.txt'"):
        cache_tokens(caching(tokenizer_path, tmp_path))
    other = tmp_path / "other.safetensors"
    VQTokenizer(SIZES).save(other)
    with pytest.raises(ValueError, match=r"other.safetensors' is not the one that made the tokens in"):
        load_token_cache(cache_path, other)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("image_size", 30, "image_size must be a multiple of 4, the stride of the tokenizer, got 30"),
        ("image_size", -1, "image_size must be at least 0, got -1"),
        ("batch_size", 0, "batch_size must be at least 1, got 0"),
        ("shard_size", 0, "shard_size must be at least 1, got 0"),
        ("workers", -1, "workers must be at least 0, got -1"),
        ("background", "blurple", "background must be a colour such as white, black or #808080, got 'blurple'"),
        ("device", "tpu", "device must be one of cpu"),
        ("data", "cifar", "data must begin with fashion-mnist, folder, hf and a colon, got 'cifar'"),
    ],
)
def test_impossible_settings_are_refused(
    tokenizer_path: Path, tmp_path: Path, name: str, value: object, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        cache_tokens(caching(tokenizer_path, tmp_path / "out", **{name: value}))
    assert not (tmp_path / "out").exists()


# unreadable images


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Two classes of 12 pictures, of which five cannot be read."""
    root = tmp_path / "pictures"
    for split, count in (("train", 8), ("val", 4)):
        for label in ("cat", "dog"):
            (root / split / label).mkdir(parents=True)
            for i in range(count):
                colour = (i * 20, 90, 200 if label == "cat" else 0)
                Image.new("RGB", (40, 32), colour).save(root / split / label / f"{i}.png")
    (root / "train/cat/0.png").write_bytes(b"")
    (root / "train/cat/7.png").write_text("no picture")
    for name in ("train/dog/2.png", "val/cat/3.png"):
        (root / name).write_bytes((root / name).read_bytes()[:60])
    shutil.copy(root / "val/dog/0.png", root / "val/dog/1.gif")
    Image.new("RGB", (2000, 2)).save(root / "val/dog/2.png")
    return root


def test_unreadable_images_are_skipped_and_listed(pictures: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    config = caching(tokenizer_path, out, data=f"folder:{pictures}", image_size=32, batch_size=3, shard_size=5)
    result = run_caching(config)
    names = [skipped.name for skipped in result.skipped]
    assert names == ["train/cat/0.png", "train/cat/7.png", "train/dog/2.png", "val/cat/3.png", "val/dog/2.png"]
    rows = (out / "skipped.csv").read_text().splitlines()
    assert rows[0] == "split,name,reason"
    assert rows[1] == "train,train/cat/0.png,no image format that Pillow knows"
    assert rows[5] == "test,val/dog/2.png,2000x2: one side is over 50 times the other"
    cache = load_token_cache(out)
    assert cache.train.labels.tolist() == [0] * 6 + [1] * 7
    assert cache.test.labels.tolist() == [0] * 3 + [1] * 4
    tokenizer = VQTokenizer.from_file(tokenizer_path)
    with Image.open(pictures / "train/dog/3.png") as image:
        square = image.crop((4, 0, 36, 32))
    pixels = torch.tensor(list(square.tobytes()), dtype=torch.float32).view(32, 32, 3).permute(2, 0, 1)
    with torch.no_grad():
        expected = tokenizer.encode(pixels[None] / 127.5 - 1).flatten(1)
    assert torch.equal(cache.train.tokens(torch.tensor([8])), expected)
    # What was skipped before the process stopped is still listed.
    (out / "index.json").unlink()
    (out / "skipped.csv").unlink()
    (out / "train-00001.safetensors").unlink()
    assert run_caching(config).skipped == result.skipped
    assert (out / "skipped.csv").read_text().splitlines() == rows
    with pytest.raises(ValueError, match=r"image 'train/cat/0.png' of the train split cannot be read: no image format"):
        run_caching(dataclasses.replace(config, strict=True))


@pytest.mark.parametrize("workers", [0, 1])
def test_strict_stops_at_the_first(pictures: Path, tokenizer_path: Path, tmp_path: Path, workers: int) -> None:
    (pictures / "train/cat/0.png").unlink()
    config = caching(tokenizer_path, tmp_path / "out", data=f"folder:{pictures}", image_size=32, strict=True)
    config = dataclasses.replace(config, workers=workers, shard_size=5)
    with pytest.raises(ValueError, match=r"image 'train/cat/7.png' of the train split cannot be read: no image format"):
        run_caching(config)
    assert sorted(contents(tmp_path / "out")) == ["train-00000.safetensors"]


def test_a_class_that_cannot_be_read_is_an_error(pictures: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    for path in (pictures / "train/dog").iterdir():
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"no train image of 'dog' can be read \(see '.*skipped.csv'\)"):
        run_caching(caching(tokenizer_path, tmp_path / "out", data=f"folder:{pictures}", image_size=32))
    assert (tmp_path / "out" / "skipped.csv").read_text().count("train/dog") == 8


def test_a_full_disk_leaves_what_was_written(
    cache_path: Path, tokenizer_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = token_caching.write_shard

    def full(path: Path, *rest: object) -> None:
        if path.name == "test-00001.safetensors":
            raise OSError(28, "No space left on device")
        write(path, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(token_caching, "write_shard", full)
        with pytest.raises(OSError, match="No space left"):
            cache_tokens(caching(tokenizer_path, tmp_path / "out"))
    assert len(contents(tmp_path / "out")) == 5
    assert contents(cache_tokens(caching(tokenizer_path, tmp_path / "out"))) == contents(cache_path)
