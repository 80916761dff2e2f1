"""Precision and compilation of a training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lpd_ext.linear import has_fast_arithmetic
from lpd_ext.modes import own_modes

PRECISIONS = ("auto", "fp32", "bf16")


def check_precision(precision: str) -> None:
    """ValueError unless it is auto, fp32 or bf16."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be auto, fp32 or bf16, got {precision!r}")


def check_backend(backend: str) -> None:
    """ValueError unless torch.compile knows the backend; empty means no compiling."""
    if backend and backend not in (known := torch.compiler.list_backends(exclude_tags=())):
        raise ValueError(f"compile_backend must be empty or one of {', '.join(known)}, got {backend!r}")


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """bf16 for "bf16", None for "fp32"; "auto" takes bf16 where the device multiplies it in hardware."""
    check_precision(precision)
    if precision == "auto":
        in_hardware = (
            torch.cuda.is_bf16_supported(including_emulation=False)
            if device.type == "cuda"
            else has_fast_arithmetic(torch.bfloat16)
        )
        precision = "bf16" if in_hardware else "fp32"
    return torch.bfloat16 if precision == "bf16" else None


def autocast(dtype: torch.dtype | None, device: torch.device) -> torch.autocast:
    """The autocast context of a forward pass; without a dtype it changes nothing.

    Casts are not kept: those of weights would stay until the outermost context ends, so within another one, even one
    that is disabled, every step would compute with the weights of the first.
    """
    return torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None, cache_enabled=False)


@contextmanager
def training_modes(device: torch.device) -> Iterator[None]:
    """Enables gradients and disables autocast and inference mode, whatever the caller has set; see `lpd_ext.modes`.

    Raises ValueError if the default dtype, in which networks and their averages are made, is not float32.
    """
    if torch.get_default_dtype() != torch.float32:
        raise ValueError(f"torch's default dtype must be float32 to train, got {torch.get_default_dtype()}")
    with own_modes(device), torch.enable_grad():
        yield
