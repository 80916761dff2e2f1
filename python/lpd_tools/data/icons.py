"""Makes an image folder of the colour icons in the npm package emoji-datasource-google (64x64 RGBA, Apache-2.0)."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

from lpd_tools.data.image_source import held_out
from lpd_tools.data.settings import IconFolder
from lpd_tools.progress import track

PERSON = "1F9D1"
# What makes a variant of an icon: joiners and selectors, skin tones, the signs for woman and man.
_VARIANT = frozenset({"200D", "FE0F", "1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF", "2640", "2642"})
_LEFT_OUT = frozenset({"Component"})  # five swatches of skin tones are no class of pictures


def base_icon(unified: str) -> str:
    """The code points of an icon that its variants share: no skin tone, woman and man as person."""
    codes = [PERSON if code in ("1F468", "1F469") else code for code in unified.split("-") if code not in _VARIANT]
    return "-".join(codes) or unified


def prepare_icons(config: IconFolder) -> dict[str, Counter[str]]:
    """Copies the icons into class folders, all variants of an icon on the same side; returns pictures per class.

    Raises FileNotFoundError for a folder that is not the package or lacks a picture, ValueError for one that is
    no list of icons or an `out` that is taken.
    """
    package, out = Path(config.package), Path(config.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out: {str(out)!r} exists and is no empty folder")
    copies = [
        (path, split, category)
        for path, base, category in _icons(package, config.variants)
        for split in ["val" if held_out(base, config.held_out) else "train"]
    ]
    missing = [path for path, _, _ in copies if not path.is_file()]
    if missing:
        raise FileNotFoundError(f"package: {str(missing[0])!r} is missing and {len(missing) - 1} others")
    counts: dict[str, Counter[str]] = {"train": Counter(), "val": Counter()}
    for path, split, category in track(copies, "copying icons"):
        folder = out / split / category
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / path.name)
        counts[split][category] += 1
    return counts


def _icons(package: Path, variants: int) -> list[tuple[Path, str, str]]:
    """File, base icon and category of at most `variants` pictures of each base icon, plain ones first."""
    listing = package / "emoji.json"
    if not listing.is_file():
        raise FileNotFoundError(f"package: there is no {str(listing)!r}; unpack emoji-datasource-google there")
    try:
        entries: list[dict[str, Any]] = json.loads(listing.read_text(encoding="utf-8"))
        plain = [(entry["category"], entry) for entry in entries if entry["category"] not in _LEFT_OUT]
        toned = [(name, tone) for name, entry in plain for tone in entry.get("skin_variations", {}).values()]
        kept = []
        seen: Counter[str] = Counter()
        for category, entry in plain + toned:
            base = base_icon(entry["unified"])
            if entry["has_img_google"] and seen[base] < variants:
                seen[base] += 1
                folder = re.sub(r"[^a-z]+", "-", category.lower())
                kept.append((package / "img" / "google" / "64" / entry["image"], base, folder))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"package: {str(listing)!r} is no list of emoji-datasource: {error!r}") from error
    return kept
