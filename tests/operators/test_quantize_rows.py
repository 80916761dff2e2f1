"""quantize_rows: rows as bytes that are within half a step of what they stand for, by scales that cover each row."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lpd_ext import ops, reference
from lpd_ext.packing import rotate_rows

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = torch.finfo(torch.float32).eps
TINY = torch.finfo(torch.float32).tiny
Quantized = tuple[Tensor, Tensor]

ROWS: dict[str, Callable[[Tensor], Tensor]] = {
    "mixed": lambda x: 3 * x,
    "positive": lambda x: x.abs() + 1,
    "negative": lambda x: -x.abs() - 1,
    "all zero": torch.zeros_like,
    "constant": lambda x: torch.full_like(x, -2.75),
    "one outlier": lambda x: torch.cat([x[:, :-1] / 100, x[:, -1:] + 50], dim=1),
    "denormal": lambda x: x * 1e-40,
    "at the smallest scale": lambda x: x * 254 * TINY,
    "huge": lambda x: x.clamp(-1, 1) * 1.6e38,
    "half of them zero": lambda x: x.relu(),
    "even steps": lambda x: (x * 20).round().clamp(-80, 40) / 8,
}


def random_rows(rows: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(rows + width)).to(dtype)


def assert_quantized(x: Tensor, result: Quantized, levels: int) -> None:
    """The range of each row and 0 in `levels` steps, whose two ends and all bytes are the nearest, in exact arithmetic.

    Near ties float32 decides: 1 / scale, its product with x and the sum are each rounded, by half a unit of `levels`.
    """
    quantized, (scale, zero_point) = result[0], result[1].double().unsqueeze(-1).unbind(1)
    assert (quantized.dtype, quantized.shape) == (torch.uint8, x.shape)
    assert (result[1].dtype, result[1].shape) == (torch.float32, (len(x), 2))
    assert quantized.is_contiguous()
    assert result[1].is_contiguous()
    if x.numel() == 0:
        return
    x = x.double()
    low, high = x.amin(1, keepdim=True).clamp(max=0), x.amax(1, keepdim=True).clamp(min=0)
    span = (high - low) / levels
    floor = 2 * levels * EPS
    # Rounded when subtracted and when divided. Below the smallest normal number 1 / scale would not be one.
    assert torch.where(span < TINY, scale == 1, (scale - span).abs() <= 2 * EPS * span).all()
    assert zero_point.eq(zero_point.round()).all()
    assert zero_point.ge(0).all()
    assert zero_point.le(levels).all()
    assert (zero_point + low / scale).abs().max() <= 0.5 + floor
    position = x / scale + zero_point
    assert (quantized - position.clamp(0, levels)).abs().max() <= 0.5 + floor
    assert quantized.le(levels).all()
    assert (x - scale * (quantized - zero_point)).abs().le(scale * (0.5 + floor)).all()
    assert quantized[x == 0].double().equal(zero_point.expand_as(x)[x == 0])


@pytest.mark.parametrize("levels", [1, 127, 255])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 7, 16, 129, 1024])
@pytest.mark.parametrize("rows", [0, 1, 7])
def test_bytes_are_the_nearest(
    rows: int, width: int, dtype: torch.dtype, levels: int, cpu_backend: torch.device
) -> None:
    x = random_rows(rows, width, dtype)
    assert_quantized(x, ops.quantize_rows(x, levels), levels)


@pytest.mark.parametrize("levels", [127, 255])
@pytest.mark.parametrize("kind", ROWS)
def test_rows_of_every_kind(kind: str, levels: int, cpu_backend: torch.device) -> None:
    for width in (1, 7, 129):
        x = ROWS[kind](random_rows(5, width))
        assert_quantized(x, ops.quantize_rows(x, levels), levels)


def test_ends_of_the_range_and_zero(cpu_backend: torch.device) -> None:
    """Steps without rounding: what is expected can be written down."""
    x = torch.tensor([[-3.0, 0.0, 1.0, 252.0], [0.0, 0.0, 2.0, 510.0], [-255.0, -254.0, -1.0, 0.0]])
    quantized, quantization = ops.quantize_rows(x)
    assert quantized.tolist() == [[0, 3, 4, 255], [0, 0, 1, 255], [0, 1, 254, 255]]
    assert quantization.tolist() == [[1.0, 3.0], [2.0, 0.0], [1.0, 255.0]]
    quantized, quantization = ops.quantize_rows(torch.tensor([[-3.0, 0.0, 1.25, 124.0]]), levels=127)
    assert quantized.tolist() == [[0, 3, 4, 127]]
    assert quantization.tolist() == [[1.0, 3.0]]


def test_levels_default_to_a_whole_byte(cpu_backend: torch.device) -> None:
    x = random_rows(3, 20)
    for found, wanted in zip(ops.quantize_rows(x), ops.quantize_rows(x, 255), strict=True):
        assert found.equal(wanted)


@pytest.mark.parametrize("dtype", DTYPES)
def test_as_the_twin_but_for_ties(dtype: torch.dtype, cpu_backend: torch.device) -> None:
    for width in (1, 7, 129, 1024):
        x = random_rows(50, width, dtype)
        quantized, quantization = ops.quantize_rows(x)
        twins, twins_quantization = reference.quantize_rows(x)
        assert quantization[:, 0].equal(twins_quantization[:, 0])
        same = quantization[:, 1] == twins_quantization[:, 1]  # a zero point at a tie moves the whole row
        assert same.float().mean() >= 0.95
        different = (quantized != twins)[same]
        scale, zero_point = quantization[same].double().unsqueeze(-1).unbind(1)
        position = x[same].double() / scale + zero_point
        assert ((position - position.floor() - 0.5).abs()[different] <= 2 * 255 * EPS).all()


@pytest.mark.parametrize("kind", ROWS)
def test_twin(kind: str) -> None:
    """In float32 by the rule of the kernels; in float64 the very definition."""
    for levels in (127, 255):
        x = ROWS[kind](random_rows(5, 129))
        assert_quantized(x, reference.quantize_rows(x, levels), levels)
        quantized, quantization = reference.quantize_rows(x.double(), levels)
        assert quantization.dtype == torch.float64
        assert_quantized(x, (quantized, quantization.float()), levels)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_rows(dtype: torch.dtype, cpu_backend: torch.device) -> None:
    x = random_rows(7, 129, dtype)
    buffer = torch.full((14, 140), 99.0, dtype=dtype)  # a value that would widen the range
    buffer[::2, 3:132] = x
    before = buffer.clone()
    for found, wanted in zip(ops.quantize_rows(buffer[::2, 3:132]), ops.quantize_rows(x), strict=True):
        assert found.equal(wanted)
    assert buffer.equal(before)
    same_row = ops.quantize_rows(x[:1].expand(5, -1))  # only read, so rows may overlap
    assert same_row[0].equal(ops.quantize_rows(x)[0][:1].expand(5, -1))


def test_rows_and_threads_do_not_matter(cpu_backend: torch.device) -> None:
    x = random_rows(300, 1024)
    expected = ops.quantize_rows(x)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            assert all(map(torch.equal, ops.quantize_rows(x), expected))
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, ops.quantize_rows(x[123:124]), (part[123:124] for part in expected)))


@pytest.mark.parametrize("column", [0, 5, 128])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_not_a_number_shows_in_the_scale_of_its_row(
    value: float, dtype: torch.dtype, column: int, cpu_backend: torch.device
) -> None:
    x = random_rows(3, 129, dtype)
    expected = ops.quantize_rows(x)
    x[1, column] = value
    quantized, quantization = ops.quantize_rows(x)
    assert quantization[1, 0].isnan()
    assert quantization[::2].equal(expected[1][::2])
    assert quantized[::2].equal(expected[0][::2])
    assert reference.quantize_rows(x)[1][:, 0].isnan().tolist() == [False, True, False]


def test_a_range_beyond_float32_is_no_silent_zero(cpu_backend: torch.device) -> None:
    """high - low overflows: what the bytes stand for is then no finite number."""
    x = torch.tensor([[-3e38, 0.0, 3e38]])
    for quantized, quantization in (ops.quantize_rows(x), reference.quantize_rows(x)):
        scale, zero_point = quantization.unsqueeze(-1).unbind(1)
        assert not (scale * (quantized - zero_point)).isfinite().any()


def sylvester(size: int) -> Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], dim=1), torch.cat([matrix, -matrix], dim=1)])
    return matrix


@pytest.mark.parametrize("width", [64, 192, 1024])
def test_the_twins_rotation_is_the_matrix(width: int) -> None:
    x = random_rows(5, width).double()
    by_matrix = torch.kron(sylvester(64), torch.eye(width // 64, dtype=torch.float64))
    assert torch.allclose(rotate_rows(x), x @ by_matrix.t(), rtol=0, atol=1e-12)
    assert torch.allclose(rotate_rows(rotate_rows(x)), 64 * x, rtol=0, atol=1e-11)


@pytest.mark.parametrize("levels", [127, 255])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [64, 192, 1024, 64 * 17, 64 * 36])
@pytest.mark.parametrize("rows", [0, 1, 7])
def test_rotated_rows_are_the_rows_of_the_rotation(
    rows: int, width: int, dtype: torch.dtype, levels: int, cpu_backend: torch.device
) -> None:
    """Bit for bit: the kernel adds in the twin's order."""
    buffer = torch.full((2 * rows, width + 5), 99.0, dtype=dtype)
    x = buffer[::2, 3 : width + 3]
    x.copy_(random_rows(rows, width, dtype))
    rotated = rotate_rows(x)
    assert rotated.dtype == torch.float32
    result = ops.quantize_rows(x, levels, rotate=True)
    assert all(map(torch.equal, result, ops.quantize_rows(rotated, levels)))
    assert_quantized(rotated, result, levels)
    twins = reference.quantize_rows(x, levels, rotate=True)
    assert all(map(torch.equal, twins, reference.quantize_rows(rotated, levels)))


def parts(result: Quantized, planes: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Bytes, scales and zero points, float64 [planes, R, .]."""
    quantized, quantization = (part.double().unflatten(0, (planes, len(part) // planes)) for part in result)
    return quantized, *quantization.split(1, -1)


@pytest.mark.parametrize("run", [ops.quantize_rows, reference.quantize_rows])
@pytest.mark.parametrize("levels", [1, 127, 255])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 7, 64, 129, 1024])
def test_the_second_plane_holds_what_the_first_leaves(
    width: int, dtype: torch.dtype, levels: int, run: Callable[..., Quantized], cpu_backend: torch.device
) -> None:
    for kind in ("mixed", "positive", "all zero", "one outlier", "even steps"):
        x = ROWS[kind](random_rows(7, width)).to(dtype)
        for rotate in [False, True][: 1 + (width % 64 == 0)]:
            result, first = run(x, levels, rotate, planes=2), run(x, levels, rotate)
            assert all(part[:7].equal(whole) for part, whole in zip(result, first, strict=True))
            quantized, scale, zero_point = parts(result)
            assert torch.allclose(scale[1], scale[0] / levels, rtol=2 * EPS)
            assert ((zero_point[1] - levels / 2).abs() <= 0.5).all()
            assert quantized.max() <= levels
            given = rotate_rows(x) if rotate else x
            found = (scale * (quantized - zero_point)).sum(0)
            # Half a step of the second plane; the ends of what is left fall on a tie of an odd number of levels.
            floor = scale[1] * 0.5 + 4 * levels * EPS * scale[0]
            assert ((found - given.double()).abs() <= floor + scale[1] * 0.5 * (levels % 2)).all()
            assert ((found - given.double()).abs() <= floor).double().mean() >= (0.9 if levels > 1 else 0.4)


def test_no_rows_in_two_planes(cpu_backend: torch.device) -> None:
    quantized, quantization = ops.quantize_rows(torch.empty(0, 24), planes=2)
    assert quantized.shape == (0, 24)
    assert quantization.shape == (0, 2)


def test_a_rotated_outlier_costs_the_others_little(cpu_backend: torch.device) -> None:
    x = random_rows(50, 1024)
    x[:, 300] = 40
    errors = []
    for rotate in (False, True):
        quantized, quantization = ops.quantize_rows(x, rotate=rotate)
        scale, zero_point = quantization.unsqueeze(-1).unbind(1)
        found = scale * (quantized - zero_point)
        errors.append(float(((rotate_rows(found) / 64 if rotate else found) - x).square().mean().sqrt()))
    assert errors[1] < 0.4 * errors[0]


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_not_a_number_shows_in_the_scale_of_a_rotated_row(value: float, cpu_backend: torch.device) -> None:
    x = random_rows(3, 192)
    x[1, 70] = value
    for quantized, quantization in (ops.quantize_rows(x, rotate=True), reference.quantize_rows(x, rotate=True)):
        assert quantization[:, 0].isnan().tolist() == [False, True, False]
        assert quantized.shape == (3, 192)
    assert ops.quantize_rows(x, planes=2)[1][:, 0].isnan().tolist() == [False, True, False] * 2


# Wrong twins: what the rule above must not let through.
def mistaken(x: Tensor, mistake: str, levels: int = 255) -> Quantized:
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    if mistake != "zero left out of the range":
        low, high = low.clamp(max=0), high.clamp(min=0)
    scale = (high - low) / (levels + 1 if mistake == "one level too many" else levels)
    zero_point = low / scale if mistake == "sign of the zero point" else -low / scale
    zero_point = zero_point if mistake == "zero point not whole" else zero_point.round()
    position = x / scale + zero_point
    rounded = position.floor() if mistake == "rounded down" else position.round()
    rounded = rounded if mistake == "not clamped" else rounded.clamp(0, levels)
    quantized = rounded.to(torch.int64).to(torch.uint8)
    if mistake == "last column left out":
        quantized[:, -1] = 0
    elif mistake == "one scale for all rows":
        return reference.quantize_rows(x.view(1, -1))[0].view_as(x), reference.quantize_rows(x.view(1, -1))[1].expand(
            len(x), -1
        ).contiguous()
    elif mistake == "zero point first":
        return quantized, torch.cat([zero_point, scale], dim=1)
    return quantized, torch.cat([scale, zero_point], dim=1)


MISTAKES = [
    "zero left out of the range",
    "one level too many",
    "sign of the zero point",
    "zero point not whole",
    "rounded down",
    "not clamped",
    "last column left out",
    "one scale for all rows",
    "zero point first",
]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_rule_rejects(mistake: str) -> None:
    if mistake == "not clamped":  # 254.5 above a zero point of 0.5, both of which are rounded up
        x = torch.tensor([[-0.5, 254.5, 0.0], [-1.5, 253.5, 0.0]])
    else:
        x = torch.cat([random_rows(7, 129), random_rows(7, 129).abs() + 1])
    assert_quantized(x, mistaken(x, "none"), 255)
    with pytest.raises(AssertionError):
        assert_quantized(x, mistaken(x, mistake), 255)


WRONG: dict[str, tuple[Callable[[Tensor], tuple[Tensor, int]], str]] = {
    "dtype": (lambda x: (x.double(), 255), "x must be float32, bfloat16 or float16, got float64"),
    "integers": (lambda x: (x.to(torch.uint8), 255), "x must be float32, bfloat16 or float16, got uint8"),
    "shape": (lambda x: (x[0], 255), r"x must have shape \[R, K\] = \[any, any\], got \[24\]"),
    "columns apart": (lambda x: (x.t().contiguous().t(), 255), "x must be contiguous in its last dimension, got"),
    "no levels": (lambda x: (x, 0), r"levels must be in \[1, 255\], got 0"),
    "negative levels": (lambda x: (x, -1), r"levels must be in \[1, 255\], got -1"),
    "more than a byte": (lambda x: (x, 256), r"levels must be in \[1, 255\], got 256"),
    "levels beyond 32 bits": (lambda x: (x, 2**32 + 127), r"levels must be in \[1, 255\], got 4294967423"),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_name_the_argument(name: str, cpu_backend: torch.device) -> None:
    spoil, message = WRONG[name]
    with pytest.raises(RuntimeError, match=message):
        ops.quantize_rows(*spoil(random_rows(4, 24)))


@pytest.mark.parametrize("width", [24, 63, 65])
def test_widths_that_cannot_be_rotated(width: int, cpu_backend: torch.device) -> None:
    with pytest.raises(RuntimeError, match=f"x: K must be a multiple of 64 to be rotated, got {width}"):
        ops.quantize_rows(random_rows(4, width), rotate=True)


@pytest.mark.parametrize("planes", [0, 3, -1, 2**32 + 1])
def test_numbers_of_planes_that_there_are_not(planes: int, cpu_backend: torch.device) -> None:
    with pytest.raises(RuntimeError, match=f"planes must be 1 or 2, got {planes}"):
        ops.quantize_rows(random_rows(4, 24), planes=planes)


def test_no_columns(cpu_backend: torch.device) -> None:
    quantized, quantization = ops.quantize_rows(torch.empty(3, 0))
    assert quantized.shape == (3, 0)
    assert quantization.tolist() == [[1.0, 0.0]] * 3


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: torch.dtype, cpu_backend: torch.device) -> None:
    for x in (random_rows(4, 24, dtype), random_rows(8, 30, dtype)[::2, 2:26], random_rows(0, 24, dtype)):
        torch.library.opcheck(torch.ops.lpd_ext.quantize_rows.default, (x, 127, False, 1))
    torch.library.opcheck(torch.ops.lpd_ext.quantize_rows.default, (random_rows(4, 128, dtype), 127, True, 2))


def test_fake_tensors_tell_shapes_and_dtypes() -> None:
    with FakeTensorMode():
        quantized, quantization = ops.quantize_rows(torch.empty(5, 24, dtype=torch.bfloat16), 127)
    assert (quantized.shape, quantized.dtype) == ((5, 24), torch.uint8)
    assert (quantization.shape, quantization.dtype) == ((5, 2), torch.float32)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")  # of inductor's own imports
def test_compiles_without_a_graph_break(cpu_backend: torch.device) -> None:
    x = random_rows(4, 24)
    found = torch.compile(ops.quantize_rows, fullgraph=True)(x, 127)
    assert all(map(torch.equal, found, ops.quantize_rows(x, 127)))
