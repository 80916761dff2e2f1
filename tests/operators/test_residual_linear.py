"""residual_linear: sums and statistics as accurate as torch's, and a row's bits those that it has alone."""

from __future__ import annotations

from collections.abc import Callable

import emulation
import pytest
import torch
from few_rows import DTYPES, Layers, assert_as_accurate
from steps import clone
from torch import Tensor

from lpd_ext import ops, reference

EPS = torch.finfo(torch.float32).eps
# N, K: one slab of K and many, slabs of odd lengths, slabs whose weights do not all fit in shared memory.
SIZES = [(32, 32), (64, 96), (192, 192), (96, 768), (160, 1344), (64, 5120)]
Results = tuple[Tensor, Tensor, Tensor]


def run(layers: Layers, device: torch.device) -> Results:
    """x afterwards and the results; the arguments stay as they are."""
    x, *rest = layers.to(device).residual()
    scaled, statistics = ops.residual_linear(x, *rest)
    return x.cpu(), scaled.cpu(), statistics.cpu()


def assert_right(results: Results, layers: Layers) -> None:
    x, scaled, statistics = results
    exact = layers.to(torch.float64).added()
    assert x.dtype == statistics.dtype == torch.float32
    assert scaled.dtype == layers.rows.dtype
    assert_as_accurate(x, exact, layers.added(), 4 * EPS)
    # Of the sums as they lie in x now, since their error has been judged.
    assert_as_accurate(scaled, x.double() * layers.gamma.double(), (x * layers.gamma.float()).to(scaled.dtype), 0.0)
    groups = x.double().unflatten(1, (-1, 32))
    of_torch = x.unflatten(1, (-1, 32))
    assert_as_accurate(statistics[..., 0], groups.mean(2), of_torch.mean(2), 2 * EPS)
    squares = [((v - v.mean(2, keepdim=True)) ** 2).sum(2) for v in (groups, of_torch)]
    assert_as_accurate(statistics[..., 1], squares[0], squares[1], 4 * EPS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "depth"), SIZES)
@pytest.mark.parametrize("rows", [0, 1, 20, 83])
def test_as_accurate_as_torch(rows: int, width: int, depth: int, dtype: torch.dtype, backend: torch.device) -> None:
    layers = Layers.random(rows, width, depth, 8, dtype)
    assert_right(run(layers, backend), layers)


def test_without_a_bias(backend: torch.device) -> None:
    layers = Layers.random(5, 64, 64, 8, torch.bfloat16)
    x, rows, weight, _, scale = layers.to(backend).residual()
    ops.residual_linear(x, rows, weight, None, scale)
    wanted = run(Layers(**vars(layers) | {"bias": torch.zeros_like(layers.bias)}), backend)[0]
    assert x.cpu().equal(wanted)


def test_statistics_of_columns_far_from_zero(backend: torch.device) -> None:
    layers = Layers.random(5, 96, 64, 8, torch.bfloat16, offset=1e4)
    assert_right(run(layers, backend), layers)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "depth"), [(192, 192), (96, 768), (64, 5120)])
def test_a_row_has_the_same_bits_alone_and_among_others(
    width: int, depth: int, dtype: torch.dtype, backend: torch.device
) -> None:
    layers = Layers.random(192, width, depth, 8, dtype)
    wanted = run(layers, backend)
    for rows in (1, 4, 20, 77, 80, 160):
        for part in (slice(0, rows), slice(192 - rows, 192)):
            for found, all_rows in zip(run(layers.slice(part), backend), wanted, strict=True):
                assert found.equal(all_rows[part])


@pytest.mark.emulated
@pytest.mark.parametrize(("width", "depth"), [(320, 1024), (1024, 512)])
def test_bits_do_not_depend_on_how_blocks_share_the_work(
    width: int, depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    emulation.load()
    monkeypatch.setattr(ops, "_ops", torch.ops.lpd_emulated)
    layers = Layers.random(20, width, depth, 8, torch.bfloat16)
    found: dict[tuple[int, int], Results] = {}
    for multiprocessors in (8, 30, 60, 132, 300):
        device = emulation.Device(90, multiprocessors)
        with emulation.running(device=device), emulation.counting() as launches:
            results = run(layers, torch.device("cpu"))
        (launch,) = launches
        found[launch["cluster"][0], launch["block"][0]] = results
    assert len({cluster for cluster, _ in found}) >= 2
    first, *others = found.values()
    for other in others:
        assert all(a.equal(b) for a, b in zip(first, other, strict=True))


@pytest.mark.emulated
def test_older_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    emulation.load()
    layers = Layers.random(2, 32, 32, 8, torch.bfloat16)
    with emulation.running(device=emulation.SM_80), pytest.raises(RuntimeError, match="needs a GPU of compute capabil"):
        torch.ops.lpd_emulated.residual_linear(*layers.residual())


@pytest.mark.emulated
def test_what_shared_memory_cannot_hold_is_refused() -> None:
    emulation.load()
    layers = Layers.random(2, 1024, 4096, 8, torch.bfloat16)
    device = emulation.Device(90, shared_limit=99 * 1024)
    message = "K = 4096 is too large for the shared memory of this GPU, 101376 bytes per block"
    with emulation.running(device=device), pytest.raises(RuntimeError, match=message):
        torch.ops.lpd_emulated.residual_linear(*layers.residual())


def test_strided_rows(backend: torch.device) -> None:
    """Rows of larger buffers: same bits as contiguous ones, and nothing around them is touched."""
    layers = Layers.random(7, 96, 64, 8, torch.bfloat16)
    expected = run(layers, backend)
    x, rows, weight, bias, scale = layers.to(backend).residual()
    buffer = torch.full((14, 112), 77.0, device=backend)
    inputs = torch.full((21, 80), 55.0, dtype=rows.dtype, device=backend)
    weights = torch.full((96, 128), 33.0, dtype=rows.dtype, device=backend)
    strided = buffer[::2, 4:100], inputs[::3, 8:72], weights[:, 32:96]
    for part, values in zip(strided, (x, rows, weight), strict=True):
        part.copy_(values)
    scaled, statistics = ops.residual_linear(*strided, bias, scale)
    found = strided[0].cpu(), scaled.cpu(), statistics.cpu()
    assert all(a.equal(b) for a, b in zip(found, expected, strict=True))
    strided[0].fill_(77.0)
    assert buffer.eq(77.0).all()


def test_not_a_number_stays_in_its_row(backend: torch.device) -> None:
    layers = Layers.random(20, 96, 192, 8, torch.bfloat16)
    expected = run(layers, backend)
    layers.rows[7, 100] = float("nan")
    for found, wanted in zip(run(layers, backend), expected, strict=True):
        assert found[7].isnan().all()
        found[7] = wanted[7]
        assert found.equal(wanted)


# Wrong twins: what the rule above must not let through.
def _wrong(spoil: Callable[[Layers, Tensor, Tensor, Tensor], Results]) -> Callable[[Layers], Results]:
    def results(layers: Layers) -> Results:
        x = layers.x.clone()
        return spoil(layers, x, *reference.residual_linear(x, *layers.residual()[1:]))

    return results


MISTAKES = {
    "bias left out": lambda w: (
        w.x + w.rows.float() @ w.weight.float().T,
        *reference.residual_linear(w.x.clone(), *w.residual()[1:]),
    ),
    "product rounded twice": _wrong(lambda w, x, a, s: ((w.added().bfloat16()).float(), a, s)),
    "a slab left out": lambda w: (
        y := w.x + w.rows.float()[:, 64:] @ w.weight.float()[:, 64:].T + w.bias.float(),
        *reference.residual_linear(y.clone(), 0 * w.rows, w.weight, 0 * w.bias, w.gamma),
    ),
    "unscaled": _wrong(lambda w, x, a, s: (x, x.to(a.dtype), s)),
    "variance for squares": _wrong(lambda w, x, a, s: (x, a, s * torch.tensor([1.0, 1 / 32]))),
    "one-pass squares": _wrong(
        lambda w, x, a, s: (
            x,
            a,
            torch.stack([s[..., 0], (x**2).unflatten(1, (-1, 32)).sum(2) - 32 * s[..., 0] ** 2], 2),
        )
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_the_rule_rejects(name: str) -> None:
    layers = Layers.random(7, 96, 256, 8, torch.bfloat16, offset=300.0 if name == "one-pass squares" else 0.0)
    with pytest.raises(AssertionError):
        assert_right(MISTAKES[name](layers), layers)


def example() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    x, rows, weight, bias, scale = Layers.random(4, 64, 32, 8, torch.bfloat16).residual()
    assert bias is not None
    return x, rows, weight, bias, scale


Arguments = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
WRONG: dict[str, tuple[Callable[[Arguments], tuple[Tensor, ...]], str]] = {
    "rows dtype": (lambda a: (a[0], a[1].float(), *a[2:]), "rows must be bfloat16 or float16, got float32"),
    "rows shape": (lambda a: (a[0], a[1][0], *a[2:]), r"rows must have shape \[R, K\] = \[any, any\], got \[32\]"),
    "weight dtype": (lambda a: (*a[:2], a[2].half(), *a[3:]), "weight must be bfloat16, got float16"),
    "weight shape": (
        lambda a: (*a[:2], a[2][:, :16], *a[3:]),
        r"weight must have shape \[N, K\] = \[any, 32\], got \[64, 1",
    ),
    "N": (
        lambda a: (a[0][:, :40], a[1], a[2][:40], a[3][:40], a[4][:40]),
        "weight: N must be a multiple of 32, got 40",
    ),
    "K": (lambda a: (a[0], a[1][:, :24], a[2][:, :24], *a[3:]), "weight: K must be a multiple of 32, got 24"),
    "no K": (lambda a: (a[0], a[1][:, :0], a[2][:, :0], *a[3:]), "weight: K must be a multiple of 32, got 0"),
    "x dtype": (lambda a: (a[0].double(), *a[1:]), "x must be float32, got float64"),
    "x shape": (lambda a: (a[0][:3], *a[1:]), r"x must have shape \[R, N\] = \[4, 64\], got \[3, 64\]"),
    "x columns apart": (lambda a: (a[0].repeat(1, 2)[:, ::2], *a[1:]), "x must be contiguous in its last dimension"),
    "x rows overlap": (lambda a: (a[0][:1].expand(4, -1), *a[1:]), "x is written, so its elements must not overlap"),
    "bias shape": (lambda a: (*a[:3], a[3][None], a[4]), r"bias must have shape \[N\] = \[64\], got \[1, 64\]"),
    "scale dtype": (lambda a: (*a[:4], a[4].float()), "scale must be bfloat16, got float32"),
    "scale stride": (lambda a: (*a[:4], a[4].repeat_interleave(2)[::2]), "scale must be contiguous"),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_name_the_argument_and_write_nothing(name: str, backend: torch.device) -> None:
    spoil, message = WRONG[name]
    args = [clone(a, backend) for a in spoil(example())]
    before = args[0].clone()
    with pytest.raises(RuntimeError, match=message):
        ops.residual_linear(*args)
    assert args[0].equal(before)


@pytest.mark.parametrize("which", range(5))
def test_an_argument_between_16_bytes(which: int, backend: torch.device, on_cuda_kernels: bool) -> None:
    args = [a.to(backend) for a in example()]
    buffer = torch.zeros((*args[which].shape[:-1], 128), dtype=args[which].dtype, device=backend)
    buffer[..., 1 : 1 + args[which].shape[-1]] = args[which]
    args[which] = buffer[..., 1 : 1 + args[which].shape[-1]]
    if not on_cuda_kernels:
        ops.residual_linear(*args)
        return
    name = ("x", "rows", "weight", "bias", "scale")[which]
    with pytest.raises(RuntimeError, match=f"{name}: on CUDA every row must begin at a multiple of 16 bytes"):
        ops.residual_linear(*args)


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: torch.dtype, backend: torch.device) -> None:
    x, rows, weight, bias, scale = Layers.random(4, 64, 32, 8, dtype).to(backend).residual()
    for given in (bias, None):
        torch.library.opcheck(ops._ops.residual_linear.default, (x, rows, weight, given, scale))
