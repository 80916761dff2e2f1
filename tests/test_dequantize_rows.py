"""dequantize_rows, gelu_quantize_rows: what a product of bytes means, in place, as accurate as torch; its bytes."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from test_quantize_rows import assert_quantized
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lpd_ext import ops, reference

EPS = torch.finfo(torch.float32).eps
Arguments = tuple[Tensor, Tensor, Tensor, Tensor | None]


def random_arguments(rows: int, width: int, bias: bool = True) -> Arguments:
    """As the products of a layer with 100 inputs have them: about -3 to 3 is what they mean."""
    generator = torch.Generator().manual_seed(rows + width)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    zero_point = torch.randint(0, 256, (rows, 1), generator=generator).float()
    scale = 0.05 * normal(rows, 1).exp()
    column_sum = normal(width)
    product = normal(rows, width) / scale + zero_point * column_sum
    return product, torch.cat([scale, zero_point], dim=1), column_sum, normal(width) if bias else None


def to_double(args: Arguments) -> Arguments:
    product, quantization, column_sum, bias = args
    return product.double(), quantization.double(), column_sum.double(), None if bias is None else bias.double()


def cloned(args: Arguments) -> Arguments:
    product, quantization, column_sum, bias = args
    return product.clone(), quantization.clone(), column_sum.clone(), None if bias is None else bias.clone()


def same_bits(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b if a is None or b is None else a.view(torch.int32).equal(b.view(torch.int32))


def meaning(args: Arguments) -> Tensor:
    """What the twin makes of the product; the arguments stay as they are."""
    product = args[0].clone()
    reference.dequantize_rows(product, *args[1:])
    return product


def floor_of(args: Arguments) -> Tensor:
    """A rounding of each term: what cancels in product - zero_point * column_sum has been rounded before."""
    product, quantization, column_sum, bias = to_double(args)
    scale, zero_point = quantization.unsqueeze(-1).unbind(1)
    return EPS * (scale * (product.abs() + zero_point * column_sum.abs()) + (0 if bias is None else bias.abs()))


def assert_as_accurate(y: Tensor, args: Arguments) -> None:
    """Error against float64 at most twice that of the twin in float32, plus a floor."""
    exact, twins = meaning(to_double(args)), meaning(args)
    assert (y.dtype, y.shape) == (torch.float32, exact.shape)
    assert ((y - exact).abs() <= 2 * (twins - exact).abs() + floor_of(args)).all()


def run(args: Arguments) -> Tensor:
    given, before = cloned(args), cloned(args)
    ops.dequantize_rows(*given)
    assert all(map(same_bits, given[1:], before[1:]))  # `product` alone is written
    return given[0]


def run_gelu(args: Arguments, levels: int = 255) -> tuple[Tensor, Tensor, Tensor]:
    """gelu(y), its bytes, and their scales and zero points."""
    given, before = cloned(args), cloned(args)
    quantized, quantization = ops.gelu_quantize_rows(*given, levels=levels)
    assert all(map(same_bits, given[1:], before[1:]))
    return given[0], quantized, quantization


def assert_gelu_as_accurate(found: Tensor, y: Tensor, floor: Tensor | float = 0.0) -> None:
    """Error against float64 at most twice that of torch's gelu, plus what Abramowitz and Stegun 7.1.26 leaves.

    gelu(y) = |y| (1/2 - erfc/2) + y/2: the formula's erfc is off by up to 1.5e-7, and terms of up to 1.45 that add to
    it are each rounded (EPS / 2) before they are halved: 4 EPS / 2 are allowed. Both count times |y|. `floor`: of y.
    """
    exact = F.gelu(y.double())
    left = (1.5e-7 / 2 + 4 * EPS / 2) * y.double().abs()
    # 1.13: the steepest slope of gelu.
    assert ((found - exact).abs() <= 2 * (F.gelu(y.float()) - exact).abs() + left + 1.13 * floor).all()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("width", [1, 7, 16, 129, 1024])
@pytest.mark.parametrize("rows", [0, 1, 7])
def test_means_what_it_should(rows: int, width: int, bias: bool, cpu_backend: torch.device) -> None:
    args = random_arguments(rows, width, bias)
    assert_as_accurate(run(args), args)


@pytest.mark.parametrize("levels", [127, 255])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("width", [1, 7, 16, 129, 1024])
@pytest.mark.parametrize("rows", [0, 1, 7])
def test_gelu_and_its_bytes(rows: int, width: int, bias: bool, levels: int, cpu_backend: torch.device) -> None:
    args = random_arguments(rows, width, bias)
    activated, *result = run_gelu(args, levels)
    y = meaning(to_double(args))
    assert_gelu_as_accurate(activated, y, 2 * (meaning(args) - y).abs() + floor_of(args))
    assert_quantized(activated, (result[0], result[1]), levels)
    assert all(map(torch.equal, result, ops.quantize_rows(activated, levels)))


@pytest.mark.parametrize("levels", [127, 255])
@pytest.mark.parametrize("width", [64, 192, 1024])
@pytest.mark.parametrize("rows", [0, 1, 7])
def test_rotated_bytes_of_gelu(rows: int, width: int, levels: int, cpu_backend: torch.device) -> None:
    args = random_arguments(rows, width)
    plain, given = cloned(args), cloned(args)
    ops.gelu_quantize_rows(*plain, levels=levels)
    result = ops.gelu_quantize_rows(*given, levels=levels, out_rotate=True)
    assert given[0].equal(plain[0])  # GELU itself is left, not its rotation
    assert all(map(torch.equal, result, ops.quantize_rows(given[0], levels, rotate=True)))
    twins = reference.gelu_quantize_rows(*given, levels=levels, out_rotate=True)
    assert all(map(torch.equal, twins, reference.quantize_rows(given[0], levels, rotate=True)))


@pytest.mark.parametrize("out_planes", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("width", [1, 7, 64, 129, 1024])
@pytest.mark.parametrize("rows", [0, 1, 7])
def test_two_planes_are_summed(rows: int, width: int, bias: bool, out_planes: int, cpu_backend: torch.device) -> None:
    args = random_arguments(2 * rows, width, bias)
    product, quantization, column_sum, added = args
    quantization[rows:, 0] /= 100
    once = 0 if added is None else added.double()
    halves = [
        meaning((product[part].double(), quantization[part].double(), column_sum.double(), None))
        for part in (slice(rows), slice(rows, None))
    ]
    floor = floor_of(args).unflatten(0, (2, rows)).sum(0)
    for run_it in (ops.dequantize_rows, reference.dequantize_rows):
        given = cloned(args)
        run_it(*given, planes=2)
        assert ((given[0][:rows] - (halves[0] + halves[1] + once)).abs() <= 3 * floor).all()
    given, activated = cloned(args), cloned(args)
    ops.dequantize_rows(*given, planes=2)
    found = ops.gelu_quantize_rows(*activated, 2, 127, out_planes=out_planes)
    assert_gelu_as_accurate(activated[0][:rows], given[0][:rows].double(), floor)
    assert all(map(torch.equal, found, ops.quantize_rows(activated[0][:rows], 127, planes=out_planes)))


def test_planes_that_do_not_fit_write_nothing(cpu_backend: torch.device) -> None:
    for rows, planes, message in (
        (5, 2, "product: its rows must be in 2 planes, got 5"),
        (4, 3, "planes must be 1 or 2"),
    ):
        args = random_arguments(rows, 24)
        before = args[0].clone()
        for operator in (ops.dequantize_rows, ops.gelu_quantize_rows):
            with pytest.raises(RuntimeError, match=message):
                operator(*args, planes=planes)
            assert args[0].equal(before)
    args = random_arguments(4, 24)
    before = args[0].clone()
    with pytest.raises(RuntimeError, match="out_planes must be 1 or 2, got 0"):
        ops.gelu_quantize_rows(*args, out_planes=0)
    assert args[0].equal(before)


def test_gelu_is_accurate_everywhere(cpu_backend: torch.device) -> None:
    y = torch.cat([torch.linspace(-12, 12, 100_001), torch.logspace(-30, 30, 1001), -torch.logspace(-30, 30, 1001)])
    args = y[None], torch.tensor([[1.0, 0.0]]), torch.zeros(len(y)), None
    assert_gelu_as_accurate(run_gelu(args)[0], y[None])


def test_gelu_levels_default_to_a_whole_byte(cpu_backend: torch.device) -> None:
    args = random_arguments(3, 20)
    for found, wanted in zip(ops.gelu_quantize_rows(*cloned(args)), run_gelu(args, 255)[1:], strict=True):
        assert found.equal(wanted)


@pytest.mark.parametrize("bias", [True, False])
def test_twins(bias: bool) -> None:
    args = random_arguments(7, 129, bias)
    product, quantization, column_sum, added = args
    wanted = torch.empty(7, 129, dtype=torch.float64)
    for r in range(7):
        scale, zero_point = quantization[r].tolist()
        for n in range(129):
            centred = product[r, n].item() - zero_point * column_sum[n].item()
            wanted[r, n] = scale * centred + (0 if added is None else added[n].item())
    y = meaning(args)
    assert ((y - wanted).abs() <= 2 * floor_of(args)).all()
    activated = product.clone()
    result = reference.gelu_quantize_rows(activated, *args[1:], levels=127)
    assert activated.equal(F.gelu(y))
    assert all(map(torch.equal, result, reference.quantize_rows(F.gelu(y), 127)))


@pytest.mark.parametrize("with_gelu", [False, True])
def test_strided_rows(with_gelu: bool, cpu_backend: torch.device) -> None:
    """Rows of a larger buffer: same bits as contiguous ones, and nothing around them is touched."""
    args = random_arguments(7, 129)
    buffer = torch.full((14, 140), 77.0)
    buffer[::2, 3:132] = args[0]
    if with_gelu:
        wanted, *result = run_gelu(args)
        assert all(map(torch.equal, ops.gelu_quantize_rows(buffer[::2, 3:132], *args[1:]), result))
    else:
        wanted = run(args)
        ops.dequantize_rows(buffer[::2, 3:132], *args[1:])
    assert buffer[::2, 3:132].equal(wanted)
    buffer[::2, 3:132] = 77.0
    assert buffer.eq(77.0).all()


def test_rows_and_threads_do_not_matter(cpu_backend: torch.device) -> None:
    args = random_arguments(300, 1024)
    expected, expected_gelu = run(args), run_gelu(args)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            assert run(args).equal(expected)
            assert all(map(torch.equal, run_gelu(args), expected_gelu))
    finally:
        torch.set_num_threads(threads)
    alone = args[0][123:124], args[1][123:124], *args[2:]
    assert run(alone).equal(expected[123:124])
    assert all(map(torch.equal, run_gelu(alone), (part[123:124] for part in expected_gelu)))


@pytest.mark.parametrize("argument", ["scale", "product", "bias", "column_sum"])
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_not_a_number_is_kept(value: float, argument: str, cpu_backend: torch.device) -> None:
    """A row whose activations were not finite (its scale is NaN) must reach the sampler as such."""
    args = random_arguments(3, 129)
    if argument == "scale":
        args[1][1, 0] = value
        hit = (1, slice(None))
    elif argument == "product":
        args[0][1, 128] = value
        hit = (1, 128)
    else:
        array = args[2] if argument == "column_sum" else args[3]
        assert array is not None
        array[128] = value
        hit = (slice(None), 128)
    y = run(args)
    touched = torch.zeros(3, 129, dtype=torch.bool)
    touched[hit] = True
    assert y.isfinite().equal(~touched)
    activated, _, quantization = run_gelu(args)
    assert activated[~touched].isfinite().all()
    assert activated.isfinite()[touched].logical_not().equal(~F.gelu(y)[touched].isfinite())
    assert quantization[:, 0].isnan().equal((~activated.isfinite()).any(1))


# Wrong twins: what the rules above must not let through.
MISTAKES: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "sign of the zero point": lambda p, s, z, c, b: s * (p + z * c) + b,
    "bias left out": lambda p, s, z, c, b: s * (p - z * c),
    "bias scaled": lambda p, s, z, c, b: s * (p - z * c + b),
    "scale and zero point swapped": lambda p, s, z, c, b: z * (p - s * c) + b,
    "column sums left out": lambda p, s, z, c, b: s * (p - z) + b,
    "zero point left out": lambda p, s, z, c, b: s * p + b,
    "last column left out": lambda p, s, z, c, b: torch.cat([(s * (p - z * c) + b)[:, :-1], p[:, -1:]], dim=1),
    "scale of the row before": lambda p, s, z, c, b: s.roll(1, 0) * (p - z * c) + b,
    "computed in bfloat16": lambda p, s, z, c, b: (s * (p - z * c) + b).bfloat16().float(),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_the_rule_rejects(name: str) -> None:
    args = random_arguments(7, 129)
    product, quantization, column_sum, bias = args
    assert bias is not None
    with pytest.raises(AssertionError):
        assert_as_accurate(
            MISTAKES[name](product, *quantization.unsqueeze(-1).unbind(1), column_sum, bias),
            args,
        )


@pytest.mark.parametrize("mistake", ["tanh form", "no activation", "Phi(y) alone", "erfc of six digits"])
def test_the_rule_for_gelu_rejects(mistake: str) -> None:
    y = torch.linspace(-12, 12, 10_001)
    wrong = {
        "tanh form": F.gelu(y, approximate="tanh"),
        "no activation": y,
        "Phi(y) alone": F.gelu(y) / y,
        "erfc of six digits": F.gelu(y) * (1 + 1e-6),
    }[mistake]
    assert_gelu_as_accurate(F.gelu(y), y)
    with pytest.raises(AssertionError):
        assert_gelu_as_accurate(wrong, y)


WRONG: dict[str, tuple[Callable[[Arguments], Arguments], str]] = {
    "product dtype": (lambda a: (a[0].double(), *a[1:]), "product must be float32, got float64"),
    "product shape": (lambda a: (a[0][0], *a[1:]), r"product must have shape \[R, N\] = \[any, any\], got \[24\]"),
    "product columns apart": (
        lambda a: (a[0].repeat(1, 2)[:, ::2], *a[1:]),
        "product must be contiguous in its last dimension, got",
    ),
    "product rows overlap": (
        lambda a: (a[0][:1].expand(4, -1), *a[1:]),
        "product is written, so its rows must not overlap",
    ),
    "quantization dtype": (lambda a: (a[0], a[1].double(), *a[2:]), "quantization must be float32, got float64"),
    "quantization of fewer rows": (
        lambda a: (a[0], a[1][:3], *a[2:]),
        r"quantization must have shape \[R, 2\] = \[4, 2\], got \[3, 2\]",
    ),
    "quantization transposed": (
        lambda a: (a[0], a[1].t(), *a[2:]),
        r"quantization must have shape \[R, 2\] = \[4, 2\], got \[2, 4\]",
    ),
    "quantization stride": (
        lambda a: (a[0], a[1].t().contiguous().t(), *a[2:]),
        "quantization must be contiguous",
    ),
    "column_sum dtype": (
        lambda a: (*a[:2], a[2].to(torch.int32), a[3]),
        "column_sum must be float32, got int32",
    ),
    "column_sum shape": (
        lambda a: (*a[:2], a[2][:8], a[3]),
        r"column_sum must have shape \[N\] = \[24\], got \[8\]",
    ),
    "column_sum stride": (
        lambda a: (*a[:2], a[2].repeat_interleave(2)[::2], a[3]),
        "column_sum must be contiguous",
    ),
    "bias dtype": (lambda a: (*a[:3], a[2].half()), "bias must be float32, got float16"),
    "bias shape": (lambda a: (*a[:3], a[2][None]), r"bias must have shape \[N\] = \[24\], got \[1, 24\]"),
    "bias stride": (lambda a: (*a[:3], a[2].repeat_interleave(2)[::2]), "bias must be contiguous"),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_name_the_argument_and_write_nothing(name: str, cpu_backend: torch.device) -> None:
    spoil, message = WRONG[name]
    args = spoil(random_arguments(4, 24))
    before = args[0].clone()
    for operator in (ops.dequantize_rows, ops.gelu_quantize_rows):
        with pytest.raises(RuntimeError, match=message):
            operator(*args)
        assert args[0].equal(before)


@pytest.mark.parametrize("levels", [0, -1, 256, 2**32 + 127])
def test_wrong_levels_write_nothing(levels: int, cpu_backend: torch.device) -> None:
    args = random_arguments(4, 24)
    before = args[0].clone()
    with pytest.raises(RuntimeError, match=rf"levels must be in \[1, 255\], got {levels}"):
        ops.gelu_quantize_rows(*args, levels=levels)
    assert args[0].equal(before)


def test_a_width_that_cannot_be_rotated_writes_nothing(cpu_backend: torch.device) -> None:
    args = random_arguments(4, 24)
    before = args[0].clone()
    with pytest.raises(RuntimeError, match="product: N must be a multiple of 64 to be rotated, got 24"):
        ops.gelu_quantize_rows(*args, out_rotate=True)
    assert args[0].equal(before)


@pytest.mark.parametrize("bias", [True, False])
def test_opcheck(bias: bool, cpu_backend: torch.device) -> None:
    args = random_arguments(4, 24, bias)
    torch.library.opcheck(torch.ops.lpd_ext.dequantize_rows.default, (*cloned(args), 1))
    torch.library.opcheck(torch.ops.lpd_ext.gelu_quantize_rows.default, (*cloned(args), 1, 127, False, 1))
    args = random_arguments(4, 128, bias)
    torch.library.opcheck(torch.ops.lpd_ext.gelu_quantize_rows.default, (*cloned(args), 2, 127, True, 2))


def test_fake_tensors_tell_shapes_and_dtypes() -> None:
    with FakeTensorMode():
        args = torch.empty(5, 24), torch.empty(5, 2), torch.empty(24), None
        assert ops.dequantize_rows(*args) is None
        quantized, quantization = ops.gelu_quantize_rows(*args)
    assert (quantized.shape, quantized.dtype) == ((5, 24), torch.uint8)
    assert (quantization.shape, quantization.dtype) == ((5, 2), torch.float32)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")  # of inductor's own imports
def test_compiles_without_a_graph_break(cpu_backend: torch.device) -> None:
    def both(first: Arguments, second: Arguments) -> tuple[Tensor, Tensor]:
        ops.dequantize_rows(*first)
        return ops.gelu_quantize_rows(*second, levels=127)

    first, second = random_arguments(4, 24), random_arguments(5, 24, bias=False)
    compiled_first, compiled_second = cloned(first), cloned(second)
    found = torch.compile(both, fullgraph=True)(compiled_first, compiled_second)
    activated, *wanted = run_gelu(second, 127)
    assert all(map(torch.equal, found, wanted))
    assert compiled_first[0].equal(run(first))
    assert compiled_second[0].equal(activated)
