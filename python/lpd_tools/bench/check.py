"""Guards against lost speed: compares the ratios of a short benchmark run with the committed ones.

A ratio is plain torch's time over ours, of medians of interleaved repeats. One that lies a quarter below the committed
one is measured again; the check fails if it does so twice in a row. Ratios differ between processors, so each has an
entry of its own in the file.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import astuple, dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.box import SIMPLE_HEAD
from rich.table import Table

from lpd_ext.content import content_of, read_json
from lpd_ext.linear import pack
from lpd_ext.model import LPDConfig
from lpd_ext.pixel_decoder import PixelDecoder
from lpd_ext.quantize import quantize
from lpd_ext.sampler import generate
from lpd_ext.state_files import write_text
from lpd_ext.tokenizer import TokenizerConfig, VQTokenizer
from lpd_tools.bench.cases import SHAPES, Shape, cases
from lpd_tools.bench.decode import Decode
from lpd_tools.bench.settings import BenchCheck
from lpd_tools.bench.timing import Function, interleaved
from lpd_tools.console import new_console, say
from lpd_tools.machine import machine
from lpd_tools.progress import track

ALLOWED = 0.75  # of the committed ratio
_CPU = torch.device("cpu")
_SHAPE = "L-256-20"
_REPEAT_SECONDS = 0.03  # a repeat calls a short operator until it has taken about this long


@dataclass(frozen=True)
class Ratio:
    """A ratio to measure: `prepare` returns our function and the plain one, on the same data."""

    name: str
    prepare: Callable[[], tuple[Function, Function]]
    repeats: int = 5


@dataclass(frozen=True)
class Verdict:
    """The measurements of one ratio, the second only if the first was too low."""

    name: str
    committed: float | None
    measured: tuple[float, ...]

    @property
    def failed(self) -> bool:
        return len(self.measured) > 1 and is_low(self.measured[-1], self.committed)


def is_low(measured: float, committed: float | None) -> bool:
    """Whether a ratio is more than a quarter below the committed one, if there is one."""
    return committed is not None and not measured >= ALLOWED * committed


def all_ratios() -> list[Ratio]:
    """Returns the ratios: operators at the shape's step, decodes of two blocks of lpd_l, and tokens to pixels."""
    ratios = []
    for batch in (1, 4):
        names = [case.name for case in cases(SHAPES[_SHAPE], SHAPES[_SHAPE].step, 1, _CPU, torch.float32)]
        ratios += [
            Ratio(f"{_operator(name)}, B = {batch}", partial(_operator_pair, i, batch)) for i, name in enumerate(names)
        ]
    ratios += [
        Ratio("decode of 2 blocks, float32", lambda: _decode_pair(pack)),
        Ratio("decode of 2 blocks, int8", lambda: _decode_pair(quantize)),
        Ratio("tokens to pixels, float32", _tokenizer_pair, repeats=3),
    ]
    return ratios


def _operator(name: str) -> str:
    return f"sample_tokens, {name.strip()}" if name.startswith(" ") else name


def _operator_pair(index: int, batch: int) -> tuple[Function, Function]:
    case = cases(SHAPES[_SHAPE], SHAPES[_SHAPE].step, batch, _CPU, torch.float32)[index]
    return case.ours, case.plain


@dataclass(frozen=True)
class _TwoBlocks(Shape):
    """The shape with the first two blocks of lpd_l."""

    @property
    def config(self) -> LPDConfig:
        return replace(super().config, depth=2)


def _decode_pair(prepare: Callable[[torch.nn.Module], torch.nn.Module]) -> tuple[Function, Function]:
    decode = Decode.at_random(_TwoBlocks(*astuple(SHAPES[_SHAPE])), 1, _CPU, torch.float32)
    model = copy.deepcopy(decode.model)
    prepare(model)
    request = decode.request()
    return lambda: generate(model, request), decode.plain


def _tokenizer_pair() -> tuple[Function, Function]:
    torch.manual_seed(0)
    plain = VQTokenizer(TokenizerConfig()).eval().requires_grad_(False)
    ours = copy.deepcopy(plain)  # the fast decoder lays its weights out anew
    tokens = torch.randint(plain.config.codebook_size, (1, 16, 16))
    features = F.embedding(tokens, plain.codes()).permute(0, 3, 1, 2).contiguous()
    return lambda: PixelDecoder(ours).decode_features(features), lambda: plain.decode_features(features)


def measure(ratio: Ratio) -> float:
    """Returns plain torch's time over ours: medians of interleaved repeats, each of enough calls for the clock."""
    with torch.inference_mode(False), torch.no_grad():
        pair = ratio.prepare()
        calls = [_calls_per_repeat(function) for function in pair]
        ours, plain = interleaved(
            [_repeated(function, times) for function, times in zip(pair, calls, strict=True)], ratio.repeats, _CPU
        )
    return (plain.median / calls[1]) / (ours.median / calls[0])


def _calls_per_repeat(function: Function) -> int:
    function()
    start = time.perf_counter()
    function()
    return max(1, math.ceil(_REPEAT_SECONDS / (time.perf_counter() - start)))


def _repeated(function: Function, times: int) -> Function:
    def run() -> None:
        for _ in range(times):
            function()

    return run


def judge(ratios: Iterable[Ratio], committed: Mapping[str, float], measure: Callable[[Ratio], float]) -> list[Verdict]:
    """Measures every ratio, then those that are too low once more."""
    ratios = list(ratios)
    first = {ratio.name: measure(ratio) for ratio in track(ratios, "Measuring ratios")}
    low = [ratio for ratio in ratios if is_low(first[ratio.name], committed.get(ratio.name))]
    second = {ratio.name: measure(ratio) for ratio in track(low, "Measuring low ones again")}
    return [
        Verdict(name, committed.get(name), (value, second[name]) if name in second else (value,))
        for name, value in first.items()
    ]


def read_ratios(path: Path) -> dict[str, dict[str, float]]:
    """Reads the committed ratios: processor -> name -> ratio; ValueError if the file holds anything else."""
    if not path.exists():
        return {}
    with content_of(path, "must hold ratios by name for each processor"):
        read = {
            str(processor): {str(name): float(ratio) for name, ratio in ratios.items()}
            for processor, ratios in read_json(path, "must hold ratios by name for each processor").items()
        }
    for processor, ratios in read.items():
        for name, ratio in ratios.items():
            if not (math.isfinite(ratio) and ratio > 0):
                raise ValueError(f"{path}: ratio {name!r} of {processor!r} must be above 0, got {ratio}")
    return read


def write_ratios(path: Path, processor: str, verdicts: Iterable[Verdict]) -> None:
    """Writes a processor's entry and keeps the others."""
    entries = read_ratios(path) | {processor: {v.name: float(f"{v.measured[-1]:.3g}") for v in verdicts}}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(dict(sorted(entries.items())), indent=1) + "\n")


def processor_name() -> str:
    """Returns the processor and the number of threads, the key of an entry."""
    described = machine(_CPU)
    return f"{described['processor']}, {described['threads']} threads, {described['isa']}"


def check(config: BenchCheck) -> None:
    """Compares this processor's ratios with the committed ones, or writes them.

    Raises RuntimeError with those that are too low twice in a row, and ValueError if nothing is committed for this
    processor.
    """
    path, processor = Path(config.ratios), processor_name()
    committed = read_ratios(path).get(processor)
    if committed is None and not config.write:
        raise ValueError(
            f"{path} has no ratios for this processor ({processor}): "
            "`make bench-check ARGS=--write` measures them and adds an entry, for you to commit"
        )
    verdicts = judge(all_ratios(), {} if config.write or committed is None else committed, measure)
    new_console().print(_table(processor, verdicts))
    if config.write:
        write_ratios(path, processor, verdicts)
        say(f"wrote {path}")
    failed = [verdict for verdict in verdicts if verdict.failed]
    if failed:
        named = "; ".join(
            f"{v.name}: {' and '.join(f'{m:.2f}' for m in v.measured)}, not {v.committed}" for v in failed
        )
        raise RuntimeError(f"more than {1 - ALLOWED:.0%} below the committed ratio twice in a row: {named}")


def _table(processor: str, verdicts: Iterable[Verdict]) -> Table:
    table = Table("", "committed", "measured", "again", "", title=processor, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for verdict in verdicts:
        first, again = [*(f"{value:.2f}x" for value in verdict.measured), ""][:2]
        committed = "none" if verdict.committed is None else f"{verdict.committed:.2f}x"
        table.add_row(verdict.name, committed, first, again, "too low" if verdict.failed else "")
    return table
