"""The likelihoods of evaluation: dependency loss and self-consistency."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")
pytest.importorskip("torchmetrics")

from evaluation_models import save_small_model
from lpd_tools.bench.plain_decode import decode_plain
from lpd_tools.evaluation.likelihood import SCORING_SEED, dependency_loss, self_consistency

from lpd_ext.orders import random_order
from lpd_ext.pipeline import LPDPipeline


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


def test_what_is_known_costs_nothing(tmp_path: Path) -> None:
    """Compares an edit's nats with a decode that is fed the true tokens group by group, by plain torch with a cache."""
    pipe = LPDPipeline.from_pretrained(save_small_model(tmp_path / "model"))
    tokens = torch.randint(0, 40, (3, 16), generator=torch.Generator().manual_seed(1))
    labels, blocks, groups = torch.tensor([2, -1, 0]), [4, 3], [2, 7]
    orders = random_order((4, 4), torch.arange(3))
    found = dependency_loss(pipe.model, tokens, labels, orders, [*blocks, *groups], num_known=7)
    logits: list[torch.Tensor] = []
    decode_plain(pipe.model, labels, [*blocks, *groups], orders, 1.0, given=tokens, logits_out=logits)
    of_hole = torch.cat(logits, 1)[:, 7:].double().log_softmax(2)
    wanted = -of_hole.gather(2, tokens.gather(1, orders[:, 7:])[..., None]).sum((1, 2))
    assert torch.allclose(found, wanted, rtol=1e-5)


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
