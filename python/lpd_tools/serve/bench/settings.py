"""Settings of `lpd bench-serve`."""

from __future__ import annotations

from dataclasses import dataclass

from lpd_tools.settings import AT_LEAST_ONE, Range, Settings, setting

PARTS = ("throughput", "preview", "overload", "malformed")


@dataclass(frozen=True)
class ServeBench(Settings):
    """Settings of `lpd bench-serve`: parts, model and durations."""

    part: tuple[str, ...] = setting(PARTS, f"of {', '.join(PARTS)}")
    model: str = setting("fashion_mnist", "bundled or published model, hub id, folder or weight file")
    dtype: str = setting("", "of the transformer: float32, bfloat16, float16 or int8")
    device: str = setting("", "cpu, cuda or cuda:<index> (empty: cuda if there is one)")
    max_images: int = setting(16, "images that the engine draws at once", range=AT_LEAST_ONE)
    images: int = setting(128, "images of the throughput", range=AT_LEAST_ONE)
    rounds: int = setting(3, "times that each way draws them, in turn", range=AT_LEAST_ONE)
    load_seconds: float = setting(60.0, "of overload", range=Range(1))
    requests: int = setting(10_000, "malformed requests", range=AT_LEAST_ONE)
    seed: int = setting(0, "of the requests")
    output: str = setting("", "JSON file to write")

    def __post_init__(self) -> None:
        super().__post_init__()
        for part in self.part:
            if part not in PARTS:
                raise ValueError(f"part must be one of {', '.join(PARTS)}, got {part!r}")
