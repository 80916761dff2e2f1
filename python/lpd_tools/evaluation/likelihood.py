"""Likelihoods under a model: the nats that parallel drawing costs, and those of the model's own images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lpd_ext.checks import Grid
from lpd_ext.model import LPDModel
from lpd_ext.orders import make_orders, random_order
from lpd_ext.pipeline import SamplingDefaults
from lpd_ext.schedule import group_sizes as default_group_sizes


@torch.no_grad()
def dependency_loss(
    model: LPDModel,
    tokens: Tensor,
    labels: Tensor,
    orders: Tensor,
    group_sizes: Sequence[int],
    batch_size: int = 125,
    mutual_visibility: bool | None = None,
    num_known: int = 0,
) -> Tensor:
    """Returns the teacher-forced nats of each image, float64 [B]: Σ -log p(token | groups before), unguided.

    tokens int64 [B, N] in raster order; labels int64 [B], -1 for unconditional; orders int64 [B, N]; group_sizes sum to
    N; mutual_visibility as in `LPDModel.forward`. num_known: the first so many cells of each order are given, as the
    known ones of an edit are, and cost nothing. On the same images the rise over N groups of one token is what drawing
    tokens in parallel ignores. Raises ValueError for a shape or value that is out of range.
    """
    model.eval()
    parts = []
    tokens, labels, orders = (values.to(model.pos_embed.device) for values in (tokens, labels, orders))
    for part in torch.arange(len(tokens)).split(batch_size):
        batch = (tokens[part], labels[part], orders[part], group_sizes)
        logits = model(*batch, mutual_visibility=mutual_visibility)
        in_order = tokens[part].gather(1, orders[part])
        nats = F.cross_entropy(logits.float().transpose(1, 2), in_order, reduction="none")
        parts.append(nats[:, num_known:].double().sum(1).cpu())
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.float64)


# Of the orders that images are scored in, far from the seeds they are drawn with: an image scored in the random order
# that it was drawn in fits better than in any other.
SCORING_SEED = 2**62


def self_consistency(
    model: LPDModel, tokens: Tensor, labels: Tensor, order_seed: int = SCORING_SEED, batch_size: int = 125
) -> Tensor:
    """Returns the nats of each drawn image, float64 [B], under its own model, one token at a time in a random order.

    tokens int64 [B, N], drawn without guidance; labels int64 [B]. Image i is scored in the order of seed order_seed +
    i, whatever order it was drawn in, so that different ways of drawing compare; more nats mean that its tokens fit
    each other less. Groups have one token, so mutual visibility makes no difference.
    """
    seeds = torch.arange(order_seed, order_seed + len(tokens), device=tokens.device)
    orders = random_order(model.config.grid, seeds)
    return dependency_loss(model, tokens, labels, orders, [1] * tokens.shape[1], batch_size)


def orders_for(policy: str, grid: Grid, steps: int, count: int, defaults: SamplingDefaults, seed: int = 0) -> Tensor:
    """Orders int64 [count, N] of a policy at `steps` decoding steps, image i from seed + i, thresholds of a model."""
    sizes = default_group_sizes(grid[0] * grid[1], steps)
    return make_orders(
        policy,
        [sizes] * count,
        grid,
        torch.arange(seed, seed + count),
        proximity_threshold=defaults.proximity_threshold,
        repulsion_threshold=defaults.repulsion_threshold,
    )
