"""The bundled model still draws what it is asked for: a judge trained on real images reads its pictures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("rich")

from lpd_tools.data.fashion_mnist import centre_psnr, from_pixels, load_fashion_mnist, to_images
from lpd_tools.data.sources import open_data
from lpd_tools.evaluation.evaluate import reconstruct_images
from lpd_tools.evaluation.generate import draw
from lpd_tools.evaluation.images import data_images
from lpd_tools.evaluation.int8_quality import FLOAT32, INT8, Int8Quality, forced_by_order, int8_quality
from lpd_tools.evaluation.likelihood import dependency_loss, orders_for, self_consistency
from lpd_tools.training.judge import Judge, grey, load_judge, predict

from lpd_ext import checkpoint, quantize
from lpd_ext.pipeline import LPDPipeline
from lpd_ext.schedule import group_sizes

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture(scope="module")
def pipe() -> LPDPipeline:
    return LPDPipeline.from_pretrained("fashion_mnist")


@pytest.fixture(scope="module")
def judge() -> Judge:
    return load_judge(DATA / "judge.safetensors")


def test_the_judge_reads_real_images(judge: Judge) -> None:
    test = load_fashion_mnist("test", DATA / "fashion_mnist")
    assert (predict(judge, grey(test)) == test.labels).float().mean() >= 0.9


def test_reconstruction(pipe: LPDPipeline, judge: Judge) -> None:
    test = load_fashion_mnist("test", DATA / "fashion_mnist")
    images = data_images(open_data(f"fashion-mnist:{DATA / 'fashion_mnist'}").test, (32, 32), "real")
    restored = from_pixels(reconstruct_images(pipe.tokenizer, images))
    assert centre_psnr(restored, test.pixels) >= 22
    assert (predict(judge, restored) == test.labels).float().mean() >= 0.85


def test_generated_images_show_their_class(pipe: LPDPipeline, judge: Judge) -> None:
    labels = list(range(10)) * 10
    images = from_pixels(draw(pipe, labels, seed=0))
    right = predict(judge, images) == torch.tensor(labels)
    # 0.9 is asked for on 2,000 images; four standard deviations of 100 draws at 0.9 are 0.12.
    assert right.float().mean() >= 0.9 - 0.12
    wrong = predict(judge, images) == torch.tensor(labels).roll(1)
    assert wrong.float().mean() < 0.2


def test_ten_steps_cost_little(pipe: LPDPipeline) -> None:
    test = load_fashion_mnist("test", DATA / "fashion_mnist")
    with torch.inference_mode():
        tokens = pipe.tokenizer.encode(to_images(test.pixels[:100])).flatten(1)

    def nats(steps: int) -> float:
        orders = orders_for("random", (8, 8), steps, 100, pipe.defaults)
        return dependency_loss(pipe.model, tokens, test.labels[:100], orders, group_sizes(64, steps)).mean().item()

    ten, all_steps, one = nats(10), nats(64), nats(1)
    assert 150 < all_steps < 300  # nats per image of 64 tokens; a uniform guess has 64 ln 512 = 399
    assert ten <= 1.03 * all_steps
    assert one > 1.1 * all_steps


def test_few_steps_draw_what_the_model_believes_less(pipe: LPDPipeline) -> None:
    """Self-consistency sees what drawing at once ignores: 2 steps give images less likely to the model than 32."""
    labels = torch.arange(20) % 10

    def nats(steps: int) -> float:
        options = {"guidance_scale": 1.0, "temperature": 1.0, "num_inference_steps": steps, "order": "random"}
        drawn = pipe(labels.tolist(), seeds=0, output_type="tokens", **options).tokens.flatten(1)
        return self_consistency(pipe.model, drawn, labels).mean().item()

    assert nats(2) > 1.1 * nats(32)


def test_images_are_not_scored_in_the_order_they_were_drawn_in(pipe: LPDPipeline) -> None:
    """Random orders are functions of the seed alone: the scores' must not be those of the first images drawn."""
    labels = torch.arange(60) % 10

    def nats(seed: int) -> float:
        options = {"guidance_scale": 1.0, "temperature": 1.0, "num_inference_steps": 32, "order": "random"}
        drawn = pipe(labels.tolist(), seeds=seed, output_type="tokens", **options).tokens.flatten(1)
        return self_consistency(pipe.model, drawn, labels).mean().item()

    assert nats(0) == pytest.approx(nats(10_000), rel=0.03)  # 8 % less, if they are


def int8_agreement(pipe: LPDPipeline, policy: str) -> float:
    """Share of the argmaxes, teacher-forced on real images at 10 steps, that int8 leaves as they are."""
    config = Int8Quality("", data_dir=str(DATA / "fashion_mnist"), forced_images=300, forced_orders=(policy,))
    pipes = {FLOAT32: pipe, INT8: LPDPipeline.from_pretrained("fashion_mnist", dtype=INT8)}
    return forced_by_order(pipes, config)[policy]["agreement"]


@pytest.mark.parametrize("policy", ["locality", "random"])
def test_int8_keeps_the_argmaxes(policy: str, pipe: LPDPipeline) -> None:
    assert int8_agreement(pipe, policy) >= 0.985


def test_the_gate_of_int8_rejects_one_byte_as_it_is(pipe: LPDPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize.Int8Linear, "rotate", False)
    monkeypatch.setattr(checkpoint, "use_planes", lambda model: model)
    assert int8_agreement(pipe, "locality") < 0.985


def test_int8_quality_reports_every_measure(tmp_path: Path) -> None:
    config = Int8Quality(
        judge=str(DATA / "judge.safetensors"),
        out=str(tmp_path / "int8.json"),
        data_dir=str(DATA / "fashion_mnist"),
        images=20,
        seeds=(0, 7),
        forced_images=20,
        lpd_l_depth=1,
    )
    results = int8_quality(config)
    assert json.loads((tmp_path / "int8.json").read_text()) == results
    assert set(results["teacher_forced"]) == {"locality", "random", "raster"}
    for row in results["teacher_forced"].values():
        assert 0.95 < row["agreement"] < 1
        assert 0 < row["nats"] < 1e-3
    for row in results["drawn"].values():
        assert row[FLOAT32] != row[INT8]
        assert abs(row[FLOAT32]["recognised"] - row[INT8]["recognised"]) <= 0.1
    assert len(results["lpd_l_random_weights"]["cosine"]) == 1
    assert 0.999 < results["lpd_l_random_weights"]["cosine"][0] < 1
