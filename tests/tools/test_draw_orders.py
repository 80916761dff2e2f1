"""Pictures of orders: each cell shows its step; the command writes a PNG and checks its options."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

pytest.importorskip("typer")
pytest.importorskip("matplotlib")

import typer
from lpd_tools.commands.orders import orders
from lpd_tools.draw_orders import draw_orders, step_grid
from typer.testing import CliRunner

app = typer.Typer()
app.command()(orders)


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


def test_step_grid() -> None:
    order = torch.tensor([3, 0, 5, 1, -1, -1])
    assert step_grid(order, [1, 2, 1], (2, 3)).tolist() == [[1, 2, -1], [0, -1, 1]]


def test_figure_numbers_every_free_cell() -> None:
    order = torch.tensor([[3, 0, 5, 1, -1, -1], [0, 1, 2, 3, 4, 5]])
    figure = draw_orders(order, [[1, 2, 1], [2, 4]], (2, 3), ["edited", "raster"], columns=2)
    edited, raster = figure.axes[:2]
    assert edited.get_title() == "edited"
    assert {text.get_position(): text.get_text() for text in edited.texts} == {
        (0, 1): "0", (0, 0): "1", (2, 1): "1", (1, 0): "2",
    }  # fmt: skip
    assert [text.get_text() for text in raster.texts] == ["0", "0", "1", "1", "1", "1"]
    image = raster.images[0]
    assert image.get_array().tolist() == [[0, 0, 1], [1, 1, 1]]
    assert edited.images[0].get_array().mask.tolist() == [[False, False, True], [False, True, False]]


def test_command_writes_a_picture(tmp_path: Path) -> None:
    path = tmp_path / "new" / "orders.png"
    output = run(
        "locality",
        "spiral",
        "--height",
        "4",
        "--width",
        "6",
        "--steps",
        "5",
        "-n",
        "2",
        "--output",
        str(path),
    )
    assert str(path) in output.replace("\n", "")
    with Image.open(path) as image:
        assert image.width > image.height > 100
        assert len(image.convert("RGB").getcolors(2**24) or []) > 5


def test_command_takes_group_sizes_and_refuses_bad_ones(tmp_path: Path) -> None:
    path = str(tmp_path / "orders.png")
    run("raster", "--height", "2", "--width", "2", "--group-sizes", "[1, 3]", "--output", str(tmp_path / "good.png"))
    with pytest.raises(ValueError, match="group_sizes must sum to 4"):
        run("raster", "--height", "2", "--width", "2", "--group-sizes", "1,1", "--output", path)
    with pytest.raises(ValueError, match="order must be a permutation of the free cells or one of locality"):
        run("zigzag", "--output", path)


def test_last_seed(tmp_path: Path) -> None:
    path = tmp_path / "orders.png"
    options = ("random", "--height", "2", "--width", "2", "--steps", "2", "-n", "2", "--force", "--output", str(path))
    run(*options, "--seed", str(2**63 - 2))
    assert path.exists()
    with pytest.raises(ValueError, match=r"seed must be in .* for 2 images, got 9223372036854775807"):
        run(*options, "--seed", str(2**63 - 1))
