"""The `lpd` command line: every command, by group, and the reporting of errors."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib.metadata import version
from typing import Annotated, Any

import typer
from rich.text import Text
from typer.core import TyperGroup

from lpd_tools.commands.bench import bench
from lpd_tools.commands.bench_check import bench_check
from lpd_tools.commands.bench_serve import bench_serve
from lpd_tools.commands.bench_tables import bench_tables
from lpd_tools.commands.bundle import bundle
from lpd_tools.commands.cache_tokens import cache_tokens
from lpd_tools.commands.check_tokens import check_tokens
from lpd_tools.commands.class_edit import class_edit
from lpd_tools.commands.curves import curves
from lpd_tools.commands.demo import demo
from lpd_tools.commands.edit_gallery import edit_gallery
from lpd_tools.commands.evaluate import evaluate
from lpd_tools.commands.export import export
from lpd_tools.commands.fetch import fetch
from lpd_tools.commands.generate import generate
from lpd_tools.commands.growth import growth
from lpd_tools.commands.info import info
from lpd_tools.commands.inpaint import inpaint
from lpd_tools.commands.int8_quality import int8_quality
from lpd_tools.commands.measure import measure
from lpd_tools.commands.orders import orders
from lpd_tools.commands.outpaint import outpaint
from lpd_tools.commands.prepare_icons import prepare_icons
from lpd_tools.commands.replay import replay
from lpd_tools.commands.sample import sample
from lpd_tools.commands.serve import serve
from lpd_tools.commands.study import study
from lpd_tools.commands.study_editing import study_editing
from lpd_tools.commands.train import train
from lpd_tools.commands.train_judge import train_judge
from lpd_tools.commands.train_preview import train_preview
from lpd_tools.commands.train_tokenizer import train_tokenizer
from lpd_tools.commands.training_cost import training_cost
from lpd_tools.console import new_console, say, show_logs
from lpd_tools.extras import missing_from_extras
from lpd_tools.options import add_command
from lpd_tools.training.stopping import TrainingStopped

GROUPS: dict[str, tuple[Callable[..., None], ...]] = {
    "Draw": (sample, inpaint, outpaint, class_edit, edit_gallery, orders, demo, serve, info, fetch),
    "Data": (prepare_icons, cache_tokens, check_tokens),
    "Train": (train_judge, train_tokenizer, train, train_preview, training_cost, curves, replay, export, bundle),
    "Measure quality": (generate, measure, evaluate, int8_quality, study, study_editing),
    "Measure speed": (bench, bench_serve, bench_tables, bench_check, growth),
}


class FriendlyGroup(TyperGroup):
    """Reports errors of the library as one sentence with exit status 2 instead of a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except TrainingStopped as stop:
            say(str(stop))
            raise typer.Exit(0) from stop
        except (typer.Exit, typer.Abort, BrokenPipeError):  # a reader like `head` may leave early; that is no mistake
            raise
        except (ValueError, TypeError, ImportError, OSError, RuntimeError) as error:
            missing = missing_from_extras(error) if isinstance(error, ModuleNotFoundError) else None
            sentence = Text.assemble(("error:", "red"), " ", missing or str(error))
            new_console(stderr=True).print(sentence, soft_wrap=True)
            raise typer.Exit(2) from error


app = typer.Typer(cls=FriendlyGroup, no_args_is_help=True, rich_markup_mode="rich", pretty_exceptions_show_locals=False)


def _say_version(wanted: bool) -> None:
    if wanted:
        say(f"lpd {version('lpd-ext')}")
        raise typer.Exit


@app.callback()
def lpd(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Show the version and end.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show what the library logs too.")] = False,
) -> None:
    """Locality-aware parallel decoding: draw images, train models, measure them."""
    show_logs(verbose)
    # Pillow's, before pictures that are too large are refused.
    warnings.filterwarnings("ignore", message="Image size .* could be decompression bomb")


for panel, commands in GROUPS.items():
    for command in commands:
        add_command(app, command, panel)
