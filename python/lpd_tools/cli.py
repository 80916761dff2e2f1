"""The `lpd` command line."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import typer
import typer.core
from rich.console import Console
from rich.markup import escape

from lpd_tools.bench.check import BenchCheck, check
from lpd_tools.bench.growth import Growth, measure_growth
from lpd_tools.bench.tables import bench_tables
from lpd_tools.commands.bench import bench
from lpd_tools.commands.info import info
from lpd_tools.commands.orders import orders
from lpd_tools.commands.sample import sample
from lpd_tools.data.icons import IconFolder, prepare_icons
from lpd_tools.data.image_reader import read_skipped
from lpd_tools.data.token_caching import TokenCaching, run_caching
from lpd_tools.data.token_check import TokenCheck, check_tokens
from lpd_tools.data.token_shards import SKIPPED_FILE
from lpd_tools.evaluation.evaluate import Evaluation, evaluate
from lpd_tools.evaluation.generate import Generation, generate
from lpd_tools.evaluation.int8_quality import Int8Quality, int8_quality
from lpd_tools.evaluation.measure import Measurement, measure
from lpd_tools.evaluation.report import int8_tables, result_tables
from lpd_tools.settings import add_command
from lpd_tools.study.study import Study, run_study
from lpd_tools.training.bundle import Bundling, bundle
from lpd_tools.training.cost import training_cost
from lpd_tools.training.curves import Curves, draw_curves
from lpd_tools.training.export import Export, export
from lpd_tools.training.judge import JudgeTraining, train_judge
from lpd_tools.training.replay import Replay, replay
from lpd_tools.training.stopping import TrainingStopped
from lpd_tools.training.tokenizer import TokenizerTraining, train_tokenizer
from lpd_tools.training.transformer import LPDTraining, train


class FriendlyGroup(typer.core.TyperGroup):
    """What the library refuses is one sentence and exit status 2, not a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except TrainingStopped as stop:
            say(str(stop))
            raise typer.Exit(0) from stop
        except (typer.Exit, typer.Abort, BrokenPipeError):  # a reader like `head` may leave early; that is no mistake
            raise
        except (ValueError, TypeError, ImportError, OSError, RuntimeError) as error:
            Console(stderr=True).print(f"[red]error:[/] {escape(str(error))}", soft_wrap=True)
            raise typer.Exit(2) from error


app = typer.Typer(
    cls=FriendlyGroup,
    help="Locality-aware parallel decoding: draw images, train models, measure them.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)
console = Console()


def say(text: str) -> None:
    """One line as it is: paths may hold brackets and be longer than the terminal is wide. Once under torchrun."""
    if os.environ.get("RANK", "0") == "0":
        console.print(text, markup=False, soft_wrap=True)


def run_train_judge(config: JudgeTraining) -> None:
    say(f"{config.out}: {100 * train_judge(config):.2f} % of the real test set recognised")


def run_train_tokenizer(config: TokenizerTraining) -> None:
    path = train_tokenizer(config)
    list_of_skipped = path.with_name(SKIPPED_FILE)
    say_skipped(len(read_skipped(list_of_skipped)), list_of_skipped)
    say(f"wrote {path}")


def say_skipped(count: int, path: Path) -> None:
    if count:
        say(f"skipped {count} images that cannot be read: {path} lists them")


def run_cache_tokens(config: TokenCaching) -> None:
    result = run_caching(config)
    say_skipped(len(result.skipped), result.path / SKIPPED_FILE)
    done = "wrote" if result.complete else "wrote a share of"
    say(f"{done} {result.path}")


def run_check_tokens(config: TokenCheck) -> None:
    say(f"{config.tokens}: {check_tokens(config):,} images, all files as they were written")


def run_prepare_icons(config: IconFolder) -> None:
    counts = {split: classes.total() for split, classes in prepare_icons(config).items()}
    say(f"wrote {config.out}: {counts['train']} train and {counts['val']} val icons")


def run_train(config: LPDTraining) -> None:
    say(f"wrote {train(config)}")


def run_replay(config: Replay) -> None:
    say(str(replay(config)))


def run_export(config: Export) -> None:
    say(f"wrote {export(config)}")


def run_bundle(config: Bundling) -> None:
    say(f"wrote {bundle(config)}")


def run_curves(config: Curves) -> None:
    say(f"wrote {draw_curves(config)}")


def run_quality_study(config: Study) -> None:
    say(f"wrote {run_study(config)}")


def run_growth(config: Growth) -> None:
    say(f"wrote {measure_growth(config)}")


def run_generate(config: Generation) -> None:
    say(f"wrote {generate(config)}")


def run_measure(config: Measurement) -> None:
    show_results(measure(config), config.out)


def run_evaluate(config: Evaluation) -> None:
    results = evaluate(config)
    if results is not None:
        show_results(results, config.out)


def show_results(results: dict[str, Any], out: str) -> None:
    for table in result_tables(results):
        console.print(table)
    for warning in results["warnings"]:
        console.print(f"[yellow]note:[/] {escape(warning)}", soft_wrap=True)
    if out:
        say(f"wrote {out}")


def run_int8_quality(config: Int8Quality) -> None:
    results = int8_quality(config)
    for table in int8_tables(results):
        console.print(table)
    if config.out:
        say(f"wrote {config.out}")


app.command()(sample)
app.command()(orders)
app.command()(info)
app.command()(bench)
app.command()(bench_tables)
add_command(app, "train-judge", JudgeTraining, run_train_judge, "Train a classifier that judges images.")
add_command(app, "train-tokenizer", TokenizerTraining, run_train_tokenizer, "Train the VQ tokenizer.")
add_command(app, "cache-tokens", TokenCaching, run_cache_tokens, "Encode the data set once, for training.")
add_command(app, "check-tokens", TokenCheck, run_check_tokens, "Read a whole token cache and compare its checksums.")
add_command(app, "prepare-icons", IconFolder, run_prepare_icons, "Make an image folder of npm packages of icons.")
add_command(app, "train", LPDTraining, run_train, "Train the LPD transformer on cached tokens.")
app.command()(training_cost)
add_command(app, "export", Export, run_export, "Write the averaged weights of a checkpoint as a model.")
add_command(app, "replay", Replay, run_replay, "Compute again the step in which a training found no finite loss.")
add_command(app, "bundle", Bundling, run_bundle, "Put a trained model, its tokenizer and defaults in a folder.")
add_command(app, "generate", Generation, run_generate, "Draw images of every class, to measure them.")
add_command(app, "measure", Measurement, run_measure, "Compare generated images with real ones.")
add_command(app, "evaluate", Evaluation, run_evaluate, "Draw images of every class and measure them and the model.")
add_command(app, "int8-quality", Int8Quality, run_int8_quality, "Compare int8 with float32: argmaxes, judge, distance.")
add_command(app, "curves", Curves, run_curves, "Draw the logs of the training programs.")
add_command(app, "study", Study, run_quality_study, "Measure quality over steps, orders, thresholds and guidance.")
add_command(app, "growth", Growth, run_growth, "Measure how time and memory grow with batch, steps, tokens and model.")
add_command(app, "bench-check", BenchCheck, check, "Compare a few benchmark ratios with the committed ones.")
