"""Tiny trainings for the tests: their data, their settings, and `lpd` in processes of its own or torchrun's."""

from __future__ import annotations

import csv
import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from lpd_tools.data.token_caching import TokenCaching, cache_tokens
from lpd_tools.training.checkpoints import read_checkpoint
from lpd_tools.training.tokenizer import TokenizerTraining
from lpd_tools.training.transformer import LPDTraining

from lpd_ext.tokenizer import TokenizerConfig, VQTokenizer

DATA = Path(__file__).parents[1] / "data" / "fashion_mnist"
# The command as it is installed. `python -m` and `-c` look for lpd_ext in the current folder first, which in a checkout
# has the sources, but not what was built of them.
LPD = str(Path(sys.executable).with_name("lpd"))


def make_cache(folder: Path, codes: int = 16, levels: int = 4) -> Path:
    """A token cache of the committed images (200 to train on, 300 to test) by a random tokenizer, beside that one."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = VQTokenizer(TokenizerConfig(32, (1,) * levels, 8, codes, 8, 1, 1))
    torch.nn.init.normal_(model.quantize.embedding.weight)
    model.save(folder / "tokenizer.safetensors")
    data = f"fashion-mnist:{DATA}"
    return cache_tokens(TokenCaching(str(folder / "tokenizer.safetensors"), str(folder / "tokens"), data, workers=0))


def lpd_config(tokens: Path, out_dir: Path, **changes: Any) -> LPDTraining:
    """Eight steps of a transformer of 2 blocks on 4x4 tokens, every one of them logged."""
    config = LPDTraining(tokens=str(tokens), out_dir=str(out_dir), dim=32, depth=2, heads=2, precision="fp32")
    config = dataclasses.replace(config, batch_size=4, steps=8, warmup_steps=2, decay_steps=3, decoding_steps=(4, 16))
    config = dataclasses.replace(config, log_every=1, evaluate_every=4, evaluate_images=5, sample_every=0)
    return dataclasses.replace(config, **{"tensorboard": False, "device": "cpu", **changes})


def tokenizer_config(out_dir: Path, **changes: Any) -> TokenizerTraining:
    """Six steps of a narrow tokenizer with 8x8 tokens."""
    config = TokenizerTraining(out_dir=str(out_dir), data=f"fashion-mnist:{DATA}", precision="fp32", z_channels=8)
    config = dataclasses.replace(config, ch_mult=(1, 1, 1), codebook_size=16, batch_size=4, steps=6, warmup_steps=2)
    config = dataclasses.replace(config, decay_steps=3, revive_every=2, evaluate_every=3, evaluate_images=8)
    config = dataclasses.replace(config, log_every=1, sample_every=0, tensorboard=False)
    return dataclasses.replace(config, **{"device": "cpu", **changes})


def as_options(config: Any) -> list[str]:
    """A config as the options of its command."""
    options = []
    for item in dataclasses.fields(config):
        name, value = f"--{item.name.replace('_', '-')}", getattr(config, item.name)
        if isinstance(value, bool):
            options.append(name if value else f"--no-{name[2:]}")
        else:
            for entry in value if isinstance(value, tuple) else (value,):
                options += [name, str(entry)]
    return options


def start(arguments: list[str], processes: int = 1, threads: int = 2) -> subprocess.Popen[str]:
    """`lpd` with these arguments, in a process of its own or in several that torchrun starts."""
    return start_python([LPD, *arguments], processes, threads)


def start_python(arguments: list[str], processes: int = 1, threads: int = 2) -> subprocess.Popen[str]:
    """Python with these arguments; see `start`."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "GOMP_SPINCOUNT": "0", "CUDA_VISIBLE_DEVICES": ""}
    # What torchrun says of its workers goes where the test looks for errors.
    return subprocess.Popen(
        [*launcher, *arguments],
        env=environment,
        cwd=sys.prefix,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str], code: int = 0, timeout: float = 300) -> str:
    """Returns what it printed; AssertionError unless it ended with that exit status."""
    try:
        output, _ = process.communicate(timeout=timeout)
    finally:
        process.kill()
    assert process.returncode == code, f"exit status {process.returncode}:\n{output}"
    return output


def column(path: Path, name: str) -> list[str]:
    """A column of a CSV file as it is written, for comparisons bit for bit."""
    with path.open(encoding="utf-8", newline="") as file:
        return [row[name] for row in csv.DictReader(file)]


def newest_state(out_dir: Path) -> dict[str, Any]:
    """The newest checkpoint of a training, but for the seconds it took."""
    state = read_checkpoint(max((out_dir / "checkpoints").glob("step_*.pt")))
    state["progress"].pop("seconds")
    return state


def differences(a: Any, b: Any, name: str = "state") -> list[str]:
    """Returns the places where two nested states differ, bit for bit."""
    if isinstance(a, dict) and isinstance(b, dict):
        missing = [f"{name}.{key} is in one only" for key in a.keys() ^ b.keys()]
        return missing + [line for key in a.keys() & b.keys() for line in differences(a[key], b[key], f"{name}.{key}")]
    same = torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    return [] if same else [name]
