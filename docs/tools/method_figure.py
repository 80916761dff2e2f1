"""Draw docs/images/method.svg: the rows of one decoding step and who sees whom, in light and dark.

`python docs/tools/method_figure.py` writes the file; the order and the group sizes are the library's own.
"""

from __future__ import annotations

from itertools import accumulate, pairwise
from pathlib import Path

import torch

from lpd_ext.orders import locality_order
from lpd_ext.schedule import cosine_group_sizes

FILE = Path(__file__).parents[1] / "images/method.svg"
SIDE, STEPS, STEP, SEED = 6, 6, 3, 3
CELL, SMALL = 36, 16
CONTEXT = ("context rows: the tokens of the last step,", "whose keys and values now enter the cache")
QUERY = (
    "query rows: a position each, no content;",
    "they see each other, and their logits",
    "give the tokens of this step",
)
STYLE = """
    text { font: 13px system-ui, sans-serif; fill: #24292f }
    .title { font-weight: 600; font-size: 15px } .note { fill: #57606a }
    .cached { fill: #2a9d8f } .context { fill: #e9a23b } .query { fill: #8a6be0 } .empty { fill: #d8dee4 }
    .unseen { fill: none; stroke: #d8dee4 } .arrow { stroke: #57606a; fill: none; stroke-width: 1.5 }
    @media (prefers-color-scheme: dark) {
      text { fill: #e6edf3 } .note { fill: #9da7b3 } .empty { fill: #363d47 } .unseen { stroke: #363d47 }
      .arrow { stroke: #9da7b3 }
    }"""


def text(x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> str:
    return f'<text x="{x:g}" y="{y:g}" class="{kind}" text-anchor="{anchor}">{words}</text>'


def square(x: float, y: float, side: int, kind: str) -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{side - 2}" height="{side - 2}" rx="2" class="{kind}"/>'


def grid(x: float, y: float, kinds: dict[int, str]) -> list[str]:
    cells = range(SIDE * SIDE)
    return [square(x + c % SIDE * CELL, y + c // SIDE * CELL, CELL, kinds.get(c, "empty")) for c in cells]


def visibility(x: float, y: float, counts: dict[str, int]) -> list[str]:
    """A row of the step per line, a key per column: filled, in the key's colour, where the row sees the key."""
    keys = [kind for kind, count in counts.items() for _ in range(count)]
    rows = [kind for kind in keys if kind != "cached"]
    sees = {"context": ("cached", "context"), "query": ("cached", "context", "query")}
    return [
        square(x + column * SMALL, y + line * SMALL, SMALL, key if key in sees[row] else "unseen")
        for line, row in enumerate(rows)
        for column, key in enumerate(keys)
    ]


def note(x: float, y: float, lines: tuple[str, ...]) -> list[str]:
    """Lines beside something whose middle is at y, the first one in the colour of headings."""
    first = y + 4 - 8.5 * (len(lines) - 1)
    return [text(x, first + 17 * index, line, "note" if index else "") for index, line in enumerate(lines)]


def figure() -> str:
    sizes = cosine_group_sizes(SIDE * SIDE, STEPS)
    order = locality_order(sizes, (SIDE, SIDE), torch.tensor([SEED]))[0].tolist()
    ends = [0, *accumulate(sizes)]
    groups = [order[a:b] for a, b in pairwise(ends)]
    cached = {cell: "cached" for group in groups[: STEP - 1] for cell in group}
    context, query = dict.fromkeys(groups[STEP - 1], "context"), dict.fromkeys(groups[STEP], "query")
    counts = {"cached": 1 + len(cached), "context": len(context), "query": len(query)}
    top, left, middle, width = 66, 12, 330, 960
    height = top + max((counts["context"] + counts["query"]) * SMALL, SIDE * CELL)
    beside, column = middle + sum(counts.values()) * SMALL + 12, middle
    parts = [
        text(left, 24, f"Step {STEP + 1} of {STEPS} asks for {len(query)} cells at once", "title"),
        text(left, 44, "apart from each other, close to what is drawn", "note"),
        *grid(left, top, cached | context | query),
        f'<path class="arrow" d="M{left + SIDE * CELL + 25} {top + SIDE * CELL / 2:g} h60 m-7 -5 l7 5 l-7 5"/>',
        text(middle, 24, "One forward pass: who sees whom", "title"),
        *visibility(middle, top, counts),
        *note(beside, top + counts["context"] * SMALL / 2, CONTEXT),
        *note(beside, top + (counts["context"] + counts["query"] / 2) * SMALL, QUERY),
    ]
    for kind, name in (("cached", "cache"), ("context", "context"), ("query", "queries")):
        span = counts[kind] * SMALL
        parts.append(text(column + span / 2, top - 8, name, "note", "middle"))
        column += span
    legend = (("cached", "in the KV cache"), ("context", "drawn by the last step"), ("query", "asked for now"))
    for index, (kind, words) in enumerate((*legend, ("empty", "not drawn yet"))):
        x = left + index * 200
        parts += [square(x, height + 18, 14, kind), text(x + 20, height + 29, words, "note")]
    size = f'width="{width}" height="{height + 40}" viewBox="0 0 {width} {height + 40}"'
    lines = "\n  ".join(parts)
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>\n  <style>{STYLE}\n  </style>\n  {lines}\n</svg>\n'


if __name__ == "__main__":
    FILE.write_text(figure(), encoding="utf-8")
    print(FILE)
