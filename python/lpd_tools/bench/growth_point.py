"""One point of `lpd growth`, in a process of its own; run with a point as JSON, it prints JSON."""

from __future__ import annotations

import ctypes
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

_LONG_ENOUGH = 1.2  # seconds: then the first decode is the time; shorter ones get three more
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def measure(
    dim: int, depth: int, heads: int, dtype: str, batch: int, steps: int, num_tokens: int, threads: int
) -> dict[str, Any]:
    """Returns the median seconds of a decode, the number of runs, and the peak of resident MB beyond `import torch`.

    The peak is that of decoding alone: making the random weights needs more for a moment.
    """
    import torch  # here, so that what has been imported before the first reading of memory is known

    before = _resident("VmRSS")
    from lpd_ext.linear import pack
    from lpd_ext.model import LPDConfig, LPDModel
    from lpd_ext.quantize import quantize
    from lpd_ext.request import make_request
    from lpd_ext.sampler import generate

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    side = round(num_tokens**0.5)
    config = LPDConfig(dim, depth, heads, vocab_size=16384, num_classes=1000, grid=(side, side))
    with torch.device("meta"):
        model = LPDModel(config)
    model = model.to_empty(device="cpu").eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.uniform_(-0.035, 0.035)  # the spread of a fresh model's weights
        else:
            parameter.fill_(float("norm" in name or "_ln" in name) if name.endswith("weight") else 0.0)
    (quantize if dtype == "int8" else pack)(model)
    request = make_request(
        config,
        [b % config.num_classes for b in range(batch)],
        num_inference_steps=steps,
        order=torch.stack([torch.randperm(num_tokens) for _ in range(batch)]),
        guidance_scale=4.8,
        seeds=0,
    )
    ctypes.CDLL(None).malloc_trim(0)  # memory freed by packing returns to the system
    _CLEAR.write_text("5", encoding="utf-8")  # and the peak starts anew

    def clocked() -> float:
        start = time.perf_counter()
        generate(model, request)
        return time.perf_counter() - start

    seconds = [clocked()]
    if seconds[0] < _LONG_ENOUGH:
        seconds = [clocked() for _ in range(3)]
    megabytes = (_resident("VmHWM") - before) / 1e6
    return {"seconds": statistics.median(seconds), "runs": len(seconds), "peak_mb": megabytes}


def _resident(field: str) -> int:
    """Returns the bytes resident now (VmRSS) or at their peak (VmHWM)."""
    for line in _STATUS.read_text(encoding="utf-8").splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"{_STATUS} has no {field}")


if __name__ == "__main__":
    print(json.dumps(measure(**json.loads(sys.argv[1]))))
