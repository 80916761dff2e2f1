"""Imports of lpd_ext and lpd_tools point one way, those inside functions too, and go round in no circle.

The tables of CONTRIBUTING.md and of docs/design/plan.md tell the same.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from graphlib import CycleError, TopologicalSorter
from importlib.util import find_spec
from pathlib import Path

import pytest

# From the top: a room imports from those of lower lines alone. A room is a module of the library, or a folder of the
# programs with all in it; `lpd_tools` is what lies beside its folders, and `lpd_ext` what the library shows to others.
LAYERS = (
    ("lpd_tools.__main__",),
    ("lpd_tools.cli",),
    ("lpd_tools.commands",),
    ("lpd_tools.study", "lpd_tools.serve", "lpd_tools.web"),
    ("lpd_tools.evaluation",),
    ("lpd_tools.training", "lpd_tools.bench"),
    ("lpd_tools.data",),
    ("lpd_tools",),
    ("lpd_ext",),
    ("lpd_ext.engine",),
    ("lpd_ext.submission",),
    ("lpd_ext.handle", "lpd_ext.pixel_thread"),
    ("lpd_ext.pipeline", "lpd_ext.compat", "lpd_ext.continuous_batch"),
    ("lpd_ext.mirror", "lpd_ext.editing"),
    ("lpd_ext.published_modules", "lpd_ext.edit_plan"),
    ("lpd_ext.drawing",),
    ("lpd_ext.sampler", "lpd_ext.checkpoint", "lpd_ext.pixel_decoder", "lpd_ext.preview_decoder", "lpd_ext.parts"),
    ("lpd_ext.decode_state", "lpd_ext.quantize", "lpd_ext.hub"),
    ("lpd_ext.request", "lpd_ext.published"),
    ("lpd_ext.model", "lpd_ext.tokenizer"),
    ("lpd_ext.few_rows",),
    ("lpd_ext.product_choice",),
    ("lpd_ext.product_check",),
    ("lpd_ext.products",),
    ("lpd_ext.linear", "lpd_ext.training_attention", "lpd_ext.orders"),
    ("lpd_ext.priority",),
    ("lpd_ext.ops", "lpd_ext.image_input"),
    ("lpd_ext.reference", "lpd_ext.block_attention"),
    ("lpd_ext.packing", "lpd_ext.visibility", "lpd_ext.schedule", "lpd_ext.plan", "lpd_ext.product_table"),
    (
        "lpd_ext.checks",
        "lpd_ext.bundled",
        "lpd_ext.class_names",
        "lpd_ext.state_files",
        "lpd_ext.memory",
        "lpd_ext.cuda_graphs",
        "lpd_ext.weights_key",
        "lpd_ext.cancel",
        "lpd_ext.masks",
        "lpd_ext.picture",
    ),
    ("lpd_ext.content", "lpd_ext.modes", "lpd_ext.pace"),
    ("lpd_ext._C",),
)
LEVEL = {room: level for level, rooms in enumerate(reversed(LAYERS)) for room in rooms}
ORACLE = "lpd_ext.reference"  # no production code but ops, for operators that a device has no kernel of
Imports = Mapping[str, set[str]]


def sources(name: str) -> dict[str, str]:
    """The text of every module of a package by its name, without importing any."""
    spec = find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    top = Path(spec.origin).parent
    modules = {}
    for path in top.rglob("*.py"):
        parts = [name, *path.relative_to(top).with_suffix("").parts]
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text(encoding="utf-8")
    return modules


def imports_of(modules: Mapping[str, str]) -> dict[str, set[str]]:
    """Returns the imports of each module among these, wherever they stand; `lpd_ext._C` is no Python file."""
    known = {*modules, "lpd_ext._C"}
    found = {}
    for module, text in modules.items():
        names = set()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{module} has a relative import in line {node.lineno}"
                assert node.module is not None
                inner = {alias.name: f"{node.module}.{alias.name}" for alias in node.names}
                names |= {inner[name] if inner[name] in known else node.module for name in inner}
        found[module] = (names & known) - {module}
    return found


def room_of(module: str) -> str:
    """The longest name in the table that the module's begins with."""
    if module.startswith("lpd_ext.") or module in LEVEL:
        return module
    return room_of(module.rpartition(".")[0])


def upward(imports: Imports) -> list[str]:
    """The imports that do not point down; or first the modules that have no room."""
    if strangers := [f"{module} is in no layer" for module in imports if room_of(module) not in LEVEL]:
        return strangers
    wrong = []
    for module, names in imports.items():
        for name in sorted(names):
            importing, imported = room_of(module), room_of(name)
            if importing != imported and LEVEL[importing] <= LEVEL[imported]:
                wrong.append(f"{module} imports {name}")
    return wrong


def circle(imports: Imports) -> list[str]:
    """Modules each of which is imported by the next, the first and the last being the same; empty if there are none."""
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        found: list[str] = error.args[1]
        return found
    return []


@pytest.fixture(scope="module")
def imports() -> Imports:
    return imports_of(sources("lpd_ext") | sources("lpd_tools"))


def test_imports_point_down(imports: Imports) -> None:
    assert upward(imports) == []


def test_imports_go_round_in_no_circle(imports: Imports) -> None:
    assert circle(imports) == []


def test_every_room_is_there(imports: Imports) -> None:
    """And is imported by something or imports something: the reading of the sources finds what it should."""
    assert set(LEVEL) - {room_of(module) for module in imports} == {"lpd_ext._C"}
    assert sum(map(len, imports.values())) > 300
    assert "lpd_ext.block_attention" in imports["lpd_ext.training_attention"]  # inside a function


def test_production_code_does_not_read_the_oracle(imports: Imports) -> None:
    readers = [name for name, names in imports.items() if ORACLE in names and name.startswith("lpd_ext")]
    assert readers == ["lpd_ext.ops"]


def lines_of_table(page: str, heading: str) -> dict[str, int]:
    """The line of each room that the first table under a heading names in its cells."""
    text = (Path(__file__).parents[2] / page).read_text(encoding="utf-8").split(f"\n## {heading}\n")[1]
    rows = [row for row in text.split("\n## ")[0].splitlines() if row.startswith("| ")][1:]
    rooms = {f".{room}": room for room in LEVEL}
    found: dict[str, int] = {}
    for line, row in enumerate(rows):
        for name in re.findall(r"`(\w+)`", row):
            (room,) = [room for end, room in rooms.items() if end.endswith(f".{name}")]
            assert room not in found
            found[room] = line
    return found


def climbing(imports: Imports, lines: Mapping[str, int]) -> list[str]:
    """The imports of a lower line of a page's table from a higher one."""
    pairs = [(module, name) for module, names in imports.items() for name in sorted(names)]
    known = [pair for pair in pairs if {room_of(module) for module in pair} <= set(lines)]
    return [f"{module} imports {name}" for module, name in known if lines[room_of(module)] > lines[room_of(name)]]


@pytest.mark.parametrize(
    ("page", "heading", "rooms"),
    [("CONTRIBUTING.md", "Imports", 20), ("docs/design/plan.md", "Who depends on whom", 40)],
)
def test_tables_of_pages_tell_the_same(page: str, heading: str, rooms: int, imports: Imports) -> None:
    lines = lines_of_table(page, heading)
    assert len(lines) > rooms
    assert climbing(imports, lines) == []
    upside_down = {room: -line for room, line in lines.items()}
    assert len(climbing(imports, upside_down)) > 10


def test_the_plan_names_every_module(imports: Imports) -> None:
    modules = {module for module in imports if module.startswith("lpd_ext.")}
    assert set(lines_of_table("docs/design/plan.md", "Who depends on whom")) == modules


PLANTED = {
    "upward": ("lpd_tools.data.sources", "import lpd_tools.training.judge", "training.judge"),
    "upward, in a function": ("lpd_ext.ops", "def f():\n    from lpd_ext.model import LPDModel", "lpd_ext.model"),
    "upward, to the package": ("lpd_ext.packing", "from lpd_ext import LPDPipeline", "lpd_ext"),
    "beside": ("lpd_tools.training.loop", "from lpd_tools.bench import timing", "lpd_tools.bench.timing"),
}


@pytest.mark.parametrize("mistake", PLANTED)
def test_a_planted_import_is_found(mistake: str) -> None:
    module, line, name = PLANTED[mistake]
    modules = sources("lpd_ext") | sources("lpd_tools")
    modules[module] += f"\n{line}\n"
    (found,) = upward(imports_of(modules))
    assert found.startswith(f"{module} imports ")
    assert found.endswith(name)


def test_a_planted_circle_is_found() -> None:
    modules = sources("lpd_ext") | sources("lpd_tools")
    modules["lpd_tools.bench.growth_report"] += "\ndef f():\n    from lpd_tools.bench.growth import measure_growth\n"
    found = imports_of(modules)
    assert upward(found) == []  # within one room
    assert set(circle(found)) == {"lpd_tools.bench.growth", "lpd_tools.bench.growth_report"}


def test_a_new_module_needs_a_layer() -> None:
    modules = sources("lpd_ext") | {"lpd_ext.attic": ""}
    assert upward(imports_of(modules)) == ["lpd_ext.attic is in no layer"]
