"""Values that are finite but whose squares, sums or products are not: no plausible number comes of them.

What overflows may be infinite or NaN, as in torch; what does not overflow has the value of float64.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lpd_ext import ops, reference
from lpd_ext.packing import pack_weight, rotate_rows

VALUES = [1e15, 2e19, -1e20, 1e30, 3e38, -3e38]


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def assert_not_plausible(ours: Tensor, exact: Tensor) -> None:
    """Every number that is finite is right, which the rounding of float32 leaves it to a thousandth."""
    ours = ours.double().cpu()
    wrong = ours.isfinite() & ((ours - exact).abs() > 1e-3 * (1 + exact.abs()))
    assert not wrong.any(), f"found {ours[wrong][:3].tolist()}, right is {exact[wrong][:3].tolist()}"


def spoilt_rows(width: int, value: float) -> Tensor:
    """Rows with one extreme element, with two, with all; the first row and the last are ordinary."""
    x = normal(5, width)
    x[1, 3] = value
    x[2, :2] = value
    x[3] = value * torch.rand(width, generator=torch.Generator().manual_seed(0))
    return x


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("width", [24, 129, 1024])
def test_layer_norm(width: int, value: float, backend: torch.device) -> None:
    x, weight, bias = spoilt_rows(width, value), normal(width) + 1, normal(width)
    exact = reference.residual_layer_norm(x.double(), None, weight.double(), bias.double())
    x, weight, bias = (t.to(backend) for t in (x, weight, bias))
    zeros, rows = torch.zeros_like(x), torch.arange(5, device=backend)
    found = [
        ops.residual_layer_norm(x.clone(), None, weight, bias),
        ops.residual_layer_norm(x.clone(), zeros, weight, bias),
        ops.residual_layer_norm(zeros.clone(), x, weight, bias),
        ops.embed_rows(rows, rows, x, zeros, weight, bias),
    ]
    for normed in found:
        assert_not_plausible(normed, exact)
        assert normed[::4].isfinite().all()


def test_the_case_that_was_found(backend: torch.device) -> None:
    """Squares that overflow were taken for a variance of 0."""
    x = normal(1, 64).to(backend)
    x[0, 5] = 1e30
    ones = torch.ones(64, device=backend)
    assert ops.residual_layer_norm(x, None, ones, 0 * ones).isnan().all()


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize(("channels", "groups"), [(32, 4), (7, 1), (48, 6)])
def test_group_norm(channels: int, groups: int, value: float, cpu_backend: torch.device) -> None:
    for count in (1, 5, 400):
        x, weight, bias = normal(2, 20, 20, channels), normal(channels) + 1, normal(channels)
        x.flatten(1, 2)[1, :count, 1] = value
        scale, shift = ops.group_norm_scale_shift(x, weight, bias, groups)[:, :, None, None].unbind(1)
        planes = x.double().permute(0, 3, 1, 2)
        exact = F.group_norm(planes, groups, weight.double(), bias.double(), 1e-6).permute(0, 2, 3, 1)
        assert_not_plausible(x * scale + shift, exact)
        assert scale[0].isfinite().all()


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("part", range(3))
def test_attention(part: int, value: float, backend: torch.device) -> None:
    """One element of q, k or v; scores then are far apart, so that one key has all the weight, or overflow."""
    qkv, caches = normal(8, 3, 2, 32), torch.zeros(2, 1, 2, 16, 32)
    qkv[3, part, 0, 0] = value
    segments = torch.tensor([[0, 4, 4, 4, 0, 0]], dtype=torch.int32)
    exact = reference.group_attention(qkv.double(), *caches.double(), segments, 8, 8)
    ours = ops.group_attention(qkv.to(backend), *caches.to(backend), segments.to(backend), 8, 8)
    assert_not_plausible(ours, exact)
    assert ours[:, 32:].isfinite().all()  # the other head


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("part", range(3))
def test_training_attention(part: int, value: float, cpu_backend: torch.device) -> None:
    """The gradient, too, is as accurate as torch's where it is finite: errors are in proportion to q and k."""
    qkv, sizes = normal(1, 10, 3, 2, 32), torch.tensor([1, 2, 3], dtype=torch.int32)
    qkv[0, 3, part, 0, 0] = value
    output, logsumexp = ops.training_attention(qkv, sizes)
    wanted, sums = reference.training_attention(qkv.double(), sizes)
    assert_not_plausible(output, wanted)
    assert_not_plausible(logsumexp, sums)
    grad, arguments = normal(1, 10, 64), (sizes, True, 32**-0.5)
    ours = ops.training_attention_backward(grad, qkv, output, logsumexp, *arguments).double()
    exact = reference.training_attention_backward(grad.double(), qkv.double(), output, logsumexp, *arguments)
    allowed = 1e-3 * (1 + exact.abs()) + 1e-5 * abs(value)
    assert ((ours - exact).abs() <= allowed)[ours.isfinite()].all()
    assert ours[:, :, :, 1].isfinite().all()


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("value", VALUES)
def test_packed_linear(value: float, gelu: bool, cpu_backend: torch.device) -> None:
    x, weight, bias = normal(5, 24), normal(33, 24), normal(33)
    x[1, 3] = x[2, 0] = value
    weight[:, 3] = torch.linspace(-2, 2, 33)  # 0 among them
    exact = F.linear(x.double(), weight.double(), bias.double())
    found = ops.packed_linear(x, pack_weight(weight), bias, 33, gelu)
    assert_not_plausible(found, F.gelu(exact) if gelu else exact)
    assert found[3:].isfinite().all()


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("planes", [1, 2])
def test_bytes_and_their_products(planes: int, rotate: bool, value: float, cpu_backend: torch.device) -> None:
    """A row whose range overflows has an infinite scale, so a product of it is not finite."""
    x = normal(4, 128)
    x[1, 3], x[2, :2] = value, torch.tensor([value, -value])
    quantized, quantization = ops.quantize_rows(x, 255, rotate, planes)
    scale, zero_point = quantization.double().view(planes, 4, 2, 1).unbind(2)
    found = (scale * (quantized.view(planes, 4, 128) - zero_point)).sum(0)
    exact = rotate_rows(x.double()) if rotate else x.double()
    steps = scale[0] * (0.51 if planes == 1 else 0.51 / 255 + 1e-4)
    assert ((found - exact).abs() <= steps)[found.isfinite()].all()
    usable = quantization.view(planes, 4, 2).isfinite().all(2).all(0)
    assert usable[[0, 3]].all()

    weight = torch.randint(-127, 128, (32, 128), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    ones = torch.ones(32)
    sums = weight.sum(1, dtype=torch.float32)
    y = ops.packed_linear_int8(quantized, quantization, pack_weight(weight), ones, sums, None, planes)
    assert not y[~usable].isfinite().any()
    assert y[[0, 3]].isfinite().all()


@pytest.mark.parametrize("value", VALUES)
def test_swish_of_a_convolution(value: float, cpu_backend: torch.device) -> None:
    """silu is 0 far below 0, where exp overflows, and not a hundredth of the number."""
    x, weight = torch.ones(1, 8, 8, 16), torch.zeros(3, 3, 16, 16)
    weight[1, 1] = torch.eye(16)
    scale_shift = torch.zeros(1, 2, 16)
    scale_shift[0, 0, 0] = value
    out = torch.zeros(1, 8, 8, 16)
    ops.conv3x3(x, weight, torch.zeros(16), scale_shift, out)
    assert_not_plausible(out, F.silu(x.double() * scale_shift[0, 0].double()))


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("temperature", [0.0, 1e-30, 1.0])
@pytest.mark.parametrize("guided", [False, True])
def test_sample_tokens(guided: bool, temperature: float, value: float, backend: torch.device) -> None:
    """The tokens of the twin, or its refusal; mixing may overflow, in float32 and so in both."""
    logits, tokens = normal(2, 100), 20
    logits[0, 5] = value
    logits[1, 7] = -value if guided else 0.0
    rows = torch.zeros(tokens, dtype=torch.int32)
    settings = torch.full((tokens,), 3.0), torch.full((tokens,), temperature)
    keys = torch.arange(tokens), torch.arange(tokens)
    for filters in ((None, None), (torch.full((tokens,), 10, dtype=torch.int32), torch.full((tokens,), 0.9))):
        given = (logits, rows, rows + 1 if guided else rows - 1, *settings, *filters, *keys)
        arguments = [None if t is None else t.to(backend) for t in given]
        assert ops.sample_tokens(*arguments).cpu().equal(reference.sample_tokens(*given))
