"""`make gpu-report` on the emulated stand-in: every step runs to its end, and what goes wrong is on record."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gpu_report
import pytest
import report_identity
import report_measures
import torch
from gpu_report import STEPS, Step, main, parsed, run_steps, to_do
from report_identity import mark_built
from report_machine import StandIn
from report_measures import check_products, summary_of, time_decode
from report_records import Records, attempts, done
from report_tables import BEGIN, END, page_with, tables_of
from torch import Tensor

from lpd_ext import ops
from lpd_ext.cuda_graphs import DecodeGraphs

NVCC = shutil.which("nvcc")
OF = {"card": "NVIDIA H200", "compute capability": "9.0", "driver": "570", "torch": "2.11", "lpd_ext": "0.1.0 (abc)"}


@pytest.fixture(scope="module", autouse=True)
def nobody_edits() -> Iterator[None]:
    """Gives the sources one name, though they may be edited while tests run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report_identity, "commit", lambda root: "abc")
        yield


@pytest.fixture
def records(tmp_path: Path) -> Records:
    return Records(tmp_path)


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    before = gpu_report.PAGE.read_bytes()
    with pytest.MonkeyPatch.context() as patch:  # a test may wait for others
        patch.setattr(gpu_report, "STEPS", tuple(Step(step.name, 60) for step in STEPS))
        assert main(["--dry-run", "--folder", str(folder), "--minutes", "500"]) == 0
    assert gpu_report.PAGE.read_bytes() == before
    return folder


@pytest.mark.emulated
def test_every_step_runs_to_its_end(dry_run: Path) -> None:
    found = Records(dry_run).read()
    assert done(found) == {step.name for step in STEPS}
    by_step = attempts(found)
    assert list(by_step) == [step.name for step in STEPS]
    whats = {step: {record["what"] for record in records} - {"begin", "end"} for step, records in by_step.items()}
    assert whats == {
        "build": {"built"},
        "tests": {"tests"},
        "ceilings": {"ceiling"},
        "checks": {"check"},
        "decodes": {"model", "decode", "tokens"},
        "products": {"product"},
        "profile": {"profile"},
        "sanitizers": {"sanitizer"},
    }
    names = {record["name"] for record in by_step["ceilings"] if record["what"] == "ceiling"}
    assert {"read from memory", "read from L2", "barrier of a cluster of 8", "block of 6 rows"} <= names
    assert all(record["within_twice"] for record in by_step["checks"] if record["what"] == "check")
    assert all(record.get("graph_equals_eager", True) for record in by_step["decodes"])
    kernels = [record["kernels"] for record in by_step["profile"] if record["what"] == "profile"]
    assert ["normed_linear" in str(names) for names in kernels] == [False, True]


@pytest.mark.emulated
def test_tables_of_a_dry_run_are_marked(dry_run: Path) -> None:
    text = (dry_run / "tables.md").read_text(encoding="utf-8")
    assert "**Emulated: no GPU took part. That the steps work is all that these figures say.**" in text
    for heading in (
        "Tests: 0 failed",
        "At best",
        "Own products",
        "Decodes of a small",
        "Products",
        "A replay with own",
    ):
        assert f"\n### {heading}" in text
    assert "| 2 | own |" in text
    assert "**no**" not in text


@pytest.mark.emulated
def test_what_is_done_is_not_done_again(dry_run: Path) -> None:
    size = Records(dry_run).path.stat().st_size
    assert main(["--dry-run", "--folder", str(dry_run)]) == 0
    assert Records(dry_run).path.stat().st_size == size
    assert main(["--dry-run", "--folder", str(dry_run), "--only", "build", "--force"]) == 0
    steps = [record["step"] for record in Records(dry_run).read() if record["what"] == "begin"]
    assert steps == [*(step.name for step in STEPS), "build"]


def test_the_library_is_built_first_unless_it_is_there_as_it_would_be_built_now(
    records: Records, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in STEPS:
        if step.name != "profile":
            records.add(step.name, "begin")
            records.add(step.name, "end", status="done", seconds=1.0)
    site = tmp_path / "site"
    monkeypatch.setattr(gpu_report, "SITE", site)

    def steps(*arguments: str, of: dict[str, Any] = OF) -> list[str]:
        return [step.name for step in to_do(records, parsed(arguments), of)]

    assert steps() == ["build", "profile"]
    site.mkdir()
    mark_built(site, OF)
    assert steps() == ["profile"]
    assert steps("--only", "checks") == []
    assert steps("--only", "checks", "--force") == ["checks"]
    for name in ("card", "torch", "lpd_ext"):
        assert steps("--only", "checks", "--force", of=OF | {name: "another"}) == ["build", "checks"]
    mark_built(site, None)  # as while it is being built
    assert steps("--only", "checks", "--force") == ["build", "checks"]
    assert steps("--only", "checks") == []
    assert steps("--only", "checks", "--force", "--dry-run") == ["checks"]


def test_another_cards_results_are_left_alone(records: Records) -> None:
    records.add("", "report", of=OF | {"emulated": False}, command="gpu_report.py")
    before = records.path.read_bytes()
    with pytest.raises(SystemExit, match=r"has results of .*NVIDIA H200.*: --force begins anew"):
        main(["--dry-run", "--folder", str(records.path.parent)])
    assert records.path.read_bytes() == before


def test_without_a_gpu_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # where there is no nvidia-smi
    with pytest.raises(SystemExit, match="no NVIDIA GPU was found; --dry-run takes the emulator in its place"):
        main(["--folder", str(tmp_path)])


def test_a_step_that_fails_or_takes_too_long_is_on_record_and_the_next_goes_on(records: Records) -> None:
    steps = [Step("unknown", 60), Step("decodes", 0.1), Step("ceilings", 0.01), Step("strange", 60)]
    assert run_steps(steps, True, records, 500) == ["unknown", "decodes", "ceilings", "strange"]
    ends = {r["step"]: (r["status"], r["said"]) for r in records.read() if r["what"] == "end"}
    assert {step: status for step, (status, _) in ends.items()} == {
        "unknown": "failed",
        "decodes": "timed out",  # 6 seconds, of which the imports take most
        "strange": "failed",
    }
    assert "KeyError: 'unknown'" in ends["unknown"][1][-1]
    assert done(records.read()) == set()
    assert "| unknown | failed |" in tables_of([{"step": "", "what": "report", "of": OF | {"emulated": True},
                                                 "command": ""}, *records.read()])  # fmt: skip


def test_without_the_build_nothing_else_is_tried(records: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []

    def run_step(name: str, dry_run: bool, records: Records, seconds: float) -> None:
        tried.append(name)
        records.add(name, "begin")
        records.add(name, "end", status="failed", seconds=1.0)

    monkeypatch.setattr(gpu_report, "run_step", run_step)
    run_steps(STEPS, True, records, 10)
    assert tried == ["build"]


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "tests": ({"what": "failed test", "name": "test_it", "said": "E"}, "failed tests: 1"),
    "checks": ({"what": "check", "within_twice": False, "bits_equal": False, "pair": "proj, fc1", "rows": 4,
                "error": 1.0, "torchs_error": 0.1}, "failed comparisons: 2"),
    "decodes": ({"what": "tokens", "batch": 1, "products": "own", "graph_equals_eager": False},
                "failed comparisons: 1"),
    "sanitizers": ({"what": "sanitizer", "tool": "racecheck", "status": 0,
                    "found": "RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)"},
                   "failed sanitizer runs: 1"),
}  # fmt: skip


@pytest.mark.parametrize("step", list(WRONG))
def test_a_step_that_finds_something_wrong_is_counted_and_done_again(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    record, counted = WRONG[step]
    finds_it, ran = [True], []

    def run_step(name: str, dry_run: bool, records: Records, seconds: float) -> None:
        ran.append(name)
        records.add(name, "begin")
        if finds_it[0]:
            records.add(name, **record)
        records.add(name, "end", status="done", seconds=1.0)

    monkeypatch.setattr(gpu_report, "run_step", run_step)
    arguments = ["--dry-run", "--folder", str(tmp_path), "--only", step]
    assert main(arguments) == 1
    assert f"{step} ... done in 1.0 s, {counted}\n{tmp_path}: {step} did not end well\n" in capsys.readouterr().out
    assert f"| {step} | done | 1 | **{counted}** |" in (tmp_path / "tables.md").read_text()
    finds_it[0] = False
    assert main(arguments) == 0
    assert "wrong" not in capsys.readouterr().out
    assert main(arguments) == 0
    assert ran == [step, step]


@pytest.mark.parametrize("forced", [False, True])
def test_times_of_products_are_kept_unless_forced(
    forced: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_report, "run_steps", lambda *_: [])
    times = tmp_path / "product_times.json"
    times.touch()
    assert main(["--dry-run", "--folder", str(tmp_path), *(["--force"] if forced else [])]) == 0
    assert times.exists() != forced


def test_the_page_gets_the_tables_between_its_marks(records: Records, tmp_path: Path,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    page = tmp_path / "gpu.md"
    page.write_text("# On a GPU\n\nText.\n")
    monkeypatch.setattr(gpu_report, "PAGE", page)
    records.add("", "report", of=OF | {"emulated": False}, command="gpu_report.py")
    records.add("ceilings", "begin")
    records.add("ceilings", "ceiling", name="read from memory", value=4321.0, unit="GB/s")
    assert main(["--tables", "--folder", str(tmp_path)]) == 0
    first = page.read_text()
    assert first.startswith(f"# On a GPU\n\nText.\n\n{BEGIN}\n\n## What make gpu-report found\n\ncard NVIDIA H200, ")
    assert "| read from memory | 4321 GB/s |" in first
    assert "| ceilings | cut off |  |" in first
    assert "mulated" not in first
    page.write_text(first + "\nMore text.\n")
    records.add("ceilings", "begin")
    records.add("ceilings", "ceiling", name="read from memory", value=4200.0, unit="GB/s")
    assert main(["--tables", "--folder", str(tmp_path)]) == 0
    assert page.read_text() == first.replace("4321", "4200") + "\nMore text.\n"
    with pytest.raises(ValueError, match="has no"):
        page_with(f"{BEGIN}\n", "tables")
    assert END in first


def test_a_dry_run_changes_no_page(records: Records, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_report, "PAGE", tmp_path / "gpu.md")
    records.add("", "report", of=OF | {"emulated": True}, command="gpu_report.py")
    assert main(["--tables", "--folder", str(tmp_path)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.jsonl", "tables.md"]


def test_what_a_profile_says() -> None:
    spans = [("b", 10.0, 14.0), ("a", 0.0, 4.0), ("a", 5.0, 9.0), ("c", 11.0, 12.0), ("a", 20.0, 21.5)]
    assert summary_of(spans, most=2) == {
        "span": 21.5,
        "idle": 1.0 + 1.0 + 6.0,  # c runs while b does
        "launches": 5,
        "kernels": [["a", 3, 9.5], ["b", 1, 4.0]],
    }
    with pytest.raises(RuntimeError, match="saw no kernel"):
        summary_of([])


@pytest.mark.emulated
def test_cards_without_clusters_have_ceilings_too(dry_run: Path) -> None:
    program = subprocess.run([StandIn.program, "80"], check=True, capture_output=True, text=True)
    names = [json.loads(line)["name"] for line in program.stdout.splitlines()]
    assert "read from memory" in names
    assert not [name for name in names if "cluster" in name or "block of" in name]


@pytest.mark.skipif(NVCC is None, reason="PROGRAM OF THE GPU REPORT NOT COMPILED: no nvcc")
@pytest.mark.parametrize("source", ["ceilings", "block_chain"])
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_its_program_compiles(source: str, architecture: str, tmp_path: Path) -> None:
    folder = gpu_report.ROOT / "csrc"
    options = ["-std=c++17", f"-arch={architecture}", "-O1", "-Werror=all-warnings", f"-I{folder / 'kernels'}"]
    command = [str(NVCC), *options, "-c", str(folder / "bench/gpu" / f"{source}.cu"), "-o", str(tmp_path / "object")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def found_by(measure: Callable[[Callable[..., None]], None]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    measure(lambda what, **values: found.append({"what": what} | values))
    return json.loads(json.dumps(found))


def _without_means(scaled: Tensor, statistics: Tensor, *rest: Any) -> Tensor:
    return torch.ops.lpd_ext.normed_linear(scaled, statistics * torch.tensor([0.0, 1.0]), *rest)


def _by_number_of_rows(scaled: Tensor, statistics: Tensor, *rest: Any) -> Tensor:
    result = torch.ops.lpd_ext.normed_linear(scaled, statistics, *rest)
    return result * (1 + 2**-7 * (len(scaled) > 10))


@pytest.mark.parametrize(("mistake", "which"), [(_without_means, "within_twice"), (_by_number_of_rows, "bits_equal")])
def test_wrong_products_are_told(mistake: Callable[..., Tensor], which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = found_by(lambda add: check_products(StandIn(), add))
    assert all(check["within_twice"] and check["bits_equal"] for check in right)
    monkeypatch.setattr(ops, "normed_linear", mistake)
    wrong = found_by(lambda add: check_products(StandIn(), add))
    assert not all(check[which] for check in wrong)
    assert "| **no** |" in "".join(gpu_report.tables_of(
        [{"step": "", "what": "report", "of": OF | {"emulated": True}, "command": ""},
         *({"step": "checks"} | record for record in [{"what": "begin"}, *wrong])]))  # fmt: skip


def test_each_decode_is_by_the_products_of_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the environment says, and whatever a decode uses that is not told."""
    monkeypatch.setenv("LPD_PRODUCTS", "cublaslt")
    card = StandIn()
    monkeypatch.setattr(card, "batches", (1,))
    used: list[str] = []

    def generate(*arguments: Any) -> Tensor:
        used.append(os.environ["LPD_PRODUCTS"])
        return decode(*arguments)

    decode = report_measures.generate
    monkeypatch.setattr(report_measures, "generate", generate)
    with torch.no_grad():
        found = found_by(lambda add: report_measures.decodes(card, add))
    assert list(dict.fromkeys(used)) == ["own", "cublaslt", "auto"]
    assert {record["products"] for record in found if record["what"] == "decode"} == {"own", "cublaslt", "auto"}
    assert os.environ["LPD_PRODUCTS"] == "cublaslt"


def test_a_graph_that_draws_other_tokens_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    card = StandIn()
    decode = report_measures.Decode.at_random(card.shape, 1, card.device, torch.bfloat16)
    with torch.no_grad():
        right = found_by(lambda add: time_decode(card, decode, "cublaslt", add))
    assert [record["graph_equals_eager"] for record in right if record["what"] == "tokens"] == [True]

    def forgets_the_last(runs: Any) -> Any:
        return [lambda: None for _ in runs]

    graphs = DecodeGraphs(capture=forgets_the_last, device_type="cpu")
    monkeypatch.setattr(card, "graphs", lambda: graphs)
    monkeypatch.setattr("lpd_ext.decode_state.DecodeState.check_drawn", lambda self: None)
    with torch.no_grad():
        wrong = found_by(lambda add: time_decode(card, decode, "cublaslt", add))
    assert [record["graph_equals_eager"] for record in wrong if record["what"] == "tokens"] == [False]
