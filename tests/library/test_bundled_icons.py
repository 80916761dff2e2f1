"""The bundled model of icons: it fits icons that it has not seen, and draws each picture from its seed alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from lpd_tools.evaluation.likelihood import dependency_loss, orders_for
from safetensors.torch import load_file

from lpd_ext.pipeline import LPDPipeline
from lpd_ext.schedule import group_sizes

# Two held-out icons of each class, as the bundled tokenizer encodes them.
HELD_OUT = load_file(Path(__file__).parents[1] / "data" / "icon_tokens.safetensors")


@pytest.fixture(scope="module")
def pipe() -> LPDPipeline:
    return LPDPipeline.from_pretrained("icons")


def test_class_names_and_defaults(pipe: LPDPipeline) -> None:
    assert len(pipe.class_names) == pipe.model.config.num_classes == 34
    assert pipe.model.config.grid == (16, 16)
    assert (pipe.defaults.num_inference_steps, pipe.defaults.order) == (20, "locality")


@pytest.mark.parametrize(
    ("policy", "steps", "nats"), [("locality", 20, 2.6324), ("locality", 256, 2.6259), ("random", 20, 2.5780)]
)
def test_icons_that_it_has_not_seen(policy: str, steps: int, nats: float, pipe: LPDPipeline) -> None:
    """Teacher-forced nats per token: 1,024 codes at random would be 6.93."""
    tokens, labels = HELD_OUT["tokens"].long(), HELD_OUT["labels"].long()
    orders = orders_for(policy, pipe.model.config.grid, steps, len(tokens), pipe.defaults)
    found = dependency_loss(pipe.model, tokens, labels, orders, group_sizes(256, steps)).mean().item() / 256
    assert found == pytest.approx(nats, abs=1e-3)


def test_a_picture_depends_on_its_seed_alone(pipe: LPDPipeline) -> None:
    alone = [pipe(label, seeds=seed, output_type="tokens").tokens[0] for label, seed in ((9, 1), (14, 2), (19, 3))]
    together = pipe([33, 9, 14, 19], seeds=[0, 1, 2, 3], output_type="tokens").tokens
    assert all(torch.equal(together[i + 1], tokens) for i, tokens in enumerate(alone))
    assert len({tuple(tokens.flatten().tolist()) for tokens in together}) == 4


def test_previews_are_near_the_exact_pictures(pipe: LPDPipeline) -> None:
    drawing = pipe.drawing(pipe.prepare([]))
    tokens = pipe(list(range(34)), seeds=list(range(34)), output_type="tokens").tokens
    exact, near = (drawing.images(tokens, "np", approximate=approximate).astype(float) for approximate in (False, True))
    decibels = 10 * np.log10(255**2 / ((exact - near) ** 2).mean((1, 2, 3)))
    assert decibels.mean() > 20
    assert decibels.min() > 12
