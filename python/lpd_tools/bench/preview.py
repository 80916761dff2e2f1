"""Times a preview of the bundled model's images, exact or by the preview decoder, beside a step."""

from __future__ import annotations

import torch

from lpd_ext.pipeline import LPDPipeline
from lpd_tools.bench.result import Result
from lpd_tools.bench.timing import Times, interleaved

STEP, EXACT, APPROXIMATE = "a step", "exact preview", "preview decoder"


def time_previews(batch: int, repeats: int) -> list[Result]:
    """Times both previews of a batch half way through, as images; a step is its share of a decode without pixels."""
    pipe = LPDPipeline.from_pretrained()
    request = pipe.prepare([index % pipe.model.config.num_classes for index in range(batch)], seeds=0)
    drawing = pipe.drawing(request)
    half = next(shown for shown in drawing.stream() if 2 * shown.step >= shown.num_steps).tokens
    runs = (
        lambda: drawing.run("tokens"),
        lambda: drawing.images(half),
        lambda: drawing.images(half, approximate=True),
    )
    decode, exact, approximate = interleaved(list(runs), repeats, torch.device("cpu"), warm_up=3)
    step = Times([seconds / request.num_groups for seconds in decode.seconds])
    return [
        Result.against(name, times, {STEP: step})
        for name, times in ((STEP, step), (EXACT, exact), (APPROXIMATE, approximate))
    ]
