"""griffe's extension for `make docs`: lines "name: what it means" of a docstring become a list, and "*" stays one."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

# A line that begins with names and a colon, but not an inner one such as "path: a string, ...: ..." of a signature.
ARGUMENT = re.compile(r"^((?:\w+, )*\w+(?: and \w+)?): (?=\S)", re.MULTILINE)
CODE_OR_STAR = re.compile(r"(`[^`]*`)|\*")


class ArgumentLists(Extension):
    """Rewrites every docstring once it is read."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is None:
            return
        obj.docstring.value = CODE_OR_STAR.sub(lambda found: found[1] or r"\*", obj.docstring.value)
        first, separator, rest = obj.docstring.value.partition("\n\n")
        if not separator:
            return
        paragraphs = [self._listed(paragraph) for paragraph in rest.split("\n\n")]
        obj.docstring.value = "\n\n".join([first, *paragraphs])

    def _listed(self, paragraph: str) -> str:
        listed = ARGUMENT.sub(r"- `\1`: ", paragraph)
        before, item, after = listed.partition("- `")
        return f"{before}\n{item}{after}" if before.strip() and item else listed
