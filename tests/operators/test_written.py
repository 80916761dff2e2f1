"""Arguments that operators write: their memory is theirs alone, and autograd knows of it, as of torch's in-place ones.

The rules are those of csrc/torch/written.cpp, for all operators that write.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from operator_calls import CALLS, WRITTEN, Call, Draw
from steps import Layout, buffer_bytes, make_step
from torch import Tensor

from lpd_ext import ops, reference


def step_call(append_only: bool) -> Call:
    step = make_step([Layout(2, 3, 4), Layout(1, 2, 0)], cuda=True)
    call: Call = {name: getattr(step, name) for name in ("qkv", "segments", "max_rows")}
    call |= {"k_cache": step.k_cache.nan_to_num(), "v_cache": step.v_cache.nan_to_num()}
    return call if append_only else call | {"max_keys": step.max_keys, "workspace": torch.zeros(64, dtype=torch.uint8)}


def right_call(name: str) -> Call:
    if name in ("group_attention", "append_kv"):
        return step_call(name == "append_kv")
    for seed in range(1000):
        call = CALLS[name](Draw(seed))
        written = [call[argument] for argument in WRITTEN[name]]
        fits = all(isinstance(t, Tensor) and min(t.shape) > 1 and t._version == 0 for t in written)
        if fits and all(t.is_contiguous() for t in tensors_of(call).values()) and call.get("delta", 0) is not None:
            return call
    raise AssertionError(f"no call of {name}")


CASES = [(name, written) for name in WRITTEN for written in WRITTEN[name]]
FLOAT_CASES = [(name, written) for name, written in CASES if written not in ("workspace", "contents", "grid")]


def tensors_of(call: Call) -> dict[str, Tensor]:
    return {name: value for name, value in call.items() if isinstance(value, Tensor)}


def tensor(call: Call, name: str) -> Tensor:
    return tensors_of(call)[name]


def run(name: str, call: Call) -> object:
    with pytest.MonkeyPatch.context() as patch:
        if name not in ops.OPERATORS:
            patch.setattr(ops, "_ops", torch.ops.lpd_ext)  # which have no CUDA kernels to be emulated
        return getattr(ops, name)(**call)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
@pytest.mark.parametrize(("name", "written"), CASES)
def test_the_version_counts_up(
    name: str, written: str, mode: Callable[[], torch.enable_grad], host_backend: torch.device
) -> None:
    call = right_call(name)
    versions = {key: t._version for key, t in tensors_of(call).items()}
    with mode():
        run(name, call)
    counted = {key: t._version - versions[key] for key, t in tensors_of(call).items()}
    assert counted == {key: int(key in WRITTEN[name]) for key in counted}


@pytest.mark.parametrize(("name", "written"), FLOAT_CASES)
def test_a_backward_pass_that_needs_what_was_overwritten_says_so(
    name: str, written: str, host_backend: torch.device
) -> None:
    call = right_call(name)
    leaf = torch.ones(1, requires_grad=True)
    product = (leaf * tensor(call, written)).sum()  # saves the argument
    run(name, call)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@pytest.mark.parametrize("is_leaf", [True, False])
@pytest.mark.parametrize(("name", "written"), FLOAT_CASES)
def test_what_requires_grad_is_not_written(name: str, written: str, is_leaf: bool, host_backend: torch.device) -> None:
    call = right_call(name)
    leaf = tensor(call, written).requires_grad_()
    call[written] = leaf if is_leaf else leaf * 1
    before = leaf.detach().clone()
    with pytest.raises(RuntimeError, match=f"^{written} requires grad, but it is written without a gradient"):
        run(name, call)
    assert leaf.equal(before)
    assert tensor(call, written)._version == 0
    with torch.no_grad():
        run(name, call)
    assert tensor(call, written)._version == 1


@pytest.mark.parametrize("name", WRITTEN)
def test_what_is_read_does_not_lose_its_gradient_in_silence(name: str, host_backend: torch.device) -> None:
    for key, t in tensors_of(right_call(name)).items():
        if key in WRITTEN[name] or not t.dtype.is_floating_point:
            continue
        call = right_call(name)
        tensor(call, key).requires_grad_()
        with pytest.raises(
            RuntimeError, match=f"^{key} requires grad, but {WRITTEN[name][0]} is written without a gradi"
        ):
            run(name, call)
        with torch.no_grad():
            run(name, call)


def test_what_is_only_read_may_require_grad(host_backend: torch.device) -> None:
    """A residual stream that nothing is added to stays as it is."""
    x = torch.ones(2, 16, requires_grad=True)
    ops.residual_layer_norm(x, None, torch.ones(16), torch.zeros(16))
    assert x._version == 0


def test_inference_tensors_are_written_in_inference_mode_alone(host_backend: torch.device) -> None:
    weight = torch.ones(16), torch.zeros(16)
    with torch.inference_mode():
        x = torch.ones(2, 16)
        ops.residual_layer_norm(x, torch.ones(2, 16), *weight)
        assert x.eq(2).all()
    with pytest.raises(
        RuntimeError, match=r"^x is written, so outside torch.inference_mode\(\) it must not be an infer"
    ):
        ops.residual_layer_norm(x, torch.ones(2, 16), *weight)
    assert x.eq(2).all()


# ---- shared memory ----


def in_memory_of(buffer: Tensor, like: Tensor, first_byte: int) -> Tensor:
    """A tensor of like's dtype, shape and strides in a buffer of bytes."""
    whole = torch.empty(0, dtype=like.dtype).set_(buffer.untyped_storage())
    return whole.as_strided(like.shape, like.stride(), first_byte // like.element_size())


def bytes_of(t: Tensor) -> int:
    return t.element_size() * (1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)))


def pairs() -> list[tuple[str, str, str]]:
    found = []
    for name, written in CASES:
        others = [key for key in tensors_of(right_call(name)) if key != written]
        found += [(name, written, other) for other in others]
    return found


@pytest.mark.parametrize(("name", "written", "other"), pairs())
def test_one_shared_byte_is_refused(name: str, written: str, other: str, host_backend: torch.device) -> None:
    """The other argument ends in the 16 bytes in which the written one begins; before them it is accepted."""
    for shared in (16, 0):
        call = right_call(name)
        a, b = tensor(call, other), tensor(call, written)
        begin = (bytes_of(a) + 15) // 16 * 16
        offset = begin - bytes_of(a)
        if offset % a.element_size():
            return  # elements of different sizes do not meet there
        buffer = torch.zeros(begin + bytes_of(b) + 64, dtype=torch.uint8)
        call[other] = in_memory_of(buffer, a, 0).copy_(a)
        call[written] = in_memory_of(buffer, b, begin - shared).copy_(b)
        if a.dtype == torch.int32:
            tensor(call, other).copy_(a)
        before = buffer.clone()
        if shared:
            message = f"({written}|{other}) is written, so it must not share memory with ({written}|{other})"
            with pytest.raises(RuntimeError, match=message):
                run(name, call)
            assert buffer.equal(before)
        else:
            run(name, call)


@pytest.mark.parametrize("written", ["k_cache", "x", "out"])  # v_cache has the strides of k_cache
@pytest.mark.parametrize("name", WRITTEN)
def test_memory_that_overlaps_with_itself_is_refused(name: str, written: str, host_backend: torch.device) -> None:
    if written not in WRITTEN[name]:
        return
    call = right_call(name)
    t = tensor(call, written)
    for key in ("k_cache", "v_cache") if written == "k_cache" else (written,):
        whole = tensor(call, key)
        step = 16 // t.element_size()  # on CUDA rows begin at multiples of 16 bytes
        call[key] = whole.as_strided(whole.shape, [*whole.stride()[:-2], whole.stride(-2) - step, 1])
    before = buffer_bytes(t)
    with pytest.raises(
        RuntimeError, match=rf"^{written} (is written, so its elements must not overlap|must be contiguous)"
    ):
        run(name, call)
    assert buffer_bytes(t).equal(before)


def test_the_cases_that_were_found(host_backend: torch.device) -> None:
    b = torch.ones(32)
    with pytest.raises(RuntimeError, match="x is written, so it must not share memory with delta"):
        ops.residual_layer_norm(b[8:].view(3, 8), b[:24].view(3, 8), torch.ones(8), torch.zeros(8))
    assert b.eq(1).all()
    step = step_call(True)
    step["k_cache"], step["v_cache"] = (
        torch.zeros(64 * 32).as_strided((4, 3, 9, 32), (32, 32, 32, 1)) for _ in range(2)
    )
    with pytest.raises(
        RuntimeError, match=r"k_cache is written, so its elements must not overlap, .* \[32, 32, 32, 1\]"
    ):
        ops.append_kv(**step)


# ---- memory that only looks shared ----


def test_interleaved_slices_of_one_buffer_are_accepted(host_backend: torch.device) -> None:
    """Keys and values side by side, and rows of x and delta in turn: no byte is in two of them."""
    call = step_call(True)
    k_cache, v_cache = tensor(call, "k_cache"), tensor(call, "v_cache")
    for dim in (0, 2, 3):
        both = torch.stack([k_cache, v_cache], dim)
        ours = call | {"k_cache": both.select(dim, 0), "v_cache": both.select(dim, 1)}
        twins = call | {"k_cache": k_cache.clone(), "v_cache": v_cache.clone()}
        ops.append_kv(**ours)
        reference.append_kv(**twins)
        assert tensor(ours, "k_cache").equal(tensor(twins, "k_cache"))
        assert tensor(ours, "v_cache").equal(tensor(twins, "v_cache"))
    rows = torch.ones(5, 4, 16)
    ops.residual_layer_norm(rows[:, 1], rows[:, 2], torch.ones(16), torch.zeros(16))
    assert rows[:, 1].eq(2).all()
    assert rows[:, ::2].eq(1).all()
    ops.residual_layer_norm(rows[0::2, 0], rows[0::2, 3], torch.ones(16), torch.zeros(16))
    with pytest.raises(RuntimeError, match="x is written, so it must not share memory with delta"):
        ops.residual_layer_norm(rows[0:2, 0], rows[1:3, 0], torch.ones(16), torch.zeros(16))


def occupied(shape: list[int], strides: list[int], offset: int) -> set[int]:
    return set((torch.arange(4096).as_strided(shape, strides, offset)).flatten().tolist())


def test_sharing_is_found_exactly(host_backend: torch.device) -> None:
    """Random slices of one buffer, against the elements counted out; the written one is a slice without overlap."""
    found = [0, 0]
    weight, bias = torch.ones(4), torch.zeros(4)
    draw = Draw(7)
    for _ in range(2000):
        buffer = torch.zeros(4096)
        layouts = []
        for least in (4, 0):
            stride = draw.randint(least, 12)
            layouts.append(([draw.randint(1, 5), 4], [stride, 1], draw.randint(0, 40)))
        layouts[1][0][0] = layouts[0][0][0]
        x, delta = (buffer.as_strided(*layout) for layout in layouts)
        shares = bool(occupied(*layouts[0]) & occupied(*layouts[1]))
        found[shares] += 1
        try:
            ops.residual_layer_norm(x, delta, weight, bias)
            refused = False
        except RuntimeError as error:
            refused = "share memory" in str(error)
            assert refused
        assert refused == shares, layouts
    assert min(found) > 300
