"""Images that evaluation reads: folders, sample batches, data sets by name, and which images stand for a set."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")
pytest.importorskip("torchmetrics")

from evaluation_models import DATA, FASHION, noise, save_images
from lpd_tools.data.fashion_mnist import load_fashion_mnist
from lpd_tools.evaluation.images import ImageSet, in_memory, open_images
from lpd_tools.evaluation.labels import labels_among
from lpd_tools.evaluation.reference import balanced_sample, open_reference


def test_folder_of_classes_and_plain_folder(tmp_path: Path) -> None:
    pixels = noise(5)
    save_images(tmp_path / "set" / "boots", pixels[:2])
    save_images(tmp_path / "set" / "bags", pixels[2:])
    images = open_images(str(tmp_path / "set"))
    assert images.labels is not None
    assert images.labels.tolist() == [0, 0, 0, 1, 1]
    np.testing.assert_array_equal(images.read([3, 0]).numpy(), pixels[[0, 2]])
    plain = open_images(str(tmp_path / "set" / "bags"))
    assert (plain.labels, len(plain), plain.size) == (None, 3, (8, 8))
    assert [len(batch) for batch in plain.batches(2)] == [2, 1]


def labels_of(folder: Path) -> list[int]:
    images = open_images(str(folder))
    assert images.labels is not None
    return images.labels.tolist()


def test_folders_called_by_numbers_are_labels(tmp_path: Path) -> None:
    """Also when some are missing, when they are written with zeros, and beyond nine, where text sorts otherwise."""
    save_images(tmp_path / "one" / "7", noise(2))
    assert labels_of(tmp_path / "one") == [7, 7]
    for number in (0, 2, 10, 11):
        save_images(tmp_path / "some" / str(number), noise(1))
        save_images(tmp_path / "zeros" / f"{number:03}", noise(1))
    assert sorted(labels_of(tmp_path / "some")) == labels_of(tmp_path / "zeros") == [0, 2, 10, 11]
    images = open_images(str(tmp_path / "some"))
    assert [images.class_names[label] for label in labels_of(tmp_path / "some")] == ["0", "10", "11", "2"]
    save_images(tmp_path / "some" / "x", noise(1))
    assert sorted(labels_of(tmp_path / "some")) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("hidden", [".ipynb_checkpoints", ".git", "__MACOSX", "@eaDir"])
def test_hidden_folders_are_no_images(hidden: str, tmp_path: Path) -> None:
    """They would shift the labels, and a folder that `lpd generate` wrote would not hold the announced number."""
    for name in ("boots", "shoes"):
        save_images(tmp_path / "set" / name, noise(2))
    before = labels_of(tmp_path / "set")
    for where in ("", "boots"):
        save_images(tmp_path / "set" / where / hidden, noise(1))
    assert labels_of(tmp_path / "set") == before == [0, 0, 1, 1]
    (tmp_path / "set" / "manifest.json").write_text('{"settings": {}, "images": 4}')
    assert len(open_images(str(tmp_path / "set"))) == 4
    save_images(tmp_path / "only" / hidden, noise(1))
    with pytest.raises(ValueError, match="only' holds no images"):
        open_images(str(tmp_path / "only"))


def shown(names: dict[int, str], labels: list[int]) -> ImageSet:
    return in_memory(torch.empty(len(labels), 1, 1, 3), torch.tensor(labels), "drawn", names)


@pytest.mark.parametrize(
    ("names", "labels", "known", "wanted"),
    [
        ({0: "bag", 1: "coat"}, [0, 1, 0], ["hat", "coat", "bag"], [2, 1, 2]),  # by name
        ({0: "10", 1: "2"}, [0, 1], ["1", "2", "10"], [2, 1]),  # names, though they are numbers
        ({7: "7"}, [7, 7], ["hat", "coat"], [7, 7]),  # numbers that are no names
        ({0: "T-shirt_top"}, [0], ["bag", "T-shirt/top"], [1]),
        ({}, [3, 1], ["hat", "coat"], [3, 1]),  # labels without names
        ({0: "a", 1: "b"}, [0, 1], ["hat", "coat"], [0, 1]),  # as many, by other names
        ({0: "a", 1: "b"}, [0, 1], [], [0, 1]),
        ({0: "a"}, [0], ["hat", "coat"], None),  # any of the two
        ({0: "bag", 1: "x"}, [0, 0], ["hat", "bag"], [1, 1]),  # no image of the unknown one
    ],
)
def test_labels_by_name_first(
    names: dict[int, str], labels: list[int], known: list[str], wanted: list[int] | None
) -> None:
    found = labels_among(shown(names, labels), known, len(known) or 2)
    assert (None if found is None else found.tolist()) == wanted


def test_classes_of_which_only_some_are_known_are_refused() -> None:
    with pytest.raises(ValueError, match="'drawn' has the classes 'boot', which are not of 'bag', 'hat'"):
        labels_among(shown({0: "bag", 1: "boot"}, [0, 1]), ["bag", "hat"], 2)
    assert labels_among(in_memory(torch.empty(1, 1, 1, 3), None, "x"), ["bag"], 1) is None


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_sample_batch_of_adm(save: Any, tmp_path: Path) -> None:
    """Labels under arr_1 are read, pixels of an uncompressed file are mapped and not read."""
    pixels = noise(4)
    save(tmp_path / "batch.npz", pixels, np.array([3, 1, 2, 0]))
    images = open_images(str(tmp_path / "batch.npz"))
    assert images.labels is not None
    assert images.labels.tolist() == [3, 1, 2, 0]
    np.testing.assert_array_equal(images.subset([3, 1], "some").read([1, 0]).numpy(), pixels[[1, 3]])
    kept = [cell.cell_contents for cell in images.read.__closure__ or ()]
    assert any(isinstance(item, np.memmap) for item in kept) == (save is np.savez)


def test_images_of_other_sizes_are_cropped_to_their_centre(tmp_path: Path) -> None:
    """A bright centre square of a 20 x 8 picture fills the result at its own size, and halved by averaging at 4."""
    wide = np.zeros((8, 20, 3), np.uint8)
    wide[:, 6:14] = 200
    (tmp_path / "set").mkdir()
    Image.fromarray(wide).save(tmp_path / "set" / "wide.png")
    for side in (8, 4):
        images = open_images(str(tmp_path / "set"), (side, side))
        assert images.size == (side, side)
        assert (images.read([0]) == 200).all()
    checks = np.indices((8, 8)).sum(0) % 2 * 200
    save_images(tmp_path / "checks", np.repeat(checks[None, ..., None], 3, 3).astype(np.uint8))
    assert (open_images(str(tmp_path / "checks"), (4, 4)).read([0]) == 100).all()
    save_images(tmp_path / "set" / "more", noise(1))
    with pytest.raises(ValueError, match="has 8 x 20 pixels, others have 8 x 8; give a size"):
        open_images(str(tmp_path / "set")).read([0, 1])
    with pytest.raises(ValueError, match="only squares are cropped"):
        open_images(str(tmp_path / "set"), (8, 10)).read([0])
    (tmp_path / "thin").mkdir()
    Image.new("RGB", (200, 1)).save(tmp_path / "thin" / "line.png")
    with pytest.raises(ValueError, match=r"line\.png.* one side is over 50 times the other"):
        open_images(str(tmp_path / "thin"), (8, 8)).read([0])


def test_unreadable_images_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no folder and no file at .*none"):
        open_images(str(tmp_path / "none"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty' holds no images"):
        open_images(str(tmp_path / "empty"))
    folder = save_images(tmp_path / "cut", noise(2, 32))
    whole = (folder / "001.png").read_bytes()
    (folder / "001.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"001\.png' is not a whole image"):
        open_images(str(folder)).read([0, 1])
    np.savez(tmp_path / "floats.npz", noise(2) / 255)
    with pytest.raises(ValueError, match=r"arr_0 of .* must be uint8 \[n, H, W, 3\], got float64"):
        open_images(str(tmp_path / "floats.npz"))
    np.savez(tmp_path / "labels.npz", noise(2), np.zeros(3))
    with pytest.raises(ValueError, match="must hold 2 labels, got"):
        open_images(str(tmp_path / "labels.npz"))
    for wrong in (np.zeros(2), np.array([0, -1]), np.array(["bag", "coat"])):
        np.savez(tmp_path / "labels.npz", noise(2), wrong)
        with pytest.raises(ValueError, match=r"arr_1 of .*labels\.npz' must hold whole numbers from 0 on, got"):
            open_images(str(tmp_path / "labels.npz"))
    np.savez(tmp_path / "other.npz", images=noise(2))
    with pytest.raises(ValueError, match="no images under arr_0"):
        open_images(str(tmp_path / "other.npz"))
    (tmp_path / "text.npz").write_text("arr_0")
    with pytest.raises(ValueError, match=r"text\.npz' is no readable \.npz file"):
        open_images(str(tmp_path / "text.npz"))


def test_balanced_sample() -> None:
    labels = torch.tensor([0] * 50 + [1] * 10 + [2] * 40)
    chosen = balanced_sample(labels, 100, 30)
    assert torch.bincount(labels[chosen]).tolist() == [10, 10, 10]
    assert len(chosen.unique()) == 30
    assert torch.bincount(labels[balanced_sample(labels, 100, 60)]).tolist() == [25, 10, 25]
    assert balanced_sample(labels, 100, 30, seed=1).tolist() != chosen.tolist()
    assert balanced_sample(None, 100, 100).sort().values.tolist() == list(range(100))


def test_npz_of_a_folder_that_generate_wrote(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    np.savez(tmp_path / "run" / "samples.npz", noise(3), np.arange(3))
    assert len(open_images(str(tmp_path / "run"))) == 3
    with zipfile.ZipFile(tmp_path / "fortran.npz", "w") as archive, archive.open("arr_0.npy", "w") as file:
        np.lib.format.write_array(file, np.asfortranarray(noise(3)))
    np.testing.assert_array_equal(open_images(str(tmp_path / "fortran.npz")).read([2])[0].numpy(), noise(3)[2])


def test_data_sets_by_name(tmp_path: Path) -> None:
    """A data set's test split is the reference and its training split the floor, unless another is named."""
    reference = open_reference(FASHION, "", (32, 32))
    assert reference.images is not None
    assert reference.more is not None
    assert (len(reference.images), len(reference.more)) == (300, 200)
    pixels = load_fashion_mnist("test", DATA / "fashion_mnist").pixels
    np.testing.assert_array_equal(reference.images.read([7])[0, 2:-2, 2:-2, 1].numpy(), pixels[7].numpy())
    folder = save_images(tmp_path / "mine" / "all", noise(3, 40))
    other = open_reference(FASHION, str(folder), (32, 32)).more
    assert other is not None
    assert (len(other), other.size) == (3, (32, 32))
    save_images(tmp_path / "set" / "train" / "bag", noise(2, 16, 1))
    save_images(tmp_path / "set" / "val" / "bag", noise(4, 20, 2))
    own = open_reference(f"folder:{tmp_path / 'set'}", "", (16, 16))
    assert own.images is not None
    assert own.more is not None
    assert (own.images.read(range(4)).shape, len(own.more)) == ((4, 16, 16, 3), 2)
    with pytest.raises(FileNotFoundError, match="no folder 'nowhere'"):
        open_reference("folder:nowhere", "", (16, 16))
