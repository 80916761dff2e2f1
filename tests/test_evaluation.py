"""From images to results: what is read, what the feature networks see, what is compared, and the two commands."""

from __future__ import annotations

import json
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")
pytest.importorskip("torchmetrics")

from evaluation_models import save_small_model, stand_in_inception
from lpd_tools.cli import app
from lpd_tools.data.fashion_mnist import load_fashion_mnist
from lpd_tools.data.sources import open_data
from lpd_tools.evaluation import evaluate as evaluate_module
from lpd_tools.evaluation.evaluate import Evaluation, evaluate, tokens_of
from lpd_tools.evaluation.features import (
    EfficientNetFeatures,
    Features,
    InceptionFeatures,
    JudgeFeatures,
    extract,
)
from lpd_tools.evaluation.images import ImageSet, data_images, in_memory, open_images
from lpd_tools.evaluation.likelihood import SCORING_SEED, dependency_loss, self_consistency
from lpd_tools.evaluation.measure import Measurement, measure, recognition_of
from lpd_tools.evaluation.metrics import frechet_distance, kernel_distance, precision_recall
from lpd_tools.evaluation.processes import Processes
from lpd_tools.evaluation.reference import balanced_sample, open_reference
from typer.testing import CliRunner

from lpd_ext.orders import random_order
from lpd_ext.pipeline import LPDPipeline

DATA = Path(__file__).parent / "data"
FASHION = f"fashion-mnist:{DATA / 'fashion_mnist'}"


def fashion_images() -> ImageSet:
    return data_images(open_data(FASHION).test, (32, 32), "real")


def noise(count: int, side: int = 8, seed: int = 0, low: int = 0, high: int = 256) -> np.ndarray:
    return np.random.default_rng(seed).integers(low, high, (count, side, side, 3), dtype=np.uint8)


def save_images(folder: Path, pixels: np.ndarray) -> Path:
    folder.mkdir(parents=True)
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{number:03}.png")
    return folder


# images


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


# feature networks


def test_efficientnet_reads_photographs_as_it_was_trained_to() -> None:
    """Input is (value - 127) / 128 at 224 pixels, 96 for small ones; features are all 320 of the last block."""
    see = EfficientNetFeatures()
    for value, side in ((255, 256), (127, 224), (0, 32)):
        constant = torch.full((1, side, side, 3), value, dtype=torch.uint8)
        assert (see.network_input(constant) - (value - 127) / 128).abs().max() < 1e-5
    colours = torch.arange(3, dtype=torch.uint8).mul(100).expand(1, 32, 32, 3)
    assert see.network_input(colours).mean((0, 2, 3)).mul(128).add(127).round().tolist() == [0, 100, 200]
    assert see.network_input(torch.zeros(2, 65, 64, 3, dtype=torch.uint8)).shape == (2, 3, 224, 224)
    assert see.network_input(torch.zeros(2, 64, 64, 3, dtype=torch.uint8)).shape == (2, 3, 96, 96)
    pixels = torch.from_numpy(noise(2, 32))
    values = see(pixels).values
    assert values.shape == (2, 320)
    assert (values.std(0) > 0).sum() > 300
    # By the network's own forward pass: its head and classifier on top of the same features' map.
    maps: list[Tensor] = []
    see.net.get_submodule("_conv_head").register_forward_pre_hook(lambda module, inputs: maps.append(inputs[0]))
    with torch.no_grad():
        see.net(see.network_input(pixels))
    assert torch.allclose(maps[0].mean((2, 3)), values, atol=1e-4)


def test_judge_reads_the_grey_centre() -> None:
    see = JudgeFeatures(DATA / "judge.safetensors")
    images = fashion_images()
    assert images.labels is not None
    seen = extract(see, images, 128)
    assert seen.values.shape == (300, 128)
    assert seen.logits is not None
    assert (seen.logits.argmax(1) == images.labels).float().mean() >= 0.9
    with pytest.raises(ValueError, match="the judge reads 32 x 32 images, got"):
        see(torch.zeros(1, 28, 28, 3, dtype=torch.uint8))


def save_inception(path: Path, seed: int = 0) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(stand_in_inception(seed)).save(path)
    return path


def test_inception_of_a_torchscript_file(tmp_path: Path) -> None:
    """Features and class log-probabilities without the bias of the last layer, of images in 0 to 255."""
    see = InceptionFeatures(save_inception(tmp_path / "inception.pt"))
    pixels = torch.from_numpy(noise(3, 16))
    seen, net = see(pixels), stand_in_inception()
    with torch.no_grad():
        values = net(pixels.permute(0, 3, 1, 2), return_features=True)
        log_probabilities = (values @ net.classes.weight.t()).log_softmax(1)
    assert torch.allclose(seen.values, values, atol=1e-5)
    assert seen.logits is not None
    assert torch.allclose(seen.logits, log_probabilities, atol=1e-4)
    with pytest.raises(FileNotFoundError, match="inception: no file at"):
        InceptionFeatures(tmp_path / "none.pt")
    torch.save({"weight": torch.zeros(1)}, tmp_path / "weights.pth")
    (tmp_path / "text.pt").write_text("weights")
    for name in ("weights.pth", "text.pt"):
        with pytest.raises(ValueError, match=rf"{name}' is no TorchScript file"):
            InceptionFeatures(tmp_path / name)


# comparison


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": ()}, "images must name at least one"),
        ({"features": ("clip",)}, "features must be of efficientnet, judge, inception, got 'clip'"),
        ({"features": ("judge",)}, r"judge must be given \(a file\)"),
        ({"reference": "nowhere"}, "no folder and no file at 'nowhere'"),
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


# likelihood


def test_dependency_loss_by_hand(tmp_path: Path) -> None:
    """Against the decoder fed with the true tokens step by step: each group from the groups before it alone."""
    pipe = LPDPipeline.from_pretrained(save_small_model(tmp_path / "model"))
    tokens = torch.randint(0, 40, (3, 16), generator=torch.Generator().manual_seed(0))
    labels, sizes = torch.tensor([0, -1, 2]), [1, 5, 10]
    orders = random_order((4, 4), torch.arange(3))
    nats = dependency_loss(pipe.model, tokens, labels, orders, sizes, batch_size=2)
    wanted = torch.zeros(3, dtype=torch.float64)
    for first, size in zip((0, 1, 6), sizes, strict=True):
        # Tokens of this group and after it must not matter: they are replaced.
        masked = tokens.clone()
        masked.scatter_(1, orders[:, first:], 0)
        with torch.no_grad():
            logits = pipe.model(masked, labels, orders, sizes)[:, first : first + size].double()
        true = tokens.gather(1, orders[:, first : first + size])
        wanted -= logits.log_softmax(2).gather(2, true[..., None]).sum((1, 2))
    assert nats.dtype == torch.float64
    assert torch.allclose(nats, wanted, rtol=1e-5)
    assert len(dependency_loss(pipe.model, tokens[:0], labels[:0], orders[:0], sizes)) == 0


def test_self_consistency_scores_in_fixed_random_orders(tmp_path: Path) -> None:
    pipe = LPDPipeline.from_pretrained(save_small_model(tmp_path / "model"))
    labels = torch.arange(60) % 3
    drawn = pipe(labels.tolist(), seeds=0, guidance_scale=1.0, num_inference_steps=16, output_type="tokens").tokens
    tokens = drawn.flatten(1)
    nats = self_consistency(pipe.model, tokens, labels)
    orders = random_order((4, 4), SCORING_SEED + torch.arange(60))
    assert torch.equal(nats, dependency_loss(pipe.model, tokens, labels, orders, [1] * 16))
    assert not torch.equal(nats, self_consistency(pipe.model, tokens, labels, order_seed=1))
    # Tokens that the model drew are likelier to it than the same tokens in other cells.
    assert nats.mean() < self_consistency(pipe.model, tokens.flip(1), labels).mean()


# the whole


def test_evaluate_measures_a_model(tmp_path: Path) -> None:
    """Two repeats, everything measured, written and shown; a second call draws nothing again."""
    model = save_small_model(tmp_path / "model", classes=10, ch_mult=(1, 1, 1, 1))
    arguments = ["--model", model, "--out", tmp_path / "out", "--images-per-class", 2, "--repeats", 2,
                 "--judge", DATA / "judge.safetensors", "--reference", FASHION, "--nats-images", 6, "--self-images", 6,
                 "--nats-steps", 4, "--nats-steps", 16, "--nats-orders", "raster"]  # fmt: skip
    result = CliRunner(env={"COLUMNS": "200", "TERM": "dumb"}).invoke(app, ["evaluate", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    for text in (
        "FD-judge",
        "real (the floor)",
        "reconstructed",
        "self-consistency",
        "2 repeats ±",
        "note: only 20 images",
    ):
        assert text in result.output
    results = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert set(results["measures"]["FD-judge"]) == {"generated", "reconstructed", "real (the floor)"}
    assert set(results["recognised"]) == {
        "generated", "reconstructed", "reconstructed reference", "real reference"
    }  # fmt: skip
    assert len(results["measures"]["FD-judge"]["generated"]["interval95"]) == 2
    assert len(results["recognised"]["generated"]) == 11
    assert results["recognised"]["real reference"]["all"]["mean"] >= 0.9
    assert [run["settings"]["seed"] for run in results["generated_with"]] == [0, 20]
    assert results["sampling"]["guidance_scale"] == 2.0
    with Image.open(tmp_path / "out" / "grid.png") as picture:
        assert picture.height == 10 * 68 + 4
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("seed_*/*/*.png")}
    assert len(files) == 40
    config = Evaluation(str(tmp_path / "out"), str(model), images_per_class=2, repeats=2, reference=FASHION,
                        judge=str(DATA / "judge.safetensors"), nats_images=0, self_images=0)  # fmt: skip
    again = evaluate(config)
    assert again is not None
    assert again["measures"]["FD-judge"] == results["measures"]["FD-judge"]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("seed_*/*/*.png")} == files
    pipe = LPDPipeline.from_pretrained(model)
    raster = results["nats_per_reference_image"]["raster"]
    real = fashion_images()
    real = real.subset([i * len(real) // 6 for i in range(6)], "real")  # of a folder the first would be of one class
    orders = torch.arange(16).expand(6, -1)
    assert real.labels is not None
    nats = dependency_loss(pipe.model, tokens_of(pipe, real), real.labels, orders, [1] * 16)
    assert raster["16"]["mean"] == pytest.approx(nats.mean().item(), rel=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"repeats": 0}, r"repeats must be in \[1, 1000\], got 0"),
        ({"nats_steps": (17,)}, r"nats_steps must be in \[1, 16\], got 17"),
        ({"nats_orders": ("zigzag",)}, "order must be .* got 'zigzag'"),
        ({"judge": "none"}, "no judge at 'none'"),
        ({"reference": "nowhere"}, "no folder and no file at 'nowhere'"),
    ],
)
def test_impossible_evaluations_draw_nothing(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    model = save_small_model(tmp_path / "model")
    config = Evaluation(str(tmp_path / "out"), str(model), nats_steps=(4,), reference=FASHION)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        evaluate(replace(config, **change))
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_measured_is_refused_before_anything_is_drawn(tmp_path: Path) -> None:
    """Pictures of another size than the judge's, more classes than it knows, statistics of other features, labels."""
    small, large = save_small_model(tmp_path / "small"), save_small_model(tmp_path / "large", 11, (1, 1, 1, 1))
    real = str(save_images(tmp_path / "real", noise(4)))
    np.savez(tmp_path / "stats.npz", mu=np.zeros(7), sigma=np.eye(7))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(stand_in_inception()).save(tmp_path / "inception.pt")
    judge, stats = str(DATA / "judge.safetensors"), str(tmp_path / "stats.npz")
    for model, changes, message in (
        (small, {"reference": real, "judge": judge}, r"the judge reads 32 x 32 images, got \[8, 8\]"),
        (large, {"reference": FASHION, "judge": judge}, "model has 11 classes, but the judge knows 10"),
        (small, {"reference": stats}, "holds statistics of Inception features alone, and efficientnet needs"),
        (small, {"reference": stats, "inception": str(tmp_path / "inception.pt")}, "has 7 features, inception gives 6"),
        (small, {"reference": FASHION}, "labels up to 9, but the model has 3 classes"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate(replace(Evaluation(str(tmp_path / "out"), str(model), nats_steps=(4,)), **changes))
        assert not (tmp_path / "out").exists(), message


def test_each_process_has_a_gpu_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not only to draw: model and feature networks of eight processes would fill the first one's memory."""
    asked = []

    @contextmanager
    def second_of_two() -> Iterator[Processes]:
        yield Processes(1, 2, 1)

    def note(directory: Path, dtype: str, device: torch.device) -> None:
        asked.append(device)
        raise InterruptedError

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(evaluate_module, "processes", second_of_two)
    monkeypatch.setattr(evaluate_module, "load_pipeline", note)
    config = Evaluation(str(tmp_path / "out"), str(save_small_model(tmp_path / "model")), reference=FASHION)
    for device, wanted in (("", "cuda:1"), ("cuda:0", "cuda:0"), ("cpu", "cpu")):
        with pytest.raises(InterruptedError):
            evaluate(replace(config, device=device))
        assert asked.pop() == torch.device(wanted)


def test_extract_keeps_every_feature_in_order() -> None:
    """Batches are put together whole, whatever their size."""

    class Sums:
        name = "sums"

        def __call__(self, pixels: Tensor) -> Features:
            return Features(pixels.flatten(1).float().cumsum(1)[:, ::7])

    pixels = torch.from_numpy(noise(11))
    images = in_memory(pixels, None, "noise")
    whole = extract(Sums(), images, 100).values
    assert torch.equal(extract(Sums(), images, 4).values, whole)
    assert torch.equal(whole, pixels.flatten(1).float().cumsum(1)[:, ::7])


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


def test_recognition_needs_labels_that_the_judge_knows(tmp_path: Path) -> None:
    """Without labels there are distances alone; each class is counted by itself."""
    logits = torch.eye(10)[torch.tensor([0, 0, 1, 2])]
    rates = recognition_of([logits], [torch.tensor([0, 1, 1, 1])])
    assert {name: rate["mean"] for name, rate in rates.items()} == {"all": 1 / 2, "T-shirt/top": 1, "trouser": 1 / 3}
    with pytest.raises(ValueError, match="labels up to 10, but the judge knows 10"):
        recognition_of([logits], [torch.tensor([0, 1, 10, 2])])
    plain = str(save_images(tmp_path / "plain", noise(4, 32)))
    results = measure(Measurement((plain,), plain, judge=str(DATA / "judge.safetensors")))
    assert "FD-judge" in results["measures"]
    assert "recognised" not in results
