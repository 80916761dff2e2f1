"""The study of editing: what it measures on the bundled model, against the same by other means, and its files."""

from __future__ import annotations

import dataclasses
import json
import math
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

from lpd_tools.bench.plain_decode import decode_plain
from lpd_tools.data.fashion_mnist import from_pixels, load_fashion_mnist
from lpd_tools.png_settings import PREFIX
from lpd_tools.study import editing as editing_study
from lpd_tools.study.editing import run_editing_study
from lpd_tools.study.editing_measure import EditInstruments, jackknife_error
from lpd_tools.study.editing_points import Edited, EditPoint, edit_points, hidden_cells, hidden_pixels
from lpd_tools.study.editing_report import tables
from lpd_tools.study.results import read_results
from lpd_tools.study.settings import EditingStudy
from lpd_tools.training.judge import grey, judge_features, load_judge, predict

from lpd_ext.pipeline import LPDPipeline

DATA = Path(__file__).parents[1] / "data"
JUDGE = DATA / "judge.safetensors"
IMAGES = 12
CENTRE = EditPoint("edited", "centre", "locality", 4)


@pytest.fixture(scope="module")
def instruments() -> EditInstruments:
    test = load_fashion_mnist("test", DATA / "fashion_mnist")
    return EditInstruments(LPDPipeline.from_pretrained("fashion_mnist"), load_judge(JUDGE), test, IMAGES)


@pytest.fixture(scope="module")
def measured(instruments: EditInstruments) -> Edited:
    return instruments.measure(CENTRE)


def quick(tmp_path: Path, **changes: Any) -> EditingStudy:
    """A study of few images and points."""
    config = EditingStudy(str(tmp_path / "edits"), str(JUDGE), data_dir=str(DATA / "fashion_mnist"))
    few: dict[str, Any] = {"images": 4, "masks": ("centre",), "steps": (2, 4), "orders": ("locality", "random")}
    return dataclasses.replace(config, **{**few, "prefill_blocks": (16,), **changes})


def test_masks_hide_what_their_names_say() -> None:
    assert {mask: hidden_cells(mask, 4) for mask in ("half", "quarter", "centre")} == {
        "half": 32, "quarter": 16, "centre": 16
    }  # fmt: skip
    assert hidden_pixels("half")[16:].all()
    assert not hidden_pixels("half")[:16].any()
    assert hidden_pixels("quarter").nonzero().aminmax() == (16, 31)
    assert hidden_pixels("centre").nonzero().aminmax() == (8, 23)


def test_points() -> None:
    """Pictures to compare with first; one block of prefill is the point that the orders have."""
    points = edit_points(quick(Path()))
    assert [point.picture for point in points[:3]] == ["unedited", "reconstruction", "filled"]
    edits = [(p.order, p.steps, p.prefill_block) for p in points[3:]]
    assert edits == [("locality", 2, 0), ("random", 2, 0), ("locality", 4, 0), ("random", 4, 0), ("locality", 4, 16)]


def test_edits_are_those_of_the_pipeline(instruments: EditInstruments, measured: Edited) -> None:
    """Pictures, how they are recognised, and what is known of them, against `pipe.inpaint` and the files' pixels."""
    test = load_fashion_mnist("test", DATA / "fashion_mnist")
    pictures = np.zeros((IMAGES, 32, 32, 3), np.uint8)
    pictures[:, 2:30, 2:30] = test.pixels[:IMAGES, ..., None].numpy()
    hidden = np.zeros((32, 32), bool)
    hidden[8:24, 8:24] = True
    mask = Image.fromarray(np.uint8(hidden) * 255)
    options: dict[str, Any] = {"num_inference_steps": 4, "seeds": list(range(IMAGES))}
    labels = test.labels[:IMAGES].tolist()
    images = [Image.fromarray(picture) for picture in pictures]
    edited = [np.asarray(one) for one in instruments.pipe.inpaint(images, mask, labels, **options).images]
    plain = instruments.pipe.inpaint(images, mask, labels, paste=False, **options).images
    drawn = [instruments.draw(drawing) for drawing in instruments.drawings(CENTRE)]
    assert (torch.cat([pasted for pasted, _ in drawn]).numpy() == np.stack(edited)).all()
    found = predict(instruments.judge, from_pixels(torch.from_numpy(np.stack(edited))))
    assert measured.recognised == pytest.approx(float((found == test.labels[:IMAGES]).float().mean()))
    assert measured.known_difference == 0
    off = np.abs(np.stack([np.asarray(one) for one in plain]).astype(int) - pictures)[:, ~hidden]
    assert measured.plain_known_difference == pytest.approx(off.mean(), rel=1e-5)
    assert measured.plain_known_difference > 1


def test_nats_are_those_of_the_hidden_true_tokens(instruments: EditInstruments, measured: Edited) -> None:
    """By plain torch with a cache, step by step, which is fed the true tokens."""
    (drawing,) = instruments.drawings(CENTRE)
    request = drawing.request
    assert request.known_tokens is not None
    seen = request.known_tokens.where(request.known_tokens >= 0, instruments.tokens)
    logits: list[torch.Tensor] = []
    sizes = [48, *request.group_sizes[0]]
    decode_plain(instruments.pipe.model, instruments.labels, sizes, request.orders, 1.0, given=seen, logits_out=logits)
    hole = request.orders[:, 48:]
    true = instruments.tokens.gather(1, hole)[..., None]
    nats = -torch.cat(logits, 1)[:, 48:].double().log_softmax(2).gather(2, true).sum((1, 2))
    assert torch.equal((request.known_tokens < 0).nonzero()[:, 1].view(IMAGES, 16), hole.sort(1).values)
    assert measured.nats == pytest.approx(float(nats.mean()), rel=1e-5)
    assert measured.nats_error == pytest.approx(float(nats.std()) / IMAGES**0.5, rel=1e-4)


def test_excess_is_over_the_same_images(instruments: EditInstruments, measured: Edited) -> None:
    """Nothing beyond itself; more when all is drawn at once than in four steps; blocks are compared with one block."""
    one_by_one = instruments.measure(EditPoint("edited", "centre", "random", 16))
    assert (one_by_one.excess_nats, one_by_one.excess_error) == (0, 0)
    assert measured.excess_nats == pytest.approx(measured.nats - one_by_one.nats, rel=1e-4)
    at_once = instruments.measure(dataclasses.replace(CENTRE, steps=1))
    assert at_once.excess_nats > measured.excess_nats + 3 * measured.excess_error
    assert instruments.measure(dataclasses.replace(CENTRE, prefill_block=48)).excess_nats == 0
    blocks = instruments.measure(dataclasses.replace(CENTRE, prefill_block=6))
    assert blocks.excess_nats == pytest.approx(blocks.nats - measured.nats, abs=1e-3)
    assert blocks.excess_nats != 0


def test_pictures_to_compare_with(instruments: EditInstruments, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hidden part of a filled picture is not there; the reconstruction is near, and nothing is said of nats."""
    hidden = hidden_pixels("half")
    filled = instruments.compared(EditPoint("filled", "half"))
    assert torch.equal(filled[..., ~hidden], instruments.pictures[..., ~hidden])
    pictures = instruments.pictures
    with monkeypatch.context() as patch:
        patch.setattr(instruments, "pictures", pictures.where(~hidden, 0.5))
        assert torch.equal(instruments.compared(EditPoint("filled", "half")), filled)
    assert torch.equal(instruments.compared(EditPoint("unedited")), pictures)
    rebuilt = instruments.compared(EditPoint("reconstruction"))
    assert 0 < float((rebuilt - pictures).abs().mean()) < 0.1
    unedited, filled_half = (instruments.measure(EditPoint(*names)) for names in (("unedited",), ("filled", "half")))
    assert unedited.recognised > filled_half.recognised
    assert unedited.frechet < filled_half.frechet
    assert math.isnan(unedited.nats)


def test_distances_are_to_the_images_that_are_not_edited(instruments: EditInstruments) -> None:
    test = load_fashion_mnist("test", DATA / "fashion_mnist")
    features = judge_features(instruments.judge, grey(test))[IMAGES:].double()
    assert torch.allclose(instruments.others.mean, features.mean(0))
    assert torch.allclose(instruments.others.covariance, features.T.cov(), atol=1e-6)


def test_jackknife() -> None:
    """For a mean it gives the usual standard error, also with groups that are left out together."""
    values = torch.randn(4000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = jackknife_error(lambda rows: float(rows.mean()), values)
    means = torch.stack([values[i::10].mean() for i in range(10)])
    assert found == pytest.approx(float(means.std()) / 10**0.5, rel=1e-9)


def test_a_study_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Points measured are not measured again; files say what they show; another model or count is refused."""
    config = quick(tmp_path)
    run_editing_study(dataclasses.replace(config, orders=("locality",), prefill_blocks=()))
    first = read_results(tmp_path / "edits.csv", Edited)
    assert len(first) == 3 + 2
    measured = []
    measure = EditInstruments.measure
    monkeypatch.setattr(
        editing_study.EditInstruments, "measure", lambda self, point: measured.append(point) or measure(self, point)
    )
    results = read_results(run_editing_study(config), Edited)
    assert measured == list(results)[5:] == [p for p in edit_points(config) if p not in first]
    with Image.open(tmp_path / "edits_chart.png") as chart, Image.open(tmp_path / "edits_pictures.png") as pictures:
        for image in (chart, pictures):
            said = image.text
            assert json.loads(said[f"{PREFIX}command"]) == "study-editing"
            assert json.loads(said[f"{PREFIX}orders"]) == ["locality", "random"]
    assert (tmp_path / "edits_tables.md").read_text() == tables(results, config) + "\n"
    with pytest.raises(ValueError, match=r"images is 5, but the results in .* began with 4"):
        run_editing_study(dataclasses.replace(config, images=5))


def test_tables(tmp_path: Path) -> None:
    config = quick(tmp_path)
    point = EditPoint("edited", "centre", "random", 4)
    one = Edited(point, 400, 0.75, 0.5, 3.456, 0.123, 4.0, 0.0, 5.5, 80.04, 1.26, 2.345, 0.25)
    text = tables(
        {point: one, EditPoint("unedited"): Edited(EditPoint("unedited"), 400, 0.9, 0.9, 1.0, 0.1, 1.0)}, config
    )
    assert "| as they are | 90.0 ± 1.5 | 1.00 ± 0.10 |" in text
    for row in ("|  | 75.0 ± 2.2 |", "|  | 3.46 ± 0.12 |", "|  | 2.35 ± 0.25 |", "|  | 80.0 ± 1.3 |"):
        assert f"| centre, 4 {row}" in text, row
    one = dataclasses.replace(one, point=CENTRE)
    blocks = dataclasses.replace(one, point=dataclasses.replace(CENTRE, prefill_block=16), excess_nats=-1.0)
    text = tables({one.point: one, blocks.point: blocks}, config)
    assert "| centre, 4 | 0 | 5.50 | 75.0 ± 2.2 | 50.0 ± 2.5 | 3.46 | 4.00 |" in text
    assert "| centre | 80.0 ± 1.3 | -1.00 ± 0.25 | 75.0 ± 2.2 | 75.0 ± 2.2 |" in text


def test_the_page_shows_the_tables_of_the_committed_points() -> None:
    folder = Path(__file__).parents[2] / "docs" / "results"
    results = read_results(folder / "editing" / "edits.csv", Edited)
    config = EditingStudy("", "")
    assert list(results) == edit_points(config)
    found = tables(results, config)
    assert (folder / "editing" / "edits_tables.md").read_text() == found + "\n"
    page = (folder / "editing.md").read_text()
    assert [part.splitlines()[0] for part in found.split("\n\n") if part not in page] == [
        "| nats of the hole: hidden, T | locality | random | outward |"
    ]


def test_impossible_studies_are_refused(tmp_path: Path) -> None:
    for changes, message in (
        ({"masks": ("whole",)}, "masks must be among half, quarter, centre, got whole"),
        ({"orders": ("zigzag",)}, "orders must be among locality, .* got zigzag"),
        ({"steps": (4, 17)}, r"steps must be in \[1, 16\], got 17"),
        ({"images": 300}, r"images must be in \[4, 296\], got 300"),
        ({"judge": "none"}, "no judge at 'none'"),
        ({"data_dir": "none"}, "none/t10k-images.* is missing"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            run_editing_study(quick(tmp_path, **changes))
        assert not list(tmp_path.iterdir()), message
    with pytest.raises(ValueError, match="images must be at least 4, got 3"):
        quick(tmp_path, images=3)
