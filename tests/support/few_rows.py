"""Arguments of the linear layers of few rows, and the layers around a LayerNorm in plain torch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

DTYPES = [torch.bfloat16, torch.float16]


@dataclass(frozen=True)
class Layers:
    """A residual stream x [R, N], the layer that adds to it, a LayerNorm, and the layer [M, N] after that."""

    x: Tensor
    rows: Tensor  # [R, K]
    weight: Tensor  # [N, K]
    bias: Tensor
    gamma: Tensor
    beta: Tensor
    next_weight: Tensor  # [M, N]
    next_bias: Tensor

    @classmethod
    def random(
        cls, rows: int, width: int, depth: int, features: int, dtype: torch.dtype, offset: float = 0.0
    ) -> Layers:
        """Makes inputs as of a model: a stream of deviation 2, weights that keep the size of their input."""
        generator = torch.Generator().manual_seed(width + depth + features)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        weights = normal(width, depth) / depth**0.5, normal(width), 1 + normal(width) / 4, normal(width) / 2
        following = normal(features, width) / width**0.5, normal(features)
        weights_16 = [t.to(dtype) for t in (*weights, *following)]
        # Drawn last, row by row: the first rows of many are those of few.
        x = torch.stack([offset + 2 * normal(width) for _ in range(rows)]) if rows else torch.empty(0, width)
        generator.manual_seed(1)
        inputs = torch.stack([normal(depth) for _ in range(rows)]) if rows else torch.empty(0, depth)
        return cls(x, inputs.to(dtype), *weights_16)

    def to(self, device: torch.device | torch.dtype) -> Layers:
        return Layers(**{name: tensor.to(device, copy=True) for name, tensor in vars(self).items()})

    def slice(self, rows: slice) -> Layers:
        parts = vars(self) | {"x": self.x[rows].clone(), "rows": self.rows[rows].clone()}
        return Layers(**parts)

    def residual(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
        """Arguments of residual_linear."""
        return self.x, self.rows, self.weight, self.bias, self.gamma

    def added(self) -> Tensor:
        """x + rows W^T + b as torch does it, in these dtypes."""
        return self.x + F.linear(self.rows, self.weight, self.bias).to(self.x.dtype)

    def normed(self, x: Tensor, gelu: bool = False) -> Tensor:
        """The LayerNorm of x and the layer after it as torch does them."""
        gamma, beta = self.gamma.to(x.dtype), self.beta.to(x.dtype)
        normed = F.layer_norm(x, x.shape[-1:], gamma, beta, 1e-6).to(self.next_weight.dtype)
        y = F.linear(normed, self.next_weight, self.next_bias)
        return F.gelu(y) if gelu else y


def assert_as_accurate(ours: Tensor, exact: Tensor, torchs: Tensor, floor: float) -> None:
    """Error against float64 at most twice that of torch's operations in the same dtypes, plus a floor."""
    assert ours.shape == exact.shape
    if ours.numel():
        allowed = 2 * (torchs.double() - exact).abs().max() + floor * (1 + exact.abs().max())
        assert (ours.double() - exact).abs().max() <= allowed
