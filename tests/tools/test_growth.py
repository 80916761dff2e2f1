"""The growth program without its measuring: what is resumed, fitted, drawn and printed; and one real point."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from lpd_tools.bench import growth, growth_report
from lpd_tools.bench.growth import append_point, measure_points, read_points
from lpd_tools.bench.growth_report import exponent
from lpd_tools.bench.growth_series import Measured, Point, all_points, all_series

POINTS = [Point(64, 1, 1, "float32", batch, 2, 16) for batch in (1, 2, 4)]
MACHINE = {"threads": 2, "bytes": 3e10, "float32": 2e11, "int8": 7e11}


def timed(point: Point) -> Measured:
    return Measured(point, 0.5 * point.batch, 3, 100.0)


def test_every_point_is_in_the_file_as_soon_as_it_is_measured(tmp_path: Path) -> None:
    path = tmp_path / "growth.csv"

    def stopped(point: Point) -> Measured:
        if point.batch == 4:
            raise KeyboardInterrupt
        return timed(point)

    with pytest.raises(KeyboardInterrupt):
        measure_points(path, POINTS, stopped)
    assert list(read_points(path)) == POINTS[:2]
    asked: list[Point] = []
    done = measure_points(path, POINTS, lambda point: asked.append(point) or timed(point))
    assert asked == POINTS[2:]
    assert done == read_points(path) == {point: timed(point) for point in POINTS}


@pytest.mark.parametrize("half", ["64,1,1,flo", "64,1,1,float32,2,2,16,0.5,3", "64,1,1,float32,2,2,16,0.5,3,"])
def test_half_a_line_is_measured_again(tmp_path: Path, half: str) -> None:
    path = tmp_path / "growth.csv"
    append_point(path, timed(POINTS[0]))
    path.write_text(path.read_text() + half)
    assert list(read_points(path)) == POINTS[:1]
    measure_points(path, POINTS, timed)
    assert list(read_points(path)) == POINTS


def test_no_point_is_started_after_the_time(tmp_path: Path) -> None:
    assert measure_points(tmp_path / "growth.csv", POINTS, timed, minutes=-1) == {}


@pytest.mark.parametrize("power", [-1.0, 0.0, 0.73, 2.0])
def test_a_power_law_is_fitted(power: float) -> None:
    x = [1, 2, 8, 30]
    assert exponent(x, [3 * value**power for value in x]) == pytest.approx(power)


def test_noise_is_averaged() -> None:
    assert exponent([1, 2, 4, 8], [1.05, 1.9, 4.2, 7.8]) == pytest.approx(1, abs=0.05)


def test_points_differ_in_one_size_along_a_series() -> None:
    for series in all_series("int8"):
        along = [series.along(point) for point in series.points]
        assert along == sorted(set(along))
        assert series.fitted <= len(along)
    assert len(set(all_points())) == len(all_points())


def test_a_point_in_a_process_of_its_own() -> None:
    measured = growth.measure_in_a_process(POINTS[1], threads=1)
    assert (measured.point, measured.runs) == (POINTS[1], 3)
    assert measured.seconds > 0
    assert measured.peak_mb > POINTS[1].work().resident_bytes / 1e6


def test_a_process_that_fails_says_why() -> None:
    with pytest.raises(RuntimeError, match="dim / heads must be a multiple of 8"):
        growth.measure_in_a_process(Point(64, 1, 3, "float32", 1, 2, 16), threads=1)


def test_the_picture_and_the_tables(tmp_path: Path) -> None:
    measured = {point: timed(point) for point in all_points()}
    growth_report.draw(measured, MACHINE, tmp_path / "growth.png", {"command": "growth"})
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")
    exponents = growth_report.exponents_table(measured, MACHINE).splitlines()
    assert exponents[2].startswith("| lpd_l with 4 blocks, float32 | B = 16, 32, 64 | 1.00 |")


def test_points_that_are_not_measured_yet_are_left_out() -> None:
    series = all_series("int8")[0]
    measured = {point: timed(point) for point in series.points[1:3]}
    (kept,) = growth_report.measured_series(measured, "int8")
    assert kept.points == series.points[1:3]
    assert growth_report.measured_series({series.points[0]: timed(series.points[0])}, "int8") == []


def test_the_committed_tables_are_those_of_the_committed_points() -> None:
    folder = Path(__file__).parents[2] / "docs/results/growth"
    measured, machine = read_points(folder / "growth.csv"), json.loads((folder / "growth_machine.json").read_text())
    assert (folder / "growth_tables.md").read_text() == growth_report.tables(measured, machine) + "\n"
