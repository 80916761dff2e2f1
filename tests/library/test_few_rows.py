"""Decoding by our own products of few rows: as near to exact logits as the usual path, of the weights as they are."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence

import emulation
import pytest
import torch
from decodes import random_model
from torch import Tensor, nn

from lpd_ext import LPDPipeline, few_rows, ops, product_table
from lpd_ext.continuous_batch import ContinuousBatch
from lpd_ext.cuda_graphs import DecodeGraphs
from lpd_ext.decode_state import DecodeState, Layout
from lpd_ext.linear import unpack
from lpd_ext.model import LPDConfig, LPDModel
from lpd_ext.modes import decoding_modes
from lpd_ext.request import DecodeRequest, make_request
from lpd_ext.sampler import begin, decode_step, generate

CPU = torch.device("cpu")


@pytest.fixture(params=["cpu", pytest.param("emulated", marks=pytest.mark.emulated)])
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Own products, by the CPU's kernels or those of CUDA."""
    monkeypatch.setenv("LPD_PRODUCTS", "own")
    if request.param == "cpu":
        yield
        return
    emulation.load()
    monkeypatch.setattr(ops, "_ops", torch.ops.lpd_emulated)
    with emulation.running("random", 1, emulation.SM_90):
        yield


def small_model(dtype: torch.dtype = torch.bfloat16) -> LPDModel:
    torch.manual_seed(0)
    model = LPDModel(LPDConfig(64, 2, 2, vocab_size=56, num_classes=5, grid=(4, 4))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.dim() > 1 else 0.5))
    return model.to(dtype)


def bundled_model() -> LPDModel:
    model = unpack(copy.deepcopy(LPDPipeline.from_pretrained("fashion_mnist").model))
    assert isinstance(model, LPDModel)
    return model


def wide_model() -> LPDModel:
    """Makes a model as wide as lpd_l, of fewer blocks, with weights that matter as a trained model's do."""
    torch.manual_seed(0)
    model = LPDModel(LPDConfig(1024, 3, 16, vocab_size=512, num_classes=10, grid=(4, 4))).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * (0.2 if "norm" in name else 0.1))
    return model


def request_for(model: LPDModel, labels: Sequence[int] = (1, 3), steps: int = 4) -> DecodeRequest:
    generator = torch.Generator().manual_seed(0)
    orders = torch.stack([torch.randperm(model.config.num_tokens, generator=generator) for _ in labels])
    return make_request(
        model.config, list(labels), num_inference_steps=steps, order=orders, guidance_scale=2.0, seeds=list(labels)
    )


def logits_of(model: LPDModel, request: DecodeRequest) -> Tensor:
    """Returns the logits of every step, with the same tokens fed whatever they are."""
    generator = torch.Generator().manual_seed(7)
    teacher = torch.randint(model.config.vocab_size, tuple(request.orders.shape), generator=generator)
    layout = Layout.of(request)
    with decoding_modes(CPU):
        plan = layout.plan(model.config.num_tokens, CPU)
        state = DecodeState(model, plan.capacity, layout.filters)
        state.load(request, plan.places, teacher)
        begin(state)
        return torch.cat([decode_step(state, step).float() for step in plan.steps])


def errors(model: LPDModel, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> tuple[float, float]:
    """Root mean square errors of the logits in dtype, of our own products and of the usual path.

    Right are those of the same weights in float32, whose own rounding is a thousand times finer.
    """
    rounded = copy.deepcopy(model).to(dtype)
    request = request_for(model)
    own = logits_of(rounded, request)
    monkeypatch.setenv("LPD_PRODUCTS", "cublaslt")
    usual, exact = logits_of(rounded, request), logits_of(rounded.float(), request)
    assert not own.equal(usual)
    return tuple((logits - exact).square().mean().sqrt().item() for logits in (own, usual))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_of_the_bundled_model(dtype: torch.dtype, products: None, monkeypatch: pytest.MonkeyPatch) -> None:
    own, usual = errors(bundled_model(), dtype, monkeypatch)
    assert own <= usual


def test_logits_of_a_model_as_wide_as_lpd_l(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LPD_PRODUCTS", "own")
    own, usual = errors(wide_model(), torch.bfloat16, monkeypatch)
    assert own <= usual


@pytest.mark.emulated
@pytest.mark.parametrize("choice", ["own", "cublaslt"])
def test_every_launch_of_a_decode_waits_for_the_one_before(choice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All begin while the launch before still runs."""
    emulation.load()
    model, request = small_model(), request_for(small_model())
    monkeypatch.setenv("LPD_PRODUCTS", choice)
    monkeypatch.setattr(ops, "_ops", torch.ops.lpd_emulated)
    with emulation.running("random", 2, emulation.SM_90):
        wanted = generate(model, request)
        with emulation.launches_follow():
            assert generate(model, request).equal(wanted)


@pytest.mark.emulated
def test_a_block_is_five_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    emulation.load()
    monkeypatch.setenv("LPD_PRODUCTS", "own")
    monkeypatch.setattr(ops, "_ops", torch.ops.lpd_emulated)
    model = small_model()
    with emulation.running(device=emulation.SM_90), emulation.counting() as launches:
        logits_of(model, request_for(model, steps=2))
    fold, block = ["fold_layer_norm"] * 5, ["group_attention", *["residual_linear", "normed_linear"] * 2]
    step = ["embed_rows", "normed_linear", *block * 2]  # qkv of the first block, then of the next, at last the head
    assert [launch["kernel"] for launch in launches] == fold + step * 2


def _no_mean(scaled: Tensor, statistics: Tensor, *rest: object) -> Tensor:
    return torch.ops.lpd_ext.normed_linear(scaled, statistics * torch.tensor([0.0, 1.0]), *rest)


def _rounded_stream(x: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
    x.copy_(x.bfloat16())
    return torch.ops.lpd_ext.residual_linear(x, *rest)


MISTAKES: dict[str, tuple[object, str, Callable[..., object]]] = {
    "folded once, before the weights": (few_rows.FewRows, "fold", lambda self: self._vectors.fill_(0.0)),
    "means left out": (few_rows.ops, "normed_linear", _no_mean),
    "a rounded residual stream": (few_rows.ops, "residual_linear", _rounded_stream),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_seen_in_the_logits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    place, attribute, wrong = MISTAKES[name]
    monkeypatch.setenv("LPD_PRODUCTS", "own")
    monkeypatch.setattr(place, attribute, wrong)
    own, usual = errors(bundled_model(), torch.bfloat16, monkeypatch)
    assert own > usual


def test_an_image_has_the_same_tokens_alone_and_among_others(products: None) -> None:
    model = small_model()
    together = generate(model, request_for(model, [1, 3, 4]))
    alone = generate(model, request_for(model, [1]))
    assert together[:1].equal(alone)


def test_continuous_batches_draw_the_same_tokens(products: None) -> None:
    model = small_model()
    request = request_for(model)
    batch = ContinuousBatch(model, 2)
    images = batch.admit(request)
    while not all(image.finished for image in images):
        batch.advance()
    drawn = torch.stack([batch.tokens(image) for image in images])
    assert drawn.equal(generate(model, request))


@pytest.mark.parametrize("steps", [4, 16])
def test_weights_changed_in_place_are_seen_by_a_recorded_decode(
    steps: int, products: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lpd_ext.cuda_graphs.MAX_STEPS_PER_GRAPH", 8)  # with 16 steps, each is a recording of its own
    model = small_model()
    request = request_for(model, steps=steps)
    graphs = DecodeGraphs(capture=lambda runs: list(runs), device_type="cpu")
    before = generate(model, request, graphs)
    assert len(graphs) == 1
    assert before.equal(generate(model, request))
    with torch.no_grad():
        for block in model.blocks:
            block.norm2.weight.mul_(-1.0)
            block.norm2.bias.add_(1.0)
    after = generate(model, request, graphs)
    assert after.equal(generate(model, request))
    assert not after.equal(before)


def test_another_choice_of_products_is_recorded_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def capture(runs: Sequence[Callable[[], None]]) -> Sequence[Callable[[], None]]:
        calls.append(len(runs))
        return runs

    model = small_model()
    graphs = DecodeGraphs(capture=capture, device_type="cpu")
    for choice in ("auto", "cublaslt", "own", "own"):
        monkeypatch.setenv("LPD_PRODUCTS", choice)
        generate(model, request_for(model), graphs)
    assert len(calls) == 3


def test_steps_of_many_rows_go_the_usual_way(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model()
    request = request_for(model)
    usual = logits_of(model, request)
    monkeypatch.setenv("LPD_PRODUCTS", "own")
    monkeypatch.setattr(few_rows, "row_class", lambda _: None)
    assert logits_of(model, request).equal(usual)


def test_weights_are_folded_once_for_steps_that_need_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not at all for a decode whose steps all have more rows than our own products take."""
    folds: list[int] = []
    fold = few_rows.FewRows.fold

    def counted(self: few_rows.FewRows) -> None:
        folds.append(1)
        fold(self)

    monkeypatch.setenv("LPD_PRODUCTS", "own")
    monkeypatch.setattr(few_rows.FewRows, "fold", counted)
    model = small_model()
    generate(model, request_for(model))
    assert len(folds) == 1
    generate(model, request_for(model, [1] * 100, steps=1))  # 3,400 rows, the last block 3,200
    assert len(folds) == 1
    batch = ContinuousBatch(model, 8)
    for label in (1, 2, 3, 4):
        batch.admit(request_for(model, [label]))
    batch.advance()
    batch.advance()
    assert len(folds) == 2


def few_rows_of(model: LPDModel) -> few_rows.FewRows | None:
    caches = torch.empty(
        2, model.config.depth, 1, model.config.heads, 1, model.config.head_dim, dtype=model.content.dtype
    )
    return model.decoding_parts(*caches, 1).few_rows


def test_they_are_used_where_they_are_asked_for_and_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    for choice in ("auto", "cublaslt"):
        monkeypatch.setenv("LPD_PRODUCTS", choice)
        assert few_rows_of(small_model()) is None
    monkeypatch.setenv("LPD_PRODUCTS", "own")
    assert few_rows_of(small_model()) is not None
    assert few_rows_of(small_model(torch.float32)) is None
    assert few_rows_of(random_model(32, (4, 4)).bfloat16()) is None  # 50 tokens


def test_unless_asked_for_they_are_neither_built_nor_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU has run them yet: without LPD_PRODUCTS the card is not even looked at."""
    monkeypatch.delenv("LPD_PRODUCTS", raising=False)
    for name in ("LayerPair", "NormedLayer", "ResidualLayer", "FewRowBlock", "FewRows", "may_be_own", "are_plain"):
        monkeypatch.setattr(f"lpd_ext.model.{name}", None)
    monkeypatch.setattr(product_table, "card_of", None)
    assert few_rows.chosen_products() == "cublaslt"
    assert few_rows_of(small_model()) is None


CHANGES: dict[str, Callable[[LPDModel], object]] = {
    "a hook": lambda m: m.blocks[0].attn.proj.register_forward_hook(lambda *_: None),
    "a hook of a norm": lambda m: m.norm.register_forward_pre_hook(lambda *_: None),
    "another layer": lambda m: setattr(m.blocks[1].mlp, "fc1", nn.Sequential(m.blocks[1].mlp.fc1)),
    "another dtype": lambda m: m.norm.float(),
    "computed weights": lambda m: nn.utils.parametrizations.orthogonal(m.blocks[0].attn.proj.float()),
}


@pytest.mark.parametrize("name", CHANGES)
def test_layers_that_are_more_than_products_are_left_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LPD_PRODUCTS", "own")
    model = small_model()
    CHANGES[name](model)
    assert few_rows_of(model) is None


def test_an_unknown_choice_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LPD_PRODUCTS", "fast")
    with pytest.raises(ValueError, match="LPD_PRODUCTS must be one of auto, own, cublaslt, got 'fast'"):
        few_rows_of(small_model())
