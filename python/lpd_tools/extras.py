"""Finds the extra that brings a missing library."""

from __future__ import annotations

EXTRAS = {
    "tools": ("typer", "rich", "matplotlib", "scipy", "huggingface_hub"),
    "serve": ("fastapi", "starlette", "uvicorn", "pydantic", "prometheus_client", "python_multipart", "httpx"),
    "web": ("gradio",),
}
_USERS = {"tools": "The lpd command", "web": "lpd demo"}


def missing_from_extras(error: ImportError) -> str | None:
    """Returns what to install if an extra brings the library that could not be imported, else None."""
    for extra, libraries in EXTRAS.items():
        if error.name is not None and error.name.split(".")[0] in libraries:
            name = _USERS.get(extra, f"lpd {extra}")
            return f"{name} needs {error.name}, which the [{extra}] extra brings: pip install 'lpd-ext[{extra}]'"
    return None
