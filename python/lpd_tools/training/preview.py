"""Trains a preview decoder to come close to a model's tokenizer, on images that the model draws itself."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from lpd_ext.drawing import Drawing
from lpd_ext.pipeline import LPDPipeline
from lpd_ext.preview_decoder import PreviewDecoder
from lpd_tools.checks import check_output
from lpd_tools.models import load_pipeline
from lpd_tools.pictures import labelled_grid
from lpd_tools.png_settings import save_png
from lpd_tools.progress import track
from lpd_tools.training.loop_settings import learning_rate
from lpd_tools.training.precision import training_modes
from lpd_tools.training.settings import PreviewTraining

_WHOLE = 0.25  # of the grids of a batch; the others are partly drawn
_DRAWN_AT_ONCE = 50
_SHOWN = 10


def train_preview(config: PreviewTraining) -> float:
    """Trains a preview decoder and writes it to `config.out`; returns its PSNR in dB on images it was not trained on.

    A PNG beside it shows some of those images, exact and as previews. Raises ValueError for a wrong setting, and the
    errors of `hub.find_model`.
    """
    check_output(Path(config.out), ".safetensors", name="out")
    Path(config.out).parent.mkdir(parents=True, exist_ok=True)
    device = torch.device(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    pipe = load_pipeline(config.model, device=device)
    held_out = max(1, config.images // 10)
    tokens = draw_tokens(pipe, config.images + held_out, config.seed, config.draw_batch)
    sizes = pipe.tokenizer.config
    with training_modes(device):
        torch.manual_seed(config.seed)
        decoder = PreviewDecoder(sizes.codebook_dim, sizes.stride, config.width).to(device)
        _fit(decoder, _drawing(pipe), tokens[held_out:], config)
    decoder.eval().requires_grad_(False)
    pipe.preview_decoder = decoder
    quality = psnr(pipe, tokens[:held_out])
    metadata = {name: str(value) for name, value in asdict(config).items() if name not in ("out", "device", "model")}
    decoder.save(config.out, metadata | {"psnr": f"{quality:.2f}"})
    draw_comparison(pipe, tokens[: min(held_out, _SHOWN)], Path(config.out).with_suffix(".png"))
    return quality


def draw_comparison(pipe: LPDPipeline, tokens: Tensor, path: Path) -> None:
    """Writes a PNG of the exact images of grids int64 [B, h, w] above their previews."""
    drawing = _drawing(pipe)
    images = [*drawing.images(tokens), *drawing.images(tokens, approximate=True)]
    save_png(labelled_grid(images, ["exact", "preview"], len(tokens)), path, {})


def draw_tokens(pipe: LPDPipeline, count: int, seed: int, batch: int) -> Tensor:
    """Draws grids int64 [count, h, w] of classes in turn with the pipeline's defaults, from seeds that go up by 1."""
    drawn: list[Tensor] = []
    for first in track(range(0, count, batch), "drawing images to train on"):
        which = range(first, min(first + batch, count))
        labels = [index % pipe.model.config.num_classes for index in which]
        drawn.append(pipe(labels, seeds=[seed + index for index in which], output_type="tokens").tokens)
    return torch.cat(drawn)


def psnr(pipe: LPDPipeline, tokens: Tensor) -> float:
    """Returns the mean PSNR in dB of previews of whole grids int64 [B, h, w], against their exact images."""
    drawing = _drawing(pipe)
    total = 0.0
    for part in tokens.split(_DRAWN_AT_ONCE):
        near, exact = (
            torch.from_numpy(drawing.images(part, "np", approximate=approximate)).float()
            for approximate in (True, False)
        )
        errors = (near - exact).square().flatten(1).mean(1).clamp(min=1e-2)  # 68 dB and more count as that
        total += float((10 * torch.log10(255**2 / errors)).sum())
    return total / len(tokens)


def _drawing(pipe: LPDPipeline) -> Drawing:
    """Returns a drawing of nothing, whose decoders are the pipeline's."""
    return pipe.drawing(pipe.prepare([]))


def _fit(decoder: PreviewDecoder, exact: Drawing, tokens: Tensor, config: PreviewTraining) -> None:
    optimizer = torch.optim.Adam(decoder.parameters())
    generator = torch.Generator().manual_seed(config.seed)
    shown: dict[str, float] = {}
    for step in track(range(config.steps), "training the preview decoder", figures=shown):
        grids = tokens[torch.randint(len(tokens), (config.batch_size,), generator=generator).to(tokens.device)]
        share = torch.rand(len(grids), 1, 1, generator=generator) / (1 - _WHOLE)  # above 1 where the grid is whole
        hidden = torch.rand(grids.shape, generator=generator) >= share
        grids = grids.masked_fill(hidden.to(grids.device), -1)
        images = exact.pixels(grids)
        near = decoder(grids, exact.tokenizer.quantize.embedding.weight)
        loss = F.mse_loss(near, images)
        optimizer.param_groups[0]["lr"] = learning_rate(
            step, config.steps, config.learning_rate, warmup=config.steps // 20, decay=config.steps // 2
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        shown["loss"] = loss.item()
