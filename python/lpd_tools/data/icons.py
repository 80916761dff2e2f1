"""Makes an image folder of colour icons: the emoji of several npm packages, in classes of things that look alike."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lpd_ext.content import content_of, read_text
from lpd_tools.data.icon_packages import Emoji, Package, list_emoji, read_packages
from lpd_tools.data.image_source import digest
from lpd_tools.data.names import visible
from lpd_tools.data.pixels import background_colour
from lpd_tools.data.settings import IconFolder
from lpd_tools.progress import track

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_OPAQUE = 8  # below this alpha value a pixel is taken for empty


@dataclass(frozen=True)
class IconClass:
    """One class of the table."""

    name: str
    subgroups: tuple[str, ...] = ()
    names: tuple[str, ...] = ()  # short names of more emoji
    without: tuple[str, ...] = ()  # short names of emoji of the subgroups that look different
    mirror: bool = True  # whether a mirrored icon is as good
    hue: float = 0.0  # how far, in degrees, colours may turn


def read_classes(path: str = "") -> list[IconClass]:
    """The classes of a TOML table, one table each; ValueError naming what is wrong with it."""
    source = Path(path) if path else Path(__file__).with_name("icon_classes.toml")
    with content_of(source, "is no table of classes"):
        tables: dict[str, dict[str, Any]] = tomllib.loads(read_text(source))
        classes = []
        for name, table in tables.items():
            lists: dict[str, Any] = {key: tuple(value) for key, value in table.items() if isinstance(value, list)}
            classes.append(IconClass(name, **{**table, **lists}))
        return classes


def prepare_icons(config: IconFolder) -> dict[str, Counter[str]]:
    """Draws the icons into class folders, all pictures of an emoji on the same side; returns pictures per class.

    Raises FileNotFoundError for a folder that is no package, ValueError for bad settings or classes.
    """
    _check(config)
    background = background_colour(config.background)
    folders = [Path(folder) for folder in config.package]
    emoji = list_emoji(folders)
    members = classify(emoji, read_classes(config.classes))
    packages = read_packages(folders, emoji)
    counts: dict[str, Counter[str]] = {"train": Counter(), "val": Counter()}
    for kind, entries in track(list(members.items()), "drawing icons"):
        there = [e for e in entries if any(e.code in package.pictures for package in packages)]
        test = held_out_bases([entry.base for entry in there], config.held_out)
        for package in packages:
            for entry in _capped(there, package, config.variants):
                split = "val" if entry.base in test else "train"
                folder = Path(config.out) / split / kind.name
                folder.mkdir(parents=True, exist_ok=True)
                icon = cut_out(package.pictures[entry.code]())
                for number in range(config.placements if split == "train" else 1):
                    picture = place(icon, config, background, kind, f"{package.name}/{entry.code}", number)
                    picture.save(folder / f"{entry.code}.{package.name}.{number}.png")
                    counts[split][kind.name] += 1
    return counts


def classify(emoji: Iterable[Emoji], classes: list[IconClass]) -> dict[IconClass, list[Emoji]]:
    """The emoji of each class, variants with their plain one; ValueError for a name or subgroup that is not there."""
    emoji = list(emoji)
    by_name = {name: entry.base for entry in emoji for name in entry.names}
    subgroups = {entry.subgroup for entry in emoji}
    members: dict[IconClass, list[Emoji]] = {}
    taken: dict[str, str] = {}
    for kind in classes:
        unknown = [n for n in (*kind.names, *kind.without) if n not in by_name]
        unknown += [group for group in kind.subgroups if group not in subgroups]
        if unknown:
            raise ValueError(f"classes: {kind.name} names {unknown[0]!r}, which no emoji or subgroup is called")
        bases = {entry.base for entry in emoji if entry.subgroup in kind.subgroups}
        bases = (bases - {by_name[name] for name in kind.without}) | {by_name[name] for name in kind.names}
        members[kind] = [entry for entry in emoji if entry.base in bases]
        for entry in members[kind]:
            if (other := taken.setdefault(entry.base, kind.name)) != kind.name:
                raise ValueError(f"classes: {kind.name} and {other} share the emoji {entry.names or entry.code}")
    return members


def held_out_bases(bases: Iterable[str], share: float) -> set[str]:
    """A share of them, at least one and not all if there are two: those whose hashes are lowest."""
    ranked = sorted(set(bases), key=digest)
    return set(ranked[: min(max(1, round(share * len(ranked))), len(ranked) - 1)])


def cut_out(icon: Image.Image) -> Image.Image:
    """The icon as RGBA without the empty rows and columns around it."""
    icon = icon.convert("RGBA")
    box = icon.getchannel("A").point(lambda alpha: 255 if alpha >= _OPAQUE else 0).getbbox()
    return icon.crop(box) if box else icon


def place(
    icon: Image.Image, config: IconFolder, background: tuple[int, int, int], kind: IconClass, name: str, number: int
) -> Image.Image:
    """The icon on its background: placement 0 in the middle, others as (seed, name, number) have it."""
    room = config.size - 2 * config.margin
    longer, where = float(room), (0.5, 0.5)
    if number:
        random = np.random.default_rng(int(digest(str(config.seed), name, str(number))[:16], 16))
        longer = room * random.uniform(0.9, 1.07)
        where = (random.uniform(0, 1), random.uniform(0, 1))
        if kind.mirror and random.random() < 0.5:
            icon = icon.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        icon = turn_hue(icon, kind.hue * random.uniform(-1, 1))
    scale = longer / max(icon.size)
    width, height = (max(1, round(side * scale)) for side in icon.size)
    # Blended at full size: the colour of transparent pixels, which may be anything, must not enter the average.
    blended = Image.alpha_composite(Image.new("RGBA", icon.size, (*background, 255)), icon).convert("RGB")
    picture = Image.new("RGB", (config.size, config.size), background)
    # Up to half the margin off the middle, and no further than the border.
    free = [min(config.margin, config.size - side) for side in (width, height)]
    corner = [
        round((config.size - side) / 2 + (at - 0.5) * space)
        for side, at, space in zip((width, height), where, free, strict=True)
    ]
    picture.paste(blended.resize((width, height), Image.Resampling.LANCZOS), (corner[0], corner[1]))
    return picture


def turn_hue(icon: Image.Image, degrees: float) -> Image.Image:
    """The icon with every hue turned by an angle; lightness, saturation and transparency as they were."""
    if not degrees:
        return icon
    hue, saturation, value = icon.convert("RGB").convert("HSV").split()
    turned = hue.point([round(h + degrees * 256 / 360) % 256 for h in range(256)])
    rgb = Image.merge("HSV", (turned, saturation, value)).convert("RGB")
    rgb.putalpha(icon.getchannel("A"))
    return rgb


def _capped(entries: list[Emoji], package: Package, variants: int) -> list[Emoji]:
    """Selects the emoji that the package has, at most `variants` per base, plain ones first."""
    seen: Counter[str] = Counter()
    kept = []
    for entry in entries:
        if entry.code in package.pictures and seen[entry.base] < variants:
            seen[entry.base] += 1
            kept.append(entry)
    return kept


def _check(config: IconFolder) -> None:
    out = Path(config.out)
    if not config.package:
        raise ValueError("package must name at least one folder")
    if 2 * config.margin >= config.size:
        raise ValueError(f"margin must be less than half of size {config.size}, got {config.margin}")
    if out.exists() and (not out.is_dir() or visible(out)):
        raise ValueError(f"out: {str(out)!r} exists and is no empty folder")
