"""The golden file of the published implementation: a small random model, its decodes and its training pass."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from lpd_ext.checkpoint import model_from_state_dict
from lpd_ext.model import LPDConfig, LPDModel
from lpd_ext.request import DecodeRequest, make_request

DATA = Path(__file__).parents[1] / "data"


@dataclass(frozen=True)
class Golden:
    tensors: dict[str, Tensor]
    spec: dict[str, Any]

    def part(self, prefix: str) -> dict[str, Tensor]:
        return {name[len(prefix) :]: t for name, t in self.tensors.items() if name.startswith(prefix)}

    def config(self) -> LPDConfig:
        spec = self.spec
        side = spec["img_size"] // 16
        sizes = (spec["dim"], spec["depth"], spec["heads"], spec["vocab"], spec["classes"])
        return LPDConfig(*sizes, grid=(side, side))

    def model(self) -> LPDModel:
        state = {name: t.clone() for name, t in self.part("model.").items()}
        return model_from_state_dict(state, self.config()).eval()

    def request(self, case: int) -> DecodeRequest:
        sample, spec = self.part(f"sample{case}."), self.spec["cases"][case]
        batch = spec["batch"]
        return make_request(
            self.config(),
            sample["labels"].tolist(),
            group_sizes=[spec["group_sizes"]] * batch,
            order=sample["orders"].long(),
            guidance_scale=spec["cfg"],
            guidance_schedule=spec["cfg_schedule"],
            top_k=1,
            seeds=0,
        )


@cache
def load_golden() -> Golden:
    path = DATA / "lpd_golden.safetensors"
    with safe_open(path, "pt") as file:
        return Golden(load_file(path), json.loads(file.metadata()["spec"]))
