"""`lpd measure`: sets of images against a reference, with the floor of the reference itself."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")
pytest.importorskip("torchmetrics")

from evaluation_models import DATA, FASHION, noise, save_images, save_inception
from lpd_tools.data.sources import open_data
from lpd_tools.evaluation.features import EfficientNetFeatures, InceptionFeatures, extract
from lpd_tools.evaluation.images import ImageSet, open_images
from lpd_tools.evaluation.measure import Measurement, measure, recognition_of
from lpd_tools.evaluation.metrics import frechet_distance, kernel_distance, precision_recall
from lpd_tools.evaluation.neighbours import nearest
from lpd_tools.evaluation.readable import without_unreadable
from lpd_tools.evaluation.reference import balanced_sample
from lpd_tools.evaluation.report import result_tables
from PIL import Image

from lpd_ext.picture import UnreadableImageError

JUDGE = str(DATA / "judge.safetensors")


def features_of(net: Any, pixels: np.ndarray) -> Tensor:
    return net(torch.from_numpy(pixels)).values


def test_measures_against_a_folder_with_its_floor(tmp_path: Path) -> None:
    """Each figure is that of its own two sets: repeats against all of the reference, the floor between halves of it."""
    real, repeats = noise(60, 16, 1), [noise(20, 16, 2, high=200), noise(20, 16, 3, high=200)]
    reference = save_images(tmp_path / "real", real)
    folders = tuple(str(save_images(tmp_path / f"run{r}", pixels)) for r, pixels in enumerate(repeats))
    inception = save_inception(tmp_path / "inception.pt")
    config = Measurement(folders, str(reference), inception=str(inception), out=str(tmp_path / "results.json"))
    results = measure(config)
    net = InceptionFeatures(inception)
    wanted = [frechet_distance(features_of(net, pixels), features_of(net, real)) for pixels in repeats]
    assert results["measures"]["FID"]["generated"]["values"] == pytest.approx(wanted, rel=1e-6)
    assert results["measures"]["FID"]["generated"]["mean"] == pytest.approx(sum(wanted) / 2, rel=1e-6)
    assert set(results["measures"]) == {"FID", "KID", "precision", "recall", "IS"}
    found, target = features_of(net, repeats[0]), features_of(net, real)
    measures = {name: rows["generated"]["values"][0] for name, rows in results["measures"].items()}
    assert measures["KID"] == pytest.approx(kernel_distance(found, target)[0], rel=1e-6)
    assert (measures["precision"], measures["recall"]) == pytest.approx(precision_recall(found, target))
    order = balanced_sample(None, 60, 60)
    halves = features_of(net, real[order[:20]]), features_of(net, real[order[20:]])
    floor = results["measures"]["FID"]["real (the floor)"]["mean"]
    assert floor == pytest.approx(frechet_distance(*halves), rel=1e-6)
    assert floor < wanted[0]
    assert any("only 20 images" in warning for warning in results["warnings"])
    assert results["sha256"]["inception"]
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(results))


def test_more_real_images_are_the_floor(tmp_path: Path) -> None:
    real, more, drawn = noise(30, 16, 1), noise(25, 16, 2), noise(20, 16, 3, high=200)
    names = ("real", "more", "drawn")
    folders = [str(save_images(tmp_path / name, set_)) for name, set_ in zip(names, (real, more, drawn), strict=True)]
    inception = save_inception(tmp_path / "inception.pt")
    config = Measurement((folders[2],), folders[0], floor=folders[1], inception=str(inception))
    floor = measure(config)["measures"]["FID"]["real (the floor)"]["mean"]
    net = InceptionFeatures(inception)
    chosen = balanced_sample(None, 25, 20)
    assert floor == pytest.approx(frechet_distance(features_of(net, more[chosen]), features_of(net, real)), rel=1e-6)


def test_statistics_of_a_file_as_reference(tmp_path: Path) -> None:
    """ADM's files: mu and sigma give the FID alone, and with images beside them the other measures come from those."""
    real, drawn = noise(40, 16, 1), noise(20, 16, 2, high=200)
    inception = save_inception(tmp_path / "inception.pt")
    net = InceptionFeatures(inception)
    values = features_of(net, real).double().numpy()
    stated = {"mu": values.mean(0) + 1, "sigma": 2 * np.cov(values, rowvar=False)}
    np.savez(tmp_path / "statistics.npz", **stated)
    np.savez(tmp_path / "both.npz", real, **stated)
    folder = save_images(tmp_path / "drawn", drawn)
    config = Measurement((str(folder),), str(tmp_path / "statistics.npz"), inception=str(inception))
    alone = measure(config)
    both = measure(replace(config, reference=str(tmp_path / "both.npz")))
    assert set(alone["measures"]) == {"FID", "IS"}
    assert set(both["measures"]) == {"FID", "IS", "KID", "precision", "recall"}
    fid = alone["measures"]["FID"]["generated"]["mean"]
    assert both["measures"]["FID"]["generated"]["mean"] == fid
    assert fid > frechet_distance(features_of(net, drawn), torch.from_numpy(values)) + 1
    assert "real (the floor)" not in alone["measures"]["FID"]
    with pytest.raises(ValueError, match="holds statistics of Inception features alone, and efficientnet needs"):
        measure(replace(config, features=("efficientnet",)))


def test_efficientnet_on_any_folder(tmp_path: Path) -> None:
    """The reference's other size is brought to that of the generated images; FD grows with the difference."""
    real = save_images(tmp_path / "real", noise(16, 40, 1))
    near = save_images(tmp_path / "near", noise(12, 32, 2))
    far = save_images(tmp_path / "far", np.zeros((12, 32, 32, 3), np.uint8) + noise(12, 1, 3))
    distances = []
    for folder in (near, far):
        results = measure(Measurement((str(folder),), str(real)))
        assert set(results["measures"]) == {
            f"{name}-efficientnet" for name in ("FD", "KID", "precision", "recall")
        }  # never FID
        distances.append(results["measures"]["FD-efficientnet"]["generated"]["mean"])
    assert distances[1] > 1.5 * distances[0]


def stripes(count: int, vertical: bool, seed: int) -> np.ndarray:
    """Noise under broad stripes one way or the other: two classes that any features tell apart."""
    pixels = noise(count, 32, seed, high=100)
    lines = (np.arange(32) // 8 % 2 * 150).astype(np.uint8)
    return pixels + (lines[None, None, :, None] if vertical else lines[None, :, None, None])


def test_classes_without_a_judge_are_learned_from_further_real_images(tmp_path: Path) -> None:
    """Two thirds of the drawn images show what their folder says; the nearest of one is the very image it copies."""
    sets = {"real": (10, 1), "more": (12, 2)}
    for name, (count, seed) in sets.items():
        for label, vertical in (("across", False), ("down", True)):
            save_images(tmp_path / name / label, stripes(count, vertical, seed))
    drawn = stripes(9, True, 3)
    drawn[:3] = stripes(3, False, 4)
    drawn[8] = stripes(12, True, 2)[7]
    save_images(tmp_path / "drawn" / "down", drawn)
    config = Measurement(
        (str(tmp_path / "drawn"),), str(tmp_path / "real"), floor=str(tmp_path / "more"), learned_images=24,
        neighbours=9, out=str(tmp_path / "out.json"),
    )  # fmt: skip
    results = measure(config)
    probed = results["probed"]["efficientnet"]
    assert probed["recognised"]["generated"]["down"]["mean"] == pytest.approx(2 / 3)
    assert probed["recognised"]["real reference"]["all"]["mean"] == 1
    assert 0 < probed["nearest"]["real reference"]["mean"] < 0.2
    learned = save_images(tmp_path / "down", stripes(12, True, 2))
    features, among = (
        extract(EfficientNetFeatures(), open_images(str(folder))).values for folder in (tmp_path / "drawn", learned)
    )
    index, distance = nearest(features, among)
    assert index[8] == 7
    assert distance[8] == pytest.approx(0, abs=1e-6)
    by_hand = torch.nn.functional.cosine_similarity(features[:, None], among[None], dim=2)
    assert torch.equal(index, by_hand.argmax(1))
    assert distance[:8].min() > 1e-4
    with Image.open(tmp_path / "neighbours.png") as picture:
        assert picture.height == 4 * 68 + 4  # two rows of drawn images, each above the nearest
        assert picture.text["lpd:neighbours"] == "9"
    shown = "".join(str(cell) for table in result_tables(results) for cell in (table.title, table.caption))
    assert "recognised by a linear classifier of efficientnet features" in shown
    assert "1 - cosine to the nearest learned image, median: generated" in shown


def test_unlabelled_images_have_distances_to_learned_ones_alone(tmp_path: Path) -> None:
    for label, vertical in (("across", False), ("down", True)):
        save_images(tmp_path / "more" / label, stripes(3, vertical, 2))
    flat = {name: str(save_images(tmp_path / name, stripes(4, True, seed))) for name, seed in (("a", 3), ("b", 4))}
    config = Measurement(
        (flat["a"],), flat["b"], floor=str(tmp_path / "more"), learned_images=6, neighbours=2, out=str(tmp_path / "out")
    )
    results = measure(config)
    assert results["probed"]["efficientnet"]["recognised"] == {}
    assert set(results["probed"]["efficientnet"]["nearest"]) == {"generated", "real reference"}
    assert len(result_tables(results)) == 2
    assert (tmp_path / "out").is_file()  # of any name, with the picture beside it
    assert (tmp_path / "neighbours.png").is_file()


def test_the_judge_learns_nothing(tmp_path: Path) -> None:
    drawn = str(save_images(tmp_path / "drawn", noise(2, 32)))
    with pytest.raises(ValueError, match="features must name others than the judge, which needs no learned_images"):
        measure(Measurement((drawn,), FASHION, judge=JUDGE, learned_images=20))


def test_classes_that_are_not_learned_are_named_at_once(tmp_path: Path) -> None:
    for label in ("0", "1"):
        save_images(tmp_path / "more" / label, noise(2))
    drawn = save_images(tmp_path / "drawn" / "2", noise(2)).parent
    config = Measurement((str(drawn),), str(drawn), floor=str(tmp_path / "more"), learned_images=4)
    with pytest.raises(ValueError, match=r"drawn' has labels up to 2, but .*more' has 2 classes to learn"):
        measure(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": ()}, "images must name at least one"),
        ({"features": ("clip",)}, "features must be of efficientnet, judge, inception, got 'clip'"),
        ({"features": ("judge",)}, r"judge must be given \(a file\)"),
        ({"reference": "nowhere"}, "no folder and no file at 'nowhere'"),
        ({"reference": FASHION, "learned_images": 19}, "learned_images must be at least 20, two of each class, got 19"),
        ({"learned_images": 5}, "learned_images must be 0 without labelled real images beside the reference, got 5"),
        ({"neighbours": 5}, "neighbours must be 0 without learned_images, among which they are sought, got 5"),
        ({"reference": FASHION, "learned_images": 20, "neighbours": 1, "out": ""}, "out must be given for neighbours"),
    ],
)
def test_impossible_measurements_write_nothing(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = str(save_images(tmp_path / "images", noise(2)))
    config = replace(Measurement((folder,), folder, out=str(tmp_path / "out.json")), **change)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        measure(config)
    assert not (tmp_path / "out.json").exists()


def test_repeats_must_be_alike(tmp_path: Path) -> None:
    folders = [str(save_images(tmp_path / str(count), noise(count))) for count in (2, 3)]
    with pytest.raises(ValueError, match="repeats must have one size and number"):
        measure(Measurement(tuple(folders), folders[0]))


def folder_of(classes: dict[str, int], folder: Path) -> str:
    """Folders of real pictures of Fashion-MNIST: by name of the folder, how many of class 8 (bags)."""
    source = open_data(FASHION).test
    bags = (source.labels == 8).nonzero().flatten().tolist()
    for name, count in classes.items():
        (folder / name).mkdir(parents=True)
        for i in bags[:count]:
            source.image(i).save(folder / name / f"{i}.png")
    return str(folder)


@pytest.mark.parametrize(("name", "share"), [("8", 1), ("bag", 1), ("2", 0), ("pullover", 0)])
def test_a_folder_is_recognised_by_its_name(name: str, share: int, tmp_path: Path) -> None:
    """Alone it would be the first of all folders, so label 0."""
    bags = folder_of({name: 12}, tmp_path / "bags")
    results = measure(Measurement((bags,), FASHION, judge=JUDGE))
    assert results["recognised"]["generated"]["all"]["mean"] == pytest.approx(share, abs=0.1)


def test_classes_that_the_judge_does_not_know_are_not_recognised(tmp_path: Path) -> None:
    bags = folder_of({"boots": 4, "shoes": 4}, tmp_path / "bags")
    results = measure(Measurement((bags,), FASHION, judge=JUDGE))
    assert "generated" not in results["recognised"]
    assert f"the judge knows none of the classes of {bags}: nothing there is recognised" in results["warnings"]


def damage(folder: Path) -> None:
    """Adds pictures that training and caching skip: one cut short, one that is none, one that is too thin."""
    whole = next(iter(sorted(folder.glob("*.png")))).read_bytes()
    (folder / "000a.png").write_bytes(whole[: len(whole) // 2])
    (folder / "001a.png").write_text("no picture")
    Image.new("RGB", (200, 2)).save(folder / "002a.png")


def test_real_images_that_cannot_be_read_are_skipped_as_in_training(tmp_path: Path) -> None:
    """In the reference and in what the floor is drawn from: the figures are those without them."""
    names = {"real": noise(30, 16, 1), "more": noise(25, 16, 2), "drawn": noise(20, 16, 3, high=200)}
    whole = {name: str(save_images(tmp_path / name, pixels)) for name, pixels in names.items()}
    inception = str(save_inception(tmp_path / "inception.pt"))
    config = Measurement((whole["drawn"],), whole["real"], floor=whole["more"], inception=inception)
    expected = measure(config)
    assert expected["skipped"] == []
    for name in ("real", "more"):
        damage(tmp_path / name)
    results = measure(config)
    assert results["measures"] == expected["measures"]
    assert [Path(text.split("'")[1]).name for text in results["skipped"][:3]] == ["000a.png", "001a.png", "002a.png"]
    assert any("skipped real images that cannot be read: images: '" in note for note in results["warnings"])
    (tmp_path / "drawn" / "000a.png").write_bytes(b"")
    with pytest.raises(UnreadableImageError, match=r"drawn/000a\.png' is not a whole image"):
        measure(config)
    for path in (tmp_path / "real").iterdir():
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"none of the 33 images of .*real can be read: .*000\.png"):
        measure(config)


def test_images_that_take_the_place_of_skipped_ones_are_read_too(tmp_path: Path) -> None:
    """A sample without the unreadable ones is another sample, which may hold other unreadable ones."""
    folder = save_images(tmp_path / "more", noise(60, 8))
    for i in range(0, 60, 3):
        (folder / f"{i:03}.png").write_bytes(b"")
    images = open_images(str(folder), (8, 8))

    def sample(left: ImageSet) -> list[int]:
        return balanced_sample(left.labels, len(left), 20, seed=1).tolist()

    left, errors = without_unreadable(images, sample)
    left.read(sample(left))
    assert 60 - len(left) == len(errors) <= 20
    assert len(errors) > 3
    whole = open_images(str(save_images(tmp_path / "whole", noise(5))), (8, 8))
    assert without_unreadable(whole, lambda left: range(len(left))) == (whole, [])


def test_recognition_needs_labels_that_the_judge_knows(tmp_path: Path) -> None:
    """Without labels there are distances alone; each class is counted by itself."""
    logits = torch.eye(10)[torch.tensor([0, 0, 1, 2])]
    rates = recognition_of([logits], [torch.tensor([0, 1, 1, 1])])
    assert {name: rate["mean"] for name, rate in rates.items()} == {"all": 1 / 2, "T-shirt/top": 1, "trouser": 1 / 3}
    with pytest.raises(ValueError, match="labels up to 10, but 10 classes are known"):
        recognition_of([logits], [torch.tensor([0, 1, 10, 2])])
    with pytest.raises(ValueError, match="labels up to 10, but 10 classes are known"):
        measure(Measurement((folder_of({"10": 2}, tmp_path / "ten"),), FASHION, judge=JUDGE, out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()
    plain = str(save_images(tmp_path / "plain", noise(4, 32)))
    results = measure(Measurement((plain,), plain, judge=str(DATA / "judge.safetensors")))
    assert "FD-judge" in results["measures"]
    assert "recognised" not in results
