"""Docstrings say what a thing is or does, in a sentence that begins with that."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
FILES = sorted([*(ROOT / "lpd_ext").glob("*.py"), *(ROOT / "python/lpd_tools").rglob("*.py")])
TESTS = sorted([*(ROOT / "tests").rglob("*.py"), *(ROOT / "examples").glob("*.py")])
RIDDLE = re.compile(r"(What|Those|Of|That of|How|Which) ")
DEFINITIONS = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def riddles(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        docstring = ast.get_docstring(node) if isinstance(node, DEFINITIONS) else None
        if docstring is not None and RIDDLE.match(docstring):
            yield docstring.splitlines()[0]


def undocumented(source: str) -> Iterator[str]:
    """Public functions and classes at the top of a module without a docstring."""
    for node in ast.parse(source).body:
        if isinstance(node, DEFINITIONS) and not node.name.startswith("_") and ast.get_docstring(node) is None:
            yield node.name


def test_docstrings_begin_with_what_a_thing_is_or_does() -> None:
    found = [(path.name, line) for path in (*FILES, *TESTS) for line in riddles(path.read_text(encoding="utf-8"))]
    assert found == []


def test_public_functions_and_classes_have_docstrings() -> None:
    found = [(str(path), name) for path in FILES for name in undocumented(path.read_text(encoding="utf-8"))]
    assert found == []


def test_both_are_found() -> None:
    source = """
def f():
    '''What a thing is.'''

class C:
    def g(self):
        '''Of two.'''

def _h(): ...
"""
    assert list(riddles(source)) == ["What a thing is.", "Of two."]
    assert list(undocumented(source)) == ["C"]
