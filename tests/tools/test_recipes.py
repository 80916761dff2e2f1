"""Recipes of the published models: whole, consistent with the published numbers, and what they cost."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from lpd_tools.data.icons import IconFolder, read_classes
from lpd_tools.data.token_caching import TokenCaching
from lpd_tools.evaluation.evaluate import Evaluation
from lpd_tools.settings import make_config, read_config
from lpd_tools.training.bundle import Bundling
from lpd_tools.training.cost import allowed_pairs, cost_row, image_cost
from lpd_tools.training.settings import TokenizerTraining
from lpd_tools.training.tokenizer import tokenizer_sizes
from lpd_tools.training.transformer import LPDTraining

from lpd_ext.model import LPDConfig, LPDModel
from lpd_ext.schedule import group_sizes
from lpd_ext.tokenizer import VQTokenizer
from lpd_ext.visibility import training_mask

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("lpd_*.toml"))
COMMANDS = {"cache-tokens": TokenCaching, "train": LPDTraining, "bundle": Bundling, "evaluate": Evaluation}
ICONS = ROOT / "recipes" / "icons.toml"
ICON_COMMANDS = {
    "prepare-icons": IconFolder,
    "train-tokenizer": TokenizerTraining,
    "cache-tokens": TokenCaching,
    "train": LPDTraining,
    "bundle": Bundling,
}
OWN = ROOT / "recipes" / "own_pictures.toml"
OWN_COMMANDS = {name: ICON_COMMANDS[name] for name in ("train-tokenizer", "cache-tokens", "train", "bundle")}
IMAGENET = 1_281_167


def test_all_published_sizes_have_a_recipe() -> None:
    assert [path.stem for path in RECIPES] == ["lpd_l_256", "lpd_l_512", "lpd_xl_256", "lpd_xl_512", "lpd_xxl_256"]


def test_the_recipe_of_icons_is_whole_and_small() -> None:
    """Outputs meet inputs, 16x16 tokens, at most 8 MB in half precision."""
    icons, tokenizer, caching, train, bundle = (
        make_config(kind, read_config(ICONS, name, ICON_COMMANDS), {}, str(ICONS), name)
        for name, kind in ICON_COMMANDS.items()
    )
    weights = f"{tokenizer.out_dir}/tokenizer.safetensors"
    assert tokenizer.data == caching.data == f"folder:{icons.out}"
    assert tokenizer.image_size == caching.image_size == icons.size
    assert caching.tokenizer == train.tokenizer == bundle.tokenizer == weights
    assert (caching.out, train.out_dir) == (train.tokens, bundle.model)
    assert (icons.placements > 1, caching.mirror, tokenizer.mirror) == (True, False, False)
    side = caching.image_size // tokenizer_sizes(tokenizer).stride
    assert side == 16
    assert max(train.decoding_steps) == side * side
    assert bundle.num_inference_steps in train.decoding_steps
    sizes = LPDConfig(train.dim, train.depth, train.heads, tokenizer.codebook_size, len(read_classes()), (side, side))
    with torch.device("meta"):
        networks = (LPDModel(sizes), VQTokenizer(tokenizer_sizes(tokenizer)))
    assert sum(2 * p.numel() for network in networks for p in network.parameters()) <= 8e6


def test_the_recipe_of_own_pictures_is_whole_and_tests_often() -> None:
    tokenizer, caching, train, bundle = (
        make_config(kind, read_config(OWN, name, OWN_COMMANDS), {}, str(OWN), name)
        for name, kind in OWN_COMMANDS.items()
    )
    weights = f"{tokenizer.out_dir}/tokenizer.safetensors"
    assert caching.tokenizer == train.tokenizer == bundle.tokenizer == weights
    assert (tokenizer.data, tokenizer.image_size, tokenizer.mirror) == (
        caching.data,
        caching.image_size,
        caching.mirror,
    )
    assert (caching.out, train.out_dir) == (train.tokens, bundle.model)
    side = caching.image_size // tokenizer_sizes(tokenizer).stride
    assert max(train.decoding_steps) == side * side
    assert bundle.num_inference_steps in train.decoding_steps
    assert train.steps % train.evaluate_every == 0
    few = 300  # pictures: the best weights are looked for at least every six times that all were seen
    assert train.evaluate_every * train.batch_size <= 6 * few
    page = (ROOT / "docs/guide/own_pictures.md").read_text()
    for name in OWN_COMMANDS:
        assert f"lpd {name} --config recipes/own_pictures.toml" in " ".join(page.split()), name


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_is_whole_and_as_published(path: Path) -> None:
    """Every table is a config of its command, sizes and rates are the published ones, outputs meet inputs."""
    caching, train, bundle, evaluation = (
        make_config(kind, read_config(path, name, COMMANDS), {}, str(path), name) for name, kind in COMMANDS.items()
    )
    _, name, side = path.stem.split("_")
    pixels = int(side)
    config = LPDConfig.preset(f"lpd_{name}", (pixels // 16, pixels // 16))
    assert (train.dim, train.depth, train.heads) == (config.dim, config.depth, config.heads)
    assert caching.image_size == pixels
    assert (caching.out, train.out_dir, bundle.out) == (train.tokens, bundle.model, evaluation.model)
    assert caching.tokenizer == bundle.tokenizer
    per_epoch = IMAGENET // train.batch_size
    epochs, warmup, decay, batch = (450, 50, 50, 2048) if pixels == 256 else (50, 1, 49, 512)
    assert train.batch_size == batch
    assert (train.steps, train.warmup_steps, train.decay_steps) == tuple(n * per_epoch for n in (epochs, warmup, decay))
    assert train.peak_learning_rate() == pytest.approx(1e-4 * batch / 256)
    assert train.init_from == ("" if pixels == 256 else f"runs/lpd_{name}_256")
    assert max(train.decoding_steps) == config.num_tokens
    assert bundle.num_inference_steps in train.decoding_steps
    assert 1000 * evaluation.images_per_class == 50_000


def test_cost_counts_the_operations_of_a_forward_pass() -> None:
    """Linear operations are those that torch counts, pairs those that the mask allows."""
    config, sizes = LPDConfig(64, 3, 2, 100, 10, (4, 4)), group_sizes(16, 5)
    assert allowed_pairs(sizes) == int(training_mask(sizes).sum())
    cost = image_cost(config, [sizes])
    model = LPDModel(config)
    tokens, labels = torch.zeros(1, 16, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(tokens, labels, torch.arange(16)[None], sizes)
    counts = counter.get_flop_counts()["Global"]
    linear = sum(value for operator, value in counts.items() if "mm" in str(operator) and "bmm" not in str(operator))
    assert cost.linear_flops == linear
    assert cost.attention_flops == 3 * 4 * 64 * allowed_pairs(sizes)
    doubled = image_cost(dataclasses.replace(config, depth=6), [sizes])
    assert doubled.attention_flops == 2 * cost.attention_flops


def test_the_page_has_the_table_of_costs() -> None:
    """docs/guide/full_scale.md shows what `lpd training-cost` prints."""
    page = (ROOT / "docs/guide/full_scale.md").read_text()
    for path in RECIPES:
        row = cost_row(path, vocab_size=16384, classes=1000, stride=16, flops_per_second=989e12 * 0.4)
        assert f"| {' | '.join(row)} |" in page


def test_a_recipe_without_an_image_size_is_refused(tmp_path: Path) -> None:
    recipe = tmp_path / "small.toml"
    recipe.write_text('[cache-tokens]\nimage_size = 100\n[train]\ntokens = "t"\nout_dir = "o"\n')
    with pytest.raises(ValueError, match="image_size must be a multiple of 16, got 100"):
        cost_row(recipe, 16384, 1000, 16, 1e15)
