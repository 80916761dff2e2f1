"""The commands that edit pictures: files in and out, settings that draw them again, and nothing overwritten unasked."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("typer")
pytest.importorskip("rich")

from lpd_tools.cli import app
from lpd_tools.data.fashion_mnist import FashionMNISTSource, load_fashion_mnist
from lpd_tools.png_settings import read_settings, save_png
from typer.testing import CliRunner, Result

DATA = Path(__file__).parents[1] / "data" / "fashion_mnist"


DRAWS = {"inpaint", "class-edit", "outpaint", "sample", "generate", "edit-gallery"}


def lpd(*arguments: object) -> Result:
    """The command; where it draws from nothing known before, by the model of clothes."""
    if arguments[0] in DRAWS and "--like" not in arguments:
        arguments = (*arguments, "--model", "fashion_mnist")
    return CliRunner(env={"COLUMNS": "200", "TERM": "dumb"}).invoke(app, [str(a) for a in arguments])


def done(*arguments: object) -> Result:
    result = lpd(*arguments)
    assert result.exit_code == 0, result.stderr
    return result


def refused(*arguments: object) -> str:
    result = lpd(*arguments)
    assert result.exit_code == 2
    return result.stderr.replace("\n", " ")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current directory with a real picture, a mask of its middle, and a larger picture in colours."""
    monkeypatch.chdir(tmp_path)
    FashionMNISTSource(load_fashion_mnist("test", DATA), "test").image(14).save("boot.png")
    mask = np.zeros((32, 32), np.uint8)
    mask[8:24, 9:24] = 255
    Image.fromarray(mask).save("hole.png")
    colours = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    Image.fromarray(colours).save("large.jpg")
    return tmp_path


def pixels(path: str) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def test_inpaint_writes_the_picture_with_what_is_known() -> None:
    output = done("inpaint", "boot.png", "hole.png", "ankle boot", "--output", "new/out.png", "--seed", 3).output
    assert str(Path("new/out.png").resolve()) in output
    assert "1 image in" in output
    hole = pixels("hole.png")[..., 0] > 0
    assert (pixels("new/out.png")[~hole] == pixels("boot.png")[~hole]).all()
    assert (pixels("new/out.png")[hole] != pixels("boot.png")[hole]).any()
    _, settings = read_settings(Path("new/out.png"))
    assert {name: settings[name] for name in ("command", "label", "seed", "steps", "guidance", "order", "model")} == {
        "command": "inpaint", "label": "ankle boot", "seed": 3, "steps": 10, "guidance": 8.0, "order": "locality",
        "model": "fashion_mnist",
    }  # fmt: skip
    assert (settings["image"], settings["mask_image"], settings["paste"]) == ("boot.png", "hole.png", True)


EDITS: list[tuple[object, ...]] = [
    ("inpaint", "boot.png", "hole.png", "ankle boot", "--seed", 3),
    ("inpaint", "boot.png", "hole.png", "none", "--steps", 4, "--order", "outward", "--guidance", 2, "--top-k", 40),
    ("inpaint", "boot.png", "hole.png", "9", "--feather", 3, "--dilate", 1, "--temperature", 0.5, "--top-p", 0.9),
    ("inpaint", "boot.png", "hole.png", "9", "--no-paste", "--order", "boot.png"),
    ("class-edit", "boot.png", "hole.png", "sandal", "--dtype", "int8"),
    ("outpaint", "boot.png", "4,8,4,0", "ankle boot", "--resize", "stretch"),
    ("outpaint", "large.jpg", "6", "bag", "--resize", "crop"),
]


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: "-".join(map(str, edit[::3])))
def test_the_file_draws_itself_again(edit: tuple[object, ...]) -> None:
    done(*edit, "--output", "out.png")
    done("sample", "--like", "out.png", "--output", "again.png")
    assert (pixels("again.png") == pixels("out.png")).all()


def test_so_does_that_one_and_by_another_seed_another() -> None:
    done("inpaint", "boot.png", "hole.png", "ankle boot", "--output", "out.png")
    done("sample", "--like", "out.png", "--output", "again.png")
    done("sample", "--like", "again.png", "--output", "third.png")
    assert (pixels("third.png") == pixels("out.png")).all()
    done("sample", "--like", "out.png", "--output", "other.png", "--seed", 77)
    assert (pixels("other.png") != pixels("out.png")).any()
    assert read_settings(Path("other.png"))[1]["seed"] == 77


def test_a_grid_draws_itself_again() -> None:
    done(
        "sample", "bag", "none", "3", "-n", 2, "--steps", 5, "--seed", 9, "--order", "boot.png", "--output", "grid.png"
    )
    Path("boot.png").unlink()  # the priorities stand in the file
    done("sample", "--like", "grid.png", "--output", "again.png")
    assert (pixels("again.png") == pixels("grid.png")).all()
    done("sample", "--like", "grid.png", "--output", "other.png", "--guidance", 1)
    assert (pixels("other.png") != pixels("grid.png")).any()
    settings = read_settings(Path("other.png"))[1]
    assert settings["labels"] == ["bag", None, 3]
    assert (settings["guidance"], settings["steps"], settings["seed"], settings["images"]) == (1, 5, 9, 2)
    done("sample", "coat", "--like", "grid.png", "--output", "coats.png", "-n", 1)
    settings = read_settings(Path("coats.png"))[1]
    assert (settings["labels"], settings["images"], settings["steps"]) == (["coat"], 1, 5)


def test_pictures_of_a_run_draw_themselves_again() -> None:
    done("generate", "--out", "run", "--images-per-class", 1, "--seed", 5, "--num-inference-steps", 4,
         "--repulsion-threshold", 1)  # fmt: skip
    done("sample", "--like", "run/8/8.png", "--output", "again.png")
    assert (pixels("again.png") == pixels("run/8/8.png")).all()
    settings = read_settings(Path("again.png"))[1]
    assert (settings["command"], settings["label"], settings["seed"]) == ("generate", 8, 13)
    assert (settings["steps"], settings["repulsion"], settings["guidance_schedule"]) == (4, 1, "linear")


def test_the_gallery_has_a_row_for_each_edit() -> None:
    arguments = ("edit-gallery", "boot.png", "hole.png", "ankle boot", "sandal", "-n", 2, "--steps", 3)
    done(*arguments)
    shown = pixels("editing.png")
    assert shown.shape[0] == 4 * (64 + 4) + 4
    assert read_settings(Path("editing.png"))[1]["new_label"] == "sandal"
    columns = shown[:, -3 * 68 :].reshape(shown.shape[0], 3, 68, 3)
    rows = [columns[row * 68 + 4 : row * 68 + 68] for row in range(4)]
    for row in rows:  # what was given and two results, all different
        assert len({row[:, column, :64].tobytes() for column in range(3)}) == 3
    assert "output 'editing.png' exists" in refused(*arguments, "--output", "editing.png")
    assert "was made by lpd edit-gallery" in refused("sample", "--like", "editing.png")


def test_several_images_are_numbered_and_each_is_that_of_its_seed() -> None:
    done("inpaint", "boot.png", "hole.png", "ankle boot", "-n", 3, "--seed", 5)
    files = ["inpainted_1.png", "inpainted_2.png", "inpainted_3.png"]
    assert sorted(path.name for path in Path().glob("inpainted*")) == files
    done("inpaint", "boot.png", "hole.png", "ankle boot", "--seed", 6)
    assert (pixels("inpainted.png") == pixels("inpainted_2.png")).all()
    done("sample", "--like", "inpainted_3.png", "--output", "again.png")
    assert (pixels("again.png") == pixels("inpainted_3.png")).all()


def test_nothing_is_overwritten_without_force() -> None:
    done("inpaint", "boot.png", "hole.png", "9", "--output", "out.png")
    before = Path("out.png").read_bytes()
    boot = Path("boot.png").read_bytes()
    again = ("inpaint", "boot.png", "hole.png", "9", "--seed", 1, "--output")
    assert refused(*again, "out.png") == "error: output 'out.png' exists: --force overwrites it "
    assert "output 'boot.png' exists" in refused(*again, "boot.png")
    Path("many_2.png").touch()
    assert "output 'many_2.png' exists" in refused(*again, "many.png", "-n", 3)
    assert Path("out.png").read_bytes() == before
    assert Path("boot.png").read_bytes() == boot
    assert not Path("many_1.png").exists()
    done(*again, "out.png", "--force")
    assert Path("out.png").read_bytes() != before
    for taken in (
        ("sample", "--output", "boot.png"),
        ("orders", "--output", "boot.png"),
        ("sample", "--animate", "a.gif"),
    ):
        Path("a.gif").touch()
        assert f"{taken[1][2:]} '{taken[2]}' exists: --force overwrites it" in refused(*taken)
    assert Path("boot.png").read_bytes() == boot
    done("orders", "--steps", 2, "-n", 1, "--output", "boot.png", "--force")
    assert read_settings(Path("boot.png"))[1]["command"] == "orders"


def test_without_a_name_a_new_file_is_taken() -> None:
    """Every run writes a file of its own; several images go together; --force takes the first name again."""
    for seed, name in enumerate(("grid.png", "grid-2.png", "grid-3.png")):
        assert str(Path(name).resolve()) in done("sample", "bag", "-n", 1, "--steps", 1, "--seed", seed).output
    first, second = (Path(name).read_bytes() for name in ("grid.png", "grid-2.png"))
    assert first != second
    done("sample", "bag", "-n", 1, "--steps", 1, "--seed", 1, "--force")
    assert Path("grid.png").read_bytes() == second
    Path("inpainted_2.png").touch()
    done("inpaint", "boot.png", "hole.png", "9", "-n", 2, "--steps", 1)
    assert sorted(path.name for path in Path().glob("inpainted*")) == [
        "inpainted-2_1.png", "inpainted-2_2.png", "inpainted_2.png"
    ]  # fmt: skip
    for _ in range(2):
        done("orders", "--height", 2, "--width", 2, "--steps", 1, "-n", 1)
    assert Path("orders-2.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("inpaint", "none.png", "hole.png", "9"), "images is 'none.png', where there is no file"),
        (("inpaint", "large.jpg", "hole.png", "9"), "masks[0] has 32 x 32 pixels, but its picture has 70 x 50"),
        (("inpaint", "large.jpg", "large.jpg", "9"), "images[0] must have 32 x 32 pixels, got 70 x 50: resize="),
        (("inpaint", "boot.png", "hole.png", "hat"), "'hat' is not a class name"),
        (("inpaint", "boot.png", "hole.png", "10"), "labels[0] must be None or an integer in [0, 10), got 10"),
        (("inpaint", "boot.png", "hole.png", "9", "--output", "out.jpg"), "output must end in .png"),
        (("inpaint", "boot.png", "hole.png", "9", "--resize", "pad"), "resize must be None, 'stretch' or 'crop'"),
        (("inpaint", "boot.png", "hole.png", "9", "--order", "zigzag"), "got 'zigzag'"),
        (("inpaint", "boot.png", "hole.png", "9", "--order", "zigzag.png"), "order is 'zigzag.png', where there is no"),
        (("outpaint", "boot.png", "16", "9"), "margins[0] = [16, 16, 16, 16] leave nothing of 32 x 32 pixels"),
        (("outpaint", "boot.png", "1,2", "9"), "margins must be a number or left,top,right,bottom"),
        (("sample", "--like", "boot.png"), "like: 'boot.png' carries no settings"),
        (("sample", "--like", "none.png"), "like is 'none.png', where there is no file"),
    ],
)
def test_what_is_refused_is_one_sentence(arguments: tuple[object, ...], message: str) -> None:
    files = sorted(Path().iterdir())
    assert message in refused(*arguments)
    assert sorted(Path().iterdir()) == files


def test_a_huge_picture_is_refused_without_a_warning_before() -> None:
    Image.new("1", (12000, 9000)).save("huge.png")
    sentence = refused("inpaint", "huge.png", "hole.png", "9")
    assert sentence == "error: images ('huge.png') cannot be read: 12000 x 9000 pixels are more than 50,000,000 "


def test_labels_do_not_change_an_edit() -> None:
    done("inpaint", "boot.png", "hole.png", "9", "--output", "out.png")
    assert "labels and --images cannot change" in refused("sample", "bag", "--like", "out.png")


def test_settings_are_text_chunks() -> None:
    settings = {"command": "sample", "labels": ["é", None, 3], "order": [[0.5] * 40] * 8, "steps": 3}
    save_png(Image.new("RGB", (3, 2)), Path("a.png"), settings)
    assert read_settings(Path("a.png"))[1] == settings
    with Image.open("a.png") as image:
        texts = image.text
    assert texts["Software"].startswith("lpd-ext ")
    assert json.loads(texts["lpd:steps"]) == 3
    assert len(texts) == 5


def test_a_chunk_that_is_no_json() -> None:
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("lpd:command", "{")
    Image.new("RGB", (3, 2)).save("a.png", pnginfo=info)
    assert "like: the settings in 'a.png' are no JSON" in refused("sample", "--like", "a.png")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"mask": "?"}, "what the file says of known cells is damaged: "),
        ({"mask": "AAAA"}, "damaged: 3 bytes are no mask of 32 x 32 pixels"),
        ({"known_tokens": "x"}, "what the file says of known cells is damaged: "),
        ({"known_tokens": [1, 2]}, "known_tokens must be int64 of shape [1, 64]"),
        ({"known_tokens": [512] * 64}, "known_tokens[0] must lie in [0, 512), or be -1"),
        ({"seed": 2**70}, "seeds[0] must be a signed 64-bit integer"),
        ({"label": "hat"}, "'hat' is not a class name"),
    ],
)
def test_damaged_settings_are_refused(damage: dict[str, object], message: str) -> None:
    done("inpaint", "boot.png", "hole.png", "9", "--output", "out.png", "--steps", 1)
    image, settings = read_settings(Path("out.png"))
    save_png(image, Path("damaged.png"), settings | damage)
    assert message in refused("sample", "--like", "damaged.png")


def test_orders_side_by_side_of_an_edit() -> None:
    arguments = ("locality", "outward", "boot.png", "--height", 8, "--width", 8, "--steps", 4, "-n", 1)
    output = done("orders", *arguments, "--mask", "hole.png", "--side-by-side").output
    assert output.count("cells of a group") == 3
    with Image.open("orders.png") as image:
        wide = image.size
    done("orders", *arguments, "--mask", "hole.png", "--output", "rows.png")
    with Image.open("rows.png") as image:
        assert image.height > wide[1]
        assert image.width < wide[0]
    settings = read_settings(Path("orders.png"))[1]
    assert (settings["policies"], settings["mask"]) == (["locality", "outward", "boot.png"], "hole.png")
    assert "--like" not in output
    Image.new("L", (8, 8)).save("empty.png")
    assert "is empty: nothing is to be painted" in refused("orders", "--mask", "empty.png")
    assert "like: 'orders.png' was made by lpd orders, which sample cannot do again" in refused(
        "sample", "--like", "orders.png"
    )
