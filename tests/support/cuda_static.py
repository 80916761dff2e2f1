"""Reads what nvcc made of the CUDA kernels: machine code, registers and shared memory, read from the built extension.

`python tests/support/cuda_static.py` writes the table that test_cuda_static.py compares with. Needs no GPU.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sysconfig
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from lpd_ext import _C

TABLE = Path(__file__).parents[1] / "data" / "cuda_kernels.json"


@dataclass(frozen=True)
class Multiprocessor:
    """The limits of one multiprocessor's blocks at a time (CUDA programming guide, compute capabilities)."""

    threads: int
    blocks: int
    shared_bytes: int  # each block takes 1 KiB more than it asks for
    registers: int = 65536

    def resident_blocks(self, threads: int, registers: int, shared_bytes: int) -> int:
        warps = -(-threads // 32)
        registers_per_warp = -(-registers * 32 // 256) * 256
        return min(
            self.blocks,
            self.threads // (32 * warps),
            self.registers // registers_per_warp // warps,
            self.shared_bytes // (-(-(shared_bytes + 1024) // 128) * 128),
        )


MULTIPROCESSORS = {
    "sm_80": Multiprocessor(2048, 32, 164 * 1024),
    "sm_86": Multiprocessor(1536, 16, 100 * 1024),
    "sm_89": Multiprocessor(1536, 24, 100 * 1024),
    "sm_90": Multiprocessor(2048, 32, 228 * 1024),
    "sm_100": Multiprocessor(2048, 32, 228 * 1024),
    "sm_120": Multiprocessor(1536, 24, 100 * 1024),
}


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel: resources in registers per thread and bytes, its machine code as text."""

    name: str
    architecture: str
    registers: int
    stack: int
    local: int
    shared: int
    code: str

    def has(self, pattern: str) -> bool:
        return re.search(pattern, self.code) is not None


def nvcc_version() -> str:
    """Such as '13.0'; empty where the extension was built without CUDA kernels."""
    match = re.search(r"(\d+\.\d+)", _C.build_config()["cuda_compiler"])
    return match[1] if match else ""


def cuobjdump() -> str | None:
    """Path of the program, from the toolkit at hand, which fits its nvcc, or else from its Python package."""
    packaged = Path(sysconfig.get_paths()["purelib"]) / "nvidia/cu13/bin/cuobjdump"
    return shutil.which("cuobjdump") or (str(packaged) if packaged.exists() else None)


def _dump(option: str) -> str:
    program = cuobjdump()
    assert program is not None
    command = [program, option, _C.__file__]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _readable(symbols: list[str]) -> dict[str, str]:
    """Mangled to short names: kernel<template arguments>, without namespaces and parameters."""
    plain = subprocess.run(["c++filt"], input="\n".join(symbols), check=True, capture_output=True, text=True).stdout
    short = {}
    for symbol, name in zip(symbols, plain.splitlines(), strict=True):
        # Template arguments may themselves be in parentheses, as in (int)64: cut at the parameter list, the last one.
        name = re.sub(
            r"\((?:anonymous namespace|int|bool|unsigned int)\)", "", name.replace("(anonymous namespace)::", "")
        )
        name = re.sub(r"_GLOBAL__N__\w+::", "", name).replace("lpd::", "").removeprefix("void ")
        short[symbol] = name[: name.rindex("(")]
    return short


@cache
def kernels() -> list[Kernel]:
    """Every kernel of the built extension, for every architecture it holds machine code of."""
    resources = {}
    architecture = ""
    lines = _dump("-res-usage").splitlines()
    for line, after in zip(lines, [*lines[1:], ""], strict=True):
        if match := re.match(r"arch = (sm_\d+)", line):
            architecture = match[1]
        elif match := re.match(r"\s*Function (\S+):", line):
            resources[architecture, match[1]] = {key: int(value) for key, value in re.findall(r"([A-Z]+):(\d+)", after)}
    code: dict[tuple[str, str], list[str]] = {}
    key = ("", "")
    for line in _dump("-sass").splitlines():
        if match := re.match(r"arch = (sm_\d+)", line.strip()):
            key = (match[1], "")
        elif match := re.match(r"\s*Function : (\S+)", line):
            key = (key[0], match[1])
        elif key[1]:
            code.setdefault(key, []).append(line)
    names = _readable(sorted({symbol for _, symbol in resources}))
    return [
        Kernel(
            name=names[symbol],
            architecture=architecture,
            registers=used["REG"],
            stack=used["STACK"],
            local=used["LOCAL"],
            # From 9.0 on the figure holds the 1 KiB that the system takes of every block, unless there is no more.
            shared=max(used["SHARED"] - (1024 if int(architecture.removeprefix("sm_")) >= 90 else 0), 0),
            code="\n".join(code[architecture, symbol]),
        )
        for (architecture, symbol), used in sorted(resources.items())
    ]


# Kernel, threads per block, dynamic shared bytes; at E = 1024, V = 16384 (in registers) or 131072 (not), 32x32 cells.
LAUNCHES = [
    (r"append_kv_kernel", 128, 0),
    (r"(embed_rows|residual_layer_norm)_kernel<\w+, \w+Slice>", 128, 0),
    (r"group_attention_kernel<float, 32>", 128, 28800),
    (r"group_attention_kernel<float, 64>", 128, 49280),
    (r"group_attention_kernel<float, 128>", 128, 90240),
    (r"group_attention_kernel<B?Float16, 32>", 128, 16512),
    (r"group_attention_kernel<B?Float16, 64>", 128, 32896),
    (r"group_attention_kernel<B?Float16, 128>", 128, 65664),
    (r"locality_order_kernel", 256, 7048),
    (r"fold_layer_norm_kernel<\w+>", 256, 0),
    *((rf"residual_linear_kernel<\w+, {rows}>", 128, 77840 + 1280 * rows) for rows in range(16, 81, 16)),  # of fc2
    *((rf"normed_linear_kernel<\w+, {rows}>", 384, 75792 + 896 * rows) for rows in range(16, 81, 16)),  # of qkv
    (r"sample_tokens_kernel<\w+, false, true>", 512, 128),
    (r"sample_tokens_kernel<\w+, true, true>", 512, 16 * 4096 + 192),
    (r"sample_tokens_kernel<float, false, false>", 256, 1024),
    (r"sample_tokens_kernel<float, true, false>", 256, 91648),
    (r"sample_tokens_kernel<\w+, false, false>", 512, 1024),
    (r"sample_tokens_kernel<\w+, true, false>", 512, 91648),
]


def launch_of(kernel: str) -> tuple[int, int]:
    """Threads per block and dynamic shared bytes with which a kernel is launched at lpd_l's sizes."""
    for pattern, threads, shared_bytes in LAUNCHES:
        if re.fullmatch(pattern, kernel):
            return threads, shared_bytes
    raise KeyError(f"{kernel}: add its launch to LAUNCHES")


def table() -> dict[str, dict[str, dict[str, int]]]:
    """architecture -> kernel -> registers, shared bytes (static and dynamic), threads, blocks per multiprocessor."""
    rows: dict[str, dict[str, dict[str, int]]] = {}
    for kernel in kernels():
        if kernel.architecture not in MULTIPROCESSORS:
            continue
        threads, dynamic = launch_of(kernel.name)
        shared = kernel.shared + dynamic
        rows.setdefault(kernel.architecture, {})[kernel.name] = {
            "registers": kernel.registers,
            "shared": shared,
            "threads": threads,
            "blocks": MULTIPROCESSORS[kernel.architecture].resident_blocks(threads, kernel.registers, shared),
        }
    return rows


if __name__ == "__main__":
    if not nvcc_version() or cuobjdump() is None:
        raise SystemExit("this needs the extension built with CUDA kernels, and cuobjdump")
    tables = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    tables[nvcc_version()] = table()
    TABLE.write_text(json.dumps(tables, indent=1, sort_keys=True) + "\n")
    print(TABLE)
