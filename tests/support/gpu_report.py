"""`make gpu-report`: what one is to know of a GPU and of this library on it, in ten minutes.

    python tests/support/gpu_report.py [--folder build/gpu_report] [--minutes 10] [--only STEP ...] [--force]

Steps come in order of worth, each with its share of the time, and each in a process of its own. What they find is in
the folder at once, results.jsonl; a step that is done is not done again by the next call. At the end it writes the
tables of docs/results/gpu.md. --dry-run puts the emulated kernels in the card's place and writes tables into the folder
alone; --tables writes those of a folder that came from elsewhere.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from report_identity import ROOT, SITE, is_built, machine
from report_programs import PROGRAMS, Command, python_path
from report_records import Records, attempts, done, ended, identity, replace_text, said_of, wrong
from report_tables import page_with, tables_of

PAGE = ROOT / "docs" / "results" / "gpu.md"
SECONDS_TO_BEGIN = 5.0  # with less left no step is begun


class Step(NamedTuple):
    """A step, and the minutes that it may take."""

    name: str
    minutes: float


STEPS = (
    Step("build", 4),
    Step("tests", 2),
    Step("ceilings", 0.5),
    Step("checks", 0.75),
    Step("decodes", 1.5),
    Step("products", 1.5),
    Step("profile", 0.75),
    Step("sanitizers", 2),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 1 if a step failed, found no time or found something wrong."""
    options = parsed(arguments)
    folder: Path = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    records = Records(folder)
    if options.worker:
        work(options.worker, options.dry_run, folder, options.seconds)
        return 0
    if options.tables:
        write_tables(records)
        return 0
    try:
        of = machine(options.dry_run)
    except RuntimeError as error:
        raise SystemExit(str(error)) from error
    before = identity(records.read())
    if before not in (None, of):
        if not options.force:
            raise SystemExit(f"{folder} has results of {before}, not of {of}: --force begins anew")
        records.path.unlink()
        before = None
    if options.force:
        (folder / "product_times.json").unlink(missing_ok=True)  # of LPD_PRODUCTS=auto
    if before is None:
        records.add("", "report", of=of, command=" ".join(["gpu_report.py", *(arguments or sys.argv[1:])]))
    chosen = to_do(records, options, of)
    failed = run_steps(chosen, options.dry_run, records, options.minutes)
    write_tables(records)
    print(f"{folder}: {', '.join(failed) + ' did not end well' if failed else 'all done'}")
    return 1 if failed else 0


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=lambda text: Path(text).resolve(), default=ROOT / "build" / "gpu_report")
    parser.add_argument("--minutes", type=float, default=10.0, help="for all steps together")
    parser.add_argument("--only", nargs="+", choices=[step.name for step in STEPS])
    parser.add_argument("--force", action="store_true", help="do steps again that are done")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--tables", action="store_true", help="measure nothing")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=0.0, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def to_do(records: Records, options: argparse.Namespace, of: Mapping[str, Any]) -> list[Step]:
    """Returns the steps that are asked for and not done, after the build if what was built is not what is there now."""
    is_done = set() if options.force else done(records.read())
    wanted = set(options.only or (step.name for step in STEPS))
    built = options.dry_run or is_built(SITE, of)
    wanted -= is_done if built else is_done - {"build"}
    if wanted and not built:
        wanted.add("build")
    return [step for step in STEPS if step.name in wanted]


def run_steps(steps: Sequence[Step], dry_run: bool, records: Records, minutes: float) -> list[str]:
    """Runs steps, each in a process; returns those that failed, found no time or found something wrong."""
    begun = time.monotonic()
    failed = []
    for step in steps:
        left = 60 * minutes - (time.monotonic() - begun)
        seconds = min(60 * step.minutes, left)
        if seconds < SECONDS_TO_BEGIN:
            print(f"{step.name}: no time left", flush=True)
            failed.append(step.name)
            continue
        print(f"{step.name} ...", end=" ", flush=True)
        run_step(step.name, dry_run, records, seconds)
        found = records.read()
        attempt = attempts(found)[step.name]
        end = ended(attempt)
        assert end is not None
        print(", ".join(filter(None, [f"{end['status']} in {end['seconds']} s", said_of(wrong(attempt))])), flush=True)
        if step.name not in done(found):
            failed.append(step.name)
        if failed == ["build"]:  # without which nothing else can be
            break
    return failed


def run_step(name: str, dry_run: bool, records: Records, seconds: float) -> None:
    """Runs one step, whose last record says how it ended."""
    folder, begun = records.path.parent, time.monotonic()
    records.add(name, "begin", seconds=round(seconds, 1))
    command = [sys.executable, __file__, "--folder", folder, "--worker", name, "--seconds", str(0.95 * seconds)]
    places = [] if dry_run else [SITE]  # the library that the first step built
    environment = {
        "PYTHONPATH": python_path(*places),
        "LPD_CACHE_DIR": str(folder),
        "PYTHONUNBUFFERED": "1",
    }
    log = folder / "steps.log"
    size = log.stat().st_size if log.exists() else 0
    status = Command([*command, *(["--dry-run"] if dry_run else [])], log, environment, True).wait(seconds)
    outcome = "timed out" if status is None else "failed" if status else "done"
    with log.open("rb") as file:
        file.seek(size)
        said = file.read().decode("utf-8", "replace").splitlines()[-20:] if outcome != "done" else []
    records.add(name, "end", status=outcome, seconds=round(time.monotonic() - begun, 1), said=said)


def work(name: str, dry_run: bool, folder: Path, seconds: float) -> None:
    """Does a step, in the process that was started for it."""
    records = Records(folder)

    def add(what: str, **values: Any) -> None:
        records.add(name, what, **values)

    if name in PROGRAMS:
        PROGRAMS[name](dry_run, folder, seconds, add)
        return
    from report_machine import Card, StandIn
    from report_measures import run

    import lpd_ext

    if not dry_run and SITE not in Path(lpd_ext.__file__).parents:
        raise SystemExit(f"another installation goes before {SITE}, {lpd_ext.__file__}: uninstall it")
    run(name, StandIn() if dry_run else Card(), add)


def write_tables(records: Records) -> None:
    """Writes tables.md into the folder, and the page's if the results are a card's."""
    found = records.read()
    of = identity(found)
    if of is None:
        raise SystemExit(f"{records.path} has no results")
    tables = tables_of(found)
    replace_text(records.path.parent / "tables.md", tables)
    if not of["emulated"]:
        replace_text(PAGE, page_with(PAGE.read_text(encoding="utf-8"), tables))


if __name__ == "__main__":
    sys.exit(main())
