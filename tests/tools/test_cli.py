"""The `lpd` command: what it draws and prints, and that a wrong argument is one sentence and exit status 2."""

from __future__ import annotations

import builtins
import errno
import io
import json
import logging
import os
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from PIL import Image

pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from lpd_tools import __main__ as entry
from lpd_tools import console as says
from lpd_tools import machine as machine_module
from lpd_tools import progress
from lpd_tools.bench.cases import SHAPES
from lpd_tools.bench.decode import BASELINES
from lpd_tools.cli import FriendlyGroup, app
from lpd_tools.console import new_console
from lpd_tools.evaluation import report
from lpd_tools.png_settings import read_settings
from lpd_tools.progress import track
from lpd_tools.spinning import ROUNDS, stop_spinning
from rich.console import Console
from training_runs import LPD
from typer.testing import CliRunner, Result

from lpd_ext import LPDPipeline, __version__, few_rows, ops, product_choice, product_table, products
from lpd_ext.drawing import Drawing
from lpd_ext.orders import ORDER_POLICIES

COMMANDS = [
    *("sample", "inpaint", "outpaint", "class-edit", "edit-gallery", "orders", "demo", "serve", "info", "fetch"),
    *("prepare-icons", "cache-tokens", "check-tokens"),
    *("train-judge", "train-tokenizer", "train", "train-preview", "training-cost", "curves", "replay"),
    *("export", "bundle"),
    *("generate", "measure", "evaluate", "int8-quality", "study", "study-editing"),
    *("bench", "bench-serve", "bench-tables", "bench-check", "growth"),
]


GPUS = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
DEVICES = ", ".join([*(["cuda"] if GPUS else []), "cpu", *GPUS])


def lpd(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "200", "TERM": "dumb"}).invoke(app, [str(a) for a in arguments])


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current directory that has nothing to do with the sources; brackets in its name are no markup."""
    folder = tmp_path / "a [b] folder"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str) -> None:
    result = lpd(command, "--help")
    assert result.exit_code == 0
    assert f"Usage: root {command}" in result.output
    assert "--help" in result.output


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_an_example_that_it_understands(command: str) -> None:
    (line,) = [line for line in lpd(command, "--help").output.splitlines() if "Example:" in line]
    program, name, *arguments = shlex.split(line.split("Example:")[1])
    assert (program, name) == ("lpd", command)
    parsed = typer.main.get_command(app).commands[command].make_context(name, arguments)
    given = [key for key in parsed.params if parsed.get_parameter_source(key).name == "COMMANDLINE"]
    assert len(given) >= 1
    assert parsed.args == []


def test_help_lists_every_command_in_its_group() -> None:
    output = lpd("--help").output
    listed = [line.split()[1] for line in output.splitlines() if re.match(r"│ [a-z]", line)]
    assert listed == COMMANDS
    panels = re.findall(r"^╭─ (.+?) ─", output, re.MULTILINE)
    assert panels == ["Options", "Draw", "Data", "Train", "Measure quality", "Measure speed"]


def test_help_imports_nothing_that_takes_long() -> None:
    code = """
        import sys
        from lpd_tools.cli import app
        from typer.testing import CliRunner
        for arguments in (["--help"], *([command, "--help"] for command in sys.argv[1:])):
            result = CliRunner().invoke(app, arguments)
            assert result.exit_code == 0 and "Usage" in result.output, result.output
        print(*{"torch", "numpy", "matplotlib", "scipy", "lpd_ext"} & sys.modules.keys())
    """
    command = [sys.executable, "-c", textwrap.dedent(code), *COMMANDS]
    imported = subprocess.run(command, check=True, capture_output=True, text=True, cwd=sys.prefix).stdout
    assert imported == "\n"


def test_threads_that_wait_soon_sleep() -> None:
    """Asks torch's libgomp itself."""
    kept = {key: value for key, value in os.environ.items() if key not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    ran = subprocess.run(
        [LPD, "orders", "--height", "2", "--width", "2", "--steps", "1"],
        check=True, capture_output=True, text=True, env={**kept, "OMP_DISPLAY_ENV": "verbose"},
    )  # fmt: skip
    if "GOMP_SPINCOUNT" not in ran.stderr:
        pytest.skip("torch's threads are not libgomp's in this build")
    assert re.findall(r"GOMP_SPINCOUNT = '(\d+)'", ran.stderr) == [ROUNDS]


@pytest.mark.parametrize("name", ["GOMP_SPINCOUNT", "OMP_WAIT_POLICY"])
def test_what_the_user_says_of_waiting_threads_stays(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for other in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, "7")
    before = dict(os.environ)
    stop_spinning()
    assert dict(os.environ) == before


def test_what_is_logged_is_shown_and_the_library_more_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    def said(*options: str) -> list[str]:
        def info(*arguments: object, **settings: object) -> None:
            logging.getLogger("lpd_ext.hub").info("found [it]")
            logging.getLogger("lpd_ext.hub").warning("no room")
            logging.getLogger("lpd_tools.data").info("held out %d", 3)
            raise ValueError("enough")

        monkeypatch.setattr(LPDPipeline, "from_pretrained", info)
        result = lpd(*options, "info")
        assert result.stdout == ""
        return result.stderr.splitlines()

    plain = ["warning: no room", "held out 3", "error: enough"]
    assert said() == plain
    assert said("--verbose") == ["found [it]", *plain]
    assert said() == plain
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    for name in ("lpd_ext", "lpd_tools"):
        monkeypatch.setattr(logging.getLogger(name), "handlers", [])
    assert said() == ["error: enough"]


def test_the_library_alone_says_nothing() -> None:
    code = """
        import logging
        import lpd_ext
        lpd_ext.LPDPipeline.from_pretrained("fashion_mnist")
        logging.getLogger("lpd_ext.hub").warning("not shown")
        logging.basicConfig(level=logging.INFO)
        lpd_ext.LPDPipeline.from_pretrained("fashion_mnist")
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    ran = subprocess.run(command, check=True, capture_output=True, text=True, cwd=sys.prefix)
    assert ran.stdout == ""
    (line,) = ran.stderr.splitlines()
    assert line.startswith("INFO:lpd_ext.pipeline:")
    assert "model.safetensors" in line


def test_version_of_the_library() -> None:
    result = lpd("--version")
    assert (result.exit_code, result.output) == (0, f"lpd {__version__}\n")


def test_help_shows_what_is_required_first_and_brackets_as_they_are() -> None:
    output = lpd("train", "--help").output
    options = re.findall(r"^│ --([a-z-]+)", output, re.MULTILINE)
    assert options[:3] == ["out-dir", "tokens", "seed"]
    assert "with a table [train] of them" in output
    assert "after proj, GELU and fc2; [0, 1) " in output
    assert "folder:path[?held_out=0.1]" in lpd("cache-tokens", "--help").output
    assert "tables [cache-tokens] and [train]." in lpd("training-cost", "--help").output


def test_help_names_what_can_be_chosen() -> None:
    """Written out there, as the libraries that know take long to import."""
    assert re.search(", ".join(ORDER_POLICIES), lpd("orders", "--help").output)
    output = " ".join(lpd("bench", "--help").output.replace("│", " ").split())
    assert " or ".join(SHAPES) in output
    assert ", ".join(BASELINES) in output


def test_paths_in_tables_are_no_markup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = LPDPipeline.from_pretrained("fashion_mnist")
    monkeypatch.setattr(LPDPipeline, "from_pretrained", lambda *_, **__: pipe)
    assert "a [b] :dog: model: 2.9 M parameters" in lpd("info", "--model", "a [b] :dog: model").output


# Markup, a closing tag that closes nothing, an emoji's name, a link and the escape of markup.
STRANGE = "[closed] a[/b] :dog: [link=x] \\[y]"


def test_class_names_are_no_markup(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = LPDPipeline.from_pretrained("fashion_mnist")
    pipe.class_names = [STRANGE, "[closed]", "a[/b]"]
    monkeypatch.setattr(LPDPipeline, "from_pretrained", lambda *_, **__: pipe)
    assert f"{STRANGE}, [closed], a[/b]" in lpd("info").output
    assert lpd("sample", STRANGE, "-n", 1, "--output", f"{STRANGE.replace('/', '')}.png").exit_code == 0
    assert f"'c[/d]' is not a class name; known are {STRANGE}, [closed], a[/b]" in lpd("sample", "c[/d]").stderr


@pytest.mark.parametrize("terminal", [True, False])
def test_what_progress_and_results_say_is_no_markup(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.StringIO()

    def console(stderr: bool = False) -> Console:
        made = new_console(stderr)
        return Console(file=written, force_terminal=terminal, width=200, markup=made._markup, emoji=made._emoji)

    for module in (progress, report, says):
        monkeypatch.setattr(module, "new_console", console)
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    assert list(track(range(2), STRANGE, figures={"[/x]": 1.0})) == [0, 1]
    measures = {"measures": {STRANGE: {STRANGE: {"mean": 1.0}}}, "warnings": [STRANGE]}
    images = {"generated": 1, "repeats": 1, "reference": 1}
    report.show_results({**measures, "images": images, "recognised": {STRANGE: {STRANGE: {"mean": 1.0}}}}, STRANGE)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b\]8;[^\\]*\\", "", written.getvalue())
    assert "[/x] 1" in plain
    assert f"note: {STRANGE}" in plain
    assert f"wrote {STRANGE}" in plain
    assert plain.count(STRANGE) >= 7


def test_no_module_makes_a_console_of_its_own() -> None:
    """Or it would read markup in paths, names and errors."""
    folder = Path(says.__file__).parent
    sources = {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*.py")}
    found = [name for name, text in sources.items() if re.search(r"\bConsole\(|rich import print|markup=True", text)]
    assert found == ["console.py"]


def test_a_path_that_cannot_be_encoded_is_shown_escaped(tmp_path: Path) -> None:
    output = os.fsencode(tmp_path) + b"/\xff.png"
    command = [LPD.encode(), *b"orders raster --height 2 --width 2 --steps 2 -n 1 --force --output".split(), output]
    for encoding in ("ascii:strict", "ascii:surrogateescape", "utf-8:strict"):
        result = subprocess.run(command, capture_output=True, env={**os.environ, "PYTHONIOENCODING": encoding})
        assert result.returncode == 0, result.stderr
        assert b"/\\udcff.png" in result.stdout


def test_sample_without_options_draws_where_it_is_called(elsewhere: Path) -> None:
    result = lpd("sample", "heart", 0, "-n", 1)
    assert result.exit_code == 0, result.output
    assert re.search(rf"^{re.escape(str(elsewhere / 'grid.png'))}  2 images in \d+\.\d s$", result.output, re.MULTILINE)
    assert read_settings(Path("grid.png"))[1]["model"] == "icons"  # --like finds it, whatever the default is then
    with Image.open("grid.png") as image:
        assert image.height == 2 * (64 + 4) + 4
        assert image.width > 64
        assert len(image.convert("L").getcolors() or []) > 20


def test_sample_takes_names_before_indices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Classes called 1 to 10 are no indices, and one called none is no picture without a class."""
    pipe = LPDPipeline.from_pretrained("fashion_mnist")
    pipe.class_names = [*map(str, range(1, 10)), "none"]
    monkeypatch.setattr(LPDPipeline, "from_pretrained", lambda *_, **__: pipe)
    drawn: list[Any] = []
    monkeypatch.setattr(LPDPipeline, "__call__", lambda self, labels, **_: drawn.extend(self._labels(labels)))
    for text in ("1", "9", "none", "None", "0"):
        lpd("sample", "-n", 1, text)
    assert drawn == [0, 8, 9, None, 0]
    for text in ("²", "--1", "1_0", "1" * 30):
        assert "is not a class name" in lpd("sample", "--", text).stderr, text


def test_sample_draws_every_class_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []

    def stop(self: object, labels: list[Any], **options: Any) -> None:
        drawn.extend(zip(labels, options["seeds"], strict=True))
        raise ValueError("enough")

    monkeypatch.setattr(LPDPipeline, "__call__", stop)
    assert "enough" in lpd("sample").output
    assert drawn == [(i // 8, i) for i in range(80)]


def test_orders_writes_a_picture(elsewhere: Path) -> None:
    result = lpd("orders", "raster", "--height", 2, "--width", 3, "--steps", 2, "-n", 1, "--output", "new/o.png")
    assert result.exit_code == 0, result.output
    assert result.output.strip() == str(elsewhere / "new" / "o.png")
    with Image.open("new/o.png") as image:
        assert image.format == "PNG"


def test_info_says_which_products_are_faster_on_the_card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LPD_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("LPD_PRODUCTS", raising=False)
    assert "cublaslt; our own if LPD_PRODUCTS is own or auto" in lpd("info").output
    monkeypatch.setenv("LPD_PRODUCTS", "auto")
    assert "auto (LPD_PRODUCTS), but there is no GPU" in lpd("info").output
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(product_table, "card_of", lambda _: ("NVIDIA H200", "9.0", "570", "2.11", "0.1.0"))
    product_choice.forget()
    monkeypatch.setattr(few_rows, "_has_kernels", lambda _: False)
    assert "cublaslt, though LPD_PRODUCTS is auto: this GPU, build or model has no other" in lpd("info").output
    monkeypatch.setattr(few_rows, "_has_kernels", lambda _: True)
    told = "auto: no times of this GPU and build yet; a decode takes them, or logs why our own are not used"
    assert told in " ".join(lpd("info").output.split())
    for name, product in products.step_products(192, 768, 1024, torch.bfloat16).items():  # of the bundled model
        most = {"head": 0, "fc1": 32}.get(name, 192)
        times = {rows: products.Times(*((1.0, 2.0) if rows <= most else (8.0, 2.0))) for rows in products.ROW_CLASSES}
        product_choice.remember(product, times, torch.device("cuda"))
    told = " ".join(lpd("info").output.split())
    everywhere = ", ".join(map(str, products.ROW_CLASSES))
    wanted = f"proj and fc1 at 16, 32 rows; fc2 and qkv at {everywhere} rows; fc2 and head at no rows"
    assert f"auto: our own for {wanted}" in told
    monkeypatch.setenv("LPD_PRODUCTS", "own")
    assert "own (LPD_PRODUCTS)" in lpd("info").output
    product_choice.forget()


def test_info_describes_build_and_model() -> None:
    result = lpd("info")
    assert result.exit_code == 0
    assert f"lpd_ext           {__version__}, built with" in result.output
    assert f"torch             {torch.__version__}" in result.output
    assert "icons: 3.1 M parameters, E 192, L 6, H 6, grid 16x16, V 1024, C 34" in result.output
    assert "0.8 M parameters, stride 4" in result.output
    assert "happy-face" in result.output


def test_bench_prints_and_writes_figures() -> None:
    result = lpd("bench", "--repeats", 3, "--output", "figures.json")
    assert result.exit_code == 0, result.output
    figures = json.loads(Path("figures.json").read_text(encoding="utf-8"))
    names = [row["operator"] for row in figures["results"]]
    few_rows = {"embed_scaled_rows", "residual_linear", "normed_linear", "fold_layer_norm"}  # in 16 bits, on GPUs
    assert set(ops.OPERATORS) - few_rows <= set(names)
    assert all(len(row["seconds"]) == 3 and min(row["seconds"]) > 0 for row in figures["results"])
    assert all(name.strip() in result.output for name in names)
    assert figures["machine"]["lpd_ext"].startswith(__version__)


def test_bench_names_the_commit_of_a_checkout(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_module, "__file__", str(elsewhere / "lib" / "lpd_tools" / "machine.py"))
    assert machine_module.version() == __version__
    (elsewhere / ".git").mkdir()
    (elsewhere / "lpd_ext").mkdir()
    (elsewhere / "lpd_ext" / "_C.pyi").touch()
    assert machine_module.version() == __version__  # an empty folder is no repository
    monkeypatch.setattr(machine_module.subprocess, "run", lambda command, **_: Described(command))
    assert machine_module.version() == f"{__version__} (git -C {elsewhere} describe --always --dirty)"


class Described:
    """The result of a command that prints itself."""

    def __init__(self, command: list[str]) -> None:
        self.stdout = " ".join(command) + "\n"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("sample", "--output", "nosuffix"), "output must end in .png, got 'nosuffix'"),
        (("sample", "--output", "grid.txt"), "output must end in .png, got 'grid.txt'"),
        (("sample", "--output", "."), "output must be a file, but '.' is a directory"),
        (("sample", "--output", "taken/grid.png"), "output is 'taken/grid.png', but"),
        (("orders", "--output", "nosuffix"), "output must end in .png, got 'nosuffix'"),
        (("orders", "--output", ".."), "output must be a file, but '..' is a directory"),
        (("bench", "--output", "figures.txt"), "output must end in .json, got 'figures.txt'"),
        (("sample", "--device", "foo"), f"device must be one of {DEVICES} here, got 'foo'"),
        (("sample", "--device", f"cuda:{len(GPUS)}"), f"device must be one of {DEVICES} here, got 'cuda:{len(GPUS)}'"),
        (("sample", "heart", "-n", 2, "--seed", 2**63 - 1), "for 2 images, got 9223372036854775807"),
        (("orders", "--seed", 2**63 - 1), "for 3 images, got 9223372036854775807"),
        (("orders", "--seed", -(2**63) - 1), "seed must be in [-9223372036854775808,"),
        (("orders", "zigzag"), "order must be a permutation of the free cells or one of locality"),
        (("sample", "hat"), "class_labels: 'hat' is not a class name"),
        (("sample", 34), "must be None or an integer in [0, 34), got 34"),
        (("sample", "--model", "./nowhere"), "neither a local path nor a hub id"),
        (("info", "--model", "taken"), "path 'taken' is not a readable checkpoint"),
        (("info", "--dtype", "float8"), "dtype must be one of float32, bfloat16, float16, int8, got 'float8'"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_a_wrong_argument_is_one_sentence(
    arguments: tuple[object, ...], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("taken").touch()
    monkeypatch.setattr(Drawing, "pixels", None)  # nothing may be drawn
    result = lpd(*arguments)
    assert result.exit_code == 2, result.output
    assert sentence in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert [path.name for path in Path().iterdir()] == ["taken"]


@pytest.mark.parametrize(
    ("gpus", "name", "allowed"), [(0, "cuda", "cpu"), (1, "cuda:1", "cuda, cpu, cuda:0"), (0, "cuda:0", "cpu")]
)
def test_a_gpu_that_is_not_there_is_refused(
    gpus: int, name: str, allowed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    result = lpd("sample", "--device", name)
    assert result.exit_code == 2
    assert result.stderr == f"error: device must be one of {allowed} here, got {name!r}\n"


def test_missing_hub_library_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    result = lpd("sample", "--model", "owner/name")
    assert result.exit_code == 2
    assert result.stderr == "error: loading from the hub needs huggingface_hub: pip install 'lpd-ext[hub]'\n"


@pytest.mark.parametrize("error", [TypeError, RuntimeError, PermissionError])
def test_what_the_library_refuses_is_one_sentence(monkeypatch: pytest.MonkeyPatch, error: type[Exception]) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise error("depth must be [one] integer")

    monkeypatch.setattr(LPDPipeline, "from_pretrained", refuse)
    result = lpd("sample")
    assert result.exit_code == 2
    assert result.stderr == "error: depth must be [one] integer\n"


@pytest.mark.parametrize(("missing", "is_an_extra"), [("typer", True), ("torch", False), ("lpd_ext", False)])
def test_missing_libraries_of_the_extra_are_named(
    missing: str, is_an_extra: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "lpd_tools.cli":
            raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(SystemExit if is_an_extra else ModuleNotFoundError, match=missing) as raised:
        entry.main()
    assert ("lpd-ext[tools]" in str(raised.value)) == is_an_extra


def test_a_library_of_the_extra_that_a_command_misses_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lpd_tools.draw_orders", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.delitem(sys.modules, "lpd_tools.draw_orders")
    result = lpd("orders")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: The lpd command needs matplotlib")
    assert result.stderr.endswith("which the [tools] extra brings: pip install 'lpd-ext[tools]'\n")


def test_a_reader_that_leaves_early_is_no_error() -> None:
    """`lpd info | head -1` may break the pipe in the middle of the output: no message, as for other commands."""
    broken = typer.Typer(cls=FriendlyGroup)

    @broken.callback()
    def group() -> None:
        """Makes `draw` a subcommand, as those of `lpd` are."""

    @broken.command()
    def draw() -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    result = CliRunner().invoke(broken, ["draw"])
    assert result.exit_code == 1
    assert result.output == ""


def test_tables_in_a_file_have_120_columns_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert new_console().width == 120
    monkeypatch.setenv("COLUMNS", "90")
    assert new_console().width == 90
