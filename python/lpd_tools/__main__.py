"""Entry point of the `lpd` command; says which extra to install when a library of the tools is missing."""

from __future__ import annotations

import sys
from io import TextIOWrapper

from lpd_tools.extras import missing_from_extras
from lpd_tools.launch import run_and_leave
from lpd_tools.spinning import stop_spinning


def main() -> None:
    """Run the command line."""
    stop_spinning()
    try:
        from lpd_tools.cli import app
    except ModuleNotFoundError as error:
        if (sentence := missing_from_extras(error)) is None:
            raise
        raise SystemExit(sentence) from error
    if isinstance(sys.stdout, TextIOWrapper) and (sys.stdout.errors == "strict" or sys.stdout.encoding != "utf-8"):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: a path may hold what cannot be encoded
    run_and_leave(app)


if __name__ == "__main__":
    main()
