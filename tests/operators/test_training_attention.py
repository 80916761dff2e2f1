"""Attention of the teacher-forced pass: who sees whom, values, gradients, and what it must work under."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from decodes import random_model
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.checkpoint import checkpoint

from lpd_ext import block_attention, ops, reference
from lpd_ext.block_attention import training_block_mask
from lpd_ext.model import Block, LPDConfig
from lpd_ext.schedule import group_sizes
from lpd_ext.training_attention import Visibility, attend
from lpd_ext.visibility import training_mask

# Tiles have 96 rows, spans 128 keys: steps that share a tile, groups that need several of each, and last groups smaller
# than the one before.
SCHEDULES = ([1], [5], [1] * 9, [1, 2, 3, 4, 5, 6], [1, 30, 100, 131], [3, 200, 1])
CASES = [
    *((sizes, 16, dtype, mutual) for sizes in SCHEDULES for mutual in (True, False) for dtype in (torch.float32,)),
    *(([1, 30, 100, 131], 64, dtype, True) for dtype in (torch.float32, torch.bfloat16, torch.float16)),
    *(([1, 2, 20, 9], head_dim, torch.bfloat16, True) for head_dim in (8, 24, 128, 256)),
    ([1, 2, 20, 9], 40, torch.float16, False),
]
Attention = Callable[[Tensor], Tensor]


def as_tensor(sizes: list[int]) -> Tensor:
    return torch.tensor(sizes, dtype=torch.int32)


def make_case(sizes: list[int], head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """qkv, part of a larger buffer, and the gradient of the output."""
    torch.manual_seed(len(sizes) + head_dim)
    rows = 1 + 2 * sum(sizes) - sizes[-1]
    qkv = torch.randn(2, rows + 1, 3, 3, head_dim + 8).to(dtype)[:, 1:, :, 1:, :head_dim]
    return qkv, torch.randn(2, rows, 2 * head_dim).to(dtype)


def dense(sizes: list[int], mutual: bool = True) -> Attention:
    visibility = Visibility(mask=training_mask(sizes, None, mutual))
    return lambda qkv: attend(qkv, visibility)


def differentiate(attention: Attention, qkv: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    leaf = qkv.detach().requires_grad_()
    output = attention(leaf)
    output.backward(grad)
    assert leaf.grad is not None
    return output.detach(), leaf.grad


def excess(found: Tensor, torchs: Tensor, wanted: Tensor) -> float:
    """The error of `found` over what is allowed: twice that of torch in the same dtype, and a floor; both float64."""
    allowed = 2 * (torchs - wanted).abs().max() + 1e-6 * wanted.abs().max()
    return float((found - wanted).abs().max() / allowed)


def test_training_mask_spelled_out() -> None:
    # condition | group 0: 1 token | group 1: 2 tokens | group 2: 1 token (never context) ; then queries of 0, 1, 2
    wanted = [
        # c  g0 g1 g1  q0 q1 q1 q2
        [1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0, 0],
        [1, 0, 0, 0, 1, 0, 0, 0],
        [1, 1, 0, 0, 0, 1, 1, 0],
        [1, 1, 0, 0, 0, 1, 1, 0],
        [1, 1, 1, 1, 0, 0, 0, 1],
    ]
    assert training_mask([1, 2, 1]).int().tolist() == wanted
    wanted[5][6] = wanted[6][5] = 0
    assert training_mask([1, 2, 1], mutual_visibility=False).int().tolist() == wanted


@pytest.mark.parametrize("mutual", [True, False])
@pytest.mark.parametrize("sizes", SCHEDULES)
def test_the_twin_is_the_dense_mask(sizes: list[int], mutual: bool) -> None:
    qkv, grad = (x.double() for x in make_case(sizes, 8, torch.float64))
    found = differentiate(lambda qkv: reference.training_attention(qkv, as_tensor(sizes), mutual)[0], qkv, grad)
    for ours, wanted in zip(found, differentiate(dense(sizes, mutual), qkv, grad), strict=True):
        assert torch.allclose(ours, wanted, rtol=1e-11, atol=1e-12)
    backward = reference.training_attention_backward(grad, qkv, qkv, qkv, as_tensor(sizes), mutual, 8**-0.5)
    assert torch.allclose(backward, found[1], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("sizes", "head_dim", "dtype", "mutual"), CASES)
def test_output_and_gradient_are_those_of_the_dense_mask(
    sizes: list[int], head_dim: int, dtype: torch.dtype, mutual: bool, cpu_backend: torch.device
) -> None:
    qkv, grad = make_case(sizes, head_dim, dtype)
    wanted = differentiate(dense(sizes, mutual), qkv.double(), grad.double())
    torchs = differentiate(dense(sizes, mutual), qkv, grad)
    ours = differentiate(lambda qkv: ops.training_attention(qkv, as_tensor(sizes), mutual)[0], qkv, grad)
    for found, plain, exact in zip(ours, torchs, wanted, strict=True):
        assert found.dtype == dtype
        assert excess(found, plain, exact) <= 1
    logsumexp = ops.training_attention(qkv, as_tensor(sizes), mutual)[1]
    exact = reference.training_attention(qkv.double(), as_tensor(sizes), mutual)[1]
    assert (logsumexp - exact).abs().max() <= 1e-5


@pytest.mark.parametrize("mistake", ["condition unseen", "next block seen", "own group unseen", "scale", "shared keys"])
def test_the_tolerance_sees_planted_mistakes(mistake: str) -> None:
    sizes = [1, 2, 20, 9]
    qkv, grad = make_case(sizes, 16, torch.float32)
    exact = differentiate(dense(sizes), qkv.double(), grad.double())
    torchs = differentiate(dense(sizes), qkv, grad)
    mask = training_mask(sizes)
    if mistake == "condition unseen":
        mask[5:, 0] = False
    if mistake == "next block seen":
        mask[1, 2] = True
    if mistake == "own group unseen":
        mask = training_mask(sizes, mutual_visibility=False)
    factor = torch.ones(3, 1, 1)
    if mistake == "scale":
        factor[0] = 1.001
    found = differentiate(lambda qkv: attend(qkv * factor, Visibility(mask=mask)), qkv, grad)
    if mistake == "shared keys":
        found[1][:, :3, 1] = 0
    assert max(excess(*parts) for parts in zip(found, torchs, exact, strict=True)) > 10


@pytest.mark.parametrize("mutual", [True, False])
def test_gradcheck(mutual: bool) -> None:
    """float64 takes the mask."""
    qkv = torch.randn(1, 10, 3, 1, 4, dtype=torch.float64, requires_grad=True)
    visibility = Visibility.of([1, 2, 3], mutual, qkv)
    assert torch.autograd.gradcheck(lambda qkv: attend(qkv, visibility), qkv)


@pytest.mark.parametrize("mutual", [True, False])
def test_every_parameter_has_the_gradient_of_the_dense_mask(mutual: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(32, (4, 6)).requires_grad_(True)
    tokens, labels = torch.randint(50, (2, 24)), torch.tensor([-1, 3])
    orders = torch.stack([torch.randperm(24) for _ in range(2)])

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        logits = model(tokens, labels, orders, [1, 2, 4, 7, 10], mutual_visibility=mutual)
        F.cross_entropy(logits.flatten(0, 1), tokens.gather(1, orders).flatten()).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    ours = gradients()
    monkeypatch.setattr(
        Visibility, "of", lambda sizes, mutual, like, dropout: Visibility(mask=training_mask(sizes, None, mutual))
    )
    plain = gradients()
    model.double()
    wanted = gradients()
    assert len(ours) == len(list(model.parameters()))
    for name, gradient in wanted.items():
        allowed = 2 * (plain[name] - gradient).norm() + 1e-6 * gradient.norm()
        assert (ours[name] - gradient).norm() <= allowed, name


def test_a_result_does_not_depend_on_the_threads() -> None:
    qkv, grad = make_case([1, 30, 100, 131], 16, torch.float32)
    sizes, threads = as_tensor([1, 30, 100, 131]), torch.get_num_threads()
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(differentiate(lambda qkv: ops.training_attention(qkv, sizes)[0], qkv, grad))
    torch.set_num_threads(threads)
    assert all(torch.equal(*pair) for result in results[1:] for pair in zip(result, results[0], strict=True))


def test_no_images() -> None:
    output, gradient = differentiate(
        lambda qkv: ops.training_attention(qkv, as_tensor([2, 3]))[0], torch.empty(0, 8, 3, 2, 8), torch.empty(0, 8, 16)
    )
    assert output.shape == (0, 8, 16)
    assert gradient.shape == (0, 8, 3, 2, 8)


@pytest.mark.parametrize(
    ("qkv", "sizes", "message"),
    [
        (
            torch.zeros(1, 8, 3, 2, 8, dtype=torch.float64),
            as_tensor([2, 3]),
            "qkv must be float32, bfloat16",
        ),
        (torch.zeros(1, 9, 3, 2, 8), as_tensor([2, 3]), r"qkv must have 1 \+ 2 N - m_last = 8 rows .*, got 9"),
        (torch.zeros(1, 8, 2, 2, 8), as_tensor([2, 3]), "qkv must have shape"),
        (torch.zeros(1, 8, 3, 2, 12), as_tensor([2, 3]), "D must be a multiple of 8 and at most 256, got 12"),
        (torch.zeros(1, 8, 3, 2, 264), as_tensor([2, 3]), "D must be a multiple of 8 and at most 256, got 264"),
        (torch.zeros(1, 8, 3, 8, 2).transpose(3, 4), as_tensor([2, 3]), "qkv must be contiguous in its last"),
        (torch.zeros(1, 8, 3, 2, 8), as_tensor([2, 3]).long(), "group_sizes must be int32, got int64"),
        (torch.zeros(1, 8, 3, 2, 8), as_tensor([]), "group_sizes must not be empty"),
        (torch.zeros(1, 8, 3, 2, 8), as_tensor([4, 0]), r"group_sizes\[1\] = 0 must be >= 1"),
    ],
)
def test_refuses(qkv: Tensor, sizes: Tensor, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        ops.training_attention(qkv, sizes)


def test_the_backward_pass_refuses_what_does_not_fit() -> None:
    qkv, sizes = torch.zeros(1, 8, 3, 2, 8), as_tensor([2, 3])
    output, logsumexp = ops.training_attention(qkv, sizes)
    good = {"grad_output": output, "output": output, "logsumexp": logsumexp}
    for name, wrong in (
        ("grad_output", output[:, :7]),
        ("grad_output", output.half()),
        ("output", output.transpose(0, 1)),
        ("logsumexp", logsumexp[:, :1]),
    ):
        with pytest.raises(RuntimeError, match=f"^{name} must "):
            ops.training_attention_backward(
                **(good | {name: wrong}), qkv=qkv, group_sizes=sizes, mutual_visibility=True, scale=1.0
            )


def test_the_log_of_the_sums_has_no_gradient() -> None:
    qkv = torch.randn(1, 8, 3, 2, 8, requires_grad=True)
    output, logsumexp = ops.training_attention(qkv, as_tensor([2, 3]))
    assert output.requires_grad
    assert not logsumexp.requires_grad
    with pytest.raises(RuntimeError, match="does not require grad"):
        logsumexp.sum().backward()
    (gradient,) = torch.autograd.grad((output.sum() + logsumexp.sum()), qkv)  # as of a constant
    assert gradient.equal(torch.autograd.grad(ops.training_attention(qkv, as_tensor([2, 3]))[0].sum(), qkv)[0])


def test_a_second_derivative_is_refused() -> None:
    qkv = torch.randn(1, 8, 3, 2, 8, requires_grad=True)
    output, _ = ops.training_attention(qkv, as_tensor([2, 3]))
    (gradient,) = torch.autograd.grad(output.square().sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError, match="training_attention has no second derivative"):
        gradient.square().sum().backward()


# Since torch 2.14 opcheck clones what it hands to AOTAutograd, so our leaf is none there, and asks the clone for its
# .grad. It does not show the warning that follows, but pytest makes an error of it before.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning:torch._subclasses")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype: torch.dtype, cpu_backend: torch.device) -> None:
    qkv, grad = make_case([1, 2, 4], 8, dtype)
    sizes = as_tensor([1, 2, 4])
    results = ops.training_attention(qkv, sizes)
    leaf = qkv.detach().requires_grad_()
    torch.library.opcheck(torch.ops.lpd_ext.training_attention.default, (leaf, sizes, False, 0.3))
    backward = torch.ops.lpd_ext.training_attention_backward.default
    torch.library.opcheck(backward, (grad, qkv, *results, sizes, True, 0.3))


def training_block(sizes: list[int]) -> tuple[Block, Visibility, Tensor]:
    torch.manual_seed(1)
    block = Block(LPDConfig(64, depth=1, heads=2, vocab_size=8, num_classes=1, grid=(1, 1)))
    x = torch.randn(2, 1 + 2 * sum(sizes) - sizes[-1], 64, requires_grad=True)
    return block, Visibility.of(sizes, True, x), x


def test_a_compiled_block_is_compiled_once_for_all_tables() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    for sizes in ([1, 2, 4], [2, 3, 5, 7], [1, 1, 1, 2, 9], [4, 5]):
        block, visibility, x = training_block(sizes)
        compiled = torch.compile(block, backend=counter, fullgraph=True)
        found, wanted = compiled(x, visibility), block(x, visibility)
        assert torch.allclose(found, wanted, atol=1e-6)
        (gradient,) = torch.autograd.grad(found.square().sum(), x)
        (expected,) = torch.autograd.grad(wanted.square().sum(), x)
        assert torch.allclose(gradient, expected, atol=1e-5)
    assert counter.frame_count <= 2  # the second is for any sizes


def test_a_compiled_model_trains() -> None:
    model = random_model(16, (2, 3)).requires_grad_(True)
    compiled = torch.compile(model, backend="aot_eager")
    arguments = (torch.randint(50, (2, 6)), torch.tensor([0, -1]), torch.arange(6).expand(2, -1))
    for sizes in ([1, 2, 3], [3, 3]):
        gradients = []
        for run in (model, compiled):
            model.zero_grad()
            run(*arguments, sizes).square().mean().backward()
            gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        assert len(gradients[0]) == len(list(model.parameters()))
        for ours, wanted in zip(*gradients, strict=True):
            assert torch.allclose(ours, wanted, rtol=1e-4, atol=1e-6 * float(wanted.abs().max()))


def test_autocast_and_checkpointing() -> None:
    block, visibility, x = training_block([1, 4, 20, 30])
    mask = Visibility(mask=training_mask([1, 4, 20, 30]))

    def gradient(seen: Visibility, autocast: bool, checkpointed: bool = False) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = checkpoint(block, x, seen, use_reentrant=False) if checkpointed else block(x, seen)
        (found,) = torch.autograd.grad(output.float().square().sum(), x)
        return found

    exact, plain, ours = gradient(mask, False), gradient(mask, True), gradient(visibility, True)
    assert not torch.equal(ours, gradient(visibility, False))
    assert (ours - exact).norm() <= 1.5 * (plain - exact).norm()
    for autocast in (False, True):
        assert torch.equal(gradient(visibility, autocast, checkpointed=True), gradient(visibility, autocast))


def test_attention_dropout_keeps_the_mean() -> None:
    qkv, _ = make_case([1, 2, 4], 8, torch.float32)
    visibility = Visibility.of([1, 2, 4], True, qkv, dropout=0.25)
    draws = torch.stack([attend(qkv, visibility) for _ in range(2000)])
    standard_error = draws.std(0) / len(draws) ** 0.5
    assert ((draws.mean(0) - attend(qkv, Visibility.of([1, 2, 4], True, qkv))).abs() <= 6 * standard_error + 1e-6).all()
    assert draws.std(0).max() > 0.1


@pytest.mark.parametrize("mutual", [True, False])
@pytest.mark.parametrize("sizes", [[1, 2, 4], group_sizes(256, 20)])
def test_block_masks_of_flex_attention(sizes: list[int], mutual: bool) -> None:
    device = torch.device("cpu")
    block_mask = training_block_mask(tuple(sizes), mutual, device)
    assert training_block_mask(tuple(sizes), mutual, device) is block_mask
    wanted = training_mask(sizes, device, mutual)
    rows = torch.arange(len(wanted))
    zero = torch.zeros((), dtype=torch.int64)
    assert torch.equal(block_mask.mask_mod(zero, zero, rows[:, None], rows[None]), wanted)
    side = block_mask.BLOCK_SIZE[0]
    blocks = F.max_pool2d(wanted[None].float(), side, ceil_mode=True)[0]
    assert torch.equal(block_mask.to_dense()[0, 0].float(), blocks)
    assert (blocks.mean() < 1) == (len(wanted) > side)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("mutual", [True, False])
def test_flex_attention_computes_the_same(mutual: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs the path of CUDA, uncompiled, as far as it runs on the CPU: without the gradient."""
    monkeypatch.setattr(block_attention, "_compiled_flex_attention", lambda: flex_attention)
    sizes = [1, 2, 20, 60, 9]
    qkv, _ = make_case(sizes, 16, torch.float32)
    found = attend(qkv, Visibility(block_mask=training_block_mask(tuple(sizes), mutual, qkv.device)))
    assert torch.allclose(found, dense(sizes, mutual)(qkv), atol=1e-5)
