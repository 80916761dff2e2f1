"""The model that comes with the package: it draws what it should, the same image whatever stands beside it."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from lpd_ext.bundled import BUNDLED, bundled_model
from lpd_ext.pipeline import LPDPipeline


@pytest.fixture(scope="module")
def pipe() -> LPDPipeline:
    return LPDPipeline.from_pretrained("fashion_mnist")


def test_weights_fit_the_limit() -> None:
    sizes = []
    for name in BUNDLED:
        files = {path.name: path.stat().st_size for path in bundled_model(name).iterdir()}
        assert set(files) == {"config.json", "model.safetensors", "preview.safetensors", "tokenizer.safetensors"}
        sizes.append(sum(files.values()))
        assert sizes[-1] <= 8e6
    assert sum(sizes) <= 16e6


def test_bundled_models_go_by_name_unless_a_folder_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    by_default, by_name = LPDPipeline.from_pretrained(), LPDPipeline.from_pretrained("icons")
    assert by_default.class_names == by_name.class_names
    assert torch.equal(by_default.model.pos_embed, by_name.model.pos_embed)
    monkeypatch.chdir(tmp_path)
    for name in BUNDLED:
        Path(name).mkdir()
        with pytest.raises(FileNotFoundError, match="holds no weights"):
            LPDPipeline.from_pretrained(name)
    assert LPDPipeline.from_pretrained().class_names == by_name.class_names


def test_an_image_depends_on_its_seed_alone(pipe: LPDPipeline) -> None:
    """50 seeds: alone, and as another row in batches of 7 with other labels, with 1 and with 2 threads."""
    seeds = list(range(1000, 1050))
    labels = [seed % 10 for seed in seeds]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = [
            pipe(label, seeds=seed, output_type="tokens").tokens[0] for label, seed in zip(labels, seeds, strict=True)
        ]
        for count in (1, 2):
            torch.set_num_threads(count)
            for i in range(50):
                row = i % 7
                batch_labels = [(labels[i] + k + 1) % 10 for k in range(7)]
                batch_seeds = [5000 + 7 * i + k for k in range(7)]
                batch_labels[row], batch_seeds[row] = labels[i], seeds[i]
                tokens = pipe(batch_labels, seeds=batch_seeds, output_type="tokens").tokens
                assert torch.equal(tokens[row], alone[i]), f"seed {seeds[i]}, {count} threads"
    finally:
        torch.set_num_threads(threads)
    assert len({tuple(tokens.flatten().tolist()) for tokens in alone}) == 50


def resident_megabytes() -> float:
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_memory_does_not_grow_from_image_to_image(pipe: LPDPipeline) -> None:
    for seed in range(20):
        pipe(seed % 10, seeds=seed)
    before = resident_megabytes()
    for seed in range(20, 100):
        pipe(seed % 10, seeds=seed)
    assert abs(resident_megabytes() - before) <= 5


def test_class_names_and_defaults(pipe: LPDPipeline) -> None:
    assert len(pipe.class_names) == pipe.model.config.num_classes == 10
    assert pipe.defaults.num_inference_steps == 10
    with pytest.raises(ValueError, match="'hat' is not a class name"):
        pipe("hat")


def test_previews_are_near_the_exact_images(pipe: LPDPipeline) -> None:
    """Its preview decoder was trained on seeds from 1,000,000 on, at 23.9 dB on those held out."""
    drawing = pipe.drawing(pipe.prepare([]))
    tokens = pipe(list(range(10)) * 2, seeds=list(range(20)), output_type="tokens").tokens
    exact, near = (drawing.images(tokens, "np", approximate=approximate).astype(float) for approximate in (False, True))
    decibels = 10 * np.log10(255**2 / ((exact - near) ** 2).mean((1, 2, 3)))
    assert decibels.mean() > 22
    assert decibels.min() > 15
