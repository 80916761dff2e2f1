"""`lpd growth`: measures how time and memory of a decode grow with the batch, the steps, the tokens and the model.

Every point is measured in a process of its own and appended to a CSV file at once, so the program can be stopped and
started again. Weights are drawn at random, guidance is on.
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, astuple, fields
from pathlib import Path
from typing import Any

import torch

from lpd_ext.content import content_of, read_json, read_text
from lpd_ext.linear import pack
from lpd_ext.quantize import quantize
from lpd_ext.state_files import write_text
from lpd_tools.bench.growth_series import DTYPES, Measured, Point, all_points
from lpd_tools.bench.settings import Growth
from lpd_tools.bench.timing import interleaved
from lpd_tools.machine import machine
from lpd_tools.progress import track

_CPU = torch.device("cpu")


def read_points(path: Path) -> dict[Point, Measured]:
    """Reads the CSV file, dropping a last line that a stopped program left unfinished."""
    if not path.exists():
        return {}
    measured = {}
    with content_of(path, "is no table of `lpd growth`"):
        for row in csv.DictReader(read_text(path).splitlines()):
            if any(row.get(name) in (None, "") for name in _columns()):
                continue
            sizes: dict[str, Any] = {
                f.name: row[f.name] if f.name == "dtype" else int(row[f.name]) for f in fields(Point)
            }
            point = Point(**sizes)
            measured[point] = Measured(point, float(row["seconds"]), int(row["runs"]), float(row["peak_mb"]))
    return measured


def _columns() -> list[str]:
    return [f.name for f in fields(Point)] + ["seconds", "runs", "peak_mb"]


def append_point(path: Path, measured: Measured) -> None:
    """Appends a row to the CSV file, with the header if it is new."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    with path.open("a", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if not text:
            writer.writerow(_columns())
        elif not text.endswith("\n"):  # a stopped program left half a line
            file.write("\n")
        writer.writerow([*astuple(measured.point), f"{measured.seconds:.5g}", measured.runs, f"{measured.peak_mb:.1f}"])


def measure_points(
    path: Path, points: Iterable[Point], measure: Callable[[Point], Measured], minutes: float = 1e9
) -> dict[Point, Measured]:
    """Measures the points missing from the CSV file and appends them; returns all points of the file."""
    done = read_points(path)
    start = time.monotonic()
    for point in track([p for p in points if p not in done], "Measuring"):
        if time.monotonic() - start > 60 * minutes:
            break
        done[point] = measure(point)
        append_point(path, done[point])
    return done


def measure_in_a_process(point: Point, threads: int) -> Measured:
    """Measures a point in a process of its own; RuntimeError with the last lines of its output if it fails."""
    argument = json.dumps(asdict(point) | {"threads": threads})
    environment = os.environ | {"GOMP_SPINCOUNT": "0", "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "lpd_tools.bench.growth_point", argument]
    # Python looks for modules in the current folder first: in a checkout it would find sources that are not built.
    process = subprocess.run(command, env=environment, cwd=sys.prefix, capture_output=True, text=True)
    if process.returncode:
        raise RuntimeError(f"{point} could not be measured: {process.stderr.strip()[-500:]}")
    return Measured(point, **json.loads(process.stdout))


def machine_peaks(threads: int) -> dict[str, Any]:
    """Describes this machine, with operations per second of large products per format and bytes read per second."""
    torch.set_num_threads(threads)
    described = machine(_CPU) | {"cores": os.cpu_count()}
    x = torch.randn(2048, 2048)
    with torch.inference_mode():
        product = pack(torch.nn.Sequential(torch.nn.Linear(2048, 2048)))
        rounded = quantize(torch.nn.Sequential(torch.nn.Linear(2048, 2048)))
        words = torch.zeros(1 << 27, dtype=torch.int64)
        times = interleaved([lambda: product(x), lambda: rounded(x), words.sum], 7, _CPU)
    operations = 2 * 2048**3
    described |= {name: operations / taken.median for name, taken in zip(DTYPES, times, strict=False)}
    return described | {"bytes": 8 * words.numel() / times[2].median}


def measure_growth(config: Growth) -> Path:
    """Measures the missing points, then draws the picture and writes the tables; returns the folder."""
    from lpd_tools.bench.growth_report import draw, tables  # matplotlib only where it is needed

    folder = Path(config.out)
    folder.mkdir(parents=True, exist_ok=True)
    described = folder / "growth_machine.json"
    if not described.exists():
        write_text(described, json.dumps(machine_peaks(config.threads), indent=1) + "\n")
    measured = measure_points(
        folder / "growth.csv", all_points(), lambda p: measure_in_a_process(p, config.threads), config.minutes
    )
    peaks = read_json(described)
    draw(measured, peaks, folder / "growth.png", {"command": "growth", "machine": peaks, **asdict(config)})
    write_text(folder / "growth_tables.md", tables(measured, peaks) + "\n")
    return folder
