"""`lpd study-editing`."""

from __future__ import annotations

from lpd_tools.console import say
from lpd_tools.study.settings import EditingStudy


def study_editing(config: EditingStudy) -> None:
    """Measure edits over masks, steps, orders and blocks of prefill.

    Example: lpd study-editing --judge judge.safetensors --out results/editing --minutes 60
    """
    from lpd_tools.study.editing import run_editing_study

    say(f"wrote {run_editing_study(config)}")
