"""`lpd generate`: draws images with balanced labels and consecutive seeds, in any number of processes, resumable."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lpd_ext.hub import ModelFiles
from lpd_ext.orders import default_repulsion_threshold
from lpd_ext.pipeline import LPDPipeline
from lpd_tools.checks import check_seeds
from lpd_tools.data.model_files import model_files
from lpd_tools.data.names import visible
from lpd_tools.data.token_cache import file_hash
from lpd_tools.evaluation.images import MANIFEST_FILE
from lpd_tools.evaluation.provenance import provenance
from lpd_tools.evaluation.samples import (
    FORMATS,
    check_manifest,
    open_samples,
    remove_unfinished,
    write_manifest,
)
from lpd_tools.evaluation.settings import Generation
from lpd_tools.models import carried_names, load_pipeline
from lpd_tools.processes import Processes, processes
from lpd_tools.progress import track
from lpd_tools.sampling import Sampling

SAMPLING = (
    "num_inference_steps",
    "guidance_scale",
    "guidance_schedule",
    "order",
    "proximity_threshold",
    "repulsion_threshold",
    "temperature",
    "top_k",
    "top_p",
)


def sampling_options(config: Any) -> dict[str, Any]:
    """Returns the settings of SAMPLING that a config sets, as options of a pipeline's call."""
    return {name: value for name in SAMPLING if (value := getattr(config, name)) is not None}


def sampling_of(pipe: LPDPipeline, options: dict[str, Any]) -> dict[str, Any]:
    """Returns every sampling setting that will be used: the options, else the model's defaults."""
    used = asdict(pipe.defaults) | options
    if used["repulsion_threshold"] is None:
        used["repulsion_threshold"] = default_repulsion_threshold(pipe.model.config.grid)
    return used


def draw(pipe: LPDPipeline, labels: Sequence[int], seed: int, batch_size: int = 100, **options: Any) -> Tensor:
    """Pixels uint8 [B, H, W, 3] of one image per label, image i from seed + i, in memory."""
    parts = []
    for start in track(range(0, len(labels), batch_size), "drawing"):
        batch = list(labels[start : start + batch_size])
        seeds = list(range(seed + start, seed + start + len(batch)))
        parts.append(torch.from_numpy(pipe(batch, seeds=seeds, output_type="np", **options).images))
    return torch.cat(parts)


def drawing_processes(device: str) -> AbstractContextManager[Processes]:
    """The processes that draw; the quickest waits for the slowest one, for as long as that draws."""
    return processes(device, "gloo", timedelta(days=7))


def generate(config: Generation) -> Path:
    """Draws the missing images of a run and returns its folder, alone or with all processes of a `torchrun`.

    Raises ValueError for wrong settings, and for other settings than the folder's, before anything is drawn.
    """
    with drawing_processes(config.device) as group:
        return _generate(config, group)


def _generate(config: Generation, group: Processes) -> Path:
    if config.format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {config.format!r}")
    files = model_files(config.model, config.tokenizer)
    pipe = load_pipeline(files.model, files.tokenizer, config.dtype, group.device)
    num_classes = pipe.model.config.num_classes
    count = config.images_per_class * num_classes
    check_seeds(config.seed, count)
    options = sampling_options(config)
    pipe.prepare([0], seeds=[config.seed], **options)  # refuses what cannot be drawn

    folder = Path(config.out)
    settings = run_settings(config, files, sampling_of(pipe, options), group.device)
    if group.is_first:
        _begin(folder, settings, count, pipe)
    group.wait()
    check_manifest(folder, settings)

    names = carried_names(config.model, config.tokenizer, config.dtype)
    carried = {"command": "generate", **names, **Sampling.of_options(sampling_of(pipe, options)).settings()}
    samples = open_samples(folder, config.format, count, num_classes, carried, config.seed)
    batches = [range(start, min(start + config.batch_size, count)) for start in range(0, count, config.batch_size)]
    missing = [batch for batch in batches[group.rank :: group.size] if not samples.has(batch)]
    for batch in track(missing, "drawing") if group.is_first else missing:
        labels = [number % num_classes for number in batch]
        seeds = [config.seed + number for number in batch]
        samples.write(batch, pipe(labels, seeds=seeds, output_type="np", **options).images)
    group.wait()
    if group.is_first:
        samples.finish(batches)
    group.wait()
    return folder


def _begin(folder: Path, settings: dict[str, Any], count: int, pipe: LPDPipeline) -> None:
    """The folder with its manifest, which stays as it is if there is one."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out must be a folder, but {str(folder)!r} is a file")
    if (folder / MANIFEST_FILE).is_file():
        remove_unfinished(folder)
        return
    if folder.is_dir() and visible(folder):
        raise ValueError(f"out: {str(folder)!r} is not empty and holds no {MANIFEST_FILE}: nothing to go on with")
    folder.mkdir(parents=True, exist_ok=True)
    manifest = {
        "settings": settings,
        "images": count,
        "labels": "image number mod classes",
        "seeds": "seed + image number",
        "class_names": pipe.class_names,
        "made_with": provenance(pipe.model.pos_embed.device),
    }
    write_manifest(folder, manifest)


def run_settings(
    config: Generation, files: ModelFiles, sampling: dict[str, Any], device: torch.device
) -> dict[str, Any]:
    """Returns everything that determines the images of a run, by name, as JSON stores it."""
    used = (files.weights, files.tokenizer)
    hashes = {f"sha256 of {path.name}": file_hash(path) for path in used if path is not None}
    own = {name: getattr(config, name) for name in ("images_per_class", "seed", "batch_size", "format", "dtype")}
    return own | {"device": device.type} | sampling | hashes


def repeat_of(config: Generation, repeat: int, num_images: int) -> Generation:
    """The `repeat`-th run of several with seeds of their own, in a folder named by its first seed."""
    seed = config.seed + repeat * num_images
    return replace(config, seed=seed, out=str(Path(config.out) / f"seed_{seed}"))
