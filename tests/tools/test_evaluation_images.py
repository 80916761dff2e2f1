"""What evaluation reads: folders, sample batches, data sets by name, and which images stand for a set."""

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
from lpd_tools.evaluation.images import open_images
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
