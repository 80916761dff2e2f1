"""Times a preview, exact or by the preview decoder, beside a step."""

from __future__ import annotations

import torch

from lpd_ext.linear import pack
from lpd_ext.model import LPDModel
from lpd_ext.pipeline import LPDPipeline, SamplingDefaults
from lpd_ext.preview_decoder import PreviewDecoder
from lpd_ext.tokenizer import TokenizerConfig, VQTokenizer
from lpd_tools.bench.cases import SHAPES
from lpd_tools.bench.result import Result
from lpd_tools.bench.timing import Times, interleaved

STEP, EXACT, APPROXIMATE = "a step", "exact preview", "preview decoder"


def published_size() -> LPDPipeline:
    """Returns a pipeline of the size of the published lpd_l_256, with weights drawn at random."""
    shape = SHAPES["L-256-20"]
    torch.manual_seed(0)
    sizes = TokenizerConfig()
    model = LPDModel(shape.config).eval().requires_grad_(False)
    pack(model)
    return LPDPipeline(
        model,
        VQTokenizer(sizes).eval().requires_grad_(False),
        SamplingDefaults(shape.steps, shape.guidance_scale, repulsion_threshold=shape.repulsion_threshold),
        preview_decoder=PreviewDecoder(sizes.codebook_dim, sizes.stride).requires_grad_(False),
    )


def time_previews(pipe: LPDPipeline, batch: int, repeats: int) -> list[Result]:
    """Times both previews of a batch half way through, as images; a step is its share of a decode without pixels."""
    request = pipe.prepare([index % pipe.model.config.num_classes for index in range(batch)], seeds=0)
    drawing = pipe.drawing(request)
    half = next(shown for shown in drawing.stream() if 2 * shown.step >= shown.num_steps).tokens
    runs = (
        lambda: drawing.run("tokens"),
        lambda: drawing.images(half),
        lambda: drawing.images(half, approximate=True),
    )
    decode, exact, approximate = interleaved(list(runs), repeats, torch.device("cpu"), warm_up=min(3, repeats))
    step = Times([seconds / request.num_groups for seconds in decode.seconds])
    return [
        Result.against(name, times, {STEP: step})
        for name, times in ((STEP, step), (EXACT, exact), (APPROXIMATE, approximate))
    ]
