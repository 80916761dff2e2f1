"""The image folder made of icons from several packages: which pictures, in which classes, on which side, how drawn."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("typer")
pytest.importorskip("rich")

from lpd_tools.data.icon_packages import base_emoji, code_points, list_emoji, read_packages
from lpd_tools.data.icons import (
    IconClass,
    IconFolder,
    classify,
    cut_out,
    held_out_bases,
    place,
    prepare_icons,
    read_classes,
    turn_hue,
)
from lpd_tools.data.sources import open_data

TONES = ("1F3FB", "1F3FC", "1F3FD")
FRUIT = [f"1F4{i:02d}" for i in range(20)]
RED, BLUE, BACKGROUND = (220, 20, 30), (20, 60, 230), (238, 242, 246)
TABLE = """
[fruit]
subgroups = ["food-fruit"]
without = ["fruit-1"]
[farmer]
names = ["farmer"]
mirror = false
"""


def write_package(folder: Path, name: str) -> Path:
    folder.mkdir()
    (folder / "package.json").write_text(json.dumps({"name": name}))
    return folder


def draw_icon(path: Path, colour: tuple[int, int, int] = RED) -> None:
    """A block in the middle, wider than high; what is transparent is green underneath."""
    icon = Image.new("RGBA", (64, 64), (0, 255, 0, 0))
    icon.paste((*colour, 255), (16, 24, 48, 40))
    path.parent.mkdir(parents=True, exist_ok=True)
    icon.save(path)


@pytest.fixture
def packages(tmp_path: Path) -> list[Path]:
    """Twenty fruit and a farmer as person, woman and man with skin tones: in full, as files by code points, drawn."""
    full = write_package(tmp_path / "full", "emoji-datasource-made-up")

    def entry(unified: str, name: str, group: str) -> dict[str, object]:
        image = f"{unified.lower()}.png"
        draw_icon(full / "img/made-up/64" / image)
        return {"unified": unified, "image": image, "name": name.upper(), "short_names": [name], "subcategory": group}

    entries = [entry(code, f"fruit-{i}", "food-fruit") for i, code in enumerate(FRUIT)]
    for person, name in (("1F468", "male-farmer"), ("1F469", "female-farmer"), ("1F9D1", "farmer")):
        farmer = entry(f"{person}-200D-1F33E", name, "person-role")
        farmer["skin_variations"] = {tone: entry(f"{person}-{tone}-200D-1F33E", "", "x") for tone in TONES}
        entries.append(farmer)
    entries.append(entry("2764-FE0F", "heart", "heart"))
    (full / "emoji.json").write_text(json.dumps(entries))
    files = write_package(tmp_path / "files", "@maker/Files")
    for code in (*FRUIT, "2764-fe0f", "1f9d1-200d-1f33e"):
        draw_icon(files / "assets" / f"{code.lower()}.webp", BLUE)
    drawn = write_package(tmp_path / "drawn", "drawn")
    block = f'<path fill="rgb{RED}" d="M2 4h4v2h-4z"/>'
    icons = {"apple": {"body": block}, "fruit-2": {"body": block}, "strange": {"body": block}}
    content = {"icons": icons, "aliases": {"fruit-3": {"parent": "fruit-2"}}, "width": 8, "height": 8}
    (drawn / "icons.json").write_text(json.dumps(content))
    (drawn / "chars.json").write_text(json.dumps({FRUIT[0].lower(): "apple"}))
    return [full, files, drawn]


@pytest.fixture
def config(packages: list[Path], tmp_path: Path) -> IconFolder:
    table = tmp_path / "classes.toml"
    table.write_text(TABLE)
    folders = tuple(str(package) for package in packages[:2])
    return IconFolder(folders, str(tmp_path / "out"), str(table), held_out=0.2)


def test_variants_share_a_base() -> None:
    assert base_emoji("1f469-1f3fd-200d-1f33e") == base_emoji("1f9d1-200d-1f33e") == "1f9d1-1f33e"
    assert base_emoji(code_points("26F9-1F3FB-200D-2640-FE0F")) == base_emoji(code_points("26F9-FE0F")) == "26f9"
    assert base_emoji("1f436") != base_emoji("1f431")
    assert base_emoji("2640") != base_emoji("2642")


def test_pictures_of_each_kind_of_package(packages: list[Path]) -> None:
    pytest.importorskip("resvg_py")
    emoji = list_emoji(packages)
    full, files, drawn = read_packages(packages, emoji)
    assert [package.name for package in (full, files, drawn)] == ["emoji-datasource-made-up", "maker-files", "drawn"]
    assert len(full.pictures) == 20 + 3 * 4 + 1
    assert {"2764", "1f9d1-200d-1f33e", FRUIT[7].lower()} < set(files.pictures)
    assert set(drawn.pictures) == {FRUIT[0].lower(), FRUIT[2].lower(), FRUIT[3].lower()}
    picture = drawn.pictures[FRUIT[3].lower()]()
    assert picture.size == (256, 256)
    assert cut_out(picture).size == (128, 64)
    assert picture.getpixel((100, 160)) == (*RED, 255)
    assert files.pictures["2764"]().convert("RGBA").getpixel((30, 30))[2] > 200


def test_classes_sides_and_variants(config: IconFolder, tmp_path: Path) -> None:
    counts = prepare_icons(dataclasses.replace(config, variants=2, placements=3))
    sides = {
        split: {path.name.split(".")[0] for path in (tmp_path / "out" / split).glob("fruit/*")}
        for split in ("train", "val")
    }
    assert (len(sides["train"]), len(sides["val"])) == (15, 4)  # 19 fruit, a fifth of them held out
    assert not sides["train"] & sides["val"]
    assert FRUIT[1].lower() not in sides["train"] | sides["val"]
    assert counts == {"train": Counter(fruit=15 * 2 * 3, farmer=3 * 3), "val": Counter(fruit=4 * 2)}
    # Two of the farmers in the first package, the only one in the other; all of one base, so none is held out.
    farmers = sorted(path.name for path in (tmp_path / "out/train/farmer").iterdir())
    assert len(farmers) == 9
    (tmp_path / "empty" / ".ipynb_checkpoints").mkdir(parents=True)
    again = dataclasses.replace(config, variants=2, placements=3, out=str(tmp_path / "empty"))
    assert prepare_icons(again) == counts
    assert {name.split(".")[1] for name in farmers} == {"emoji-datasource-made-up", "maker-files"}
    with pytest.raises(ValueError, match="exists and is no empty folder"):
        prepare_icons(config)


def test_icons_are_a_data_set(config: IconFolder, tmp_path: Path) -> None:
    Path(config.classes).write_text('[fruit]\nsubgroups = ["food-fruit"]\n', encoding="utf-8")
    prepare_icons(config)
    data = open_data(f"folder:{tmp_path / 'out'}")
    assert data.class_names == ("fruit",)
    assert (len(data.train), len(data.test)) == (32, 8)


def test_held_out_emoji_stay_held_out_beside_others() -> None:
    some = held_out_bases(FRUIT[:10], 0.3)
    assert len(some) == 3
    assert held_out_bases([*FRUIT[:10], *FRUIT[:10]], 0.3) == some
    assert held_out_bases(FRUIT[:9], 0.01) < set(FRUIT)
    assert len(held_out_bases(FRUIT[:9], 0.01)) == len(held_out_bases(FRUIT[:2], 0.99)) == 1
    assert held_out_bases(FRUIT[:1], 0.5) == set()
    assert len(held_out_bases(FRUIT, 0.4) & held_out_bases(FRUIT[1:], 0.4)) >= 6


def test_the_first_placement_is_in_the_middle_and_clean(tmp_path: Path) -> None:
    draw_icon(tmp_path / "icon.png")
    icon = cut_out(Image.open(tmp_path / "icon.png"))
    assert icon.size == (32, 16)
    pixels = np.asarray(place(icon, IconFolder(("x",), "y"), BACKGROUND, IconClass("block"), "block", 0)).astype(int)
    assert pixels.shape == (64, 64, 3)
    inside = np.zeros((64, 64), bool)
    inside[18:46, 4:60] = True  # 56 wide, half as high
    assert (pixels[~inside] == BACKGROUND).all()
    assert np.abs(pixels[inside] - RED).max() <= 1  # no green from under the transparent border


def test_other_placements_move_mirror_and_turn_hues() -> None:
    icon = Image.new("RGBA", (56, 56), (*RED, 255))
    icon.paste((*BLUE, 255), (0, 0, 28, 56))  # blue at the left
    config = IconFolder(("x",), "y")

    def pixels(kind: IconClass, number: int, seed: int = 0) -> np.ndarray:
        return np.asarray(place(icon, dataclasses.replace(config, seed=seed), BACKGROUND, kind, "a", number)).astype(
            int
        )

    fixed, free = IconClass("fixed", mirror=False), IconClass("free")
    numbers = range(1, 41)
    assert (pixels(fixed, 5) == pixels(fixed, 5)).all()
    assert (pixels(fixed, 5) != pixels(fixed, 6)).any()
    assert (pixels(fixed, 5) != pixels(fixed, 5, seed=1)).any()
    boxes = []
    mirrored = 0
    for number in numbers:
        drawn = (pixels(fixed, number) != BACKGROUND).any(axis=2)
        rows, columns = np.flatnonzero(drawn.any(axis=1)), np.flatnonzero(drawn.any(axis=0))
        boxes.append((rows[0], columns[0], rows[-1] - rows[0] + 1))
        assert pixels(fixed, number)[32, 16, 2] > 200
        mirrored += int(pixels(free, number)[32, 16, 0] > 200)
    assert {side for _, _, side in boxes} <= set(range(50, 61))
    assert len({side for _, _, side in boxes}) >= 5
    assert len(set(boxes)) >= 30
    assert 10 <= mirrored <= 30
    turned = [pixels(IconClass("turned", mirror=False, hue=60), number)[32, 44] for number in numbers]
    assert all(np.abs(colour - turned[0]).max() > 0 for colour in turned[1:5])
    assert all(max(colour) - min(colour) > 150 for colour in turned)  # as colourful as before
    assert any(colour[1] > 150 for colour in turned)
    assert not any(colour[2] > 200 > 100 > colour[0] for colour in turned)  # 60 degrees from red there is no blue


def test_hues_turn_and_transparency_stays() -> None:
    icon = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    icon.putpixel((1, 0), (255, 0, 0, 77))
    green = turn_hue(icon, 120)
    assert [pixel[3] for pixel in (green.getpixel((0, 0)), green.getpixel((1, 0)))] == [255, 77]
    red, strong, blue, _ = green.getpixel((0, 0))
    assert strong == 255
    assert max(red, blue) <= 6
    assert turn_hue(icon, 0) is icon


def test_the_table_that_comes_along() -> None:
    classes = read_classes()
    assert 20 <= len(classes) <= 40
    assert len({kind.name for kind in classes}) == len(classes)
    for part in ("subgroups", "names"):
        assert max(Counter(name for kind in classes for name in getattr(kind, part)).values()) == 1
    assert not next(kind for kind in classes if kind.name == "clock").mirror


def test_classes_that_cannot_be(packages: list[Path], tmp_path: Path) -> None:
    emoji = list_emoji(packages)
    for kinds, match in (
        ([IconClass("a", names=("kiwi",))], "a names 'kiwi', which no emoji or subgroup is called"),
        ([IconClass("a", subgroups=("food",))], "a names 'food'"),
        ([IconClass("a", without=("kiwi",))], "a names 'kiwi'"),
        (
            [IconClass("a", subgroups=("food-fruit",)), IconClass("b", names=("fruit-4",))],
            r"b and a share the emoji \('fruit-4',\)",
        ),
    ):
        with pytest.raises(ValueError, match=match):
            classify(emoji, kinds)
    table = tmp_path / "table.toml"
    for text in ("[a]\nname = ['x']", "a = 3", "[a"):
        table.write_text(text)
        with pytest.raises(ValueError, match="is no table of classes"):
            read_classes(str(table))


def test_what_is_no_package_is_refused(config: IconFolder, packages: list[Path], tmp_path: Path) -> None:
    for changes, match in (
        ({"held_out": 1.0}, r"held_out must be in \(0, 1\), got 1"),
        ({"variants": 0}, "variants must be at least 1, got 0"),
        ({"placements": 0}, "placements must be at least 1"),
        ({"margin": 32}, "margin must be less than half of size 64, got 32"),
        ({"background": "glass"}, "background must be a colour"),
        ({"package": ()}, "package must name at least one folder"),
    ):
        with pytest.raises(ValueError, match=match):
            prepare_icons(dataclasses.replace(config, **changes))
    with pytest.raises(FileNotFoundError, match=r"none has an emoji\.json"):
        prepare_icons(dataclasses.replace(config, package=(str(packages[1]),)))
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"has neither emoji\.json"):
        prepare_icons(dataclasses.replace(config, package=(str(packages[0]), str(tmp_path / "empty"))))
    (packages[1] / "package.json").unlink()
    with pytest.raises(ValueError, match=r"has no package\.json with a name"):
        prepare_icons(config)
    (packages[0] / "emoji.json").write_text("[1]")
    with pytest.raises(ValueError, match="is no list of emoji-datasource"):
        prepare_icons(config)
    assert not (tmp_path / "out").exists()
