"""Runs a fuzzer in processes of its own, so that a crash, a hang or a flood of memory ends them and nothing else.

A fuzzer is a module fuzz_<name>.py beside this one with `case(seed, index) -> str`: it makes the case of that number
alone, judges it, and says what became of it in a word, or raises. Whatever goes wrong is printed with the command that
repeats that one case.

    python tests/support/fuzz.py operators --calls 1000000 --processes 2
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

HANGS = 120  # seconds without a new case
MEMORY = 8 << 30  # bytes of addresses of one process; a sanitizer needs far more
LOOK_EVERY = 0.2  # seconds
CLOCK_EVERY = 100  # cases
SAY_EVERY = 10  # seconds


def work(name: str, seed: int, first: int, calls: int, seconds: float) -> None:
    """In a process of its own: cases first, first + 1, …; each is announced before it begins."""
    faulthandler.enable()
    if "libasan" not in os.environ.get("LD_PRELOAD", ""):
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    case = importlib.import_module(f"fuzz_{name}").case
    outcomes: Counter[str] = Counter()
    end = time.monotonic() + seconds
    for index in range(first, first + calls):
        os.pwrite(1, b"%20d" % index, 0)
        if (index - first) % CLOCK_EVERY == 0 and time.monotonic() > end:
            break
        try:
            outcomes[case(seed, index)] += 1
        except Exception as error:
            raise SystemExit(f"case {index} of seed {seed}: {error}") from None
    print(f"{'done':>20}", *(f"{word}={count}" for word, count in outcomes.items()), flush=True)


def _unnamed_file() -> int:
    descriptor, path = tempfile.mkstemp()
    Path(path).unlink()
    return descriptor


class Worker:
    """A process that works on its share of the cases; its standard output is a file, which says where it is."""

    def __init__(self, name: str, seed: int, first: int, calls: int, seconds: float) -> None:
        self.name, self.seed, self.first, self.calls = name, seed, first, calls
        self.output, self.errors = _unnamed_file(), _unnamed_file()
        command = [sys.executable, __file__, name, "--work", str(first), "--seed", str(seed), "--calls", str(calls)]
        command += ["--seconds", str(seconds)]
        self.process = subprocess.Popen(command, stdout=self.output, stderr=self.errors)
        self.index, self.looks = first, 0

    def look(self) -> None:
        """The case it is at, and how often it has been seen there."""
        text = os.pread(self.output, 20, 0).strip()
        index = int(text) if text.isdigit() else self.first
        self.index, self.looks = index, self.looks + 1 if index == self.index else 0

    def outcomes(self) -> Counter[str]:
        words = os.pread(self.output, 1000, 20).decode().split()
        return Counter({word: int(count) for word, count in (pair.split("=") for pair in words)})

    def fault(self) -> str | None:
        """Returns what went wrong, once it ended or hangs."""
        status = self.process.poll()
        self.look()
        # Looks are counted, not seconds: both processes may have been stopped together.
        if status == 0 or (status is None and self.looks * LOOK_EVERY < HANGS):
            return None
        self.process.kill()
        self.process.wait()
        how = f"no end within {HANGS} s" if status is None else f"exit status {status}"
        errors = os.pread(self.errors, 1 << 20, 0).decode(errors="replace")[-6000:]
        repeat = f"python tests/support/fuzz.py {self.name} --seed {self.seed} --first {self.index} --calls 1"
        return f"{how} at case {self.index}\n{errors}\nto repeat it: {repeat}"


def fuzz(
    name: str, calls: int, seconds: float = 1e9, seed: int = 0, first: int = 0, processes: int = 1, quiet: bool = True
) -> Counter[str]:
    """Run cases until `calls` are done or the time is over; what became of them. RuntimeError at the first fault."""
    share = -(-calls // processes)
    starts = range(first, first + calls, share)
    workers = [Worker(name, seed, start, min(share, first + calls - start), seconds) for start in starts]
    began = said = time.monotonic()
    try:
        while True:
            running = [worker for worker in workers if worker.process.poll() is None]
            for worker in workers:
                fault = worker.fault()
                if fault is not None:
                    raise RuntimeError(fault)
            done = sum(worker.index - worker.first for worker in running)
            done += sum(sum(worker.outcomes().values()) for worker in workers if worker not in running)
            if not quiet and (not running or time.monotonic() - said > SAY_EVERY):
                said = time.monotonic()
                print(f"{name}, seed {seed}: {done:,} of {calls:,} cases in {said - began:.0f} s", flush=True)
            if not running:
                return sum((worker.outcomes() for worker in workers), Counter())
            time.sleep(LOOK_EVERY)
    finally:
        for worker in workers:
            worker.process.kill()
            worker.process.wait()
            os.close(worker.output)
            os.close(worker.errors)


def main() -> None:
    parser = argparse.ArgumentParser(description="Fuzz a part of the library.")
    parser.add_argument("name", help="operators, files, …: of fuzz_<name>.py")
    parser.add_argument("--calls", type=int, default=1_000_000, help="cases, of all processes")
    parser.add_argument("--seconds", type=float, default=1e9, help="end earlier after these")
    parser.add_argument("--seed", type=int, default=None, help="by default another one each time")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--work", type=int, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work is not None:
        work(arguments.name, arguments.seed, arguments.work, arguments.calls, arguments.seconds)
        return
    seed = int.from_bytes(os.urandom(4), "little") if arguments.seed is None else arguments.seed
    processes = min(arguments.processes, arguments.calls)
    try:
        outcomes = fuzz(
            arguments.name, arguments.calls, arguments.seconds, seed, arguments.first, processes, quiet=False
        )
    except RuntimeError as error:
        raise SystemExit(f"{arguments.name}, seed {seed}: {error}") from None
    print(", ".join(f"{count:,} {word}" for word, count in sorted(outcomes.items())))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
