"""Nearest neighbours of drawn images among real ones: how much a model remembers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from lpd_tools.evaluation.images import ImageSet
from lpd_tools.evaluation.reference import balanced_sample
from lpd_tools.pictures import labelled_grid

NEIGHBOURS_FILE = "neighbours.png"
_AT_ONCE = 1000  # images whose distances to all others are taken together
_COLUMNS = 8


def nearest(features: Tensor, among: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the nearest of `among` [m, F] to each of features [n, F] by cosine: index int64 [n], 1 - cosine [n]."""
    features, among = F.normalize(features, dim=1), F.normalize(among, dim=1)
    found = [(part @ among.T).max(1) for part in features.split(_AT_ONCE)]
    return torch.cat([best.indices for best in found]), 1 - torch.cat([best.values for best in found])


def neighbours_picture(
    drawn: ImageSet, features: Tensor, real: ImageSet, real_features: Tensor, count: int
) -> Image.Image:
    """Draws `count` of the drawn images, classes in turn, each above the real image whose features are nearest."""
    chosen = balanced_sample(drawn.labels, len(drawn), count).tolist()
    index, _ = nearest(features[chosen], real_features)
    above = [Image.fromarray(image) for image in drawn.read(chosen).numpy()]
    below = [Image.fromarray(image) for image in real.read(index.tolist()).numpy()]
    columns = min(_COLUMNS, len(above))
    missing = [Image.new("RGB", above[0].size, "white")] * (-len(above) % columns)
    starts = range(0, len(above), columns)
    rows = [(images + missing)[start : start + columns] for start in starts for images in (above, below)]
    return labelled_grid([image for row in rows for image in row], ["drawn", "nearest"] * len(starts), columns)
