"""packed_linear, packed_linear_int8: accurate, rows that do not depend on each other, exact sums of bytes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lpd_ext import _C, ops, reference
from lpd_ext.packing import pack_weight, unpack_weight

EPS = torch.finfo(torch.float32).eps
# K, N: around words, panels of 32 channels, vectors, and runs of 1,024 words.
SIZES = [(1, 1), (3, 31), (7, 33), (64, 32), (129, 16), (33, 100), (1023, 65), (1024, 32), (1025, 48), (2500, 7)]
ROWS = [1, 2, 11, 12, 13, 25, 40, 101]
Arguments = tuple[Tensor, Tensor, Tensor | None, int]


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def arguments(rows: int, size: tuple[int, int], dtype: torch.dtype = torch.float32, bias: bool = True) -> Arguments:
    inputs, outputs = size
    weight = (normal(outputs, inputs) / inputs**0.5).to(dtype)
    return normal(rows, inputs).to(dtype), pack_weight(weight), normal(outputs).to(dtype) if bias else None, outputs


def exact(args: Arguments, gelu: bool = False) -> Tensor:
    x, weight, bias, outputs = args
    y = x.double() @ unpack_weight(weight, outputs, x.shape[1]).double().t()
    y = y if bias is None else y + bias.double()
    return F.gelu(y) if gelu else y


def assert_accurate(y: Tensor, args: Arguments, gelu: bool = False) -> None:
    """Within the roundings of K sums in any order, of the result itself, and what the kernel's GELU is off by."""
    x, weight, _, outputs = args
    wanted = exact(args, gelu)
    assert (y.shape, y.dtype) == (wanted.shape, x.dtype)
    assert y.is_contiguous()
    sizes = x.double().abs() @ unpack_weight(weight, outputs, x.shape[1]).double().abs().t()
    allowed = 4 * EPS * x.shape[1] ** 0.5 * sizes + 2 * EPS + (3e-7 * wanted.abs().clamp(min=1) if gelu else 0)
    assert ((y - wanted).abs() <= allowed + torch.finfo(y.dtype).eps * wanted.abs()).all()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_weights_come_back_bit_for_bit(dtype: torch.dtype, size: tuple[int, int]) -> None:
    weight = (100 * normal(size[1], size[0])).to(dtype)
    packed = pack_weight(weight)
    elements = 4 // weight.element_size()
    assert packed.shape == (-(-size[1] // 32), -(-size[0] // elements), 32, elements)
    found = unpack_weight(packed, size[1], size[0])
    assert found.equal(weight)
    assert found.is_contiguous()
    assert packed.double().abs().sum() == weight.double().abs().sum()  # zeros around it
    channel, k = size[1] - 1, size[0] - 1
    assert packed[channel // 32, k // elements, channel % 32, k % elements] == weight[channel, k]


def by_reference(x: Tensor, weight: Tensor, bias: Tensor | None, out_features: int, gelu: bool = False) -> Tensor:
    out = x.new_empty((len(x), out_features))
    reference.packed_linear(x, weight, bias, out_features, gelu, out)
    return out


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_accurate_as_its_sums_can_be(
    dtype: torch.dtype, size: tuple[int, int], bias: bool, gelu: bool, cpu_backend: torch.device
) -> None:
    for rows in ROWS:
        args = arguments(rows, size, dtype, bias)
        assert_accurate(ops.packed_linear(*args, gelu=gelu), args, gelu)
        assert_accurate(by_reference(*args, gelu=gelu), args, gelu)


MISTAKES: dict[str, Callable[[Arguments], Arguments]] = {
    "bias left out": lambda a: (a[0], a[1], None, a[3]),
    "last input left out": lambda a: (torch.cat([a[0][:, :-1], torch.zeros(len(a[0]), 1)], dim=1), *a[1:]),
    "channels in other places": lambda a: (a[0], a[1].roll(1, dims=2), *a[2:]),
    "words in other places": lambda a: (a[0], a[1].roll(1, dims=1), *a[2:]),
    "rows in other places": lambda a: (a[0].roll(1, dims=0), *a[1:]),
    "bfloat16": lambda a: (a[0].bfloat16().float(), *a[1:]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_bound_rejects(mistake: str) -> None:
    args = arguments(25, (129, 40))
    with pytest.raises(AssertionError):
        assert_accurate(by_reference(*MISTAKES[mistake](args)), args)


def test_the_bound_rejects_the_other_gelu() -> None:
    args = arguments(25, (129, 40))
    with pytest.raises(AssertionError):
        assert_accurate(F.gelu(by_reference(*args), approximate="tanh"), args, gelu=True)


@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.float32, (4096, 163)), (torch.float32, (1100, 2048)), (torch.bfloat16, (4096, 163))]
)
def test_many_rows(dtype: torch.dtype, size: tuple[int, int], cpu_backend: torch.device) -> None:
    """More than 4 MB of them: over four panels at a time, of which the last may be fewer, floats in runs of words."""
    rows = (1 << 20) * (4 // dtype.itemsize) // size[0] + 30
    args = arguments(rows, size, dtype)
    y = ops.packed_linear(*args, gelu=True)
    some = torch.tensor([0, 1, 11, 12, rows // 2, rows - 2, rows - 1])
    assert_accurate(y[some], (args[0][some], *args[1:]), gelu=True)
    assert torch.allclose(y, by_reference(*args, gelu=True), atol=2e-5, rtol=torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(1025, 48), (33, 100), (64, 4096)])
def test_a_row_does_not_depend_on_the_others_or_on_the_threads(
    size: tuple[int, int], dtype: torch.dtype, cpu_backend: torch.device
) -> None:
    args = arguments(40, size, dtype)
    y = ops.packed_linear(*args)
    for first, last in ((0, 1), (3, 16), (39, 40), (0, 39)):
        assert ops.packed_linear(args[0][first:last], *args[1:]).equal(y[first:last])
    threads = torch.get_num_threads()
    try:
        for count in (1, 3, 7):
            torch.set_num_threads(count)
            assert ops.packed_linear(*args).equal(y)
    finally:
        torch.set_num_threads(threads)


def test_strided_rows(cpu_backend: torch.device) -> None:
    x, *rest = arguments(25, (129, 40))
    buffer = torch.full((50, 150), torch.nan)
    buffer[::2, 7:136] = x
    assert ops.packed_linear(buffer[::2, 7:136], *rest).equal(ops.packed_linear(x, *rest))


def test_no_rows(cpu_backend: torch.device) -> None:
    x, *rest = arguments(1, (129, 40))
    assert ops.packed_linear(x[:0], *rest).shape == (0, 40)
    q, *others = int8_arguments(1, (129, 40), 2)
    assert ops.packed_linear_int8(q[:0], others[0][:0], *others[1:]).shape == (0, 40)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_not_a_number_stays_in_its_row(value: float, cpu_backend: torch.device) -> None:
    x, *rest = arguments(14, (129, 40))
    x[5, 100] = value
    for gelu in (False, True):
        finite = ops.packed_linear(x, *rest, gelu=gelu).isfinite()
        assert finite[torch.arange(14) != 5].all()
        assert not finite[5].all()


# ---- int8 ----

Int8Arguments = tuple[Any, ...]  # of ops.packed_linear_int8


def int8_arguments(rows: int, size: tuple[int, int], planes: int = 1, bias: bool = True) -> Int8Arguments:
    """Any bytes at all, and scales that make the products mean a few units."""
    inputs, outputs = size
    generator = torch.Generator().manual_seed(rows + inputs + outputs)
    quantized = torch.randint(0, 256, (planes * rows, inputs), generator=generator, dtype=torch.uint8)
    weight = torch.randint(-127, 128, (outputs, inputs), generator=generator, dtype=torch.int8)
    scale = normal(outputs).exp() / (100 * inputs**0.5)
    zero_point = torch.randint(0, 256, (planes * rows, 1), generator=generator).float()
    quantization = torch.cat([normal(planes * rows, 1).exp() / 100, zero_point], dim=1)
    column_sum = weight.sum(1, dtype=torch.int32) * scale
    return quantized, quantization, pack_weight(weight), scale, column_sum, normal(outputs) if bias else None, planes


def int8_by_reference(*args: Any, gelu: bool = False) -> Tensor:
    quantized, _, _, scale, _, _, planes = args
    out = scale.new_empty((len(quantized) // planes, len(scale)))
    reference.packed_linear_int8(*args, gelu, out)
    return out


def as_double(args: Int8Arguments) -> Int8Arguments:
    return tuple(a.double() if isinstance(a, Tensor) and a.dtype == torch.float32 else a for a in args)


def assert_int8_accurate(y: Tensor, args: Int8Arguments, gelu: bool = False) -> None:
    """Three roundings of each term: sums of products of bytes are exact."""
    quantized, quantization, weight, scale, column_sum, bias, planes = as_double(args)
    wanted = int8_by_reference(*as_double(args), gelu=gelu)
    assert (y.shape, y.dtype) == (wanted.shape, torch.float32)
    product = (quantized.double() @ unpack_weight(weight, len(scale), quantized.shape[1]).double().t()).abs() * scale
    row_scale, zero_point = quantization.unsqueeze(-1).unbind(1)
    terms = (row_scale * (product + zero_point * column_sum.abs())).unflatten(0, (planes, -1)).sum(0)
    allowed = 2 * EPS * (terms + (0 if bias is None else bias.abs()))
    allowed = 1.2 * allowed + 3e-7 * wanted.abs().clamp(min=1) if gelu else allowed  # GELU's slope is 1.13 at most
    assert ((y - wanted).abs() <= allowed).all()


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("size", SIZES)
def test_int8_is_as_accurate_as_float32(
    size: tuple[int, int], planes: int, bias: bool, gelu: bool, cpu_backend: torch.device
) -> None:
    for rows in (1, 6, 7, 13, 40):
        args = int8_arguments(rows, size, planes, bias)
        assert_int8_accurate(ops.packed_linear_int8(*args, gelu=gelu), args, gelu)
        assert_int8_accurate(int8_by_reference(*args, gelu=gelu), args, gelu)


def test_many_int8_rows(cpu_backend: torch.device) -> None:
    args = int8_arguments(540, (4096, 163), planes=2)
    assert_int8_accurate(ops.packed_linear_int8(*args, gelu=True), args, gelu=True)


@pytest.mark.parametrize("sign", [-127, 127])
def test_the_largest_sums_of_bytes_fit(sign: int, cpu_backend: torch.device) -> None:
    quantized = torch.full((13, 65536), 255, dtype=torch.uint8)
    weight = torch.full((33, 65536), sign, dtype=torch.int8)
    ones, zeros = torch.ones(33), torch.zeros(33)
    quantization = torch.tensor([[1.0, 0.0]]).repeat(13, 1)
    y = ops.packed_linear_int8(quantized, quantization, pack_weight(weight), ones, zeros, None)
    assert y.eq(float(65536 * 255 * sign)).all()


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("inputs", [1, 5, 255, 256, 258, 515, 1030])
def test_sums_of_bytes_are_exact_on_every_instruction_set(inputs: int, planes: int, cpu_backend: torch.device) -> None:
    """Around words, passes over 256 inputs, blocks of rows and more of them than a pass takes."""
    for rows, outputs in ((1, 1), (3, 40), (7, 32), (13, 65), (101, 33)):
        quantized, _, weight, *_ = int8_arguments(rows, (inputs, outputs), planes)
        quantization = torch.tensor([[1.0, 0.0]]).repeat(planes * rows, 1)
        ones, zeros = torch.ones(outputs), torch.zeros(outputs)
        y = ops.packed_linear_int8(quantized, quantization, weight, ones, zeros, None, planes)
        sums = quantized.double() @ unpack_weight(weight, outputs, inputs).double().t()
        assert y.equal(sums.float().unflatten(0, (planes, rows)).sum(0))


INT8_MISTAKES: dict[str, Callable[[Int8Arguments], Int8Arguments]] = {
    "zero point left out": lambda a: (a[0], a[1] * torch.tensor([1.0, 0.0]), *a[2:]),
    "second plane left out": lambda a: (a[0], a[1] * (torch.arange(len(a[1])) < len(a[1]) // 2)[:, None], *a[2:]),
    "planes exchanged": lambda a: (a[0].roll(len(a[0]) // 2, 0), *a[1:]),
    "scale of the next channel": lambda a: (*a[:3], a[3].roll(1), *a[4:]),
    "signed bytes": lambda a: (a[0] & 127, *a[1:]),
    "bias left out": lambda a: (*a[:5], None, a[6]),
}


@pytest.mark.parametrize("mistake", INT8_MISTAKES)
def test_the_bound_of_int8_rejects(mistake: str) -> None:
    args = int8_arguments(13, (129, 40), planes=2)
    assert_int8_accurate(int8_by_reference(*args), args)
    with pytest.raises(AssertionError):
        assert_int8_accurate(int8_by_reference(*INT8_MISTAKES[mistake](args)), args)


@pytest.mark.parametrize("planes", [1, 2])
def test_an_int8_row_does_not_depend_on_the_others(planes: int, cpu_backend: torch.device) -> None:
    quantized, quantization, *rest = int8_arguments(40, (129, 100), planes)
    y = ops.packed_linear_int8(quantized, quantization, *rest)
    for first, last in ((0, 1), (3, 16), (0, 39)):
        rows = torch.cat([torch.arange(first, last) + 40 * plane for plane in range(planes)])
        assert ops.packed_linear_int8(quantized[rows], quantization[rows], *rest).equal(y[first:last])


def test_a_scale_that_is_no_number_spoils_its_row(cpu_backend: torch.device) -> None:
    quantized, quantization, *rest = int8_arguments(14, (129, 40))
    quantization[5, 0] = torch.nan
    for gelu in (False, True):
        y = ops.packed_linear_int8(quantized, quantization, *rest, gelu=gelu)
        assert y[5].isnan().all()
        assert y[torch.arange(14) != 5].isfinite().all()


# ---- on processors with AVX-512 that lack an instruction of this one ----

ELSEWHERE = """
import sys
import torch
from lpd_ext import _C, ops
floats, of_bytes = torch.load(sys.argv[1])
torch.save([_C.cpu_features(), ops.packed_linear(*floats), ops.packed_linear_int8(*of_bytes)], sys.argv[2])
"""


def test_without_vnni_and_bfloat16_instructions(tmp_path: Path) -> None:
    """Sums of bytes are the same bits; those of bfloat16 products are as accurate."""
    floats, of_bytes = arguments(25, (129, 40), torch.bfloat16), int8_arguments(25, (4097, 40), planes=2)
    given, found = tmp_path / "given.pt", tmp_path / "found.pt"
    torch.save([floats, of_bytes], given)
    environment = os.environ | {"LPD_CPU_WITHOUT": "vnni bfloat16"}
    subprocess.run([sys.executable, "-c", ELSEWHERE, str(given), str(found)], env=environment, check=True, cwd=tmp_path)
    features, y, y_int8 = torch.load(found)
    assert features == []
    assert set(_C.cpu_features()) <= {"vnni", "bfloat16"}
    assert_accurate(y, floats)
    assert y_int8.equal(ops.packed_linear_int8(*of_bytes))


# ---- what is refused ----


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(3, 8, dtype=torch.float64)}, "x must be float32 or bfloat16, got float64"),
        ({0: torch.zeros(8)}, r"x must have shape \[R, K\] = \[any, any\], got \[8\]"),
        ({0: torch.zeros(8, 3).t()}, "x must be contiguous in its last dimension, got stride 3"),
        ({0: torch.zeros(3, 0)}, "x: K must be at least 1, got 0"),
        ({0: torch.zeros(3, 9)}, r"weight must have shape .* = \[1, 9, 32, 1\], got \[1, 8, 32, 1\]"),
        ({1: torch.zeros(1, 8, 32, 1).bfloat16()}, "weight must be float32, got bfloat16"),
        ({1: torch.zeros(1, 8, 32)}, r"weight must have shape .*, got \[1, 8, 32\]"),
        ({1: torch.zeros(1, 32, 8, 1).transpose(1, 2)}, "weight must be contiguous"),
        ({2: torch.zeros(4)}, r"bias must have shape \[N\] = \[5\], got \[4\]"),
        ({2: torch.zeros(5).double()}, "bias must be float32, got float64"),
        ({3: 0}, "out_features must be at least 1, got 0"),
        ({3: -1}, "out_features must be at least 1, got -1"),
        ({0: torch.tensor(1.0)}, r"x must have shape \[R, K\]"),
        ({3: 33}, r"weight must have shape .* = \[2, 8, 32, 1\], got \[1, 8, 32, 1\]"),
    ],
)
def test_refused(change: dict[int, Any], message: str, cpu_backend: torch.device) -> None:
    args: list[Any] = list(arguments(3, (8, 5)))
    for place, value in change.items():
        args[place] = value
    with pytest.raises(RuntimeError, match=message):
        ops.packed_linear(*args)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(4, 8)}, "quantized must be uint8, got float32"),
        ({0: torch.zeros(8, dtype=torch.uint8)}, r"quantized must have shape \[R, K\]"),
        ({0: torch.zeros(3, 8, dtype=torch.uint8)}, "quantized: its rows must be in 2 planes, got 3"),
        ({0: torch.zeros(4, 0, dtype=torch.uint8)}, "quantized: K must be at least 1, got 0"),
        ({0: torch.zeros(4, 65537, dtype=torch.uint8)}, "quantized: K must be at most 65536, got 65537"),
        ({1: torch.zeros(3, 2)}, r"quantization must have shape \[R, 2\] = \[4, 2\], got \[3, 2\]"),
        ({1: torch.zeros(4, 2).half()}, "quantization must be float32, got float16"),
        ({2: torch.zeros(1, 2, 32, 4)}, "weight must be .*, got float32"),
        ({2: torch.zeros(1, 3, 32, 4, dtype=torch.int8)}, r"weight must have shape .* = \[1, 2, 32, 4\], got"),
        ({3: torch.zeros(40)}, r"weight must have shape .* = \[2, 2, 32, 4\], got \[1, 2, 32, 4\]"),
        ({3: torch.zeros(5, 1)}, r"scale must have shape \[N\]"),
        ({3: torch.tensor(1.0)}, r"scale must have shape \[N\]"),
        ({0: torch.tensor(1, dtype=torch.uint8)}, r"quantized must have shape \[R, K\]"),
        ({4: torch.zeros(4)}, r"column_sum must have shape \[N\] = \[5\], got \[4\]"),
        ({5: torch.zeros(4)}, r"bias must have shape \[N\] = \[5\], got \[4\]"),
        ({6: 3}, "planes must be 1 or 2, got 3"),
    ],
)
def test_int8_refused(change: dict[int, Any], message: str, cpu_backend: torch.device) -> None:
    args = list(int8_arguments(2, (8, 5), planes=2))
    for place, value in change.items():
        args[place] = value
    with pytest.raises(RuntimeError, match=message):
        ops.packed_linear_int8(*args)


BAD_OUT = [
    (torch.zeros(2, 5), r"out must have shape \[R, N\] = \[3, 5\], got \[2, 5\]"),
    (torch.zeros(3), r"out must have shape \[R, N\] = \[3, 5\], got \[3\]"),
    (torch.zeros(3, 5).double(), "out must be float32, got float64"),
    (torch.zeros(5, 3).t(), "out must be contiguous"),
    (torch.zeros(3, 6), r"out must have shape \[R, N\] = \[3, 5\], got \[3, 6\]"),
]


@pytest.mark.parametrize(("out", "message"), BAD_OUT)
def test_out_refused(out: Tensor, message: str, cpu_backend: torch.device) -> None:
    with pytest.raises(RuntimeError, match=message):
        ops.packed_linear(*arguments(3, (8, 5)), out=out)
    with pytest.raises(RuntimeError, match=message):
        ops.packed_linear_int8(*int8_arguments(3, (8, 5), planes=2), out=out)
    assert not out.any()


def test_x_as_out_is_refused(cpu_backend: torch.device) -> None:
    x, *rest = arguments(3, (5, 5))
    with pytest.raises(RuntimeError, match="out is written, so it must not share memory with x"):
        ops.packed_linear(x, *rest, out=x)


def test_out_is_written_and_returned(cpu_backend: torch.device) -> None:
    memory = torch.full((15, 40), torch.nan)
    for call, args in (
        (ops.packed_linear, arguments(13, (129, 40))),
        (ops.packed_linear_int8, int8_arguments(13, (129, 40))),
    ):
        out = memory.fill_(torch.nan)[1:14]
        assert call(*args, gelu=True, out=out) is out
        assert out.equal(call(*args, gelu=True))
        assert memory[[0, 14]].isnan().all()


# ---- as torch knows them ----


def test_operators_are_registered_well(cpu_backend: torch.device) -> None:
    for dtype, bias, gelu in ((torch.float32, True, True), (torch.bfloat16, False, False)):
        *args, channels = arguments(13, (129, 40), dtype, bias)
        out = torch.empty(13, channels, dtype=dtype)
        torch.library.opcheck(torch.ops.lpd_ext.packed_linear.default, (*args, channels, gelu, out))
    of_bytes = (*int8_arguments(13, (129, 40), 2), True, torch.empty(13, 40))
    torch.library.opcheck(torch.ops.lpd_ext.packed_linear_int8.default, of_bytes)


def test_fake_tensors_tell_shapes_and_dtypes() -> None:
    with FakeTensorMode():
        y = ops.packed_linear(torch.empty(3, 8, dtype=torch.bfloat16), torch.empty(1, 4, 32, 2), None, 5)
        of_bytes = ops.packed_linear_int8(
            torch.empty(4, 8, dtype=torch.uint8), torch.empty(4, 2), torch.empty(1, 2, 32, 4), *[torch.empty(5)] * 3, 2
        )
    assert (y.shape, y.dtype) == ((3, 5), torch.bfloat16)
    assert (of_bytes.shape, of_bytes.dtype) == ((2, 5), torch.float32)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")  # of inductor's own imports
def test_compiles_without_a_graph_break(cpu_backend: torch.device) -> None:
    def both(floats: Arguments, of_bytes: Int8Arguments) -> Tensor:
        return ops.packed_linear(*floats, gelu=True) + ops.packed_linear_int8(*of_bytes)

    args = arguments(13, (129, 40)), int8_arguments(13, (129, 40))
    assert torch.compile(both, fullgraph=True)(*args).equal(both(*args))
