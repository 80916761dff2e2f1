"""Settings of the training commands: TOML files and options, ranges, learning rate, precision."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path

import pytest
import torch
import typer

pytest.importorskip("rich")

from lpd_tools import settings as tools_settings
from lpd_tools.options import add_command
from lpd_tools.settings import Range, check_ranges, fixed_settings, make_config, setting, settings_of, tomllib
from lpd_tools.training.loop_settings import LoopSettings, learning_rate
from lpd_tools.training.precision import autocast_dtype, check_backend
from lpd_tools.training.settings import LPDTraining, TokenizerTraining
from typer.testing import CliRunner

from lpd_ext.linear import has_fast_arithmetic


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(tools_settings.Settings):
    place: str = setting(..., "required")
    count: int = setting(3, "an int", range=Range(1, 10))
    rate: float = setting(0.5, "a float", range=Range(0, open_low=True), resumable=True)
    quick: bool = setting(False, "a bool", resumable=True)
    sizes: tuple[int, ...] = setting((1, 2), "a tuple", range=Range(0, 5, open_high=True))
    limit: int | None = setting(None, "an int or nothing", range=Range(1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Further(Settings):
    rate: float = setting(1.0)
    count: int = setting(4, "another int", range=Range(2, 10), resumable=True)


def run(tmp_path: Path, toml: str, *options: str) -> Settings | str:
    """Returns the settings that `lpd one` is called with, or the error."""
    app = typer.Typer()
    seen: list[Settings] = []

    def one(config: Settings) -> None:
        seen.append(config)

    def two(config: Settings) -> None:
        raise AssertionError("nobody called it")

    def three(count: int = 1) -> None:
        """A command of options of its own, which reads no file."""

    for function in (one, two, three):
        add_command(app, function)
    (tmp_path / "recipe.toml").write_text(toml)
    result = CliRunner().invoke(app, ["one", "--config", str(tmp_path / "recipe.toml"), *options])
    return seen[0] if seen else str(result.exception)


def test_options_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    toml = 'place = "here"\ncount = 7\nrate = 2\nsizes = [4]\nquick = true\n'
    assert run(tmp_path, toml) == Settings(place="here", count=7, rate=2.0, quick=True, sizes=(4,))
    options = ("--count", "3", "--sizes", "1", "--sizes", "2", "--no-quick")
    # 3, (1, 2) and False are the defaults too: given on the command line they win all the same.
    assert run(tmp_path, toml, *options) == Settings(place="here", count=3, rate=2.0, quick=False, sizes=(1, 2))
    assert run(tmp_path, "", "--place", "there") == Settings(place="there")
    assert run(tmp_path, 'place = "here"\nlimit = 2\n') == Settings(place="here", limit=2)


def test_a_file_may_have_a_table_per_command(tmp_path: Path) -> None:
    assert run(tmp_path, '[one]\nplace = "a"\n[two]\nplace = "b"\ncount = 1\n') == Settings(place="a")
    assert "has a table [three]; a table may be named one, two" in str(run(tmp_path, "[three]\ncount = 1\n"))
    assert "outside them, the key 'count'" in str(run(tmp_path, "count = 1\n[one]\nrate = 1\n"))


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("stepz = 1", "sets 'stepz', which is no setting of one; allowed are place, count, rate, quick, sizes, limit"),
        ("count = 1.5", "count must be a whole number, got 1.5"),
        ("count = true", "count must be a whole number, got True"),
        ("rate = 'fast'", "rate must be a number, got 'fast'"),
        ("quick = 1", "quick must be true or false, got 1"),
        ("place = 1", "place must be a string, got 1"),
        ("sizes = 4", "sizes must be a list, each entry a whole number, got 4"),
        ("sizes = [4, 'x']", "sizes must be a whole number, got 'x'"),
        ("limit = 'none'", "limit must be a whole number, got 'none'"),
        ("count = 1", "place is missing: give --place, or set it in a file given by --config"),
        ("place = ''\ncount = 11", "count must be in [1, 10], got 11"),
        ("place = ''\nsizes = [0, 5]", "sizes must be in [0, 5), got 5"),
        ("count =", "is not valid TOML"),
    ],
)
def test_what_a_file_must_not_say(tmp_path: Path, toml: str, message: str) -> None:
    found = run(tmp_path, toml)
    assert isinstance(found, str)
    assert message in found


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": 0}, r"count must be in \[1, 10\], got 0"),
        ({"rate": 0.0}, "rate must be above 0, got 0.0"),
        ({"rate": math.nan}, "rate must be above 0, got nan"),
        ({"sizes": (0, -1)}, r"sizes must be in \[0, 5\), got -1"),
        ({"limit": 0}, "limit must be at least 1, got 0"),
    ],
)
def test_settings_out_of_their_ranges_cannot_be_made(changes: dict[str, object], message: str) -> None:
    Settings(place="", count=10, rate=1e-9, sizes=(0, 4), limit=1)
    with pytest.raises(ValueError, match=message):
        Settings(place="", **changes)
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(Settings(place=""), **changes)


def test_an_option_out_of_its_range_is_refused(tmp_path: Path) -> None:
    assert run(tmp_path, "", "--place", "", "--count", "11") == "count must be in [1, 10], got 11"


def test_ranges_may_follow_from_data() -> None:
    check_ranges(Settings(place=""), count=Range(1, 3))
    with pytest.raises(ValueError, match=r"count must be in \[1, 2\], got 3"):
        check_ranges(Settings(place=""), count=Range(1, 2))
    with pytest.raises(TypeError, match="Settings has no setting counts"):
        check_ranges(Settings(place=""), counts=Range(1, 2))


def test_a_subclass_says_only_what_is_different() -> None:
    known = {item.name: item for item in settings_of(Further)}
    assert known["rate"] == dataclasses.replace(settings_of(Settings)[2], default=1.0)
    assert known["count"] == tools_settings.Setting("count", int, 4, "another int", Range(2, 10), resumable=True)
    with pytest.raises(ValueError, match="rate must be above 0"):
        Further(place="", rate=0.0)
    assert fixed_settings(Further(place="p"), data="d") == {"data": "d", "place": "p", "sizes": (1, 2), "limit": None}
    assert "count" in fixed_settings(Settings(place="p"))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    found = run(tmp_path, "", "--config", str(tmp_path / "none.toml"))
    assert "there is none at" in str(found)


# values


def loop(**changes: object) -> LoopSettings:
    return LoopSettings(**{"out_dir": "out", **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 101}, r"batch_size must be in \[1, 100\], got 101"),
        ({"micro_batch_size": 65}, r"micro_batch_size must be in \[0, 64\], got 65"),
        ({"evaluate_images": -1}, r"evaluate_images must be at least 0, got -1"),
        ({"evaluate_every": 0}, r"evaluate_every must be at least 1, got 0"),
        ({"keep": 0}, r"keep must be at least 1, got 0"),
        ({"seed": -1}, "seed must be in"),
        ({"ema_decay": math.nan}, r"ema_decay must be in \[0, 1\], got nan"),
        ({"learning_rate": -1.0}, "learning_rate must be at least 0, got -1.0"),
        ({"parallel": "tensor"}, "parallel must be ddp or fsdp, got 'tensor'"),
        ({"precision": "half"}, "precision must be auto, fp32 or bf16, got 'half'"),
        ({"compile_backend": "gcc"}, "compile_backend must be empty or one of .*inductor.*, got 'gcc'"),
    ],
)
def test_impossible_values_are_named(changes: dict[str, object], message: str) -> None:
    loop(evaluate_images=30).check(100, 30)
    with pytest.raises(ValueError, match=message):
        loop(**{"evaluate_images": 30, **changes}).check(100, 30)


def test_an_empty_data_set_is_refused() -> None:
    with pytest.raises(ValueError, match="the data set holds no training images"):
        loop(evaluate_images=0).check(0, 0)


def test_learning_rate_shape() -> None:
    rates = [learning_rate(step, 100, 2.0, warmup=10, decay=40, floor=0.5) for step in range(101)]
    assert rates[:10] == pytest.approx([0.2 * i for i in range(10)])
    assert rates[10:61] == [2.0] * 51
    assert rates[80] == pytest.approx(1.25)
    assert all(a > b for a, b in itertools.pairwise(rates[60:]))
    assert rates[99] > rates[100] == 0.5


def test_learning_rate_of_the_published_recipe() -> None:
    recipe = loop(
        batch_size=2048,
        learning_rate=1e-4,
        learning_rate_batch=256,
        min_learning_rate=1e-5,
        steps=450 * 625,
        warmup_steps=50 * 625,
        decay_steps=50 * 625,
    )
    assert recipe.learning_rate_at(0) == 0
    assert recipe.learning_rate_at(25 * 625) == pytest.approx(4e-4)
    assert recipe.learning_rate_at(50 * 625) == recipe.learning_rate_at(400 * 625) == pytest.approx(8e-4)
    assert recipe.learning_rate_at(425 * 625) == pytest.approx((8e-4 + 1e-5) / 2)
    assert recipe.learning_rate_at(450 * 625) == pytest.approx(1e-5)
    assert loop(learning_rate=0.25).peak_learning_rate() == 0.25


def test_the_recipe_on_the_training_page_is_one() -> None:
    page = (Path(__file__).parents[2] / "docs/guide/training.md").read_text(encoding="utf-8")
    toml = page.split("```toml\n")[1].split("```")[0]
    values = tomllib.loads(toml)["train"]
    recipe = make_config(LPDTraining, values, {}, "the page", "train")
    assert (recipe.dim, recipe.depth, recipe.heads) == (1024, 24, 16)
    assert recipe.learning_rate_at(100 * 625) == pytest.approx(8e-4)
    assert (recipe.clip, recipe.weight_decay, recipe.dropout, recipe.label_drop) == (3.0, 0.02, 0.1, 0.1)
    recipe.check(1_281_167, 50_000)


LOOP_FIXED = {"seed", "batch_size", "learning_rate", "learning_rate_batch", "min_learning_rate", "warmup_steps"}
LOOP_FIXED |= {"beta1", "beta2", "weight_decay", "clip", "ema_decay"}
TOKENIZER_FIXED = {"image_size", "background", "mirror", "perceptual_weight", "ch", "ch_mult", "z_channels"}
TOKENIZER_FIXED |= {"codebook_size", "codebook_dim", "encoder_res_blocks", "decoder_res_blocks", "commitment_weight"}
TOKENIZER_FIXED |= {"codebook_decay", "revive_every", "revive_below"}
LPD_FIXED = {"dim", "depth", "heads", "label_drop", "dropout", "attention_dropout", "mutual_visibility"}
LPD_FIXED |= {"decoding_steps"}


@pytest.mark.parametrize(
    ("config", "fixed"),
    [
        (LoopSettings(out_dir=""), LOOP_FIXED),
        (TokenizerTraining(out_dir=""), LOOP_FIXED | TOKENIZER_FIXED),
        (LPDTraining(out_dir="", tokens=""), LOOP_FIXED | LPD_FIXED),
    ],
    ids=["loop", "tokenizer", "transformer"],
)
def test_only_what_counts_is_fixed_for_resuming(config: LoopSettings, fixed: set[str]) -> None:
    """Checkpoints hold these: with one more or less they could not be resumed."""
    assert set(fixed_settings(config)) == fixed


def test_precision_names(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert autocast_dtype("fp32", cpu) is None
    assert autocast_dtype("bf16", cpu) == torch.bfloat16
    assert autocast_dtype("auto", cpu) == (torch.bfloat16 if has_fast_arithmetic(torch.bfloat16) else None)
    for fast, dtype in ((True, torch.bfloat16), (False, None)):
        monkeypatch.setattr("lpd_tools.training.precision.has_fast_arithmetic", lambda kind, fast=fast: fast)
        assert autocast_dtype("auto", cpu) == dtype
    with pytest.raises(ValueError, match="precision must be auto, fp32 or bf16, got 'half'"):
        autocast_dtype("half", cpu)
    check_backend("aot_eager")
