"""The training programs: resuming, losses, caches and refusals, on 500 committed images."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from lpd_tools.data.token_cache import check_tokenizer, load_token_cache
from lpd_tools.data.token_caching import TokenCaching, cache_tokens
from lpd_tools.data.token_shards import ShardEntry, file_hash, read_index, write_index
from lpd_tools.evaluation.evaluate import Evaluation, evaluate
from lpd_tools.training import tokenizer as tokenizer_training
from lpd_tools.training import transformer as lpd_training
from lpd_tools.training.bundle import Bundling, bundle
from lpd_tools.training.checkpointing import (
    append_csv,
    load_state,
)
from lpd_tools.training.curves import Curves, draw_curves, read_log
from lpd_tools.training.tokenizer import CodebookAverages, TokenizerTraining, train_tokenizer
from lpd_tools.training.transformer import LPDTraining, batch_loss, make_batch, nats_per_token, parameter_groups, train

from lpd_ext.model import LPDConfig, LPDModel
from lpd_ext.tokenizer import VQTokenizer

DATA = Path(__file__).parent / "data" / "fashion_mnist"


class Killed(Exception):
    """Stands for the death of the process in the middle of a training."""


def dies_after(steps: int) -> Callable[..., Iterator[int]]:
    """A stand-in for the progress bar that kills the training before step number `steps`."""

    def track(items: Iterable[int], description: str) -> Iterator[int]:
        for item in items:
            if item == steps:
                raise Killed
            yield item

    return track


# tokenizer training


def log_columns(path: Path) -> list[str]:
    return path.read_text().splitlines()[0].split(",")


def tokenizer_config(out_dir: Path, **changes: object) -> TokenizerTraining:
    config = TokenizerTraining(out_dir=str(out_dir), data_dir=str(DATA), precision="fp32", z_channels=8)
    config = dataclasses.replace(config, ch_mult=(1, 1), codebook_size=16, batch_size=4, steps=6, warmup_steps=2)
    config = dataclasses.replace(config, decay_steps=3, revive_every=2, evaluate_every=3, evaluate_images=8)
    return dataclasses.replace(config, **changes)


def test_tokenizer_training_resumes_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = load_file(train_tokenizer(tokenizer_config(tmp_path / "whole")))
    config = tokenizer_config(tmp_path / "parts", save_every_s=0.0)
    with monkeypatch.context() as patch:
        patch.setattr(tokenizer_training, "track", dies_after(4))
        with pytest.raises(Killed):
            train_tokenizer(config)
    assert not (tmp_path / "parts" / "tokenizer.safetensors").exists()
    # What the dead process logged after its last save must not stay: the resumed one writes it again.
    append_csv(tmp_path / "parts" / "log.csv", dict.fromkeys(log_columns(tmp_path / "parts" / "log.csv"), 6))
    parts = load_file(train_tokenizer(config))
    assert all(torch.equal(parts[name], value) for name, value in whole.items())
    assert VQTokenizer.from_state_dict(whole).config == config.sizes()
    states = [load_state(tmp_path / name / "state.pt", {}) for name in ("whole", "parts")]
    assert torch.equal(states[0]["count"], states[1]["count"])
    logs = [read_log(tmp_path / name / "log.csv") for name in ("whole", "parts")]
    assert logs[1]["step"] == [3, 6]
    assert logs[1]["test_psnr_centre"] == logs[0]["test_psnr_centre"]


def test_tokenizer_training_depends_on_its_seed(tmp_path: Path) -> None:
    a, b = (load_file(train_tokenizer(tokenizer_config(tmp_path / str(seed), seed=seed))) for seed in (0, 1))
    assert not torch.equal(a["quantize.embedding.weight"], b["quantize.embedding.weight"])


def test_codebook_follows_its_vectors() -> None:
    averages = CodebookAverages(3, 2)
    vectors = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    averages.update(vectors, torch.tensor([0, 0]), decay=0.75)
    assert averages.count.tolist() == [1.25, 0.75, 0.75]
    assert averages.total.tolist() == [[0.25, 0.25], [0, 0], [0, 0]]
    for _ in range(300):
        averages.update(vectors, torch.tensor([0, 1]), decay=0.9)
    assert torch.allclose(averages.codes()[:2], vectors, atol=1e-6)
    assert averages.perplexity() == pytest.approx(2, rel=1e-3)
    revived = averages.revive(torch.tensor([[0.6, 0.8]]), 0.05, torch.Generator().manual_seed(0))
    assert revived == 1
    assert torch.allclose(averages.codes()[2], torch.tensor([0.6, 0.8]))
    assert torch.allclose(averages.codes()[:2], vectors, atol=1e-6)


# token cache


@pytest.fixture(scope="module")
def cache_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokens")
    torch.manual_seed(0)
    config = tokenizer_config(folder)
    model = VQTokenizer(config.sizes())
    torch.nn.init.normal_(model.quantize.embedding.weight)
    model.save(folder / "tokenizer.safetensors")
    data = f"fashion-mnist:{DATA}"
    return cache_tokens(TokenCaching(str(folder / "tokenizer.safetensors"), str(folder / "tokens"), data, workers=0))


def test_another_tokenizer_is_refused(cache_path: Path, tmp_path: Path) -> None:
    train(lpd_config(cache_path, tmp_path / "lpd", steps=1))
    right = cache_path.with_name("tokenizer.safetensors")
    wrong = VQTokenizer(tokenizer_config(tmp_path).sizes())
    wrong.save(tmp_path / "wrong.safetensors")
    out = bundle(Bundling(str(tmp_path / "lpd"), str(right), str(tmp_path / "bundle")))
    check_tokenizer(out, out / "tokenizer.safetensors")
    with pytest.raises(ValueError, match=r"wrong\.safetensors' is not the one whose tokens"):
        bundle(Bundling(str(tmp_path / "lpd"), str(tmp_path / "wrong.safetensors"), str(tmp_path / "other")))
    assert not (tmp_path / "other").exists()
    wrong.save(out / "tokenizer.safetensors")
    with pytest.raises(ValueError, match="is not the one whose tokens"):
        evaluate(Evaluation(out=str(tmp_path / "evaluation"), model=str(out)))


# transformer training


def lpd_config(tokens: Path, out_dir: Path, **changes: object) -> LPDTraining:
    config = LPDTraining(str(tokens), str(out_dir), dim=32, depth=2, heads=2, precision="fp32", batch_size=5)
    config = dataclasses.replace(config, steps=6, warmup_steps=2, decay_steps=3, decoding_steps=(8, 256))
    return dataclasses.replace(config, evaluate_every=3, evaluate_images=5, dropout=0.1, **changes)


def test_transformer_training_resumes_exactly(
    cache_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = load_file(train(lpd_config(cache_path, tmp_path / "whole")) / "model.safetensors")
    config = lpd_config(cache_path, tmp_path / "parts", save_every_s=0.0)
    with monkeypatch.context() as patch:
        patch.setattr(lpd_training, "track", dies_after(4))
        with pytest.raises(Killed):
            train(config)
    parts = load_file(train(config) / "model.safetensors")
    assert all(torch.equal(parts[name], value) for name, value in whole.items())
    states = [load_state(tmp_path / name / "state.pt", {}) for name in ("whole", "parts")]
    for key in ("model", "average"):
        assert all(torch.equal(states[1][key][name], value) for name, value in states[0][key].items())


def test_resuming_with_other_settings_is_refused(cache_path: Path, tmp_path: Path) -> None:
    config = lpd_config(cache_path, tmp_path / "run")
    train(dataclasses.replace(config, steps=1))
    with pytest.raises(ValueError, match=r"learning_rate is 0\.5, but the training in .* began with 0\.0015"):
        train(dataclasses.replace(config, learning_rate=0.5))
    shutil.copytree(cache_path, tmp_path / "others")
    shard = tmp_path / "others" / "train-00000.safetensors"
    tensors = load_file(shard)
    tensors["tokens"] = tensors["tokens"].flip(0)
    save_file(tensors, shard)
    settings, class_names, entries = read_index(cache_path)
    entries["train"] = [ShardEntry(shard.name, 200, shard.stat().st_size, file_hash(shard))]
    write_index(tmp_path / "others", settings, class_names, entries)
    with pytest.raises(ValueError, match="tokens_sha256 is"):
        train(dataclasses.replace(config, tokens=str(tmp_path / "others")))
    longer = dataclasses.replace(config, steps=2, decay_steps=1, evaluate_every=1, evaluate_images=7, save_every_s=9.0)
    shutil.copytree(cache_path, tmp_path / "moved")
    train(dataclasses.replace(longer, tokens=str(tmp_path / "moved")))
    assert read_log(tmp_path / "run" / "log.csv")["step"] == [1, 2]
    train_tokenizer(tokenizer_config(tmp_path / "vq", steps=1))
    with pytest.raises(ValueError, match="z_channels is 16, but"):
        train_tokenizer(tokenizer_config(tmp_path / "vq", steps=1, z_channels=16))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("decoding_steps", (8, 257), r"decoding_steps must be in \[1, 256\], got 257"),
        ("decoding_steps", (), "decoding_steps must name at least one"),
        ("evaluate_every", 0, r"evaluate_every must be in \[1, inf\], got 0"),
        ("evaluate_images", 301, r"evaluate_images must be in \[1, 300\], got 301"),
        ("batch_size", 201, r"batch_size must be in \[1, 200\], got 201"),
        ("dropout", math.nan, r"dropout must be in \[0, 1\], got nan"),
        ("seed", -1, "seed must be in"),
    ],
)
def test_impossible_settings_are_refused_at_once(
    cache_path: Path, tmp_path: Path, name: str, value: object, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        train(dataclasses.replace(lpd_config(cache_path, tmp_path / "run"), **{name: value}))
    assert not (tmp_path / "run").exists()


def test_transformer_learns(cache_path: Path, tmp_path: Path) -> None:
    train(lpd_config(cache_path, tmp_path, steps=60, decay_steps=20, ema_decay=0.8, learning_rate=3e-3))
    rows = [line.split(",") for line in (tmp_path / "log.csv").read_text().splitlines()]
    column = rows[0].index("test_nats_10_steps")
    first, last = float(rows[1][column]), float(rows[-1][column])
    assert last < first - 0.2
    assert last < math.log(16)
    rows = "step,test_psnr_centre,test_recognised\n1,20,0.5\n2,22,0.75\n"
    (tmp_path / "tokenizer.csv").write_text(rows)
    picture = draw_curves(Curves(str(tmp_path / "tokenizer.csv"), str(tmp_path / "log.csv"), str(tmp_path / "x.png")))
    with Image.open(picture) as image:
        assert image.size == (1320, 432)


def test_batches_are_a_function_of_seed_and_step(cache_path: Path, tmp_path: Path) -> None:
    cache = load_token_cache(cache_path)
    config = lpd_config(cache_path, tmp_path)
    index = torch.arange(100)
    batches = [make_batch(cache, index, config, step) for step in range(20)]
    again = make_batch(cache, index, config, 3)
    assert torch.equal(again.orders, batches[3].orders)
    assert torch.equal(again.tokens, batches[3].tokens)
    assert not torch.equal(batches[4].orders, batches[3].orders)
    assert {len(batch.group_sizes) for batch in batches} == {8, 256}
    assert torch.equal(batches[0].orders.sort(dim=1).values, torch.arange(256).expand(100, 256))
    dropped = torch.stack([batch.labels == -1 for batch in batches]).float().mean().item()
    # 2,000 labels dropped with p = 0.1: four standard deviations are 0.027.
    assert dropped == pytest.approx(0.1, abs=0.027)
    kept = batches[0].labels >= 0
    assert torch.equal(batches[0].labels[kept], cache.train.labels[index][kept])
    mirror_images = cache.train.tokens(index, 1)
    mirrored = [(batch.tokens == mirror_images).all(1).float().mean().item() for batch in batches]
    assert sum(mirrored) / 20 == pytest.approx(0.5, abs=0.045)


def test_loss_is_the_cross_entropy_of_each_cell(cache_path: Path, tmp_path: Path) -> None:
    cache = load_token_cache(cache_path)
    batch = make_batch(cache, torch.arange(4), lpd_config(cache_path, tmp_path), 0)
    torch.manual_seed(0)
    model = LPDModel(LPDConfig(32, 1, 2, 16, 10, (16, 16))).eval()
    with torch.no_grad():
        model.head.weight.normal_()
        logits = model(batch.tokens, batch.labels, batch.orders, batch.group_sizes)
        chosen = [
            -F.log_softmax(logits[b, i].double(), 0)[batch.tokens[b, batch.orders[b, i]]]
            for b in range(4)
            for i in range(256)
        ]
        expected = torch.stack(chosen).mean().item()
        assert batch_loss(model, batch).item() == pytest.approx(expected, rel=1e-5)
        arguments = (model, batch.tokens, batch.labels, batch.orders, batch.group_sizes)
        assert nats_per_token(*arguments, batch_size=3) == pytest.approx(expected, rel=1e-5)


def test_weight_decay_spares_vectors() -> None:
    model = LPDModel(LPDConfig(32, 1, 2, 16, 10, (4, 4)))
    decayed, spared = parameter_groups(model, 0.02)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.02, 0.0)
    assert {id(p) for p in decayed["params"]} == {id(p) for p in model.parameters() if p.ndim >= 2}
    assert {id(p) for p in spared["params"]} == {id(p) for p in model.parameters() if p.ndim < 2}
    assert any(p is model.pos_embed for p in decayed["params"])


def test_stored_weights_are_half_precision_in_the_published_layout(cache_path: Path, tmp_path: Path) -> None:
    train(lpd_config(cache_path, tmp_path, steps=1))
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
        assert {"class_emb.weight", "fake_latent", "blocks.1.mlp.fc2.bias", "head.weight"} <= names
        assert file.get_tensor("pos_embed").shape == (1, 257, 32)
        assert all(file.get_tensor(name).dtype == torch.float16 for name in names)
    assert '"dim": 32' in (tmp_path / "config.json").read_text()
