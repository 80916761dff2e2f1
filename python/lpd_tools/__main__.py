"""Entry point of the `lpd` command; says which extra to install when a library of the tools is missing."""

from __future__ import annotations

TOOLS_EXTRA = ("typer", "rich", "matplotlib", "scipy", "huggingface_hub")


def main() -> None:
    """Run the command line."""
    try:
        from lpd_tools.cli import app
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] not in TOOLS_EXTRA:
            raise
        raise SystemExit(
            f"The lpd command needs {error.name}, which the [tools] extra brings: pip install 'lpd-ext[tools]'"
        ) from error
    app()


if __name__ == "__main__":
    main()
