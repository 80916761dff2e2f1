"""Memory of a decode on the CPU: huge pages are asked for, and results of all layers lie in the same few places."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest
import torch
from decodes import random_model, request_for
from torch import Tensor

from lpd_ext import _C, memory, ops
from lpd_ext.linear import pack
from lpd_ext.quantize import quantize
from lpd_ext.sampler import generate

CPU = torch.device("cpu")


def flags_at(address: int) -> list[str]:
    """The kernel's flags of the mapping that holds an address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        name, _, rest = line.partition(" ")
        if "-" in name and not name.endswith(":"):
            first, last = (int(end, 16) for end in name.split("-"))
            inside = first <= address < last
        elif inside and name == "VmFlags:":
            return rest.split()
    raise AssertionError(f"no mapping holds {address:#x}")


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(),
    reason="no transparent huge pages here: other systems and some kernels lack them, and then nothing is asked for",
)
def test_huge_pages_are_asked_for_inside_the_memory_only() -> None:
    huge = 2 * 2**20
    region = mmap.mmap(-1, 20 * huge)  # of its own: malloc might give memory that a decode has had before
    bytes_of = torch.frombuffer(region, dtype=torch.uint8)
    first = -(-bytes_of.data_ptr() // huge) * huge
    pages = [first + i * huge for i in range(4, 9)]
    _C.prefer_huge_pages(pages[1] - 7, 2 * huge + 9)  # all of pages 1 and 2, some of 0 and 3
    assert ["hg" in flags_at(page) for page in pages] == [False, True, True, False, False]
    _C.prefer_huge_pages(pages[4] + 1, huge)  # none whole
    assert "hg" not in flags_at(pages[4])


def test_they_are_asked_for_all_of_a_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(_C, "prefer_huge_pages", lambda *args: asked.append(args))
    found = memory.empty((3, 5), torch.float32, CPU)
    assert asked == [(found.data_ptr(), 60)]


@pytest.mark.parametrize("shape", [(0,), (1,), (3, 5), (2**21 + 7,), (3, 2**21)])
def test_memory_is_what_was_asked_for(shape: tuple[int, ...]) -> None:
    found = memory.empty(shape, torch.bfloat16, CPU)
    assert (found.shape, found.dtype, found.device.type) == (torch.Size(shape), torch.bfloat16, "cpu")
    assert found.fill_(3).eq(3).all()
    assert memory.empty(shape, torch.float32, torch.device("meta")).is_meta


def test_available_memory_is_that_of_the_machine_or_its_container(tmp_path: Path) -> None:
    assert memory.available(tmp_path) is None
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal:       9000 kB\nMemAvailable:   5000 kB\nHugePages_Total:   0\n")
    assert memory.available(tmp_path) == 5000 * 1024
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    for name, text in (("max", "max"), ("current", "300000"), ("stat", "anon 100000\ninactive_file 150000")):
        (group / f"memory.{name}").write_text(text + "\n")
    assert memory.available(tmp_path) == 5000 * 1024
    for limit, left in ((1_000_000, 850_000), (100_000, 0), (10**9, 5000 * 1024)):
        (group / "memory.max").write_text(f"{limit}\n")
        assert memory.available(tmp_path) == left
    (tmp_path / "proc/meminfo").unlink()
    assert memory.available(tmp_path) == 10**9 - 150_000


@pytest.mark.parametrize(("make", "operator"), [(pack, "packed_linear"), (quantize, "packed_linear_int8")])
def test_layers_share_the_memory_of_their_results(make: object, operator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(32, (4, 4))
    request = request_for(model, [[1, 3, 4, 8], [1, 7, 8]])
    assert callable(make)
    make(model)
    product = getattr(ops, operator)
    places: dict[int, set[int]] = {}

    def seen(*args: object) -> Tensor:
        y: Tensor = product(*args)
        places.setdefault(y.shape[1], set()).add(y.data_ptr())
        return y

    monkeypatch.setattr(ops, operator, seen)
    tokens = generate(model, request)
    width = model.config.dim
    assert {channels: len(found) for channels, found in places.items()} == {
        3 * width: 1,
        width: 1,
        4 * width: 1,
        model.config.vocab_size: 1,
    }
    with torch.device("meta"):  # another default device is none of its concern
        assert generate(model, request).equal(tokens)
