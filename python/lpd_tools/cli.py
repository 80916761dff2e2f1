"""The `lpd` command line."""

from __future__ import annotations

from typing import Any

import typer
import typer.core
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lpd_tools.bench.check import BenchCheck, check
from lpd_tools.bench.growth import Growth, measure_growth
from lpd_tools.bench.tables import bench_tables
from lpd_tools.commands.bench import bench
from lpd_tools.commands.info import info
from lpd_tools.commands.orders import orders
from lpd_tools.commands.sample import sample
from lpd_tools.data.token_cache import TokenCaching, cache_tokens
from lpd_tools.evaluation.evaluate import Evaluation, evaluate
from lpd_tools.evaluation.int8_quality import Int8Quality, int8_quality
from lpd_tools.settings import add_command
from lpd_tools.training.bundle import Bundling, bundle
from lpd_tools.training.curves import Curves, draw_curves
from lpd_tools.training.judge import JudgeTraining, train_judge
from lpd_tools.training.tokenizer import TokenizerTraining, train_tokenizer
from lpd_tools.training.transformer import LPDTraining, train


class FriendlyGroup(typer.core.TyperGroup):
    """What the library refuses is one sentence and exit status 2, not a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
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
    """One line as it is: paths may hold brackets and be longer than the terminal is wide."""
    console.print(text, markup=False, soft_wrap=True)


def run_train_judge(config: JudgeTraining) -> None:
    say(f"{config.out}: {100 * train_judge(config):.2f} % of the real test set recognised")


def run_train_tokenizer(config: TokenizerTraining) -> None:
    say(f"wrote {train_tokenizer(config)}")


def run_cache_tokens(config: TokenCaching) -> None:
    say(f"wrote {cache_tokens(config)}")


def run_train(config: LPDTraining) -> None:
    say(f"wrote {train(config)}")


def run_bundle(config: Bundling) -> None:
    say(f"wrote {bundle(config)}")


def run_curves(config: Curves) -> None:
    say(f"wrote {draw_curves(config)}")


def run_growth(config: Growth) -> None:
    say(f"wrote {measure_growth(config)}")


def run_evaluate(config: Evaluation) -> None:
    results = evaluate(config)
    for table in result_tables(results):
        console.print(table)
    if config.out:
        say(f"wrote {config.out}")


def run_int8_quality(config: Int8Quality) -> None:
    results = int8_quality(config)
    forced = Table("order", "same argmax (%)", "nats", title="int8 against float32, teacher-forced")
    for order, row in results["teacher_forced"].items():
        share = f"{100 * row['agreement']:.2f} ± {100 * row['standard_error']:.2f}"
        forced.add_row(order, share, f"{row['nats']:.1e}")
    console.print(forced)
    if "drawn" in results:
        drawn = Table("seed", "weights", "recognised (%)", "Fréchet distance", title="drawn images, by the judge")
        for seed, by_weights in results["drawn"].items():
            for weights, row in by_weights.items():
                share, distance = f"{100 * row['recognised']:.2f}", f"{row['frechet_distance']:.2f}"
                drawn.add_row(seed, weights, share, distance)
        console.print(drawn)
    if "lpd_l_random_weights" in results:
        row = results["lpd_l_random_weights"]
        say("lpd_l, random weights: cosine after each block " + " ".join(f"{value:.5f}" for value in row["cosine"]))
        say(f"logits: {row['kl']:.1e} nats, {100 * row['agreement']:.1f} % of the argmaxes the same")
    if config.out:
        say(f"wrote {config.out}")


def result_tables(results: dict[str, Any]) -> list[Table]:
    """The measures of `evaluate` as tables: recognition, distances, nats."""
    sources = results["recognised"]
    recognised = Table("class", *sources, title="recognised by the judge (%)")
    for name in next(iter(sources.values())):
        recognised.add_row(name, *(f"{100 * rates[name]:.1f}" for rates in sources.values()))
    distances = Table("images", "distance", title="Fréchet distance to the real test set (judge features)")
    for name, value in results["frechet_distance_to_test_set"].items():
        distances.add_row(name, f"{value:.2f}")
    distances.caption = f"reconstruction PSNR on the 28x28 centre: {results['reconstruction_psnr_centre_db']:.2f} dB"
    by_order = results["nats_per_test_image"]
    steps = list(next(iter(by_order.values())))
    nats = Table("order", *(f"{count} steps" for count in steps), title="teacher-forced nats per test image")
    for order, row in by_order.items():
        nats.add_row(order, *(f"{row[count]:.1f}" for count in steps))
    return [recognised, distances, nats]


app.command()(sample)
app.command()(orders)
app.command()(info)
app.command()(bench)
app.command()(bench_tables)
add_command(app, "train-judge", JudgeTraining, run_train_judge, "Train a classifier that judges images.")
add_command(app, "train-tokenizer", TokenizerTraining, run_train_tokenizer, "Train the VQ tokenizer.")
add_command(app, "cache-tokens", TokenCaching, run_cache_tokens, "Encode the data set once, for training.")
add_command(app, "train", LPDTraining, run_train, "Train the LPD transformer on cached tokens.")
add_command(app, "bundle", Bundling, run_bundle, "Put a trained model, its tokenizer and defaults in a folder.")
add_command(app, "evaluate", Evaluation, run_evaluate, "Measure a model on Fashion-MNIST.")
add_command(app, "int8-quality", Int8Quality, run_int8_quality, "Compare int8 with float32: argmaxes, judge, distance.")
add_command(app, "curves", Curves, run_curves, "Draw the logs of the training programs.")
add_command(app, "growth", Growth, run_growth, "Measure how time and memory grow with batch, steps, tokens and model.")
add_command(app, "bench-check", BenchCheck, check, "Compare a few benchmark ratios with the committed ones.")
