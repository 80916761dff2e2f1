"""The codebook of a tokenizer in training: moving averages of the vectors that chose each code."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class CodebookAverages:
    """Moving averages of how often each code is chosen [V], and of the sum of those vectors [V, d]."""

    def __init__(self, size: int, dim: int, device: torch.device | str = "cpu") -> None:
        self.count = torch.ones(size, device=device)
        self.total = torch.zeros(size, dim, device=device)

    def initialise(self, vectors: Tensor, generator: torch.Generator) -> None:
        """Codes become randomly chosen vectors [n, d]."""
        size = len(self.count)
        chosen = torch.randint(len(vectors), (size,), generator=generator)
        self.count.fill_(len(vectors) / size)
        self.total.copy_(vectors[chosen] * self.count[:, None])

    def start(self, codes: Tensor) -> None:
        """Codes become unit-length `codes` [V, d], as if each had been chosen once."""
        self.count.fill_(1)
        self.total.copy_(codes)

    def update(self, vectors: Tensor, tokens: Tensor, decay: float) -> None:
        """Takes in the vectors [n, d] and the codes [n] that they chose."""
        size = len(self.count)
        self.count.lerp_(torch.bincount(tokens, minlength=size).float(), 1 - decay)
        self.total.lerp_(torch.zeros_like(self.total).index_add_(0, tokens, vectors), 1 - decay)

    def revive(self, vectors: Tensor, below: float, generator: torch.Generator) -> int:
        """Codes with less than `below` of the fair share become random vectors; returns how many did."""
        dead = self.count < below * self.count.mean()
        number = int(dead.sum())
        chosen = torch.randint(len(vectors), (number,), generator=generator)
        self.count[dead] = self.count.mean()
        self.total[dead] = vectors[chosen] * self.count[dead, None]
        return number

    def codes(self) -> Tensor:
        """Unit-length codes [V, d]."""
        return F.normalize(self.total, dim=1)

    def nearest(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest codes [B, d, h, w] of unit-length features [B, d, h, w], and their ids [B, h, w]."""
        with torch.no_grad(), torch.autocast(features.device.type, enabled=False):
            codes = self.codes()
            tokens = (features.permute(0, 2, 3, 1) @ codes.T).argmax(-1)
            return F.embedding(tokens, codes).permute(0, 3, 1, 2), tokens

    def perplexity(self) -> float:
        """2^entropy of code use: V if all codes are used alike."""
        p = self.count / self.count.sum()
        return float(torch.exp(-(p * p.clamp_min(1e-12).log()).sum()))

    def usage(self, below: float) -> float:
        """Share of the codes that are chosen at least `below` of the fair share."""
        return float((self.count >= below * self.count.mean()).float().mean())
