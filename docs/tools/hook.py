"""mkdocs' hook: shows links to files outside docs/ as their paths, and refuses pages that load from another host."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError

LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)\s#]+)(#[^)\s]*)?\)")
LOADED = re.compile(r"<(?:script|img|iframe|link)\b[^>]*\b(?:src|href)=\"?(?:https?:)?//[^>]*>", re.IGNORECASE)


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """A site has no csrc/ to link to: the path is shown instead, once it is known to exist."""
    docs = Path(config.docs_dir)
    folder = docs / Path(page.file.src_uri).parent

    def shown(link: re.Match[str]) -> str:
        text, target = link[1], link[2]
        if "://" in target or target.startswith("mailto:"):
            return link[0]
        path = Path(os.path.normpath(folder / target))
        if path.is_relative_to(docs):
            return link[0]
        if not path.exists():
            raise PluginError(f"{page.file.src_uri}: {target} does not exist")
        name = f"`{path.relative_to(docs.parent)}`"
        return name if path.name in text else f"{text} ({name})"

    return LINK.sub(shown, markdown)


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """No script, style, font or picture of a page may come from another host."""
    for found in LOADED.findall(output):
        if 'rel="canonical"' not in found:
            raise PluginError(f"{page.file.src_uri} loads from another host: {found}")
    return output
