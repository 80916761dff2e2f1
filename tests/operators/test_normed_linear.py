"""normed_linear: with residual_linear before it, as accurate as torch's LayerNorm and linear layer, row by row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import emulation
import pytest
import torch
import torch.nn.functional as F
from few_rows import DTYPES, Layers, assert_as_accurate
from steps import clone
from torch import Tensor

from lpd_ext import ops, reference

EPS = torch.finfo(torch.float32).eps
# Features, K: one slab of K and many, features that fill no group of 32, weights that stream through shared memory.
SIZES = [(8, 32), (64, 96), (200, 192), (576, 192), (96, 1344), (8200, 320)]


def arguments(layers: Layers, device: torch.device) -> tuple[Tensor, ...]:
    """Makes the inputs of normed_linear by the twins: its own error is judged."""
    x = layers.x.clone()
    scaled, statistics = reference.residual_linear(x, *layers.residual()[1:])
    slope, shift = reference.fold_layer_norm(layers.next_weight, layers.gamma, layers.beta, layers.next_bias)
    return tuple(t.to(device) for t in (scaled, statistics, layers.next_weight, slope, shift))


def run(layers: Layers, device: torch.device, gelu: bool = False) -> Tensor:
    return ops.normed_linear(*arguments(layers, device), 1e-6, gelu).cpu()


def assert_right(result: Tensor, layers: Layers, gelu: bool = False) -> None:
    exact = layers.to(torch.float64)
    assert result.dtype == layers.next_weight.dtype
    assert_as_accurate(result, exact.normed(exact.added(), gelu), layers.normed(layers.added(), gelu), 8 * EPS)


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("features", "depth"), SIZES)
def test_as_accurate_as_torch(features: int, depth: int, dtype: torch.dtype, gelu: bool, backend: torch.device) -> None:
    for rows in (0, 1, 20) if features > 1000 else (0, 1, 20, 83):
        layers = Layers.random(rows, depth, 32, features, dtype)
        assert_right(run(layers, backend, gelu), layers, gelu)


@pytest.mark.parametrize("dtype", DTYPES)
def test_after_residual_linear(dtype: torch.dtype, backend: torch.device) -> None:
    """The three operators in a row."""
    layers = Layers.random(20, 192, 768, 576, dtype)
    here = layers.to(backend)
    scaled, statistics = ops.residual_linear(*here.residual())
    slope, shift = ops.fold_layer_norm(here.next_weight, here.gamma, here.beta, here.next_bias)
    y = ops.normed_linear(scaled, statistics, here.next_weight, slope, shift)
    assert_right(y.cpu(), layers)


def test_rows_whose_mean_is_as_large_as_their_deviation(backend: torch.device) -> None:
    layers = Layers.random(20, 192, 64, 96, torch.bfloat16, offset=2.0)
    assert_right(run(layers, backend), layers)


@pytest.mark.parametrize("eps", [1e-12, 0.3, 50.0])
def test_eps(eps: float, backend: torch.device) -> None:
    layers = Layers.random(5, 96, 64, 40, torch.bfloat16)
    args = arguments(layers, backend)
    exact = reference.normed_linear(*(t.double() for t in args), eps)
    torchs = reference.normed_linear(*args, eps)
    assert_as_accurate(ops.normed_linear(*args, eps).cpu(), exact.cpu(), torchs.cpu(), 8 * EPS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("features", "depth"), [(576, 192), (96, 1344), (8200, 320)])
def test_a_row_has_the_same_bits_alone_and_among_others(
    features: int, depth: int, dtype: torch.dtype, backend: torch.device
) -> None:
    most = 84 if features > 1000 else 192
    scaled, statistics, *rest = arguments(Layers.random(most, depth, 32, features, dtype), backend)
    wanted = ops.normed_linear(scaled, statistics, *rest)
    for rows in (1, 20, 77) if features > 1000 else (1, 4, 20, 77, 80, 160):
        for part in (slice(0, rows), slice(most - rows, most)):
            assert ops.normed_linear(scaled[part], statistics[part], *rest).equal(wanted[part])


@pytest.mark.emulated
def test_bits_do_not_depend_on_how_blocks_share_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    emulation.load()
    monkeypatch.setattr(ops, "_ops", torch.ops.lpd_emulated)
    layers = Layers.random(20, 1024, 32, 1024, torch.float16)
    found: dict[tuple[int, int], Tensor] = {}
    for multiprocessors in (8, 30, 60, 132, 300):
        with emulation.running(device=emulation.Device(90, multiprocessors)), emulation.counting() as launches:
            result = run(layers, torch.device("cpu"))
        (launch,) = launches
        found[launch["cluster"][0], launch["block"][0]] = result
    assert len({cluster for cluster, _ in found}) >= 2
    first, *others = found.values()
    assert all(other.equal(first) for other in others)


@pytest.mark.emulated
@pytest.mark.parametrize("shared_limit", [99 * 1024, 227 * 1024])
def test_rows_are_tiled_by_what_shared_memory_holds(shared_limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    emulation.load()
    monkeypatch.setattr(ops, "_ops", torch.ops.lpd_emulated)
    layers = Layers.random(160, 256, 32, 256, torch.bfloat16)
    with emulation.running(device=emulation.Device(90, 8, shared_limit)):
        assert_right(run(layers, torch.device("cpu")), layers)


def test_not_a_number_stays_in_its_row(backend: torch.device) -> None:
    layers = Layers.random(20, 96, 32, 40, torch.bfloat16)
    expected = run(layers, backend)
    layers.x[7, 50] = float("nan")
    found = run(layers, backend)
    assert found[7].isnan().all()
    found[7] = expected[7]
    assert found.equal(expected)


# Wrong twins: what the rule above must not let through.
def _twin(layers: Layers, spoil: Callable[..., tuple[Tensor, ...]]) -> Tensor:
    return reference.normed_linear(*spoil(*arguments(layers, torch.device("cpu"))))


MISTAKES: dict[str, Callable[[Layers], Tensor]] = {
    "mean left out": lambda w: _twin(w, lambda a, s, m, slope, shift: (a, s, m, 0 * slope, shift)),
    "bias left out": lambda w: _twin(w, lambda a, s, m, slope, shift: (a, s, m, slope, shift - w.next_bias.float())),
    "deviation of the groups alone": lambda w: _twin(
        w,
        lambda a, s, m, slope, shift: (
            a,
            torch.stack([s[..., 0].mean(1, True).expand_as(s[..., 0]), s[..., 1]], 2),
            m,
            slope,
            shift,
        ),
    ),
    "GELU where none is": lambda w: F.gelu(w.normed(w.added())),
    "a slab left out": lambda w: _twin(
        w, lambda a, s, m, slope, shift: (a, s, torch.cat([m[:, :-32], 0 * m[:, -32:]], 1), slope, shift)
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_the_rule_rejects(name: str) -> None:
    layers = Layers.random(20, 192, 64, 96, torch.bfloat16, offset=6.0)
    with pytest.raises(AssertionError):
        assert_right(MISTAKES[name](layers), layers)


Arguments = tuple[Tensor, ...]
WRONG: dict[str, tuple[Callable[[Arguments], tuple[Any, ...]], str]] = {
    "scaled dtype": (lambda a: (a[0].float(), *a[1:]), "scaled must be bfloat16 or float16, got float32"),
    "scaled columns apart": (
        lambda a: (a[0].repeat(1, 2)[:, ::2], *a[1:]),
        "scaled must be contiguous in its last dim",
    ),
    "statistics shape": (
        lambda a: (a[0], a[1][:, :1], *a[2:]),
        r"statistics must have shape \[R, K / 32, 2\] = \[4, 2, 2\]",
    ),
    "statistics dtype": (lambda a: (a[0], a[1].double(), *a[2:]), "statistics must be float32, got float64"),
    "weight shape": (lambda a: (*a[:2], a[2][:, :32], *a[3:]), r"weight must have shape \[N, K\] = \[any, 64\]"),
    "N": (lambda a: (*a[:2], a[2][:12], a[3][:12], a[4][:12]), "weight: N must be a multiple of 8, got 12"),
    "slope shape": (lambda a: (*a[:3], a[3][:8], a[4]), r"slope must have shape \[N\] = \[40\], got \[8\]"),
    "slope dtype": (lambda a: (*a[:3], a[3].bfloat16(), a[4]), "slope must be float32, got bfloat16"),
    "shift stride": (lambda a: (*a[:4], a[4].repeat_interleave(2)[::2]), "shift must be contiguous"),
    "eps": (lambda a: (*a, float("nan")), "eps must be finite, got nan"),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_name_the_argument(name: str, backend: torch.device) -> None:
    spoil, message = WRONG[name]
    spoilt = spoil(arguments(Layers.random(4, 64, 32, 40, torch.bfloat16), torch.device("cpu")))
    with pytest.raises(RuntimeError, match=message):
        ops.normed_linear(*(clone(a, backend) if isinstance(a, Tensor) else a for a in spoilt))


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: torch.dtype, backend: torch.device) -> None:
    args = arguments(Layers.random(4, 64, 32, 40, dtype), backend)
    torch.library.opcheck(ops._ops.normed_linear.default, (*args, 1e-6, True))
