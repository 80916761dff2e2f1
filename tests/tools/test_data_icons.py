"""The image folder made of the icons of emoji-datasource-google."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("typer")
pytest.importorskip("rich")

from lpd_tools.data.icons import IconFolder, base_icon, prepare_icons
from lpd_tools.data.sources import open_data

TONES = ("1F3FB", "1F3FC", "1F3FD")


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """Sixty animals, a farmer as person, woman and man with skin tones, and a swatch."""
    root = tmp_path / "package"
    (root / "img/google/64").mkdir(parents=True)

    def entry(unified: str, category: str) -> dict[str, object]:
        image = f"{unified.lower()}.png"
        Image.new("RGBA", (64, 64)).save(root / "img/google/64" / image)
        return {"unified": unified, "image": image, "has_img_google": True, "category": category}

    entries = [entry(f"1F4{i:02d}", "Animals & Nature") for i in range(60)]
    for person in ("1F468", "1F469", "1F9D1"):
        farmer = entry(f"{person}-200D-1F33E", "People & Body")
        farmer["skin_variations"] = {tone: entry(f"{person}-{tone}-200D-1F33E", "People & Body") for tone in TONES}
        entries.append(farmer)
    entries.append(entry("1F3FB", "Component"))
    entries.append(entry("1F500", "Symbols") | {"has_img_google": False})
    (root / "emoji.json").write_text(json.dumps(entries))
    return root


def test_variants_share_a_base() -> None:
    assert base_icon("1F469-1F3FD-200D-1F33E") == base_icon("1F9D1-200D-1F33E") == "1F9D1-1F33E"
    assert base_icon("26F9-1F3FB-200D-2640-FE0F") == base_icon("26F9-FE0F") == "26F9"
    assert base_icon("1F436") != base_icon("1F431")
    assert base_icon("2640-FE0F") != base_icon("2642-FE0F")


def test_icons_by_category_variants_capped_and_never_split(package: Path, tmp_path: Path) -> None:
    config = IconFolder(str(package), str(tmp_path / "out"), held_out=0.2, variants=5)
    counts = prepare_icons(config)
    assert set(counts["train"]) | set(counts["val"]) == {"animals-nature", "people-body"}
    assert counts["train"]["animals-nature"] + counts["val"]["animals-nature"] == 60
    assert 3 <= counts["val"]["animals-nature"] <= 24
    people = [path.parent.parent.name for path in (tmp_path / "out").glob("*/people-body/*.png")]
    assert len(people) == 5
    assert len(set(people)) == 1
    plain = {"1f468-200d-1f33e.png", "1f469-200d-1f33e.png", "1f9d1-200d-1f33e.png"}
    assert plain < {path.name for path in (tmp_path / "out").glob("*/people-body/*.png")}
    with pytest.raises(ValueError, match="exists and is no empty folder"):
        prepare_icons(config)


def test_icons_are_a_data_set(package: Path, tmp_path: Path) -> None:
    entries = [entry for entry in json.loads((package / "emoji.json").read_text()) if entry["category"][0] == "A"]
    (package / "emoji.json").write_text(json.dumps(entries))
    prepare_icons(IconFolder(str(package), str(tmp_path / "out"), held_out=0.3))
    data = open_data(f"folder:{tmp_path / 'out'}")
    assert data.class_names == ("animals-nature",)
    assert len(data.train) + len(data.test) == 60


def test_what_is_no_package_is_refused(package: Path, tmp_path: Path) -> None:
    config = IconFolder(str(package), str(tmp_path / "out"))
    for changes, match in (({"held_out": 1.0}, r"held_out must be in \(0, 1\), got 1"), ({"variants": 0}, "got 0")):
        with pytest.raises(ValueError, match=match):
            prepare_icons(IconFolder(str(package), str(tmp_path / "out"), **changes))
    (package / "img/google/64/1f400.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"1f400\.png' is missing and 0 others"):
        prepare_icons(config)
    (package / "emoji.json").write_text("[1]")
    with pytest.raises(ValueError, match="is no list of emoji-datasource"):
        prepare_icons(config)
    with pytest.raises(FileNotFoundError, match="unpack emoji-datasource-google there"):
        prepare_icons(IconFolder(str(tmp_path), str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()
