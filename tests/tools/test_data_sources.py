"""Data sets by name: Fashion-MNIST, folders of pictures, the datasets library; what is no data set is refused."""

from __future__ import annotations

import logging
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("typer")
pytest.importorskip("rich")

from lpd_tools.data.fashion_mnist import load_fashion_mnist, to_images
from lpd_tools.data.image_reader import ImageReader
from lpd_tools.data.image_source import held_out
from lpd_tools.data.names import in_order, whole_numbers
from lpd_tools.data.sources import open_data

from lpd_ext.picture import UnreadableImageError, reads_heif

DATA = Path(__file__).parents[1] / "data" / "fashion_mnist"


def picture(path: Path, colour: tuple[int, int, int] = (0, 0, 0)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), colour).save(path)


def names(root: Path | str) -> list[list[tuple[str, int]]]:
    data = open_data(f"folder:{root}")
    return [[(source.name(i), int(source.labels[i])) for i in range(len(source))] for source in (data.train, data.test)]


# Fashion-MNIST


def test_fashion_mnist_as_a_source_gives_the_images_of_its_files() -> None:
    data = open_data(f"fashion-mnist:{DATA}")
    for split, source in (("train", data.train), ("test", data.test)):
        files = load_fashion_mnist(split, DATA)
        assert torch.equal(source.labels, files.labels)
        index = torch.arange(0, len(files), 7)
        reader = ImageReader(source, data.default_image_size)
        assert torch.equal(reader.images(index), to_images(files.pixels[index]))
    assert (data.default_image_size, data.kind, data.class_names[8]) == (32, "fashion-mnist", "bag")
    assert data.test.name(5) == "test[5]"
    assert data.train.fingerprint() != data.test.fingerprint()


# folders


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("train/b/2.png", "train/b/10.JPG", "train/a/deep/1.webp", "val/a/1.png", "val/b/1.bmp"):
        picture(tmp_path / "set" / name, (len(name), 0, 0))
    (tmp_path / "set/train/a/notes.txt").write_text("no picture")
    picture(tmp_path / "set/train/a/.hidden.png")
    picture(tmp_path / "set/.cache/1.png")
    return tmp_path / "set"


def test_given_splits(root: Path) -> None:
    train, test = names(root)
    assert train == [("train/a/deep/1.webp", 0), ("train/b/10.JPG", 1), ("train/b/2.png", 1)]
    assert test == [("val/a/1.png", 0), ("val/b/1.bmp", 1)]
    data = open_data(f"folder:{root}")
    assert data.class_names == ("a", "b")
    assert np.asarray(data.test.image(1).convert("RGB"))[0, 0].tolist() == [len("val/b/1.bmp"), 0, 0]
    (root / "val").rename(root / "test")
    assert names(root)[1] == [("test/a/1.png", 0), ("test/b/1.bmp", 1)]


def test_class_names_that_are_numbers_are_in_the_order_of_numbers(tmp_path: Path) -> None:
    """Sorted as text, 10 would come before 2, and label 1 would be the class called 10."""
    for number in range(12):
        picture(tmp_path / "set" / "train" / str(number) / "1.png")
        picture(tmp_path / "set" / "val" / str(number) / "1.png")
    data = open_data(f"folder:{tmp_path / 'set'}")
    assert data.class_names == tuple(map(str, range(12)))
    assert all(data.train.name(i) == f"train/{int(data.train.labels[i])}/1.png" for i in range(12))
    picture(tmp_path / "set" / "train" / "x" / "1.png")
    picture(tmp_path / "set" / "val" / "x" / "1.png")
    assert open_data(f"folder:{tmp_path / 'set'}").class_names[:3] == ("0", "1", "10")  # text, as the last is


@pytest.mark.parametrize(
    ("names", "order", "numbers"),
    [
        (["10", "9", "007"], ["007", "9", "10"], [7, 9, 10]),
        (["1", "01"], ["01", "1"], None),  # one number, two classes
        (["1", "-2"], ["-2", "1"], None),
        (["²", "1"], ["1", "²"], None),
        (["20240101", "99999999999"], ["20240101", "99999999999"], None),
        ([], [], []),
    ],
)
def test_names_that_are_numbers(names: list[str], order: list[str], numbers: list[int] | None) -> None:
    assert in_order(names) == order
    assert whole_numbers(order) == numbers


HIDDEN = (".ipynb_checkpoints", ".git", "__MACOSX", "@eaDir")


@pytest.mark.parametrize("hidden", HIDDEN)
def test_hidden_folders_are_no_data(root: Path, hidden: str) -> None:
    """Beside the splits, as a class, in a class and below: nothing changes."""
    before, fingerprint = names(root), open_data(f"folder:{root}").fingerprint()
    for where in ("", "train", "val", "train/a", "train/a/deep"):
        picture(root / where / hidden / "1-checkpoint.png")
    assert names(root) == before
    assert open_data(f"folder:{root}").fingerprint() == fingerprint
    flat = root.parent / "flat"
    for i in range(30):
        picture(flat / "a" / f"{i}.png")
    split = names(flat)
    picture(flat / hidden / "1.png")
    picture(flat / "a" / hidden / "1.png")
    picture(flat / "train" / hidden / "1.png")  # not a folder of classes: a class without pictures
    with pytest.raises(ValueError, match="no images in 'train' of"):
        names(flat)
    shutil.rmtree(flat / "train")
    assert names(flat) == split


def test_links_that_lead_back_give_no_picture_twice(root: Path) -> None:
    before = names(root)
    (root / "train/a/deep/again").symlink_to(root / "train/a")
    assert names(root) == before


def test_a_folder_that_cannot_be_read_is_an_error(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pictures would be missing without a word."""
    scandir = os.scandir

    def refuse(path: str | Path) -> Any:
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match=r"Permission denied: '.*train/a/deep'"):
        open_data(f"folder:{root}")


def test_a_share_is_held_out_by_name(tmp_path: Path) -> None:
    for i in range(100):
        picture(tmp_path / ("a" if i % 2 else "b") / f"{i}.png")
    train, test = names(tmp_path)
    assert len(train) + len(test) == 100
    assert 3 <= len(test) <= 20
    assert all(held_out(name, 0.1) for name, _ in test)
    assert not any(held_out(name, 0.1) for name, _ in train)
    # A picture stays on its side whatever comes and goes beside it.
    for name, _ in train[:20]:
        (tmp_path / name).unlink()
    picture(tmp_path / "a/new.png")
    again = names(tmp_path)
    assert set(test) <= set(again[1])
    assert set(train[20:]) <= set(again[0])
    assert len(names(f"{tmp_path}?held_out=0.5")[1]) > 25
    # A folder called train that holds pictures is a class.
    picture(tmp_path / "train/1.png")
    assert open_data(f"folder:{tmp_path}").class_names == ("a", "b", "train")


def test_a_share_is_held_out_of_a_lone_train_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for i in range(60):
        picture(tmp_path / "set" / "train" / ("a" if i % 2 else "b") / f"{i}.png")
    with caplog.at_level(logging.INFO, "lpd_tools"):
        train, test = names(tmp_path / "set")
    assert len(train) + len(test) == 60
    assert open_data(f"folder:{tmp_path / 'set'}").class_names == ("a", "b")
    assert [held_out(name, 0.1) for name, _ in train + test] == [False] * len(train) + [True] * len(test)
    assert test[0][0].startswith("train/a/")
    assert f"{len(test)} of its 60 pictures are held out by their names (?held_out=0.1)" in caplog.text
    caplog.clear()
    picture(tmp_path / "set/val/a/1.png")
    picture(tmp_path / "set/val/b/1.png")
    with caplog.at_level(logging.INFO, "lpd_tools"):
        assert len(names(tmp_path / "set")[1]) == 2  # given, so none is held out
    assert not caplog.records


@pytest.fixture
def with_heif() -> Iterator[None]:
    """Has pillow-heif looked for anew, before and after."""
    reads_heif.cache_clear()
    yield
    reads_heif.cache_clear()


def test_heic_is_read_where_pillow_heif_is_installed(root: Path, with_heif: None) -> None:
    pytest.importorskip("pillow_heif").register_heif_opener()
    Image.new("RGB", (4, 4), (200, 10, 10)).save(root / "train/a/phone.HEIC", format="HEIF")
    data = open_data(f"folder:{root}")
    assert names(root)[0][1] == ("train/a/phone.HEIC", 0)
    red, green, _ = np.asarray(data.train.image(1).convert("RGB"))[0, 0].tolist()
    assert red > 190
    assert green < 30


def test_heic_is_named_where_it_cannot_be_read(
    root: Path, with_heif: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    before = names(root)
    assert not caplog.records
    for name in ("a/1.heic", "a/2.HEIF", "b/3.heic"):
        (root / "train" / name).touch()
    assert names(root) == before
    (said,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert said.getMessage() == (
        f"3 HEIC pictures of {str(root / 'train')!r} are left out: `pip install pillow-heif` reads them"
    )
    (root / "val/a/1.png").rename(root / "val/a/1.heic")
    with pytest.raises(ValueError, match=r"no images in .val/a. of .*; 1 HEIC pictures of .* are left out: `pip"):
        names(root)


def test_held_out_share_is_the_share() -> None:
    share = sum(held_out(f"class/{i}.png", 0.1) for i in range(10000)) / 10000
    assert share == pytest.approx(0.1, abs=0.012)  # four standard deviations


def test_folders_that_are_no_data_set(root: Path, tmp_path: Path) -> None:
    def refused(match: str, error: type[Exception] = ValueError, spec: str = f"folder:{root}") -> None:
        with pytest.raises(error, match=match):
            open_data(spec)

    refused("there is no folder '/nowhere'", FileNotFoundError, "folder:/nowhere")
    (tmp_path / "empty").mkdir()
    refused("has no class folders; images belong in", spec=f"folder:{tmp_path / 'empty'}")
    (root / "train/c").mkdir()
    refused("the class folders of '.*' differ: 'c' only in train")
    (root / "val/d").mkdir()
    refused("differ: 'c' only in train; 'd' only in val")
    (root / "val/d").rename(root / "val/c")
    refused("no images in 'train/c' of")
    picture(root / "train/c/1.png")
    refused("no images in 'val/c' of")
    picture(tmp_path / "one/a/1.png")
    for share, match in (("0.999999", "has no images in its train split"), ("0.000001", "no images in its test split")):
        refused(match, spec=f"folder:{tmp_path / 'one'}?held_out={share}")
    for share in ("0", "1", "much"):
        refused(rf"held_out must be a number in \(0, 1\), got '{share}'", spec=f"folder:{root}?held_out={share}")


def test_fingerprint_follows_names_and_classes(root: Path, tmp_path: Path) -> None:
    before = open_data(f"folder:{root}").fingerprint()
    moved = Path(shutil.copytree(root, tmp_path / "moved"))
    assert open_data(f"folder:{moved}").fingerprint() == before
    (moved / "val/a/1.png").rename(moved / "val/a/2.png")
    assert open_data(f"folder:{moved}").fingerprint() != before
    for split in ("train", "val"):
        (root / split / "b").rename(root / split / "bb")
    assert open_data(f"folder:{root}").fingerprint() != before


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        ("", "data must begin with fashion-mnist, folder, hf and a colon, got ''"),
        ("folder", "'folder' names no path; write folder:path"),
        ("hf:", "'hf:' names no path"),
        ("folder:/x?share=0.5", "folder has the options held_out, got 'share'"),
        ("fashion-mnist:/x?held_out=0.5", "fashion-mnist has the options none, got 'held_out'"),
    ],
)
def test_names_that_name_nothing(spec: str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        open_data(spec)


def test_missing_fashion_mnist(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"train-images-idx3-ubyte.gz is missing"):
        open_data(f"fashion-mnist:{tmp_path}")


# the datasets library


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten pictures, one of them damaged, as a dict of splits, as one split with class names, and with text labels."""
    datasets = pytest.importorskip("datasets")
    folder = tmp_path_factory.mktemp("hf")
    files = []
    for i in range(10):
        picture(folder / f"{i}.png", (25 * i, 0, 0))
        files.append({"bytes": (folder / f"{i}.png").read_bytes() if i != 3 else b"damaged", "path": None})
    labels = [i % 2 for i in range(10)]
    features = datasets.Features({"img": datasets.Image(), "kind": datasets.ClassLabel(names=["even", "odd"])})
    whole = datasets.Dataset.from_dict({"img": files, "kind": labels}, features=features)
    parts = datasets.DatasetDict({"train": whole.select(range(6)), "validation": whole.select(range(6, 10))})
    parts.save_to_disk(folder / "parts")
    whole.save_to_disk(folder / "whole")
    text = datasets.Features(
        {"image": datasets.Image(), "label": datasets.Value("string"), "n": datasets.Value("int64")}
    )
    words = {"image": files, "label": ["odd" if label else "even" for label in labels], "n": [3 * n for n in labels]}
    datasets.Dataset.from_dict(words, features=text).save_to_disk(folder / "text")
    return folder


def test_saved_data_set(saved: Path) -> None:
    data = open_data(f"hf:{saved / 'parts'}")
    assert (data.kind, data.class_names) == ("hf", ("even", "odd"))
    assert data.train.labels.tolist() == [0, 1, 0, 1, 0, 1]
    assert data.test.labels.tolist() == [0, 1, 0, 1]
    assert [np.asarray(data.test.image(i))[0, 0, 0] for i in range(4)] == [150, 175, 200, 225]
    assert data.test.name(1) == "validation[1]"
    with pytest.raises(UnreadableImageError, match="no image format"):
        data.train.image(3)
    again = open_data(f"hf:{saved / 'parts'}?image=img&label=kind&train=train&test=validation")
    assert again.fingerprint() == data.fingerprint()
    swapped = open_data(f"hf:{saved / 'parts'}?train=validation&test=train")
    assert swapped.train.labels.tolist() == [0, 1, 0, 1]
    assert swapped.fingerprint() != data.fingerprint()


def test_saved_split_holds_out_a_share(saved: Path) -> None:
    data = open_data(f"hf:{saved / 'whole'}?held_out=0.4")
    expected = [i for i in range(10) if held_out(f"train[{i}]", 0.4)]
    assert [data.test.name(i) for i in range(len(data.test))] == [f"train[{i}]" for i in expected]
    assert data.test.labels.tolist() == [i % 2 for i in expected]
    readable = next(i for i, row in enumerate(expected) if row != 3)
    assert np.asarray(data.test.image(readable))[0, 0, 0] == 25 * expected[readable]
    assert len(data.train) + len(data.test) == 10


def test_labels_that_are_text_or_plain_numbers(saved: Path) -> None:
    data = open_data(f"hf:{saved / 'text'}?held_out=0.4")
    assert data.class_names == ("even", "odd")
    assert data.train.labels.tolist() == [i % 2 for i in range(10) if not held_out(f"train[{i}]", 0.4)]
    with pytest.raises(ValueError, match=r"has no train images of '1', '2'"):
        open_data(f"hf:{saved / 'text'}?held_out=0.4&label=n")


def test_text_labels_that_are_numbers_are_in_the_order_of_numbers(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    picture(tmp_path / "1.png")
    files = [{"bytes": (tmp_path / "1.png").read_bytes(), "path": None}] * 24
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    table = {"image": files, "label": [str(i % 12) for i in range(24)]}
    datasets.Dataset.from_dict(table, features=features).save_to_disk(tmp_path / "set")
    data = open_data(f"hf:{tmp_path / 'set'}?held_out=0.3")
    assert data.class_names == tuple(map(str, range(12)))
    for source in (data.train, data.test):
        rows = [int(source.name(i).removeprefix("train[")[:-1]) for i in range(len(source))]
        assert source.labels.tolist() == [row % 12 for row in rows]


@pytest.fixture(scope="module")
def competition(saved: Path) -> Path:
    """The saved parts with the labels of some splits withheld."""
    datasets = pytest.importorskip("datasets")
    parts = datasets.load_from_disk(saved / "parts")
    features = parts["train"].features

    def withheld(split: str) -> Any:
        return parts[split].map(lambda row: {"kind": -1}, features=features)

    splits = {"train": parts["train"], "test": withheld("validation"), "validation": parts["validation"]}
    datasets.DatasetDict(splits).save_to_disk(saved / "competition")
    datasets.DatasetDict({**splits, "validation": splits["test"]}).save_to_disk(saved / "train only")
    datasets.DatasetDict({**splits, "train": withheld("train")}).save_to_disk(saved / "no train")
    return saved


def test_a_split_without_labels_is_no_test_split(competition: Path) -> None:
    data = open_data(f"hf:{competition / 'competition'}")
    assert (data.test.name(0), data.test.labels.tolist()) == ("validation[0]", [0, 1, 0, 1])
    held = open_data(f"hf:{competition / 'train only'}?held_out=0.4")
    assert held.test.name(0).startswith("train[")
    for name, option, others in (
        ("competition?test=test", "test='test'", "'train', 'validation'"),
        ("train only?test=validation", "test='validation'", "'train'"),
        ("no train", "train='train'", "'validation'"),
    ):
        with pytest.raises(ValueError, match=rf"{option} of '.*' has no labels .* splits with labels: {others}$"):
            open_data(f"hf:{competition / name}")


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("parts?image=picture", "image='picture' is no column of '.*'; it has 'img', 'kind'"),
        ("parts?label=class", "label='class' is no column of"),
        ("parts?image=kind", "image='kind' of '.*' is no column of pictures but of ClassLabel"),
        ("parts?train=all", "train='all' is no split of '.*'; it has 'train', 'validation'"),
        ("parts?test=all", "test='all' is no split of"),
        (".", "is no data set saved by save_to_disk"),
    ],
)
def test_unfit_saved_data_sets(saved: Path, name: str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        open_data(f"hf:{saved / name}")


def test_nothing_is_fetched_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked = []

    def load(*arguments: object) -> None:
        asked.append(arguments)
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(FileNotFoundError, match="there is no data set at '/nowhere'"):
        open_data("hf:/nowhere")
    assert asked == []
    with pytest.raises(FileNotFoundError, match=r"'owner/name' is neither on disk nor .* hub gives: no network"):
        open_data("hf:owner/name?config=small")
    assert asked == [("owner/name", "small")]


def test_a_missing_library_names_its_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'lpd-ext\[train\]'"):
        open_data(f"hf:{tmp_path}")
