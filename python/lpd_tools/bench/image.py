"""Tokens to pixels, and a label to a PNG, at the published sizes with weights drawn at random, on the CPU.

The baseline is what one would write in plain torch: the published style of decoding, and the tokenizer as it is.
"""

from __future__ import annotations

import copy
import io
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from lpd_ext.pipeline import LPDPipeline, SamplingDefaults
from lpd_ext.tokenizer import TokenizerConfig, VQTokenizer
from lpd_tools.bench import tokenizer as bench_tokenizer
from lpd_tools.bench.cases import SHAPES
from lpd_tools.bench.decode import Decode, ours_on_cpu
from lpd_tools.bench.result import Result
from lpd_tools.bench.timing import Times, interleaved

_CPU = torch.device("cpu")
PLAIN = "plain torch"
_COLD = """
import sys
from lpd_ext import LPDPipeline
pipe = LPDPipeline.from_pretrained(*sys.argv[2:])
pipe(1, seeds=0).images[0].save(sys.argv[1])
"""


def time_decoders(batch: int, repeats: int) -> list[Result]:
    """Times our pixel decoder and the plain one, with the PSNR between them."""
    decoded = bench_tokenizer.decode_results(batch, repeats)
    baselines = {PLAIN: decoded[0].plain_times}
    results = [Result.against(one.operator, one.times, baselines, note=f"{one.decibels:.1f} dB") for one in decoded]
    return [*results, Result.against(PLAIN, decoded[0].plain_times, baselines)]


def time_images(batch: int, repeats: int) -> list[Result]:
    """Times whole calls, from labels to PNG files in memory, and cold processes that draw one image."""
    decode = Decode.at_random(SHAPES["L-256-20"], batch, _CPU, torch.float32)
    tokenizer = VQTokenizer(TokenizerConfig()).eval().requires_grad_(False)
    plain_tokenizer = copy.deepcopy(tokenizer)  # the pipelines lay theirs out anew
    defaults = SamplingDefaults(guidance_scale=decode.shape.guidance_scale)
    models = ours_on_cpu(decode)
    has_bfloat16 = torch.cpu._is_avx512_bf16_supported()

    def draw(pipe: LPDPipeline) -> None:
        for image in pipe(decode.labels.tolist(), order=decode.orders, seeds=0).images:
            _png(image)

    def draw_plain() -> None:
        tokens = decode.plain().unflatten(1, decode.shape.grid)
        with torch.no_grad():
            images: Tensor = plain_tokenizer.decode(tokens)
        for pixels in VQTokenizer.to_pixels(images).numpy():
            _png(Image.fromarray(pixels))

    runs: dict[str, Callable[[], None]] = {}
    for name, model in models.items():
        pipe = LPDPipeline(model, tokenizer, defaults)
        runs[f"tokens in {name}, pixels in float32"] = partial(draw, pipe)
    if has_bfloat16:
        fast = LPDPipeline(models["int8"], tokenizer, defaults, pixel_dtype=torch.bfloat16)
        runs["tokens in int8, pixels in bfloat16"] = partial(draw, fast)
    runs[PLAIN] = draw_plain
    timed = dict(zip(runs, interleaved(list(runs.values()), repeats, _CPU, warm_up=1), strict=True))
    results = [Result.against(name, times, {PLAIN: timed[PLAIN]}) for name, times in timed.items()]
    return results + ([] if batch > 1 else _cold_processes(models["int8"], tokenizer, defaults, repeats))


def _cold_processes(model: Any, tokenizer: VQTokenizer, defaults: SamplingDefaults, repeats: int) -> list[Result]:
    """Times processes that start, import torch, load (files in the page cache), draw one image and end."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        LPDPipeline(model, tokenizer, defaults).save_pretrained(folder / "int8")
        commands = {
            "cold process, fashion_mnist": ["fashion_mnist"],
            "cold process, lpd_l from an int8 file": [str(folder / "int8")],
            "cold process, import torch alone": None,
        }
        seconds: dict[str, list[float]] = {title: [] for title in commands}
        for _ in range(repeats + 1):
            for title, arguments in commands.items():
                code = ["import torch"] if arguments is None else [_COLD, str(folder / "image.png"), *arguments]
                start = time.perf_counter()
                subprocess.run([sys.executable, "-c", *code], check=True, cwd=folder)
                seconds[title].append(time.perf_counter() - start)
    return [Result.against(title, Times(taken[1:]), {}) for title, taken in seconds.items()]


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
