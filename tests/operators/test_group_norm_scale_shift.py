"""group_norm_scale_shift against torch's GroupNorm in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lpd_ext import ops, reference

Arguments = tuple[Tensor, Tensor, Tensor, int, float]


def random_arguments(
    shape: tuple[int, int, int, int], groups: int, offset: float = 0.0, eps: float = 1e-6
) -> Arguments:
    generator = torch.Generator().manual_seed(sum(shape))

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    channels = shape[-1]
    x = (offset + 2 * normal(*shape)) * (1 + torch.arange(channels) / channels)  # no two channels alike
    return x, 1 + normal(channels) / 2, normal(channels), groups, eps


def group_norm(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    return F.group_norm(x.permute(0, 3, 1, 2), groups, weight, bias, eps).permute(0, 2, 3, 1)


def assert_as_accurate(scale_shift: Tensor, args: Arguments) -> None:
    """Error of x * scale + shift against float64 at most twice that of torch's GroupNorm, plus a floor."""
    x, weight, bias, groups, eps = args
    assert scale_shift.shape == (x.shape[0], 2, x.shape[3])
    assert scale_shift.dtype == torch.float32
    exact = group_norm(x.double(), weight.double(), bias.double(), groups, eps)
    torchs = group_norm(*args)
    scale, shift = scale_shift[:, :, None, None].unbind(1)
    if exact.numel():
        floor = 4 * torch.finfo(torch.float32).eps * (1 + exact.abs().max() + shift.abs().max())
        assert (x * scale + shift - exact).abs().max() <= 2 * (torchs - exact).abs().max() + floor


@pytest.mark.parametrize(
    ("shape", "groups"),
    [
        ((1, 1, 1, 32), 4),
        ((2, 7, 5, 7), 7),
        ((3, 1, 129, 48), 6),
        ((1, 16, 16, 128), 32),
        ((2, 12, 11, 129), 3),
        ((0, 4, 4, 32), 8),
        ((1, 33, 31, 64), 1),
    ],
)
def test_accurate(shape: tuple[int, int, int, int], groups: int, cpu_backend: torch.device) -> None:
    args = random_arguments(shape, groups)
    assert_as_accurate(ops.group_norm_scale_shift(*args), args)


@pytest.mark.parametrize("offset", [-3e2, 1e4])
def test_mean_much_larger_than_deviation(offset: float, cpu_backend: torch.device) -> None:
    """One pass over sums of squares would lose all digits here."""
    x, weight, bias, _, _ = random_arguments((2, 16, 24, 64), 8)
    args = (x / 2 + offset, weight, bias, 8, 1e-6)
    assert_as_accurate(ops.group_norm_scale_shift(*args), args)


@pytest.mark.parametrize("eps", [1e-12, 0.3, 50.0])
def test_eps(eps: float, cpu_backend: torch.device) -> None:
    args = random_arguments((2, 9, 9, 96), 32, eps=eps)
    assert_as_accurate(ops.group_norm_scale_shift(*args), args)


def test_batch_and_threads_do_not_matter(cpu_backend: torch.device) -> None:
    x, weight, bias, groups, eps = random_arguments((3, 40, 40, 64), 32)
    expected = ops.group_norm_scale_shift(x, weight, bias, groups, eps)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            assert ops.group_norm_scale_shift(x, weight, bias, groups, eps).equal(expected)
    finally:
        torch.set_num_threads(threads)
    assert ops.group_norm_scale_shift(x[1:2], weight, bias, groups, eps).equal(expected[1:2])


def wrong(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, mistake: str) -> Tensor:
    right = reference.group_norm_scale_shift(x, weight, bias, groups, eps)
    size = x.shape[-1] // groups
    grouped = x.flatten(1, 2).unflatten(-1, (groups, size))
    variance, mean = torch.var_mean(grouped, dim=(1, 3), correction=0)
    if mistake == "groups interleaved":
        order = torch.arange(x.shape[-1]).view(size, groups).T.flatten()
        right = reference.group_norm_scale_shift(x[..., order], weight[order], bias[order], groups, eps)
        return right[..., order.argsort()]
    if mistake == "statistics per channel":
        return reference.group_norm_scale_shift(x, weight, bias, x.shape[-1], eps)
    if mistake == "variance over n - 1":
        variance = variance * size * x.shape[1] * x.shape[2] / (size * x.shape[1] * x.shape[2] - 1)
    if mistake == "eps outside the root":
        scale = weight.view(groups, -1) / (variance.sqrt() + eps)[..., None]
    else:
        scale = weight.view(groups, -1) * torch.rsqrt(variance + eps)[..., None]
    shift = bias.view(groups, -1) - mean[..., None] * scale
    if mistake == "mean not scaled":
        shift = bias.view(groups, -1) - mean[..., None]
    return torch.stack([scale.flatten(1), shift.flatten(1)], 1)


@pytest.mark.parametrize(
    "mistake",
    [
        "groups interleaved",
        "statistics per channel",
        "variance over n - 1",
        "eps outside the root",
        "mean not scaled",
    ],
)
def test_the_rule_rejects(mistake: str) -> None:
    args = random_arguments((2, 4, 4, 96), 24, offset=1.0, eps=1e-2)
    assert_as_accurate(reference.group_norm_scale_shift(*args), args)
    with pytest.raises(AssertionError):
        assert_as_accurate(wrong(*args, mistake), args)


WRONG: dict[str, tuple[Callable[[Arguments], tuple[object, ...]], str]] = {
    "x dtype": (lambda a: (a[0].double(), *a[1:]), "x must be float32, got float64"),
    "x shape": (lambda a: (a[0][0], *a[1:]), r"x must have shape \[B, H, W, C\] = .*, got \[3, 5, 24\]"),
    "x stride": (lambda a: (a[0].transpose(1, 2), *a[1:]), "x must be contiguous"),
    "x empty": (lambda a: (a[0][:, :0], *a[1:]), r"x must have at least one pixel, got \[2, 0, 5, 24\]"),
    "weight shape": (lambda a: (a[0], a[1][:8], *a[2:]), r"weight must have shape \[C\] = \[24\], got \[8\]"),
    "bias dtype": (lambda a: (*a[:2], a[2].half(), *a[3:]), "bias must be float32, got float16"),
    "num_groups": (lambda a: (*a[:3], 7, a[4]), "num_groups must divide C = 24, got 7"),
    "no groups": (lambda a: (*a[:3], 0, a[4]), "num_groups must divide C = 24, got 0"),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_name_the_argument(name: str) -> None:
    spoil, message = WRONG[name]
    with pytest.raises(RuntimeError, match=message):
        ops.group_norm_scale_shift(*spoil(random_arguments((2, 3, 5, 24), 8)))


def test_opcheck(cpu_backend: torch.device) -> None:
    torch.library.opcheck(ops._ops.group_norm_scale_shift.default, random_arguments((2, 3, 5, 24), 8))


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")  # of inductor's own imports
def test_compiles_without_a_graph_break() -> None:
    args = random_arguments((2, 3, 5, 24), 8)
    compiled = torch.compile(ops.group_norm_scale_shift, fullgraph=True)
    assert compiled(*args).equal(ops.group_norm_scale_shift(*args))
