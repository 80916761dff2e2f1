"""The tables of `make gpu-report`, in Markdown, from its records."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from report_records import Record, attempts, ended, identity, said_of, wrong

BEGIN, END = "<!-- make gpu-report writes from here -->", "<!-- to here -->"


def page_with(page: str, tables: str) -> str:
    """Returns the page with these tables between its marks, or after its last line if it has none yet."""
    marked = f"{BEGIN}\n\n{tables}\n{END}\n"
    if BEGIN not in page:
        return f"{page.rstrip()}\n\n{marked}"
    before, _, rest = page.partition(BEGIN)
    _, end, after = rest.partition(f"{END}\n")
    if not end:
        raise ValueError(f"the page has no {END!r} after {BEGIN!r}")
    return before + marked + after


def tables_of(records: Sequence[Record]) -> str:
    """Returns all tables under a heading, with the card, the versions and the command; marked if emulated."""
    of = identity(records)
    assert of is not None
    command = next(record["command"] for record in records if record["what"] == "report")
    described = ", ".join(f"{name} {value}" for name, value in of.items() if name != "emulated")
    lines = ["## What make gpu-report found", "", f"{described}: `{command}`", ""]
    if of["emulated"]:
        lines += ["**Emulated: no GPU took part. That the steps work is all that these figures say.**", ""]
    by_step = attempts(records)
    lines += _table(["step", "ended", "seconds", "wrong"], [_ending(step, found) for step, found in by_step.items()])
    for step, found in by_step.items():
        lines += _SECTIONS[step](found) if step in _SECTIONS else []
    return "\n".join(lines).rstrip() + "\n"


def _ending(step: str, found: Sequence[Record]) -> list[str]:
    end = ended(found)
    ending = [end["status"], f"{end['seconds']:.0f}"] if end else ["cut off", ""]
    counts = said_of(wrong(found))
    return [step, *ending, f"**{counts}**" if counts else ""]


def _tests(found: Sequence[Record]) -> list[str]:
    failed = [record for record in found if record["what"] == "failed test"]
    passed = max((record["passed"] for record in found if record["what"] == "tests"), default=0)
    lines = [f"### Tests: {len(failed)} failed, {passed} passed", ""]
    rows = [[f"`{record['name']}`", record["said"].replace("|", "\\|")] for record in failed]
    return lines + (_table(["failed", "said"], rows) if rows else [])


def _ceilings(found: Sequence[Record]) -> list[str]:
    rows = [[r["name"], f"{r['value']:.4g} {r['unit']}"] for r in found if r["what"] == "ceiling"]
    return [
        "### At best",
        "",
        "Blocks are those of lpd_l one after the other, with own products.",
        "",
        *_table(["", ""], rows),
    ]


def _decodes(found: Sequence[Record]) -> list[str]:
    times = [record for record in found if record["what"] == "decode"]
    kinds = list(dict.fromkeys(record["by"] for record in times))
    rows = []
    for batch, products in dict.fromkeys((record["batch"], record["products"]) for record in times):
        of_these = {r["by"]: r for r in times if (r["batch"], r["products"]) == (batch, products)}
        cells = [_milliseconds(of_these[kind]) if kind in of_these else "" for kind in kinds]
        same = [r for r in found if r["what"] == "tokens" and (r["batch"], r["products"]) == (batch, products)]
        rows.append([str(batch), products, *cells, *(_yes(r["graph_equals_eager"]) for r in same)])
    shares = [
        f"B = {r['batch']}: {r['same']:.2%} of the tokens are the same with either products."
        for r in found
        if r["what"] == "tokens" and "same" in r
    ]
    table = _table(["B", "products", *kinds, "tokens of graph and eager equal"], rows)
    model = next((record["name"] for record in found if record["what"] == "model"), "nothing")
    return [f"### Decodes of {model}", "", *table, " ".join(shares), ""]


def _products(found: Sequence[Record]) -> list[str]:
    rows = [
        [
            record["product"],
            str(record["rows"]),
            f"{record['own']['microseconds']:.2f} ± {record['own']['spread']:.0%}",
            f"{record['cublaslt']['microseconds']:.2f} ± {record['cublaslt']['spread']:.0%}",
            f"{record['cublaslt']['microseconds'] / record['own']['microseconds']:.2f}",
            f"{record['gigabytes_per_second']:.0f}",
        ]
        for record in found
        if record["what"] == "product"
    ]
    weights = [record["weights"] for record in found if record["what"] == "product"]
    over = f"Over {min(weights)} weights or more in turn." if weights else ""
    head = ["product", "rows", "own, µs", "cuBLASLt and LayerNorm or GELU, µs", "ratio", "own, GB/s"]
    return ["### Products", "", over, "", *_table(head, rows)]


def _checks(found: Sequence[Record]) -> list[str]:
    rows = [
        [
            record["pair"],
            str(record["rows"]),
            f"{record['error']:.2e}",
            f"{record['torchs_error']:.2e}",
            _yes(record["within_twice"]),
            _yes(record["bits_equal"]),
        ]
        for record in found
        if record["what"] == "check"
    ]
    head = ["pair", "rows", "error against float64", "torch's", "at most twice that", "bits as among most rows"]
    return ["### Own products against float64", "", *_table(head, rows)]


def _profile(found: Sequence[Record]) -> list[str]:
    lines = []
    for record in found:
        if record["what"] != "profile":
            continue
        lines += [
            f"### A replay with {record['products']} products, B = 1",
            "",
            f"{record['launches']} launches in {record['span']:.0f} µs, of which {record['idle']:.0f} µs idle.",
            "",
            *_table(
                ["kernel", "launches", "µs"],
                [[f"`{name}`".replace("|", "\\|"), str(n), f"{total:.0f}"] for name, n, total in record["kernels"]],
            ),
        ]
    return lines


def _sanitizers(found: Sequence[Record]) -> list[str]:
    rows = [[r["tool"], str(r.get("status", "")), r["found"]] for r in found if r["what"] == "sanitizer"]
    return ["### compute-sanitizer", "", *_table(["tool", "exit status", "said"], rows)]


def _milliseconds(record: Record) -> str:
    return f"{1e-3 * record['microseconds']:.2f} ms ± {record['spread']:.0%}"


def _yes(holds: bool) -> str:
    return "yes" if holds else "**no**"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [*(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *rows]), ""]


_SECTIONS: dict[str, Callable[[Sequence[Record]], list[str]]] = {
    "tests": _tests,
    "ceilings": _ceilings,
    "checks": _checks,
    "decodes": _decodes,
    "products": _products,
    "profile": _profile,
    "sanitizers": _sanitizers,
}
