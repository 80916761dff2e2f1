"""The training programs: data, resuming, losses, measures and the command line, on 500 committed images."""

from __future__ import annotations

import dataclasses
import gzip
import itertools
import math
import pickle
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from lpd_tools import train as lpd_training
from lpd_tools import train_tokenizer as tokenizer_training
from lpd_tools.bundle import Bundling, bundle
from lpd_tools.cache_tokens import TokenCaching, cache_tokens, check_tokenizer, file_hash, load_token_cache
from lpd_tools.checkpointing import (
    append_csv,
    autocast_dtype,
    drop_rows_after,
    learning_rate,
    load_state,
    save_state,
    update_ema,
)
from lpd_tools.curves import Curves, draw_curves, read_log
from lpd_tools.data import centre_grey, epoch_batches, load_fashion_mnist, read_idx, to_images
from lpd_tools.evaluate import Evaluation, evaluate
from lpd_tools.judge import JudgeTraining, augment, grey, load_judge, predict, train_judge
from lpd_tools.metrics import centre_psnr, frechet_distance, psnr
from lpd_tools.train import LPDTraining, batch_loss, make_batch, nats_per_token, parameter_groups, train
from lpd_tools.train_tokenizer import CodebookAverages, TokenizerTraining, train_tokenizer

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


# data


def test_fixture_is_balanced() -> None:
    for split, count in (("train", 200), ("test", 300)):
        data = load_fashion_mnist(split, DATA)
        assert data.pixels.shape == (count, 28, 28)
        assert torch.bincount(data.labels).tolist() == [count // 10] * 10


def test_images_are_padded_grey_and_in_range() -> None:
    pixels = load_fashion_mnist("test", DATA).pixels[:7]
    images = to_images(pixels)
    assert images.shape == (7, 3, 32, 32)
    assert torch.equal(images[:, 0], images[:, 2])
    assert (images.min(), images.max()) == (-1, 1)
    assert (images[:, :, :2] == -1).all()
    assert (images[..., -2:] == -1).all()
    assert torch.equal(((centre_grey(images).squeeze(1) + 1) * 127.5).round().to(torch.uint8), pixels)


def test_damaged_idx_file(tmp_path: Path) -> None:
    source = gzip.decompress((DATA / "t10k-images-idx3-ubyte.gz").read_bytes())
    (tmp_path / "short").write_bytes(source[:-1])
    (tmp_path / "foreign").write_bytes(b"PNG" + source)
    with pytest.raises(ValueError, match="holds 235199 bytes"):
        read_idx(tmp_path / "short")
    with pytest.raises(ValueError, match="not an IDX file"):
        read_idx(tmp_path / "foreign")
    (tmp_path / "header").write_bytes(source[:9])
    packed = gzip.compress(source)
    (tmp_path / "short.gz").write_bytes(packed[:-9])
    (tmp_path / "plain.gz").write_bytes(source)
    (tmp_path / "damaged.gz").write_bytes(packed[:10] + b"\xff" * 50 + packed[60:])
    for name, problem in {
        "header": "ends within its header",
        "short.gz": "no whole gzip file",
        "plain.gz": "no whole gzip file",
        "damaged.gz": "no whole gzip file",
    }.items():
        with pytest.raises(ValueError, match=rf"{name}' .*{problem}"):
            read_idx(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="dataset-fashion-mnist"):
        load_fashion_mnist("train", tmp_path)
    with pytest.raises(ValueError, match="split must be 'train' or 'test', got 'all'"):
        load_fashion_mnist("all", DATA)


def take(batches: Iterator[Tensor], count: int) -> list[list[int]]:
    return [next(batches).tolist() for _ in range(count)]


def test_batches_visit_every_image_once_and_resume() -> None:
    whole = take(epoch_batches(10, 3, seed=5), 9)
    for epoch in range(3):
        seen = [i for batch in whole[3 * epoch : 3 * epoch + 3] for i in batch]
        assert len(set(seen)) == 9
    assert whole[:3] != whole[3:6]
    assert take(epoch_batches(10, 3, seed=5, start_step=4), 5) == whole[4:]
    assert take(epoch_batches(10, 3, seed=6), 9) != whole
    with pytest.raises(ValueError, match=r"batch_size must be in 1\.\.10, got 11"):
        next(epoch_batches(10, 11, seed=0))


# checkpointing


def test_failed_save_leaves_the_old_state(tmp_path: Path) -> None:
    path = tmp_path / "run" / "state.pt"
    save_state({"step": 1, "weight": torch.ones(3), "settings": {"seed": 0}}, path)
    with pytest.raises((pickle.PicklingError, AttributeError, TypeError)):
        save_state({"step": 2, "bad": lambda: None}, path)
    state = load_state(path, {"seed": 0})
    assert state is not None
    assert state["step"] == 1
    assert [p.name for p in path.parent.iterdir()] == ["state.pt"]
    assert load_state(tmp_path / "none.pt", {}) is None


def test_damaged_and_foreign_states_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    save_state({"step": 1, "settings": {"dim": 32, "ch_mult": (1, 2)}}, path)
    assert load_state(path, {"dim": 32, "ch_mult": (1, 2)}) is not None
    with pytest.raises(ValueError, match=r"dim is 64, but the training in '.*state\.pt' began with 32"):
        load_state(path, {"dim": 64})
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"state\.pt' is not a readable training state"):
        load_state(path, {})
    torch.save([1], path)
    with pytest.raises(ValueError, match=r"state\.pt' holds no training state"):
        load_state(path, {})


class Payload:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("this must never run",)


def test_pickled_code_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"model": Payload()}, tmp_path / "state.pt")
    with pytest.raises(ValueError, match="not a readable training state: UnpicklingError"):
        load_state(tmp_path / "state.pt", {})
    assert capsys.readouterr().out == ""


def test_learning_rate_shape() -> None:
    rates = [learning_rate(step, 100, 2.0, warmup=10, decay=40) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert rates[10:61] == [2.0] * 51
    assert rates[80] == pytest.approx(1.0)
    assert all(a > b for a, b in itertools.pairwise(rates[60:]))
    assert 0 < rates[99] < 0.01


def test_moving_average() -> None:
    layer = torch.nn.Linear(2, 2)
    average = {name: torch.zeros_like(value) for name, value in layer.state_dict().items()}
    update_ema(average, layer, 0.75)
    assert torch.allclose(average["weight"], 0.25 * layer.weight)


def test_precision_names() -> None:
    assert autocast_dtype("fp32") is None
    assert autocast_dtype("bf16") == torch.bfloat16
    with pytest.raises(ValueError, match="precision must be auto, fp32 or bf16, got 'half'"):
        autocast_dtype("half")


def test_csv_log(tmp_path: Path) -> None:
    for step in (1, 2):
        append_csv(tmp_path / "log.csv", {"step": step, "loss": step / 3})
    assert (tmp_path / "log.csv").read_text().split() == ["step,loss", "1,0.333333", "2,0.666667"]
    drop_rows_after(tmp_path / "log.csv", 1)
    append_csv(tmp_path / "log.csv", {"step": 2, "loss": 0.5})
    drop_rows_after(tmp_path / "none.csv", 1)
    assert (tmp_path / "log.csv").read_text().split() == ["step,loss", "1,0.333333", "2,0.5"]
    drop_rows_after(tmp_path / "log.csv", 0)
    append_csv(tmp_path / "log.csv", {"step": 1, "loss": 0.25})
    assert (tmp_path / "log.csv").read_text().split() == ["step,loss", "1,0.25"]


def test_log_survives_a_crash_while_rows_are_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2):
        append_csv(tmp_path / "log.csv", {"step": step})
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", lambda file: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            drop_rows_after(tmp_path / "log.csv", 1)
    assert (tmp_path / "log.csv").read_text().split() == ["step", "1", "2"]


# measures


def test_frechet_distance_of_an_affine_copy() -> None:
    a = torch.randn(500, 6, generator=torch.Generator().manual_seed(0)).double() @ torch.randn(6, 6).double()
    # b = 3a + 1 has mean 3μ + 1 and covariance 9Σ, so tr(Σ + 9Σ - 2·3Σ) = 4 tr Σ.
    expected = (2 * a.mean(0) + 1).square().sum() + 4 * torch.cov(a.T).trace()
    assert frechet_distance(a, 3 * a + 1) == pytest.approx(expected.item(), rel=1e-8)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-8)
    with pytest.raises(ValueError, match="at least 2 samples, got 1"):
        frechet_distance(a[:1], a)
    with pytest.raises(ValueError, match=r"\[n, F\] and \[m, F\]"):
        frechet_distance(a, a[:, :3])


def test_frechet_distance_without_shared_axes() -> None:
    # Σa = diag(1, 4), Σb = its rotation by 90°: tr((ΣaΣb)^½) = 2·2.
    a = torch.tensor([[1.0, 2.0], [1.0, -2.0], [-1.0, 2.0], [-1.0, -2.0]]).double() * math.sqrt(3 / 4)
    assert frechet_distance(a, a.flip(1)) == pytest.approx(5 + 5 - 8)


def test_psnr() -> None:
    pixels = torch.full((2, 28, 28), 100, dtype=torch.uint8)
    assert psnr(torch.zeros(4), torch.full((4,), 25.5)) == pytest.approx(20)
    assert centre_psnr(torch.full((2, 1, 28, 28), 102.55 / 127.5 - 1), pixels) == pytest.approx(40, abs=1e-3)
    assert psnr(pixels, pixels) == math.inf


# judge


def test_judge_learns_and_is_stored(tmp_path: Path) -> None:
    path = tmp_path / "judge.safetensors"
    config = JudgeTraining(out=str(path), data_dir=str(DATA), epochs=10, batch_size=20, precision="fp32")
    accuracy = train_judge(config)
    assert accuracy > 0.5
    test = load_fashion_mnist("test", DATA)
    right = predict(load_judge(path), grey(test)) == test.labels
    assert right.float().mean().item() == pytest.approx(accuracy)
    assert len(path.with_suffix(".csv").read_text().splitlines()) == 11
    with pytest.raises(FileNotFoundError, match="train-judge"):
        load_judge(tmp_path / "none.safetensors")


def test_augmented_images_are_shifted_or_mirrored() -> None:
    images = torch.full((40, 1, 28, 28), -1.0)
    images[:, :, 14, 10] = 1
    moved = augment(images, torch.Generator().manual_seed(0))
    assert moved.shape == images.shape
    columns = {int(image.argmax()) % 28 for image in moved}
    assert len(columns) == 2
    assert sum(columns) in range(27 - 4, 27 + 5)


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
    caching = TokenCaching(str(folder / "tokenizer.safetensors"), str(folder / "tokens.safetensors"), str(DATA))
    return cache_tokens(caching)


def test_cached_tokens_are_those_of_the_images(cache_path: Path) -> None:
    cache = load_token_cache(cache_path)
    tokenizer_path = cache_path.with_name("tokenizer.safetensors")
    tokenizer = VQTokenizer.from_file(tokenizer_path)
    images = to_images(load_fashion_mnist("train", DATA).pixels[50:58])
    with torch.no_grad():
        assert torch.equal(cache.train_tokens[50:58, 0], tokenizer.encode(images).flatten(1))
        assert torch.equal(cache.train_tokens[50:58, 1], tokenizer.encode(images.flip(3)).flatten(1))
    assert cache.test_tokens.shape == (300, 256)
    assert (cache.grid, cache.vocab_size) == ((16, 16), 16)
    assert cache.tokenizer_hash == file_hash(tokenizer_path)
    assert torch.equal(cache.test_labels, load_fashion_mnist("test", DATA).labels)
    with pytest.raises(FileNotFoundError, match="cache-tokens"):
        load_token_cache(cache_path.with_name("none"))


def test_damaged_and_foreign_caches_are_refused(cache_path: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "cut"
    damaged.write_bytes(cache_path.read_bytes()[:-1])
    for path in (damaged, cache_path.with_name("tokenizer.safetensors")):
        with pytest.raises(ValueError, match=f"{path.name}' is no whole token cache"):
            load_token_cache(path)


def test_large_vocabularies_fit_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = VQTokenizer(dataclasses.replace(tokenizer_config(tmp_path).sizes(), codebook_size=2**15 + 1))
    tokenizer.save(tmp_path / "tokenizer.safetensors")
    monkeypatch.setattr(VQTokenizer, "encode", lambda self, images: torch.full((len(images), 2, 2), 2**15))
    path = tmp_path / "tokens"
    cache = load_token_cache(cache_tokens(TokenCaching(str(tmp_path / "tokenizer.safetensors"), str(path), str(DATA))))
    assert cache.train_tokens.unique().tolist() == [2**15]
    assert cache.test_tokens.unique().tolist() == [2**15]
    assert {p.name for p in tmp_path.iterdir()} == {"tokenizer.safetensors", "tokens"}


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
        evaluate(Evaluation(judge="", model=str(out)))


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
    tensors = load_file(cache_path)
    tensors["train.tokens"] = tensors["train.tokens"].flip(0)
    with safe_open(cache_path, "pt") as file:
        save_file(tensors, tmp_path / "others", metadata=file.metadata())
    with pytest.raises(ValueError, match="tokens_sha256 is"):
        train(dataclasses.replace(config, tokens=str(tmp_path / "others")))
    longer = dataclasses.replace(config, steps=2, decay_steps=1, evaluate_every=1, evaluate_images=7, save_every_s=9.0)
    shutil.copy(cache_path, tmp_path / "moved")
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
    assert torch.equal(batches[0].labels[kept], cache.train_labels[index][kept])
    views = cache.train_tokens[index]
    mirrored = [(batch.tokens == views[:, 1]).all(1).float().mean().item() for batch in batches]
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
