"""Fuzzing of the operators: random calls, half of them spoilt, each judged by its twin or by how it was refused.

A call that is right must do what its twin does, by the rule of the operators' tests: error against float64 at most
twice that of the same torch operations, and a floor. A refusal must be a RuntimeError, ValueError or TypeError and
leave every argument as it was. fuzz.py runs it in processes of its own: a crash must not take the tests with it.
"""

from __future__ import annotations

import math
import warnings
from contextlib import nullcontext

import emulation
import numpy as np
import torch
import torch.nn.functional as F
from operator_calls import CALLS, FLOATS, WRITTEN, Call, Draw
from torch import Tensor

from lpd_ext import _C, ops, reference
from lpd_ext.packing import rotate_rows, unpack_weight

EPS = torch.finfo(torch.float32).eps
HUGE = (2**31, 2**32, 2**33, 2**40)
INTEGERS = (-1, 0, 1, 2, 3, 255, 256, 2**31 - 1, *HUGE, 2**62, 2**63 - 1, -(2**31), -(2**63))
NUMBERS = (0.0, -1.0, 1e-300, 1e300, math.inf, -math.inf, math.nan)
SLOW_TWINS = {"locality_order": 0.2, "sample_tokens": 0.5}  # how often they are drawn
TENSOR_FAULTS = (
    *("dtype", "dims", "size", "expanded", "huge and empty", "strides", "overlap", "shared", "values", "values"),
    *("gradient", "none"),
)
EXTREMES = (1e15, -1e19, 1e30, -3e38, math.inf, -math.inf, math.nan)


# ---- spoiling ----


def _other_dtype(draw: Draw, t: Tensor) -> Tensor:
    return t.detach().to(draw.choice((*FLOATS, torch.float64, torch.int32, torch.int64, torch.uint8, torch.bool)))


def _other_dims(draw: Draw, t: Tensor) -> Tensor:
    if t.dim() == 0 or draw.random() < 0.3:
        return t.unsqueeze(0)
    return draw.choice((lambda: t.flatten(), lambda: t.sum(0).to(t.dtype), lambda: t.reshape(-1)[:1].squeeze(0)))()


def _other_size(draw: Draw, t: Tensor) -> Tensor:
    if t.dim() == 0:
        return t
    dim = draw.randrange(t.dim())
    if draw.random() < 0.3:
        return torch.cat([t, t], dim)
    return t.narrow(dim, 0, draw.choice((0, t.shape[dim] // 2, max(t.shape[dim] - 1, 0))))


def _expanded(draw: Draw, t: Tensor) -> Tensor:
    if t.dim() == 0 or t.numel() == 0:
        return t
    dim = draw.randrange(t.dim())
    size = draw.choice((t.shape[dim], t.shape[dim], *HUGE))
    return t.narrow(dim, 0, 1).expand(*(size if i == dim else -1 for i in range(t.dim())))


def _huge_and_empty(draw: Draw, t: Tensor) -> Tensor:
    if t.dim() < 2 or t.numel() == 0:
        return t
    empty, huge = draw.sample(range(t.dim()), 2)
    t = t.narrow(empty, 0, 0).narrow(huge, 0, 1)
    return t.expand(*(draw.choice(HUGE) if i == huge else -1 for i in range(t.dim())))


def _other_strides(draw: Draw, t: Tensor) -> Tensor:
    if t.dim() == 0:
        return t
    if t.dim() > 1 and draw.random() < 0.5:
        a, b = draw.sample(range(t.dim()), 2)
        return t.transpose(a, b).contiguous().transpose(a, b)
    return torch.stack([t, t], -1)[..., 0]


def _odd_strides(draw: Draw, t: Tensor, memory: Tensor | None = None) -> Tensor:
    """The same shape in its own memory or in that of another tensor, wherever it fits."""
    memory = t if memory is None else memory
    buffer = torch.empty(0, dtype=t.dtype).set_(memory.untyped_storage())
    strides = [draw.choice((stride, stride, 1, 2, draw.randint(0, 40))) for stride in t.stride()]
    reach = sum(stride * max(size - 1, 0) for size, stride in zip(t.shape, strides, strict=True)) + 1
    if reach > len(buffer):
        return t
    return buffer.as_strided(t.shape, strides, draw.randint(0, len(buffer) - reach))


def _other_values(draw: Draw, t: Tensor) -> Tensor:
    if t.numel() == 0:
        return t
    t = t.clone()
    place = tuple(draw.randrange(size) for size in t.shape)
    if t.dtype.is_floating_point:
        t[place] = draw.choice(EXTREMES)
    elif t.dtype != torch.bool:
        limits = torch.iinfo(t.dtype)
        t[place] = min(max(draw.choice(INTEGERS), limits.min), limits.max)
    return t


def spoil(draw: Draw, name: str, call: Call) -> str:
    """Change one argument; what was done to it."""
    argument = draw.choice(list(call))
    value = call[argument]
    if isinstance(value, bool):
        call[argument] = not value
        return f"{argument} flipped"
    if isinstance(value, int):
        call[argument] = draw.choice(INTEGERS)
    elif isinstance(value, float):
        call[argument] = draw.choice(NUMBERS)
    elif isinstance(value, Tensor):
        if any(size > 2**20 for size in value.shape):
            return f"{argument} kept"
        how = draw.choice(TENSOR_FAULTS)
        if how == "values" and name.startswith("packed") and argument == "weight":
            return f"{argument} kept"  # what pads a packed weight must be zeros: 0 * NaN would be seen
        tensors = [t for key, t in call.items() if isinstance(t, Tensor) and key != argument]
        if how == "none":
            call[argument] = None
        elif how == "gradient":
            call[argument] = value.detach().requires_grad_() if value.dtype.is_floating_point else value
        elif how == "shared":
            call[argument] = _odd_strides(draw, value, draw.choice(tensors)) if tensors else value
        else:
            change = {
                "dtype": _other_dtype,
                "dims": _other_dims,
                "size": _other_size,
                "expanded": _expanded,
                "huge and empty": _huge_and_empty,
                "strides": _other_strides,
                "overlap": _odd_strides,
                "values": _other_values,
            }[how]
            call[argument] = change(draw, value)
        return f"{argument} {how}"
    return f"{argument} = {call[argument]}"


# ---- judging ----


def tensors_of(call: Call) -> dict[str, Tensor]:
    return {name: value for name, value in call.items() if isinstance(value, Tensor)}


def _bytes(t: Tensor) -> np.ndarray:
    buffer = torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage())
    return buffer.numpy()


class Memory:
    """The bytes of all arguments as they were, and the versions."""

    def __init__(self, call: Call) -> None:
        self.tensors = tensors_of(call)
        self.before = {t.untyped_storage().data_ptr(): _bytes(t.detach()).copy() for t in self.tensors.values()}
        self.versions = {name: t._version for name, t in self.tensors.items()}

    def copy(self, call: Call, dtype: torch.dtype | None = None) -> Call:
        """The call as it was, in memory of its own; in another dtype where it had floats."""
        copies: Call = dict(call)
        for name, t in self.tensors.items():
            buffer = torch.from_numpy(self.before[t.untyped_storage().data_ptr()].copy())
            empty = torch.empty(0, dtype=t.dtype).set_(buffer.untyped_storage())
            copy = empty.as_strided(t.shape, t.stride(), t.storage_offset()) if len(buffer) else t.detach().clone()
            copies[name] = copy.to(dtype) if dtype and t.dtype.is_floating_point else copy
        return copies

    def assert_unchanged(self, besides: tuple[str, ...] = ()) -> None:
        """Every byte outside of the tensors named."""
        for name, t in self.tensors.items():
            now, before = (_bytes(t.detach()).copy(), self.before[t.untyped_storage().data_ptr()].copy())
            for other in besides:
                if other not in self.tensors or not len(now):
                    continue
                view = self.tensors[other].detach()
                if view.untyped_storage().data_ptr() == t.untyped_storage().data_ptr():
                    for data in (now, before):
                        whole = torch.empty(0, dtype=view.dtype).set_(torch.from_numpy(data).untyped_storage())
                        whole.as_strided(view.shape, view.stride(), view.storage_offset()).zero_()
            assert np.array_equal(now, before), f"bytes of {name} changed"

    def assert_no_overlap(self, written: str) -> None:
        """By marking every byte that the tensor and the others occupy."""
        t = self.tensors[written].detach()
        if t.numel() == 0:
            return
        pointer, size = t.untyped_storage().data_ptr(), t.untyped_storage().nbytes() // t.element_size()
        seen = torch.zeros(size, dtype=torch.int32)
        view = seen.as_strided(t.shape, t.stride(), t.storage_offset())
        places = torch.arange(size).as_strided(t.shape, t.stride(), t.storage_offset()).flatten()
        assert len(places.unique()) == len(places), f"{written} overlaps with itself"
        view.fill_(1)
        own = seen.repeat_interleave(t.element_size()).bool()
        for name, other in self.tensors.items():
            if name == written or other.untyped_storage().data_ptr() != pointer or other.numel() == 0:
                continue
            count = len(own) // other.element_size()
            per_element = own[: count * other.element_size()].view(count, -1).any(1)
            shared = per_element.as_strided(other.shape, other.stride(), other.storage_offset()).any()
            assert not shared, f"{written} shares memory with {name}"


def assert_near(ours: Tensor, exact: Tensor, plain: Tensor, size: Tensor | float, extreme: bool) -> None:
    """Error against float64 at most twice that of the row in plain torch, and the rounding of numbers of that size.

    Where a value is extreme, what overflows may be infinite or NaN, but not a number like any other.
    """
    assert ours.shape == exact.shape, f"shape {list(ours.shape)}, wanted {list(exact.shape)}"
    assert ours.dtype == plain.dtype, f"dtype {ours.dtype}, wanted {plain.dtype}"
    if ours.numel() == 0:
        return
    found, plain = ours.detach().double(), plain.double()
    finite = exact.isfinite() & plain.isfinite()
    assert extreme or found[finite].isfinite().all(), "not finite"
    errors = torch.where(finite, (plain - exact).abs(), 0.0).amax(-1, keepdim=True)
    allowed = 2 * errors + 4 * EPS * size + 2 * torch.finfo(ours.dtype).eps * exact.abs() + 1e-37
    wrong = finite & found.isfinite() & ((found - exact).abs() > allowed)
    assert not wrong.any(), f"found {found[wrong][:3].tolist()}, wanted {exact[wrong][:3].tolist()}"
    # In float32 and in float64 no number: then it is none.
    plausible = ~exact.isfinite() & ~plain.isfinite() & (found.abs() < 1e15)
    assert not plausible.any(), f"found {found[plausible][:3].tolist()} where nothing finite is right"


def assert_same(ours: Tensor, wanted: Tensor, what: str) -> None:
    assert ours.shape == wanted.shape, f"{what}: shape {list(ours.shape)}, wanted {list(wanted.shape)}"
    found, right = (
        t.detach().flatten().clone(memory_format=torch.contiguous_format).view(torch.uint8) for t in (ours, wanted)
    )  # NaN equals NaN
    assert found.equal(right), f"{what} differs"


def _judge_attention(exact: Call, plain: Call, after: Call, results: tuple[Tensor, ...], extreme: bool) -> None:
    for name in ("k_cache", "v_cache"):
        assert_same(after[name], plain[name], name)
    ours, wanted, torchs = results
    if not extreme:
        size = 4 * wanted.abs().max() if wanted.numel() else 0.0
        assert_near(ours, wanted, torchs, size, extreme)


def _near_boundary(probabilities: Tensor, seed: Tensor, cell: Tensor, token: Tensor) -> Tensor:
    """Whether the drawn token [M] is the twin's but for a level whose random number lies at the boundary."""
    vocab_size = probabilities.shape[-1]
    levels = (vocab_size - 1).bit_length()
    remaining = F.pad(probabilities, (0, 2**levels - vocab_size))
    near = torch.ones_like(token, dtype=torch.bool)
    for level in range(levels):
        left, right = remaining.chunk(2, dim=-1)
        left_weight, both = left.sum(-1), remaining.sum(-1)
        number = reference.uniform(seed, cell, draw=level // 4, word=level % 4).double()
        went_right = (token >> (levels - 1 - level) & 1).bool()
        margin = 1e-4 * both
        near &= torch.where(went_right, number * both >= left_weight - margin, number * both < left_weight + margin) & (
            torch.where(went_right, both - left_weight, left_weight) > 0
        )
        remaining = torch.where(went_right[:, None], right, left)
    return near


def _nothing_to_draw(before: Call, token: int) -> bool:
    """Whether the twin refuses the logits of one token."""
    rows = (before[name][token : token + 1] for name in ("conditional_row", "unconditional_row", "guidance"))
    try:
        reference.token_probabilities(before["logits"], *rows, before["temperature"][token : token + 1])
    except RuntimeError:
        return True
    return False


def _has_rows(call: Call) -> Tensor:
    conditional, unconditional, rows = call["conditional_row"], call["unconditional_row"], len(call["logits"])
    has_rows: Tensor = (conditional >= 0) & (conditional < rows) & (unconditional >= -1) & (unconditional < rows)
    return has_rows


def _usable_tokens(call: Call) -> Tensor:
    """Whether each token has settings that the CPU allows, and rows that are there."""
    right = _has_rows(call) & call["guidance"].isfinite() & call["temperature"].isfinite() & (call["temperature"] >= 0)
    if call["top_k"] is not None:
        right = right & (call["top_k"] >= 0)
    if call["top_p"] is not None:
        right = right & (call["top_p"] > 0) & (call["top_p"] <= 1)
    return right


def _judge_tokens(before: Call, ours: Tensor) -> None:
    right = _usable_tokens(before)  # all of them on the CPU, which refuses others
    assert (ours[~right] == -1).all(), "a token was drawn that could not be"
    per_token = [name for name in before if name != "logits"]
    before, ours = {**before, **{n: t if (t := before[n]) is None else t[right] for n in per_token}}, ours[right]
    none = ours == -1  # said by CUDA kernels, which cannot raise
    assert all(_nothing_to_draw(before, token) for token in none.nonzero().flatten().tolist()), "a token was not drawn"
    before, ours = {**before, **{n: t if (t := before[n]) is None else t[~none] for n in per_token}}, ours[~none]
    mixed = [before[name] for name in ("logits", "conditional_row", "unconditional_row", "guidance", "temperature")]
    keys = before["seed"], before["cell"]
    possible = torch.zeros_like(ours, dtype=torch.bool)
    # Sums in float32 may move the threshold of top-p over one token.
    for factor in (1.0, 1 + 1e-5, 1 - 1e-5):
        top_p = before["top_p"]
        top_p = None if top_p is None else (top_p * factor).clamp(max=1.0)
        probabilities = reference.token_probabilities(*mixed, before["top_k"], top_p)
        possible |= _near_boundary(probabilities, *keys, ours)
    assert possible.all(), f"tokens {ours[~possible][:3].tolist()} could not be drawn"


def _judge_step(before: Call, after: Call) -> None:
    """The tokens are as sample_tokens may draw them, and the tables hold them where they should and nowhere else."""
    has_rows = _has_rows(before)  # without, which CUDA kernels alone accept, a token leaves the tables alone
    by_index = ("conditional_row", "unconditional_row", "image", "token_index", "write_index", "twin_index")
    before = {**before, **{name: before[name][has_rows] for name in by_index}}
    image, write, twin = before["image"], before["write_index"], before["twin_index"]
    cell = before["positions"].flatten()[write] - 1
    tokens = after["contents"].flatten()[write]
    by_token = {
        name: None if before[name] is None else before[name][image] for name in ("temperature", "top_k", "top_p")
    }
    settings = {"guidance": before["guidance"][image, before["token_index"]], "seed": before["seeds"][image]}
    logits = {name: before[name] for name in ("logits", "conditional_row", "unconditional_row")}
    _judge_tokens({**logits, **settings, **by_token, "cell": cell}, tokens)
    contents, grid = before["contents"].clone(), before["grid"].clone()
    contents.view(-1)[write] = tokens
    contents.view(-1)[twin[twin >= 0]] = tokens[twin >= 0]
    grid[image, cell] = tokens
    assert_same(after["contents"], contents, "contents")
    assert_same(after["grid"], grid, "grid")


def _judge_bytes(before: Call, ours: tuple[Tensor, Tensor], twins: tuple[Tensor, Tensor]) -> None:
    for found, wanted in zip(ours, twins, strict=True):
        assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
    planes, levels, rows = before["planes"], before["levels"], len(before["x"])
    x = before["x"].double()
    x = rotate_rows(x) if before["rotate"] else x
    quantized = ours[0].double().view(planes, rows, x.shape[1])
    quantization = ours[1].double().view(planes, rows, 2)
    unusable = ~quantization[0, :, 0].isfinite()
    overflows = ~x.float().isfinite().all(1) | (x.amax(1) - x.amin(1)).float().isinf()
    assert not (unusable & ~overflows & (x.abs().amax(1) < 1e36)).any(), "a row is unusable without overflow"
    assert unusable[overflows].all(), "a row that overflows looks like any other"
    step = quantization[:1, :, :1]
    value = (quantization[..., :1] * (quantized - quantization[..., 1:])).sum(0)
    largest = x.abs().amax(1, keepdim=True)
    allowed = step[0] * (0.5 / levels ** (planes - 1) + 4 * levels * EPS) + 64 * EPS * largest
    assert ((value - x).abs() <= allowed)[~unusable].all(), "not the nearest bytes"


def _linear_sizes(before: Call) -> Tensor:
    weight = unpack_weight(before["weight"], before["out_features"], before["x"].shape[1])
    return before["x"].double().abs() @ weight.double().abs().t() + 1


def _judge_few_rows(name: str, before: Call, plain: Call, after: Call, results: tuple[object, ...]) -> None:
    """`results`: what was found, what is right, what plain torch makes of it."""
    found, right, torchs = (_listed(result) for result in results)
    given = {key: value.double().abs() for key, value in before.items() if isinstance(value, Tensor)}
    if name == "fold_layer_norm":
        sizes = [(given["weight"] @ given[key]).max() + 4 if found[0].numel() else 0.0 for key in ("gamma", "beta")]
    elif name == "normed_linear":
        mean, squares = before["statistics"].double().unbind(2)
        mean, variance = mean.mean(1, keepdim=True), squares.sum(1, keepdim=True) / before["scaled"].shape[1]
        sums = given["scaled"] @ given["weight"].T + mean.abs() * given["slope"]
        sizes = [sums * (variance + before["eps"]).rsqrt() + given["shift"] + 1]
    else:
        size = given["rows"] @ given["weight"].T + given["x"] + 4
        exact = before["x"].double() + before["rows"].double() @ before["weight"].double().T
        exact += 0 if before["bias"] is None else before["bias"].double()
        assert_near(after["x"], exact, plain["x"], size, False)
        largest = size.amax(1)[:, None, None] if size.numel() else 0.0
        sizes = [size * (given["scale"] + 1), torch.stack([largest, 64 * largest**2], 3) if size.numel() else 0.0]
        sizes[1] = sizes[1][..., 0, :] if size.numel() else 0.0
    for one, wanted, plainly, size in zip(found, right, torchs, sizes, strict=True):
        assert_near(one, wanted, plainly.to(one.dtype), size, False)


def judge(name: str, memory: Memory, call: Call, result: object, extreme: bool) -> None:
    """Compares what an operator did with what its twin does to the same arguments, in their dtypes and in float64."""
    before, plain, exact = memory.copy(call), memory.copy(call), memory.copy(call, torch.float64)
    twin = getattr(reference, name)
    with torch.no_grad():
        if name == "sample_tokens":
            return _judge_tokens(before, result)
        if name == "sample_step":
            return None if extreme else _judge_step(before, call)
        if name == "quantize_rows":
            return _judge_bytes(before, result, twin(**plain)) if before["x"].shape[1] else None
        if name.startswith("packed") and call["out"] is None:
            return None
        if name == "preview_pixels":
            return None if extreme or not result.numel() else judge_pixels(exact, result)
        if name == "conv3x3" and call["out"].numel() == 0:
            return None  # which torch's convolution refuses
        if name == "group_norm_scale_shift" and before["x"].numel() == 0:
            return None  # its twin takes memory for every group
        torchs, wanted = twin(**plain), twin(**exact)
    if name == "append_kv":
        for cache in ("k_cache", "v_cache"):
            assert_same(call[cache], plain[cache], cache)
    elif name == "group_attention":
        _judge_attention(exact, plain, call, (result, wanted, torchs), extreme)
    elif name == "locality_order":
        assert_same(result, torchs, "order")
    elif name in ("embed_rows", "residual_layer_norm"):
        if name == "residual_layer_norm":
            assert call["x"].detach().allclose(plain["x"], rtol=0, atol=0, equal_nan=True), "x differs"
        size = wanted.abs().amax(-1, keepdim=True) + 1 if wanted.numel() else 0.0
        # An extreme weight enlarges what rounding leaves of a value near its row's mean.
        size = 16 * (size + before["weight"].double().abs()) if extreme and wanted.numel() else size
        assert_near(result, wanted, torchs.to(result.dtype), size, extreme)
    elif name == "embed_scaled_rows":
        if not extreme:
            x, scaled, statistics = result
            size = 16 * (wanted[0].abs().amax(-1, keepdim=True) + 1) if wanted[0].numel() else 0.0
            assert_near(x, wanted[0], torchs[0], size, extreme)
            expected = (x * before["scale"].float()).to(scaled.dtype)
            assert scaled.allclose(expected, rtol=0, atol=0, equal_nan=True), "scaled differs"
            groups = x.double().unflatten(1, (-1, 32))
            means = groups.mean(2, keepdim=True)
            exact = torch.cat([means, ((groups - means) ** 2).sum(2, keepdim=True)], 2)
            size = groups.abs().amax(2, keepdim=True)
            assert_near(statistics, exact, exact.float(), torch.cat([size, 64 * size**2], 2), extreme)
    elif name in ("residual_linear", "normed_linear", "fold_layer_norm"):
        if not extreme:
            _judge_few_rows(name, before, plain, call, (result, wanted, torchs))
    elif name in ("packed_linear", "packed_linear_int8"):
        size = (
            _linear_sizes(before) if name == "packed_linear" else exact["out"].abs() + 8 * before["quantized"].shape[1]
        )
        assert_near(call["out"], exact["out"], plain["out"], 4 * size, extreme)
    elif name == "conv3x3":
        if not extreme:
            size = 1 + before["x"].abs().max() * 4 if before["x"].numel() else 1
            size = size * (2e-2 / EPS if before["bfloat16"] else 4.0)
            assert_near(call["out"], exact["out"], plain["out"], size, extreme)
    elif name == "group_norm_scale_shift":
        x = before["x"]
        if x.numel():
            scale, shift = result[:, :, None, None].double().unbind(1)
            ours, wanted, torchs = (
                x.double() * part[:, 0, None, None].double() + part[:, 1, None, None].double()
                for part in (result, wanted, torchs)
            )
            largest = x.abs().amax((1, 2, 3), keepdim=True)  # whose rounding is in the mean, and so in the shift
            assert_near(ours.float(), wanted, torchs.float(), 4 * largest * scale.abs() + 4 * shift.abs() + 4, extreme)
    elif not extreme:  # training_attention and its gradient
        for found, right, torch_ in zip(_listed(result), _listed(wanted), _listed(torchs), strict=True):
            rounding = torch.finfo(found.dtype).eps / EPS  # the gradient is of rounded results
            size = right.abs().max() * rounding + 1 if right.numel() else 0.0
            assert_near(found, right, torch_, 8 * size, extreme)  # scalar code adds one product after the other
    return None


def judge_pixels(exact: Call, result: Tensor) -> None:
    """Each pixel lies half a step from what float64 has in its place, give or take float32's rounding."""
    images = reference.preview_images(**exact)
    steps = ((images + 1) * 127.5).clamp(0, 255)
    error = (result.double() - steps).abs()
    rounding = 1e-3 * (1 + images.abs())
    assert (error <= 0.5 + rounding).all(), f"pixels are {(error - rounding).max():.4f} steps off"


def _listed(result: object) -> list[Tensor]:
    return list(result) if isinstance(result, tuple) else [result]


def case(seed: int, index: int) -> str:
    """Make and judge one call; "accepted" or "refused". AssertionError where something is wrong."""
    draw = Draw(f"{seed}/{index}")
    name = draw.choices(list(CALLS), [SLOW_TWINS.get(name, 1.0) for name in CALLS])[0]
    backend = draw.choice(_C.available_cpu_isas())
    chosen = draw.random() < 0.05  # drawn in any case, so that a case is the same in every build
    emulated = chosen and name in ops.OPERATORS and emulation.library_path().exists()
    _C.set_cpu_isa(backend)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of autograd, about operators without a gradient
        call = CALLS[name](draw)
        changes = [spoil(draw, name, call) for _ in range(draw.choice((0, 0, 1, 1, 2)))]
        try:
            return _run(draw, name, call, changes, emulated)
        except Exception as error:
            shapes = {key: list(value.shape) if isinstance(value, Tensor) else value for key, value in call.items()}
            where = "emulated" if emulated else backend
            text = f"{name} on {where}, {changes}, {shapes}: {type(error).__name__}: {error}"
            raise AssertionError(text) from error


def _run(draw: Draw, name: str, call: Call, changes: list[str], emulated: bool) -> str:
    extreme = any(change.endswith(("values", "overlap", "shared")) for change in changes)
    written = [key for key in WRITTEN.get(name, ()) if isinstance(call[key], Tensor)]
    if name == "residual_layer_norm" and call["delta"] is None:
        written = []
    memory = Memory(call)
    refusal = None
    pretended = emulation.SM_90 if name in emulation.NEED_CLUSTERS else emulation.SM_80
    device = emulation.running("random", draw.getrandbits(30), pretended) if emulated else nullcontext()
    with device:
        ops._ops, used = torch.ops.lpd_emulated if emulated else torch.ops.lpd_ext, ops._ops
        try:
            result = getattr(ops, name)(**call)
        except (RuntimeError, ValueError, TypeError) as error:
            refusal = error
        except AttributeError as error:  # of the wrapper, where it is given no tensor
            refusal = error if any(change.endswith("none") for change in changes) else None
            if refusal is None:
                raise
        finally:
            ops._ops = used
    if refusal is not None:
        memory.assert_unchanged()
        versions = {key: t._version for key, t in memory.tensors.items()}
        assert versions == memory.versions, "a version was counted up"
        assert changes or emulated, f"refused: {refusal}"
        return "refused"
    memory.assert_unchanged(tuple(written))
    for key in written:
        memory.assert_no_overlap(key)
        assert call[key]._version > memory.versions[key], f"the version of {key} was not counted up"
        assert not any(t.requires_grad for t in memory.tensors.values()), f"{key} was written without a gradient"
    if emulated and name in ("embed_rows", "embed_scaled_rows") and changes:
        return "accepted"  # ids are not looked at on CUDA
    if name == "training_attention_backward" and changes:
        return "accepted"  # what it is given must come from training_attention
    if isinstance(call.get("eps"), float) and call["eps"] < 0:
        return "accepted"  # may take the variance to 0, and any error with it to infinity
    if any(t.numel() > 2**22 for t in memory.tensors.values()):
        return "accepted"  # expanded; its copy would not be
    judge(name, memory, call, result, extreme)
    return "accepted"
