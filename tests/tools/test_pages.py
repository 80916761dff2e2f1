"""The pages: their links lead somewhere, their commands and options exist, and the examples they show are the files."""

from __future__ import annotations

import ast
import re
import runpy
import shlex
from collections.abc import Iterator
from pathlib import Path

from lpd_tools.cli import app
from typer.main import get_command

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
COMMANDS = get_command(app).commands
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LPD = re.compile(r"(?:^|[ (`])lpd ([a-z][a-z0-9-]+)\b([^`\n]*)", re.MULTILINE)


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def without_fences(text: str) -> str:
    return FENCE.sub("", text)


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.*)$", without_fences(text), re.MULTILINE)
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading).strip().replace(" ", "-") for heading in plain}


def dead_links(page: Path, text: str) -> Iterator[str]:
    for target in LINK.findall(without_fences(text)):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        heading_is_there = not anchor or file.suffix != ".md" or anchor in anchors(text if file == page else read(file))
        if not file.exists() or not heading_is_there:
            yield target


def unknown_commands(text: str) -> Iterator[str]:
    """Returns the uses of `lpd COMMAND --option` in a text that name no command, or no option of it."""
    for name, rest in LPD.findall(text.replace("\\\n", " ")):
        if name not in COMMANDS:
            yield f"lpd {name}"
            continue
        words = shlex.split(re.split(r"[|;&]|\$\(| #", rest)[0].replace("'", ""))
        known = {option for item in COMMANDS[name].params for option in (*item.opts, *item.secondary_opts)} | {"--help"}
        yield from (f"lpd {name} {word}" for word in words if word.startswith("--") and word.split("=")[0] not in known)


def test_links_lead_somewhere() -> None:
    dead = [(str(page.relative_to(ROOT)), link) for page in PAGES for link in dead_links(page, read(page))]
    assert dead == []


def test_commands_and_options_exist() -> None:
    unknown = [(str(page.relative_to(ROOT)), found) for page in PAGES for found in unknown_commands(read(page))]
    assert unknown == []


def test_dead_links_and_unknown_commands_are_found() -> None:
    text = "# A title\n[a](nowhere.md) [b](#a-title) [c](#b) [d](LICENSE) [e](CONTRIBUTING.md#nowhere)"
    assert list(dead_links(ROOT / "README.md", text)) == ["nowhere.md", "#b", "CONTRIBUTING.md#nowhere"]
    fence = "```bash\nlpd smaple\nlpd sample --steps 3  # --no\nrun lpd train \\\n  --depht 3\n```"
    found = list(unknown_commands("`lpd sample --stepz 3`\n" + fence))
    assert found == ["lpd sample --stepz", "lpd smaple", "lpd train --depht"]


def test_python_in_pages_is_python() -> None:
    blocks = [(page, code) for page in PAGES for kind, code in FENCE.findall(read(page)) if kind == "python"]
    assert len(blocks) > 5
    for page, code in blocks:
        ast.parse(code, str(page))


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {(page.name, name) for page in PAGES for name in re.findall(r"`make ([a-z-]+)", read(page))}
    assert len(named) > 5
    assert [(page, name) for page, name in sorted(named) if name not in targets] == []


def test_messages_of_troubleshooting_are_the_programs_own() -> None:
    files = [*(ROOT / "lpd_ext").rglob("*.py"), *(ROOT / "python").rglob("*.py"), *(ROOT / "cmake").glob("*.cmake")]
    sources = re.sub(r'"\s*\n\s*f?"', "", "\n".join(map(read, [ROOT / "CMakeLists.txt", *files])))
    messages = re.findall(r"^### `(.*)`$", read(ROOT / "docs/guide/troubleshooting.md"), re.MULTILINE)
    assert len(messages) > 5
    assert [message for message in messages if message not in sources] == []


def test_the_figure_of_the_method_is_what_its_script_draws() -> None:
    drawn = runpy.run_path(str(ROOT / "docs/tools/method_figure.py"))["figure"]()
    assert drawn == read(ROOT / "docs/images/method.svg")
