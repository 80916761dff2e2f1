"""Memory of a decode on the CPU: huge pages are asked for, and results of all layers lie in the same few places."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_sampler import random_model, request_for
from torch import Tensor

from lpd_ext import memory, ops
from lpd_ext.linear import pack
from lpd_ext.quantize import quantize
from lpd_ext.sampler import generate

CPU = torch.device("cpu")
SMAPS = Path("/proc/self/smaps")


def flags_at(address: int) -> list[str]:
    """The kernel's flags of the mapping that holds an address."""
    inside = False
    for line in SMAPS.read_text().splitlines():
        name, _, rest = line.partition(" ")
        if "-" in name and not name.endswith(":"):
            first, last = (int(end, 16) for end in name.split("-"))
            inside = first <= address < last
        elif inside and name == "VmFlags:":
            return rest.split()
    raise AssertionError(f"no mapping holds {address:#x}")


@pytest.mark.skipif(not SMAPS.exists() or "VmFlags" not in SMAPS.read_text(), reason="needs Linux's smaps")
def test_large_memory_is_asked_to_lie_on_huge_pages() -> None:
    if not Path("/sys/kernel/mm/transparent_hugepage").exists():
        pytest.skip("this kernel has no transparent huge pages")
    size, middle = 40 * 2**20, 20 * 2**20
    asked, plain = memory.empty((size,), torch.uint8, CPU), torch.empty(size, dtype=torch.uint8)
    assert "hg" in flags_at(asked.data_ptr() + middle)
    assert "hg" not in flags_at(plain.data_ptr() + middle)


@pytest.mark.parametrize("shape", [(0,), (1,), (3, 5), (2**21 + 7,), (3, 2**21)])
def test_memory_is_what_was_asked_for(shape: tuple[int, ...]) -> None:
    found = memory.empty(shape, torch.bfloat16, CPU)
    assert (found.shape, found.dtype, found.device.type) == (torch.Size(shape), torch.bfloat16, "cpu")
    assert found.fill_(3).eq(3).all()
    assert memory.empty(shape, torch.float32, torch.device("meta")).is_meta


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
