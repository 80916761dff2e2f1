"""Reads unpacked npm packages of emoji: the list of emoji, and the picture of each in each package."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from lpd_ext.content import content_of, read_json
from lpd_ext.picture import open_image
from lpd_tools.data.names import visible

PERSON = "1f9d1"
_SELECTOR = "fe0f"  # asks for a coloured picture; packages differ in where they write it
# What makes a variant of an emoji: joiners, skin tones, the signs for woman and man.
_VARIANT = frozenset({"200d", "1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff", "2640", "2642"})
_LARGEST_SET = 256 << 20  # bytes of an icons.json; @iconify-json/fluent-emoji has 99 MiB
_SVG_SIZE = 256  # pixels of a drawing's longer side; it is made smaller later

Pictures = dict[str, Callable[[], Image.Image]]  # by code points; read when they are asked for


@dataclass(frozen=True)
class Emoji:
    """One entry of the list of emoji."""

    code: str  # code points as in code_points()
    base: str  # what its variants (skin tones, woman and man) share
    subgroup: str
    names: tuple[str, ...]  # short names, of the plain ones only
    title: str  # the name that Unicode gives it, of the plain ones only
    file: str  # its picture in packages of emoji-datasource


@dataclass(frozen=True)
class Package:
    """The pictures of one package, by code points."""

    name: str
    pictures: Pictures


def code_points(text: str) -> str:
    """Code points as hexadecimal numbers joined by hyphens, in lower case, without variation selectors."""
    return "-".join(code for code in text.lower().split("-") if code != _SELECTOR)


def base_emoji(code: str) -> str:
    """The code points that variants of an emoji share: no skin tone, woman and man as person."""
    codes = [PERSON if part in ("1f468", "1f469") else part for part in code.split("-") if part not in _VARIANT]
    return "-".join(codes) or code


def list_emoji(packages: Iterable[Path]) -> list[Emoji]:
    """All emoji, plain ones before variants, from the first package that has the list of emoji-datasource."""
    for folder in packages:
        if (listing := folder / "emoji.json").is_file():
            with content_of(listing, "is no list of emoji-datasource"):
                return _listed(read_json(listing, "is no list of emoji-datasource"))
    raise FileNotFoundError("package: none has an emoji.json; one must be of emoji-datasource")


def _listed(entries: list[dict[str, Any]]) -> list[Emoji]:
    found = []
    for entry in entries:
        code, names, title = code_points(entry["unified"]), tuple(entry["short_names"]), str(entry["name"] or "")
        found.append(Emoji(code, base_emoji(code), entry["subcategory"], names, title, entry["image"]))
    for entry in entries:
        for tone in entry.get("skin_variations", {}).values():
            code = code_points(tone["unified"])
            found.append(Emoji(code, base_emoji(code), entry["subcategory"], (), "", tone["image"]))
    return found


def read_packages(folders: Iterable[Path], emoji: list[Emoji]) -> list[Package]:
    """The packages with their pictures of these emoji; FileNotFoundError for a folder that is none of the known."""
    folders = list(folders)
    names = {_kebab(name): entry.code for entry in emoji for name in entry.names}
    names |= {_kebab(entry.title): entry.code for entry in emoji if entry.title}
    for folder in folders:
        if (table := folder / "chars.json").is_file():
            with content_of(table, "is no table of names"):
                names |= {name: code_points(code) for code, name in read_json(table, "is no table of names").items()}
    packages = []
    for folder in folders:
        if (folder / "emoji.json").is_file():
            pictures = _datasource(folder, emoji)
        elif (folder / "icons.json").is_file():
            pictures = _iconify(folder / "icons.json", names)
        elif (folder / "assets").is_dir():
            pictures = {code_points(path.stem): _file(path) for path in visible(folder / "assets")}
        else:
            raise FileNotFoundError(
                f"package: {str(folder)!r} has neither emoji.json (emoji-datasource) nor icons.json (Iconify) nor "
                "assets (pictures named by code points)"
            )
        packages.append(Package(_name(folder), pictures))
    return packages


def _name(folder: Path) -> str:
    if not (folder / "package.json").is_file():
        raise ValueError(f"package: {str(folder)!r} has no package.json with a name")
    with content_of(folder / "package.json", "has no name of a package"):
        name = read_json(folder / "package.json")["name"]
    return re.sub(r"[^a-z0-9]+", "-", str(name).lower()).strip("-")


def _kebab(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _file(path: Path) -> Callable[[], Image.Image]:
    return lambda: open_image(path)


def _datasource(folder: Path, emoji: list[Emoji]) -> Pictures:
    """The pictures in img/<set>/64 that are the set's own (others are listed, but not there)."""
    sizes = sorted(folder.glob("img/*/64"))
    return {entry.code: _file(path) for size in sizes for entry in emoji if (path := size / entry.file).is_file()}


def _iconify(listing: Path, names: dict[str, str]) -> Pictures:
    """Drawings of an Iconify set whose names are those of an emoji."""
    with content_of(listing, "is no set of Iconify"):
        content = read_json(listing, "is no set of Iconify", largest=_LARGEST_SET)
        icons, aliases = content["icons"], content.get("aliases", {})
        found: Pictures = {}
        for name in [*icons, *aliases]:
            drawn, seen = name, set[str]()
            while drawn in aliases:
                if drawn in seen:
                    raise ValueError(f"{name} is an alias of itself")
                seen.add(drawn)
                drawn = aliases[drawn]["parent"]
            if name in names and drawn in icons:
                found.setdefault(names[name], _drawing({**content, **icons[drawn]}))
        return found


def _drawing(icon: dict[str, Any]) -> Callable[[], Image.Image]:
    # Defaults of the format: https://iconify.design/docs/types/iconify-icon.html
    box = [icon.get(key, default) for key, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))]
    scale = _SVG_SIZE / max(box[2:])
    size = f'width="{round(box[2] * scale)}" height="{round(box[3] * scale)}"'
    space = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    text = f'<svg {space} viewBox="{" ".join(map(str, box))}" {size}>{icon["body"]}</svg>'

    def draw() -> Image.Image:
        try:
            import resvg_py
        except ImportError as error:
            raise ImportError("Iconify packages hold drawings; pip install resvg-py to read them") from error
        return open_image(bytes(resvg_py.svg_to_bytes(svg_string=text)))

    return draw
