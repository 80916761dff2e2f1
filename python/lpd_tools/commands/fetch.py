"""`lpd fetch`: put a model of the hub into this machine's cache."""

from __future__ import annotations

from typing import Annotated

import typer

from lpd_tools.console import say


def fetch(
    model: Annotated[str, typer.Argument(help="Published model (lpd_l_256, ...) or hub id.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit; default: main.")] = None,
    token: Annotated[str | None, typer.Option(help="Of the hub; default: that of `hf auth login`.")] = None,
) -> None:
    """Download a model and its tokenizer to the hub's cache, so that other commands need no network.

    Example: lpd fetch lpd_l_256
    """
    from lpd_ext.hub import HubOptions, find_model, published_tokenizer

    files = find_model(model, HubOptions(revision, token))
    say(f"{model}: {files.model}")
    say(f"tokenizer: {files.tokenizer or published_tokenizer()}")
