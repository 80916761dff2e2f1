"""Packed linear layers: as accurate as torch's, weights bit for bit, and never moved or trained by accident."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from decodes import recorded_logits
from golden import load_golden
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lpd_ext.linear import (
    PackedLinear,
    ResultRows,
    can_pack,
    count_parameters,
    linear_step,
    mlp_step,
    pack,
    replace_linears,
    unpack,
)
from lpd_ext.model import LPDConfig, LPDModel
from lpd_ext.quantize import quantize

CPU = torch.device("cpu")
DTYPES = [dtype for dtype in (torch.float32, torch.bfloat16) if can_pack(CPU, dtype)]
SIZES = [(1, 1), (7, 5), (16, 129), (129, 16), (1, 33), (33, 1), (96, 512)]  # K, N


def random_linear(inputs: int, outputs: int, bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(inputs + outputs)
    return nn.Linear(inputs, outputs, bias=bias).to(dtype)


def packed(linear: nn.Linear) -> PackedLinear:
    layer = pack(nn.Sequential(copy.deepcopy(linear)))[0]
    assert isinstance(layer, PackedLinear)
    return layer


def assert_as_accurate(y: Tensor, x: Tensor, linear: nn.Linear, step: Callable[[Tensor], Tensor]) -> None:
    """Error against float64 at most twice that of the same torch operations, plus a rounding of the result."""
    exact, torchs = step(x.double()), linear(x)
    assert (y.dtype, y.shape) == (torchs.dtype, torchs.shape)
    if y.numel() > 0:
        floor = 4 * torch.finfo(torch.float32).eps * exact.abs().max() + torch.finfo(y.dtype).eps * exact.abs().max()
        assert (y.double() - exact).abs().max() <= 2 * (torchs.double() - exact).abs().max() + floor


@pytest.mark.parametrize("shape", [(0,), (1,), (7,), (40,), (129,), (0, 3), (3, 0), (2, 1), (3, 7)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_as_accurate_as_torchs(dtype: torch.dtype, size: tuple[int, int], bias: bool, shape: tuple[int, ...]) -> None:
    linear = random_linear(*size, bias, dtype)
    x = torch.randn(*shape, size[0]).to(dtype)
    exact = copy.deepcopy(linear).double()
    y = packed(linear)(x)
    assert_as_accurate(y, x, linear, exact)
    rows = x.reshape(-1, size[0])
    step = linear_step(packed(linear), ResultRows(len(rows) + 2))
    assert step(rows).equal(y.reshape(-1, size[1]))
    assert step(rows[1:]).equal(y.reshape(-1, size[1])[1:])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_mlp(dtype: torch.dtype, bias: bool) -> None:
    """GELU is the exact form: the tanh form is off by 1e-4, which the rule does not let through."""
    fc1, fc2 = random_linear(48, 129, bias, dtype), random_linear(129, 48, bias, dtype)
    fc1.weight *= 4
    x = torch.randn(7, 48).to(dtype)
    torchs, exact = nn.Sequential(fc1, nn.GELU(), fc2), nn.Sequential(fc1, nn.GELU(), fc2)
    exact = copy.deepcopy(exact).double()
    assert_as_accurate(mlp_step(packed(fc1), packed(fc2), ResultRows(7), ResultRows(7))(x), x, torchs, exact)
    tanh = nn.Sequential(fc1, nn.GELU(approximate="tanh"), fc2)
    if dtype == torch.float32:
        with pytest.raises(AssertionError):
            assert_as_accurate(tanh(x), x, torchs, exact)


@torch.no_grad()
def test_strided_inputs() -> None:
    linear = random_linear(48, 33)
    x = torch.randn(7, 48)
    wanted = packed(linear)(x)
    buffer = torch.full((14, 60), 9.0)
    buffer[::2, 5:53] = x
    assert torch.allclose(packed(linear)(buffer[::2, 5:53]), wanted, atol=1e-6)
    assert torch.allclose(packed(linear)(x.t().contiguous().t()), wanted, atol=1e-6)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_come_back_bit_for_bit(dtype: torch.dtype, size: tuple[int, int]) -> None:
    linear = random_linear(*size, dtype=dtype)
    state = {name: value.clone() for name, value in linear.state_dict().items()}
    layer = packed(linear)
    empty = PackedLinear(*size, bias=True)
    empty.load_state_dict(layer.state_dict(), assign=True)
    for found in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), empty):
        assert found.state_dict().keys() == state.keys()
        assert all(value.equal(state[name]) for name, value in found.state_dict().items())
        assert found.weight.equal(state["weight"])
        assert found.weight.is_contiguous()
        assert (found.in_features, found.out_features) == size
        x = torch.randn(3, size[0]).to(dtype)
        assert found(x).equal(layer(x))


def test_copies_share_nothing() -> None:
    linear = random_linear(16, 16)
    state = {name: value.clone() for name, value in linear.state_dict().items()}
    layer = packed(linear)
    other = copy.deepcopy(layer)
    other.load_state_dict({name: value + 1 for name, value in state.items()})
    layer.weight.zero_()
    layer.state_dict()["weight"].zero_()
    source = linear.weight.detach().clone()
    third = PackedLinear(16, 16, bias=False)
    third.pack(weight=source)
    source.zero_()
    assert third.weight.equal(state["weight"])
    assert all(value.equal(state[name]) for name, value in layer.state_dict().items())
    assert other.weight.equal(state["weight"] + 1)


def good_state() -> dict[str, Tensor]:
    return dict(random_linear(7, 5).state_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {"bias": s["bias"]}, r'Missing key.*"0\.weight"'),
        (lambda s: {"weight": s["weight"]}, r'Missing key.*"0\.bias"'),
        (lambda s: s | {"weight": s["weight"].t()}, r"0\.weight: expected shape \[5, 7\], got \[7, 5\]"),
        (lambda s: s | {"weight": s["weight"][:4]}, r"0\.weight: expected shape \[5, 7\], got \[4, 7\]"),
        (lambda s: s | {"bias": s["bias"][:4]}, r"size mismatch for 0\.bias"),
        (lambda s: s | {"surprise": s["bias"]}, r'Unexpected key.*"0\.surprise"'),
    ],
)
def test_a_state_dict_that_does_not_fit(change: Callable[[dict[str, Tensor]], dict[str, Tensor]], message: str) -> None:
    layer = nn.Sequential(packed(random_linear(7, 5)))
    state = {f"0.{name}": value for name, value in change(good_state()).items()}
    with pytest.raises(RuntimeError, match=f"(?s){message}"):
        layer.load_state_dict(state)
    assert layer[0].weight.equal(good_state()["weight"])


def test_what_is_missing_is_told_where_that_is_allowed() -> None:
    layer = nn.Sequential(packed(random_linear(7, 5)))
    missing, unexpected = layer.load_state_dict({"0.bias": torch.ones(5), "1.x": torch.ones(1)}, strict=False)
    assert (missing, unexpected) == (["0.weight"], ["1.x"])
    assert layer[0].bias.equal(torch.ones(5))
    assert layer[0].weight.equal(good_state()["weight"])


def test_state_dicts_are_left_as_they_were() -> None:
    state = good_state()
    packed(random_linear(7, 5)).load_state_dict(state)
    assert state.keys() == {"weight", "bias"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int8])
def test_weights_that_cannot_be_packed_are_refused(dtype: torch.dtype) -> None:
    layer = packed(random_linear(7, 5))
    with pytest.raises(ValueError, match=f"cannot pack weights of {dtype} on cpu"):
        layer.pack(weight=torch.zeros(5, 7, dtype=dtype))
    with pytest.raises(RuntimeError, match=rf"(?s)0\.weight: cannot pack weights of {dtype} on cpu"):
        nn.Sequential(layer).load_state_dict({"0.weight": torch.zeros(5, 7, dtype=dtype), "0.bias": torch.zeros(5)})
    with pytest.raises(RuntimeError, match=r"(?s)Unexpected key.*rotated_scale"):
        layer.load_state_dict(good_state() | {"rotated_scale": torch.ones(5)})
    assert layer.weight.equal(good_state()["weight"])


@pytest.mark.parametrize("move", [torch.float16, torch.float64, "meta"])
def test_moves_are_refused(move: torch.dtype | str) -> None:
    layer = packed(random_linear(7, 5))
    with pytest.raises(ValueError, match=r"cannot pack weights of .*: unpack the model first"):
        layer.to(move)
    assert layer.weight.equal(good_state()["weight"])
    assert layer.bias is not None
    assert layer.bias.equal(good_state()["bias"])


def test_moves_that_a_packed_layer_can_make() -> None:
    layer = packed(random_linear(7, 5))
    x = torch.randn(3, 7)
    wanted = layer(x)
    assert layer.to("cpu").float()(x).equal(wanted)
    if torch.bfloat16 in DTYPES:
        layer.to(torch.bfloat16)
        assert layer.weight.equal(good_state()["weight"].bfloat16())
        assert layer(x.bfloat16()).dtype == torch.bfloat16


def test_packing_where_it_cannot_be_done_changes_nothing() -> None:
    for linear in (random_linear(7, 5, dtype=torch.float16), random_linear(7, 5).to("meta")):
        assert pack(nn.Sequential(linear))[0] is linear


def test_unpacked_layers_can_be_trained() -> None:
    linear = random_linear(7, 5)
    model = unpack(pack(nn.Sequential(copy.deepcopy(linear), nn.ReLU(), random_linear(5, 3, bias=False))))
    assert [type(layer) for layer in model] == [nn.Linear, nn.ReLU, nn.Linear]
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in model.parameters())
    assert all(value.equal(linear.state_dict()[name]) for name, value in model[0].state_dict().items())
    assert model[2].bias is None
    before = model[0].weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    model(torch.randn(4, 7)).square().sum().backward()
    optimizer.step()
    assert not model[0].weight.equal(before)


def test_there_are_no_gradients_by_accident() -> None:
    """A loss behind packed layers must not give gradients that lack what went through them."""
    layer = packed(random_linear(7, 5))
    x = torch.randn(4, 7, requires_grad=True)
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    for kind in (layer, layer.requires_grad_(True)):
        for out in (None, torch.empty(4, 5)):
            with pytest.raises(RuntimeError, match="x requires grad, but out is written without a gradient"):
                kind.product(x, gelu=True, out=out)
            with torch.no_grad():
                assert not kind.product(x, gelu=True, out=out).requires_grad


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("size", [(1, 32), (48, 32), (16, 16), (7, 64)])
def test_a_layer_keeps_nothing_of_what_it_was_packed_from(size: tuple[int, int], transposed: bool) -> None:
    """Also where the packed order is that of the weights."""
    weight = torch.randn(size[::-1])
    source = weight.t().clone(memory_format=torch.contiguous_format).t() if transposed else weight.clone()
    layer = PackedLinear(*size, bias=False)
    layer.pack(weight=source)
    source.zero_()
    assert layer.weight.equal(weight)
    layer.weight.zero_()
    assert layer.weight.equal(weight)


def test_weights_of_another_shape_are_refused() -> None:
    layer = packed(random_linear(8, 5))
    with pytest.raises(ValueError, match=r"weight must have shape \[5, 8\], got \[3, 8\]"):
        layer.pack(weight=torch.zeros(3, 8))


@pytest.mark.parametrize("make", [pack, quantize])
def test_packed_weights_are_counted(make: Callable[[LPDModel], LPDModel]) -> None:
    model = LPDModel(LPDConfig(32, depth=2, heads=2, vocab_size=40, num_classes=3, grid=(4, 4))).eval()
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count_parameters(model) == count
    assert count_parameters(make(model)) == count
    assert sum(parameter.numel() for parameter in model.parameters()) < count / 2


def test_layers_that_do_more_than_multiply_stay_as_they_are() -> None:
    """A packed layer would call no hook, and a module that computes weights may have layers of its own."""

    class LowRank(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(16, 16, bias=False)

        def forward(self, weight: Tensor) -> Tensor:
            return weight + self.a.weight

    model = nn.Sequential(*(random_linear(16, 16) for _ in range(4)))
    model[0].register_forward_hook(lambda module, inputs, result: -result)
    model[1].register_forward_pre_hook(lambda module, inputs: (-inputs[0],))
    parametrize.register_parametrization(model[2], "weight", LowRank())
    x = torch.randn(3, 16)
    wanted = model(x)
    kinds = [type(layer) for layer in pack(model)]
    assert kinds == [nn.Linear, nn.Linear, type(model[2]), PackedLinear]
    assert type(model[2].parametrizations.weight[0].a) is nn.Linear
    steps = [linear_step(layer, ResultRows(3)) for layer in model]
    with torch.no_grad():
        assert torch.allclose(model(x), wanted, atol=1e-5)
        for step in steps:
            x = step(x)
    assert torch.allclose(x, wanted, atol=1e-5)


def test_only_layers_of_exactly_the_kind_are_replaced() -> None:
    class Special(nn.Linear):
        pass

    special = Special(3, 3)
    model = nn.ModuleDict({"a": nn.Sequential(nn.Linear(3, 3)), "b": special})
    replace_linears(model, nn.Linear, lambda linear: nn.Identity())
    assert isinstance(model["a"][0], nn.Identity)
    assert model["b"] is special


def golden_logits(model: LPDModel) -> Tensor:
    train = load_golden().part("train.")
    with torch.no_grad():
        return model(
            train["tokens"].long(),
            train["labels"].long(),
            train["orders"].long(),
            load_golden().spec["train_group_sizes"],
        )


@pytest.fixture
def packed_golden() -> LPDModel:
    model = pack(load_golden().model())
    assert isinstance(model, LPDModel)
    assert sum(isinstance(module, PackedLinear) for module in model.modules()) == 4 * model.config.depth + 1
    assert not any(isinstance(module, nn.Linear) for module in model.modules())
    return model


def test_packed_model_in_the_teacher_forced_pass(packed_golden: LPDModel) -> None:
    golden = load_golden()
    train = golden.part("train.")
    logits, wanted = golden_logits(packed_golden), golden_logits(golden.model())
    assert (logits - wanted).abs().max() <= 2e-5 * wanted.abs().max()
    targets = train["tokens"].long().gather(1, train["orders"].long())
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert abs(loss.item() - train["loss"].item()) <= 1e-5


@pytest.mark.parametrize("case", range(3))
def test_packed_model_decodes_as_golden(packed_golden: LPDModel, case: int) -> None:
    sample, request = load_golden().part(f"sample{case}."), load_golden().request(case)
    tokens, conditional, unconditional = recorded_logits(packed_golden, request)
    assert tokens.equal(sample["tokens"].long())
    wanted, batch = sample["logits"], len(request.labels)
    bound = 2e-5 * wanted.abs().max()
    assert (conditional - wanted[:batch]).abs().max() <= bound
    if len(wanted) > batch:
        assert (unconditional - wanted[batch:]).abs().max() <= bound


def test_packed_model_keeps_the_published_state_dict(packed_golden: LPDModel) -> None:
    published = load_golden().part("model.")
    for model in (packed_golden, copy.deepcopy(packed_golden), unpack(copy.deepcopy(packed_golden))):
        state = model.state_dict()
        assert state.keys() == published.keys()
        assert all(value.equal(published[name]) for name, value in state.items())
    assert golden_logits(unpack(packed_golden)).equal(golden_logits(load_golden().model()))
