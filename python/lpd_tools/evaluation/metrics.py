"""Measures of images: Fréchet distance between feature sets, and PSNR."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """‖μa - μb‖² + tr(Σa + Σb - 2(ΣaΣb)^½) of two feature sets [n, F] and [m, F] (Heusel et al., 2017)."""
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"features must be [n, F] and [m, F], got {tuple(a.shape)} and {tuple(b.shape)}")
    if min(len(a), len(b)) < 2:
        raise ValueError(f"a covariance needs at least 2 samples, got {len(a)} and {len(b)}")
    a, b = a.double(), b.double()
    mean = (a.mean(0) - b.mean(0)).square().sum()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    # tr((ΣaΣb)^½) = Σ √λ(Σa^½ Σb Σa^½): the matrix on the right is symmetric, so its roots are real.
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors @ torch.diag(values.clamp_min(0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp_min(0).sqrt().sum()
    return float(mean + cov_a.trace() + cov_b.trace() - 2 * cross)


def psnr(found: Tensor, wanted: Tensor, peak: float = 255.0) -> float:
    """10·log10(peak² / mean squared error) in dB, over all elements."""
    if found.shape != wanted.shape:
        raise ValueError(f"found and wanted must have one shape, got {tuple(found.shape)} and {tuple(wanted.shape)}")
    error = (found.double() - wanted.double()).square().mean().item()
    return math.inf if error == 0 else 10 * math.log10(peak * peak / error)


def centre_psnr(restored: Tensor, pixels: Tensor) -> float:
    """PSNR in dB of grey images [B, 1, 28, 28] in [-1, 1] against their pixels uint8 [B, 28, 28]."""
    return psnr((restored.squeeze(1) + 1) * 127.5, pixels.float())
