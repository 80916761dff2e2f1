"""A pytest plugin of `make gpu-report`: the name of a test that fails is on disk before the next one begins."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from report_records import Records

_passed = 0
_shared_out = False  # this process runs tests for another one, which sees all reports


def pytest_configure(config: pytest.Config) -> None:
    global _shared_out
    _shared_out = hasattr(config, "workerinput")  # not by xdist's variables, which its processes' children inherit


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    global _passed
    folder, step = os.environ["LPD_REPORT_FOLDER"], os.environ["LPD_REPORT_STEP"]
    if _shared_out:
        return
    if report.failed:
        text = report.longreprtext.strip().splitlines()
        said = next((line for line in reversed(text) if line.startswith("E ")), text[-1] if text else "")
        Records(Path(folder)).add(step, "failed test", name=report.nodeid, when=report.when, said=said[:300])
    elif report.when == "call" and report.passed:
        _passed += 1
        if _passed % 50 == 0:
            _add_passed()


def pytest_sessionfinish() -> None:
    if not _shared_out:
        _add_passed()


def _add_passed() -> None:
    Records(Path(os.environ["LPD_REPORT_FOLDER"])).add(os.environ["LPD_REPORT_STEP"], "tests", passed=_passed)
