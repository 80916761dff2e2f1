"""Which extra brings a library of the tools that is missing."""

from __future__ import annotations

TOOLS_EXTRA = ("typer", "rich", "matplotlib", "scipy", "huggingface_hub")


def missing_from_tools(error: ImportError) -> str | None:
    """What to install, if the library that could not be imported is one of the [tools] extra; else None."""
    if error.name is None or error.name.split(".")[0] not in TOOLS_EXTRA:
        return None
    return f"The lpd command needs {error.name}, which the [tools] extra brings: pip install 'lpd-ext[tools]'"
