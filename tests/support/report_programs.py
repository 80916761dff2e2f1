"""The steps of `make gpu-report` that run other programs: the build, the tests, and compute-sanitizer."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from report_identity import BUILT, ROOT, SITE, machine, mark_built, version

EMULATED = ROOT / "build" / "emulated"
# Of each kernel that a decode on a GPU runs; the stand-in has less time.
TESTED = {
    "cuda": ["tests/operators", "tests/library/test_cuda_device.py"],
    "emulated": ["tests/operators/test_fold_layer_norm.py"],
}
SANITIZED = {
    "cuda": [
        f"tests/operators/test_{stem}.py"
        for stem in ("residual_linear", "normed_linear", "fold_layer_norm", "group_attention", "sample_step")
    ],
    "emulated": ["tests/operators/test_fold_layer_norm.py"],
}
# Of tests/operators, what no GPU has a part in.
NOT_ON_A_GPU = ("cuda_static", "cuda_traffic", "cuda_kernels", "cuda_launch", "emulator", "fuzz_operators")
Add = Callable[..., None]


class Command:
    """A program in a process group of its own, which ends with it; or, within a step, in the step's.

    What it has started ends when it is ended, as the tests do that compute-sanitizer runs.
    """

    def __init__(
        self,
        command: Sequence[str | Path],
        log: Path,
        environment: Mapping[str, str] | None = None,
        own_group: bool = False,
    ) -> None:
        self._own_group = own_group
        self._log = log.open("ab")
        self._log.write(f"\n$ {' '.join(map(str, command))}\n".encode())
        self._log.flush()
        self._process = subprocess.Popen(
            list(map(str, command)),
            cwd=ROOT,
            env=os.environ | dict(environment or {}),
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=own_group,
        )

    def wait(self, seconds: float) -> int | None:
        """Returns the exit status; None if it took longer and was ended."""
        try:
            return self._process.wait(max(seconds, 0.1))
        except subprocess.TimeoutExpired:
            for process in _started_by(self._process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            return None
        finally:
            if self._own_group:  # all that is left of it, whether the program has ended or not
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._process.pid, signal.SIGKILL)
            self._process.kill()
            self._process.wait()
            self._log.close()


def _started_by(process: int) -> list[int]:
    """Returns the processes that one has started and that run, and those that they have started."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            parents[int(stat.parent.name)] = int(stat.read_text(errors="replace").rpartition(")")[2].split()[1])
    found = [process]
    for parent in found:
        found += [child for child, its in parents.items() if its == parent]
    return found[1:]


def build(emulated: bool, folder: Path, seconds: float, add: Add) -> None:
    """Builds the library for this card alone, with the torch that is there, and lpd_gpu_ceilings; RuntimeError if not.

    The stand-in's are those of `make emulated`.
    """
    log = folder / "build.log"
    begun = time.monotonic()
    cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if cmake is None:
        raise RuntimeError("cmake was not found")

    def run(*command: str | Path) -> None:
        status = Command(command, log).wait(seconds - (time.monotonic() - begun))
        if status != 0:
            raise RuntimeError(f"{'no time left for' if status is None else 'failed:'} {' '.join(map(str, command))}")

    if emulated:
        if not (EMULATED / "CMakeCache.txt").exists():
            raise RuntimeError(f"{EMULATED} is not there: run `make emulated`")
        run(cmake, "--build", EMULATED, "--target", "lpd_emulated", "lpd_gpu_ceilings")
    else:
        pybind11 = importlib.util.find_spec("pybind11")
        if pybind11 is None or pybind11.origin is None:
            raise RuntimeError(f"{sys.executable} has no pybind11: install it")
        of = machine(dry_run=False)
        mark_built(SITE, None)
        architecture = of["compute capability"].replace(".", "")
        options = {
            "LPD_PYTHON_MODULE": "ON",
            "LPD_CUDA": "ON",
            "LPD_CUDA_ARCHITECTURES": f"{architecture}-real",
            "SKBUILD_PROJECT_VERSION": version(),
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": f"{Path(pybind11.origin).parent}/share/cmake/pybind11",
        }
        run(cmake, "-S", ROOT, "-B", BUILT, *(f"-D{name}={value}" for name, value in options.items()))
        jobs = str(os.cpu_count() or 1)
        run(cmake, "--build", BUILT, "--parallel", jobs, "--target", "_C", "lpd_gpu_ceilings")
        install()
        mark_built(SITE, of)
        add("build", architecture=architecture)
    add("built", seconds=round(time.monotonic() - begun, 1))


def install() -> None:
    """Puts the packages of the tree and the module that was built into SITE, and leaves nothing else of them there."""
    for package in (ROOT / "lpd_ext", ROOT / "python" / "lpd_tools"):
        shutil.rmtree(SITE / package.name, ignore_errors=True)
        shutil.copytree(package, SITE / package.name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for module in BUILT.glob("_C*.so"):
        shutil.copy2(module, SITE / "lpd_ext")


def test(emulated: bool, folder: Path, seconds: float, add: Add) -> None:
    """Runs the tests that the card has a part in; each failing one is a record as soon as it fails."""
    kind = "emulated" if emulated else "cuda"
    skipped = [f"--ignore={ROOT}/tests/operators/test_{name}.py" for name in NOT_ON_A_GPU]
    command = [*pytest_of(kind, TESTED[kind]), *skipped]
    if importlib.util.find_spec("xdist") is not None and not emulated:
        command += ["--numprocesses", str(min(8, os.cpu_count() or 1))]
    require = {} if emulated else {"LPD_REQUIRE": "cuda"}
    status = Command(command, folder / "tests.log", _reporting(folder, "tests") | require).wait(seconds)
    if status not in (0, 1):  # 1: some fail
        raise RuntimeError("no time left for all tests" if status is None else f"pytest ended with {status}")


def sanitize(emulated: bool, folder: Path, seconds: float, add: Add) -> None:
    """Runs short tests of the kernels under each tool of compute-sanitizer; the emulator is a tool itself."""
    kind, begun, log = "emulated" if emulated else "cuda", time.monotonic(), folder / "sanitizers.log"
    tools = ("the emulator",) if emulated else ("memcheck", "racecheck", "synccheck")
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None and not emulated:
        add("sanitizer", tool="compute-sanitizer", found="not installed")
        return
    for i, tool in enumerate(tools):
        options = ["--tool", tool, "--target-processes", "all", "--error-exitcode", "9"]
        prefix = [] if emulated else [str(sanitizer), *options]
        size = log.stat().st_size if log.exists() else 0
        share = (seconds - (time.monotonic() - begun)) / (len(tools) - i)
        status = Command([*prefix, *pytest_of(kind, SANITIZED[kind]), "-x"], log, pytest_places()).wait(share)
        with log.open("rb") as file:
            file.seek(size)
            said = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*|\d+ passed.*", file.read().decode("utf-8", "replace"))
        add("sanitizer", tool=tool, status="no time left" if status is None else status, found="; ".join(said))


def pytest_of(kind: str, files: Sequence[str]) -> list[str]:
    """A command that runs tests by the kernels of a GPU, or the emulated ones."""
    # Not as `python -m pytest`, which would find the library's sources where it is started, and no kernels beside them.
    start = "import sys; sys.path.remove(''); import pytest; sys.exit(pytest.main())"
    options = ["-q", "-p", "no:cacheprovider", "-rf", "-c", f"{ROOT}/pyproject.toml", "-k", f"{kind} and not cpu-"]
    return [sys.executable, "-c", start, *options, *(f"{ROOT}/{file}" for file in files)]


def pytest_places() -> dict[str, str]:
    """Returns the paths where pytest finds the modules that tests share."""
    return {"PYTHONPATH": python_path(Path(__file__).parent)}


def python_path(*first: Path) -> str:
    """Returns PYTHONPATH with these places before those in it; an empty one would be where Python is started."""
    others = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return os.pathsep.join([*map(str, first), *filter(None, others)])


def _reporting(folder: Path, step: str) -> dict[str, str]:
    of_plugin = {"LPD_REPORT_FOLDER": str(folder), "LPD_REPORT_STEP": step, "PYTEST_ADDOPTS": "-p report_plugin"}
    return of_plugin | pytest_places()


PROGRAMS: dict[str, Callable[[bool, Path, float, Add], None]] = {"build": build, "tests": test, "sanitizers": sanitize}
