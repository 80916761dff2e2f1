"""Training of the transformer in one process: batches, losses, gradients, where it starts from, what it leaves."""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file

pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from lpd_tools.data.token_cache import TokenCache, TokenSplit, check_tokenizer, load_token_cache
from lpd_tools.data.token_shards import Shard
from lpd_tools.processes import Processes
from lpd_tools.training import task as tasks
from lpd_tools.training import transformer
from lpd_tools.training.curves import read_log
from lpd_tools.training.export import Export, export
from lpd_tools.training.gradients import add_gradients, clip_gradients, micro_batches
from lpd_tools.training.loop import prepare
from lpd_tools.training.shuffling import EpochShuffle
from lpd_tools.training.transformer import (
    LPDTraining,
    TransformerTask,
    batch_loss,
    initial_model,
    make_batch,
    nats_per_token,
    train,
)
from training_runs import column, differences, lpd_config, make_cache, newest_state

from lpd_ext.checkpoint import load_model, resize_position_embedding, save_model
from lpd_ext.model import LPDConfig, LPDModel

CPU = torch.device("cpu")
ALONE = Processes(0, 1, CPU)


@pytest.fixture(scope="module")
def cache_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cache(tmp_path_factory.mktemp("tokens"))


@pytest.fixture(scope="module")
def cache(cache_path: Path) -> TokenCache:
    return load_token_cache(cache_path)


# batches


def test_batches_are_a_function_of_seed_and_step(cache: TokenCache) -> None:
    config = lpd_config(Path(), Path(), decoding_steps=(4, 16))
    index = torch.arange(100)
    batches = [make_batch(cache, index, config, step) for step in range(20)]
    again = make_batch(cache, index, config, 3)
    assert torch.equal(again.orders, batches[3].orders)
    assert torch.equal(again.tokens, batches[3].tokens)
    assert not torch.equal(batches[4].orders, batches[3].orders)
    assert {len(batch.group_sizes) for batch in batches} == {4, 16}
    assert torch.equal(batches[0].orders.sort(dim=1).values, torch.arange(16).expand(100, 16))
    dropped = torch.stack([batch.labels == -1 for batch in batches]).float().mean().item()
    # 2,000 labels dropped with p = 0.1: four standard deviations are 0.027.
    assert dropped == pytest.approx(0.1, abs=0.027)
    kept = batches[0].labels >= 0
    assert torch.equal(batches[0].labels[kept], cache.train.labels[index][kept])
    plain, mirror = cache.train.tokens(index, 0), cache.train.tokens(index, 1)
    # Few images have the same tokens mirrored, so most rows tell which view they are.
    told = (plain != mirror).any(1)
    assert told.sum() > 50
    mirrored = torch.cat([(batch.tokens == mirror).all(1)[told] for batch in batches]).float()
    assert mirrored.mean().item() == pytest.approx(0.5, abs=2 / math.sqrt(len(mirrored)))


def test_a_row_does_not_depend_on_which_rows_are_asked_for(cache: TokenCache) -> None:
    config = lpd_config(Path(), Path())
    index = torch.arange(50, 62)
    whole = make_batch(cache, index, config, 5)
    for rows in (slice(0, 4), slice(3, 12), slice(11, 12)):
        part = make_batch(cache, index, config, 5, rows)
        for item in dataclasses.fields(whole):
            expected = getattr(whole, item.name)
            found = getattr(part, item.name)
            assert torch.equal(found, expected[rows]) if isinstance(found, torch.Tensor) else found == expected


def test_every_image_comes_once_in_an_epoch() -> None:
    shuffle = EpochShuffle(10, 3, seed=5)
    whole = [shuffle.batch(step).tolist() for step in range(9)]
    for epoch in range(3):
        seen = [i for batch in whole[3 * epoch : 3 * epoch + 3] for i in batch]
        assert len(set(seen)) == 9
    assert whole[:3] != whole[3:6]
    assert EpochShuffle(10, 3, seed=5).batch(7).tolist() == whole[7]
    assert EpochShuffle(10, 3, seed=6).batch(7).tolist() != whole[7]
    with pytest.raises(ValueError, match=r"batch_size must be in 1\.\.10, got 11"):
        EpochShuffle(10, 11, seed=0)


# losses and gradients


def test_loss_is_the_cross_entropy_of_each_cell(cache: TokenCache) -> None:
    batch = make_batch(cache, torch.arange(4), lpd_config(Path(), Path()), 0)
    torch.manual_seed(0)
    model = LPDModel(LPDConfig(32, 1, 2, 16, 10, (4, 4))).eval()
    with torch.no_grad():
        model.head.weight.normal_()
        logits = model(batch.tokens, batch.labels, batch.orders, batch.group_sizes)
        chosen = [
            -F.log_softmax(logits[b, i].double(), 0)[batch.tokens[b, batch.orders[b, i]]]
            for b in range(4)
            for i in range(16)
        ]
        expected = torch.stack(chosen).mean().item()
        assert batch_loss(model, batch).item() == pytest.approx(expected, rel=1e-5)
        arguments = (model, batch.tokens, batch.labels, batch.orders, batch.group_sizes)
        assert nats_per_token(*arguments, batch_size=3) == pytest.approx(expected, rel=1e-5)


def gradients(config: LPDTraining, cache: TokenCache) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Losses and gradients of step 3."""
    task = TransformerTask(config, cache, CPU)
    model = prepare(task, config, ALONE)
    parts = micro_batches(slice(0, config.batch_size), config.micro_batch_size)
    torch.manual_seed(1)
    losses = add_gradients(model, parts, partial(task.batch, 3), task.losses, task.dtype, CPU)
    return losses, {name: p.grad for name, p in task.network.named_parameters()}


def test_micro_batches_add_up_to_the_batch(cache: TokenCache) -> None:
    assert micro_batches(slice(4, 9), 2) == [slice(4, 6), slice(6, 8), slice(8, 9)]
    assert micro_batches(slice(4, 9), 0) == [slice(4, 9)]
    config = lpd_config(Path(), Path(), batch_size=5)
    losses, whole = gradients(config, cache)
    parts_losses, parts = gradients(dataclasses.replace(config, micro_batch_size=2), cache)
    assert parts_losses["loss"] == pytest.approx(losses["loss"], rel=1e-6)
    for name, value in whole.items():
        assert (parts[name] - value).norm() <= 1e-5 * value.norm() + 1e-8, name


def test_gradients_are_clipped_to_their_limit_if_there_is_one() -> None:
    network = torch.nn.Linear(3, 1, bias=False)
    for limit, length in ((2.5, 2.5), (10.0, 5.0), (0.0, 5.0)):
        network.weight.grad = torch.tensor([[3.0, 0.0, 4.0]])
        assert clip_gradients(network, limit) == 5.0
        assert network.weight.grad.norm().item() == pytest.approx(length, rel=1e-5)


def test_recomputing_activations_changes_no_gradient_and_keeps_less(cache: TokenCache) -> None:
    config = lpd_config(Path(), Path(), dropout=0.2)
    kept: list[int] = []

    def count(tensor: torch.Tensor) -> torch.Tensor:
        kept[-1] += tensor.numel()
        return tensor

    results = []
    for recompute in (False, True):
        kept.append(0)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            results.append(gradients(dataclasses.replace(config, checkpoint_activations=recompute), cache))
    (losses, whole), (again_losses, again) = results
    assert again_losses == losses
    assert all(torch.equal(again[name], value) for name, value in whole.items())
    assert kept[1] < 0.5 * kept[0]


# The compiler looks at the gradient of every input of a block, and torch warns where that is no leaf.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled_blocks_give_the_same_gradients(cache: TokenCache) -> None:
    # aot_eager traces as inductor does, and needs no C++ compiler.
    config = lpd_config(Path(), Path())
    losses, whole = gradients(config, cache)
    torch._dynamo.utils.counters.clear()
    compiled_losses, compiled = gradients(dataclasses.replace(config, compile_backend="aot_eager"), cache)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    assert compiled_losses["loss"] == pytest.approx(losses["loss"], rel=1e-6)
    for name, value in whole.items():
        assert (compiled[name] - value).norm() <= 1e-5 * value.norm() + 1e-8, name


def test_bf16_is_used_where_asked_for(cache: TokenCache) -> None:
    config = lpd_config(Path(), Path())
    losses, _ = gradients(config, cache)
    rounded, grads = gradients(dataclasses.replace(config, precision="bf16"), cache)
    assert rounded["loss"] == pytest.approx(losses["loss"], rel=2e-2)
    assert rounded["loss"] != losses["loss"]
    assert all(grad.dtype == torch.float32 for grad in grads.values())


@pytest.mark.parametrize("setting", ["dropout", "attention_dropout"])
def test_dropout_acts_on_the_training_loss_alone(cache: TokenCache, setting: str) -> None:
    config = lpd_config(Path(), Path(), label_drop=0.0)
    dropping = dataclasses.replace(config, **{setting: 0.5})
    assert gradients(dropping, cache)[0] != gradients(config, cache)[0]
    task = TransformerTask(dropping, cache, CPU)
    average = dict(task.network.named_parameters())
    assert task.test(average) == TransformerTask(config, cache, CPU).test(average)


def test_a_twin_is_trained_without_mutual_visibility(cache_path: Path, cache: TokenCache, tmp_path: Path) -> None:
    config = lpd_config(cache_path, tmp_path / "blind", decoding_steps=(4,), mutual_visibility=False, steps=1)
    seeing = dataclasses.replace(config, mutual_visibility=True)
    assert gradients(config, cache)[0] != gradients(seeing, cache)[0]
    train(config)
    assert not load_model(tmp_path / "blind").config.mutual_visibility
    with pytest.raises(ValueError, match="mutual_visibility is True, but the training in"):
        train(seeing)
    tokenizer = str(cache_path.with_name("tokenizer.safetensors"))
    with pytest.raises(ValueError, match="tokenizer must be empty without mutual_visibility"):
        train(dataclasses.replace(config, tokenizer=tokenizer))
    # Either may start from the other.
    assert initial_model(dataclasses.replace(seeing, init_from=str(tmp_path / "blind")), cache).config.mutual_visibility


# whole trainings


def test_transformer_learns(cache_path: Path, tmp_path: Path) -> None:
    config = lpd_config(cache_path, tmp_path, steps=150, decay_steps=50, ema_decay=0.8, learning_rate=3e-3)
    train(dataclasses.replace(config, batch_size=16, evaluate_every=10, evaluate_images=50))
    nats = read_log(tmp_path / "log.csv")["test_nats_10_steps"]
    assert nats[-1] < nats[0] - 0.2
    assert nats[-1] < math.log(16)
    steps = read_log(tmp_path / "steps.csv")
    assert steps["step"] == list(range(1, 151))
    assert sum(steps["loss"][-20:]) < sum(steps["loss"][:20])


@pytest.mark.parametrize("enabled", [False, True])
def test_bf16_steps_see_the_newest_weights_inside_another_autocast(
    cache_path: Path, tmp_path: Path, enabled: bool
) -> None:
    """Torch keeps casts of weights until the outermost context ends: all steps would compute with the first's."""
    plain, inside = (lpd_config(cache_path, tmp_path / name, precision="bf16") for name in ("plain", "inside"))
    train(plain)
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        train(inside)
    assert not differences(newest_state(tmp_path / "inside"), newest_state(tmp_path / "plain"))
    losses = [column(tmp_path / name / "steps.csv", "loss") for name in ("plain", "inside")]
    assert losses[0] == losses[1]


def test_test_images_are_of_all_classes(
    cache_path: Path, cache: TokenCache, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Also where the images of a class lie together, as in folders of pictures."""
    order = cache.test.labels.argsort()
    shard = Shard(cache.test.tokens(order).unflatten(1, (1, 4, 4)), cache.test.labels[order].int(), order.int())
    in_classes = dataclasses.replace(cache, test=TokenSplit([shard], 1, 16))
    seen = []

    def watch(model: LPDModel, tokens: torch.Tensor, labels: torch.Tensor, *rest: object) -> float:
        seen.append((tokens, labels))
        return 1.0

    monkeypatch.setattr(transformer, "nats_per_token", watch)
    task = TransformerTask(lpd_config(cache_path, tmp_path, evaluate_images=100), in_classes, CPU)
    task.test(dict(task.network.named_parameters()))
    tokens, labels = seen[0]
    assert labels.unique().tolist() == list(range(10))
    assert torch.equal(tokens, shard.tokens.flatten(1)[::3])
    assert torch.equal(labels, in_classes.test.labels[::3])
    more = TransformerTask(lpd_config(cache_path, tmp_path, evaluate_images=301), in_classes, CPU)
    more.test(dict(task.network.named_parameters()))
    assert torch.equal(seen[-1][1], in_classes.test.labels)


def test_result_is_the_average_in_half_precision_and_published_layout(cache_path: Path, tmp_path: Path) -> None:
    config = lpd_config(cache_path, tmp_path / "lpd", steps=3, ema_decay=0.9)
    train(config)
    with safe_open(tmp_path / "lpd" / "model.safetensors", "pt") as file:
        names = set(file.keys())
        assert {"class_emb.weight", "fake_latent", "blocks.1.mlp.fc2.bias", "head.weight"} <= names
        assert file.get_tensor("pos_embed").shape == (1, 17, 32)
        assert all(file.get_tensor(name).dtype == torch.float16 for name in names)
    assert '"dim": 32' in (tmp_path / "lpd" / "config.json").read_text()
    state = torch.load(tmp_path / "lpd" / "checkpoints" / "step_000000003.pt", weights_only=True)
    stored = load_file(tmp_path / "lpd" / "model.safetensors")["head.weight"]
    assert torch.equal(stored, state["average"]["head.weight"].half())
    assert not torch.equal(stored, state["weights"]["head.weight"].half())


def test_the_best_checkpoint_has_the_lowest_test_loss(cache_path: Path, tmp_path: Path) -> None:
    # A learning rate that is far too high makes the test loss rise again.
    config = lpd_config(cache_path, tmp_path, steps=12, evaluate_every=2, learning_rate=0.3, warmup_steps=6, keep=1)
    train(dataclasses.replace(config, decay_steps=0, ema_decay=0.0, evaluate_images=50))
    log = read_log(tmp_path / "log.csv")
    losses = log["test_nats_10_steps"]
    best = torch.load(tmp_path / "checkpoints" / "best.pt", weights_only=True)
    assert best["progress"]["done"] == log["step"][losses.index(min(losses))] < 12
    model = load_model(export(Export(str(tmp_path / "checkpoints" / "best.pt"), str(tmp_path / "best"))))
    assert torch.equal(model.head.weight, best["average"]["head.weight"].half().float())
    assert check_tokenizer(tmp_path / "best", cache_path.with_name("tokenizer.safetensors")) is None
    with pytest.raises(ValueError, match="is not a readable checkpoint"):
        export(Export(str(tmp_path / "log.csv"), str(tmp_path / "none")))
    assert (tmp_path / "checkpoints" / "step_000000012.pt").exists()


def test_a_test_loss_that_is_no_number_is_not_the_best_for_ever(
    cache_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([math.nan, 2.0, 3.0])
    monkeypatch.setattr(TransformerTask, "test", lambda task, average: tasks.Test(next(losses), {}))
    train(lpd_config(cache_path, tmp_path, steps=6, evaluate_every=2))
    best = torch.load(tmp_path / "checkpoints" / "best.pt", weights_only=True)
    assert best["progress"]["done"] == 4
    assert best["progress"]["best"] == 2.0


def test_a_model_out_of_a_checkpoint_is_the_one_that_training_writes(cache_path: Path, tmp_path: Path) -> None:
    train(lpd_config(cache_path, tmp_path / "lpd", steps=2))
    export(Export(str(tmp_path / "lpd" / "checkpoints" / "step_000000002.pt"), str(tmp_path / "out")))
    assert (tmp_path / "out" / "config.json").read_text() == (tmp_path / "lpd" / "config.json").read_text()
    found, wanted = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "lpd"))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


# where it starts from


def test_training_starts_from_another_model_on_a_larger_grid(
    cache_path: Path, cache: TokenCache, tmp_path: Path
) -> None:
    torch.manual_seed(5)
    source = LPDModel(LPDConfig(32, 2, 2, 16, 10, (2, 2)))
    save_model(source, tmp_path / "source")
    config = lpd_config(cache_path, tmp_path / "run", init_from=str(tmp_path / "source"))
    model = initial_model(config, cache)
    assert model.config.grid == (4, 4)
    resized = resize_position_embedding(source.pos_embed[None], (2, 2), (4, 4))[0]
    for name, value in model.named_parameters():
        assert torch.equal(value, resized if name == "pos_embed" else source.get_parameter(name)), name
    # Steps of no size, but for rounding to half precision, leave it as it is.
    train(dataclasses.replace(config, learning_rate=0.0, steps=2))
    trained = load_model(tmp_path / "run")
    assert torch.equal(trained.head.weight, source.head.weight.half().float())


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((32, 2, 2, 17, 10), "has vocab_size 17, but the tokens have 16"),
        ((32, 2, 2, 16, 11), "has num_classes 11, but the tokens have 10"),
        ((64, 2, 2, 16, 10), "has dim 64, but the settings ask for 32"),
        ((32, 1, 2, 16, 10), "has depth 1, but the settings ask for 2"),
    ],
)
def test_a_model_of_other_sizes_is_no_start(
    cache_path: Path, tmp_path: Path, sizes: tuple[int, ...], message: str
) -> None:
    save_model(LPDModel(LPDConfig(*sizes, grid=(4, 4))), tmp_path / "source")
    with pytest.raises(ValueError, match=f"init_from: .*{message}"):
        train(lpd_config(cache_path, tmp_path / "run", init_from=str(tmp_path / "source")))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("decoding_steps", (8, 17), r"decoding_steps must be in \[1, 16\], got 17"),
        ("decoding_steps", (), "decoding_steps must name at least one"),
        ("evaluate_images", -1, r"evaluate_images must be at least 0, got -1"),
        ("batch_size", 201, r"batch_size must be in \[1, 200\], got 201"),
        ("dropout", math.nan, r"dropout must be in \[0, 1\), got nan"),
        ("attention_dropout", 1.0, r"attention_dropout must be in \[0, 1\), got 1"),
        ("label_drop", 2.0, r"label_drop must be in \[0, 1\]"),
        ("dim", 33, "dim / heads must be a multiple of 8"),
        ("device", "tpu", "device must be one of cpu"),
    ],
)
def test_impossible_settings_are_refused_at_once(
    cache_path: Path, tmp_path: Path, name: str, value: object, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        train(dataclasses.replace(lpd_config(cache_path, tmp_path / "run"), **{name: value}))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, partial(torch.autocast, "cpu", torch.bfloat16)])
def test_modes_of_the_caller_change_no_training(mode: Any, cache_path: Path, tmp_path: Path) -> None:
    transformer.train(lpd_config(cache_path, tmp_path / "wanted", steps=2, evaluate_images=0))
    with mode():
        transformer.train(lpd_config(cache_path, tmp_path / "found", steps=2, evaluate_images=0))
    wanted, found = (load_file(tmp_path / name / "model.safetensors") for name in ("wanted", "found"))
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


def test_another_default_dtype_is_refused(cache_path: Path, tmp_path: Path) -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        with pytest.raises(ValueError, match=r"default dtype must be float32 to train, got torch\.bfloat16"):
            transformer.train(lpd_config(cache_path, tmp_path))
    finally:
        torch.set_default_dtype(torch.float32)
    assert list(tmp_path.iterdir()) == []
