"""Loads and saves models: published .pth files, safetensors files, and directories with a config.json.

A directory holds `config.json` (model sizes, sampling defaults, class names), `model.safetensors` in the published
layout and `tokenizer.safetensors`.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lpd_ext.checks import as_grid
from lpd_ext.content import content_of, read_json
from lpd_ext.hub import CONFIG_FILE, MODEL_FILE, ModelFiles
from lpd_ext.linear import DecodingLinear, PackedLinear, can_pack, has_fast_arithmetic, replace_linears
from lpd_ext.model import Block, LPDConfig, LPDModel
from lpd_ext.modes import own_modes
from lpd_ext.quantize import SCALE, Int8Linear, use_planes
from lpd_ext.state_files import complete_files, read_metadata, read_state_dict, without_prefixes, write_tensors

_PUBLISHED_HEAD_DIM = 64
ModelDType = torch.dtype | Literal["int8"]
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, "int8")
_BLOCKS = "blocks."
_MOST_READS = 64  # of a file while it is packed: loading is quadratic in the number of blocks otherwise
_MUTUAL_VISIBILITY = "mutual_visibility"  # in a file's metadata, where it is not as published
_SCALE_SUFFIX = f".{SCALE}"
_EARLIER_SCALE_SUFFIX = ".weight_scale"  # of int8 weights that were not rotated


def load_model(
    path: str | Path,
    *,
    grid: tuple[int, int] | None = None,
    heads: int | None = None,
    dtype: ModelDType | None = None,
    device: torch.device | str = "cpu",
    packed: bool = False,
    ema: bool = False,
) -> LPDModel:
    """Loads an LPD transformer in eval mode from a weight file or a directory with config.json.

    grid resizes the position embedding to another (h, w). dtype is float32 (default), bfloat16, float16, or "int8":
    linear layers rounded to int8 (as they are in a file of int8 weights), which multiply 3 to 4 times as fast as in
    float32 with AVX-512 VNNI and 1.6 times with AVX2. heads is required unless config.json or the file's metadata has
    it, or the width is a multiple of 64, the published head dimension.
    packed, on the CPU: packs the linear layers for decoding (`linear.PackedLinear`), one by one, so that they are never
    held twice. int8 and packed models are for inference only. ema takes the averaged weights from a trainer's file.
    Raises FileNotFoundError or ValueError.
    """
    if grid is not None:
        grid = as_grid(grid)
    if dtype is not None and dtype not in _DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, _DTYPES))}, got {dtype}")
    device = torch.device(device)
    float_dtype = dtype if isinstance(dtype, torch.dtype) else torch.float32
    path = Path(path)
    with own_modes(), content_of(path):
        state, config = _weights_and_sizes(path, grid, heads, ema)
        _check_blocks(state, config)
        layers = _decoding_layers(state, dtype, device, packed)
        if device.type == "cpu" and not has_fast_arithmetic(float_dtype):
            warnings.warn(
                f"this processor has no {float_dtype} arithmetic: decoding is slower than in float32", stacklevel=2
            )
        if layers is None:
            return model_from_state_dict(state, config, grid=grid).to(device=device, dtype=float_dtype).eval()
        del state
        return _load_part_by_part(partial(read_state_dict, _weight_file(path), ema), config, grid, layers, float_dtype)


def _weight_file(path: Path) -> Path:
    return ModelFiles(path).weights


def _weights_and_sizes(
    path: Path, grid: tuple[int, int] | None, heads: int | None, ema: bool
) -> tuple[dict[str, Tensor], LPDConfig]:
    """Returns the state dict of a weight file or folder and its config; arguments as in `load_model`."""
    if path.is_dir():
        config = model_config(read_config(path))
        if heads is not None and heads != config.heads:
            raise ValueError(f"heads must be {config.heads} as config.json says, got {heads}")
        return read_state_dict(_weight_file(path), ema), config
    state = read_state_dict(path, ema)
    heads, stored_grid, mutual_visibility = _settings_of_file(path, heads)
    config = infer_config(state, heads, stored_grid or grid)
    return state, replace(config, mutual_visibility=mutual_visibility)


def _check_blocks(state: Mapping[str, Tensor], config: LPDConfig) -> None:
    """Raises ValueError for a block that the file lacks, before anything larger than the file is allocated."""
    with torch.device("meta"):
        own = Block(config).state_dict()
    for name in (f"{_BLOCKS}{i}.{name}" for i in range(config.depth) for name in own):
        if name not in state:
            raise ValueError(f"the checkpoint does not fit {config}: {name} is missing")


def _decoding_layers(
    state: Mapping[str, Tensor], dtype: ModelDType | None, device: torch.device, packed: bool
) -> type[DecodingLinear] | None:
    """Returns the kind of linear layers that the arguments of `load_model` ask for; None for torch's own."""
    if any(name.endswith(_EARLIER_SCALE_SUFFIX) for name in state):
        raise ValueError("the checkpoint has int8 weights of an earlier kind: make it again from one of float weights")
    stored_as_int8 = any(name.endswith(_SCALE_SUFFIX) for name in state)
    if stored_as_int8 and dtype not in (None, "int8"):
        raise ValueError(f"dtype must be 'int8' or None for a checkpoint of int8 weights, got {dtype}")
    if stored_as_int8 or dtype == "int8":
        if device.type != "cpu":
            raise ValueError(f"dtype 'int8' decodes on the CPU, got device {device}")
        return Int8Linear
    return PackedLinear if packed and can_pack(device, dtype or torch.float32) else None


def _load_part_by_part(
    read: Callable[[], dict[str, Tensor]],
    config: LPDConfig,
    grid: tuple[int, int] | None,
    layers: type[DecodingLinear],
    dtype: torch.dtype,
) -> LPDModel:
    """Builds a model with linear layers of that kind from a published-layout file; ValueError if it does not fit.

    Each block, and the rest, comes from a mapping of the file of its own, so that no more than one of them is held both
    as it was read and packed.
    """
    rest = _read_part(read(), "", dtype)
    model, config = _empty_model(rest, config, grid)
    replace_linears(
        model, nn.Linear, lambda linear: layers(linear.in_features, linear.out_features, linear.bias is not None)
    )
    use_planes(model)
    faults: list[str] = []

    def load(module: nn.Module, prefix: str, part: dict[str, Tensor]) -> None:
        try:
            missing, unexpected = module.load_state_dict(part, strict=False, assign=True)
        except RuntimeError as error:
            raise RuntimeError(f"{prefix or 'model'}: {error}") from error
        faults.extend(f"{prefix}{name} is missing" for name in missing if prefix or not name.startswith(_BLOCKS))
        faults.extend(f"{prefix}{name} is unexpected" for name in unexpected)

    try:
        load(model, "", rest)
        del rest
        known = [f"{_BLOCKS}{i}." for i in range(config.depth)]
        together = -(-config.depth // _MOST_READS)
        state = read()
        for i, block in enumerate(model.blocks):
            if i and i % together == 0:
                state = read()  # releases the mapping of the blocks before
            load(block, known[i], _read_part(state, known[i], dtype))
        numbers = {prefix.split(".")[1] for prefix in known}
        names = (name for name in state if name.startswith(_BLOCKS))
        faults.extend(f"{name} is unexpected" for name in names if name.split(".")[1] not in numbers)
        if faults:
            raise RuntimeError("; ".join(faults))
    except RuntimeError as error:
        raise ValueError(f"the checkpoint does not fit {config}: {error}") from error
    return model.requires_grad_(False).eval()


def _read_part(state: Mapping[str, Tensor], prefix: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Returns the tensors below a prefix, without it; for "", those of no block. Floats are cast to dtype."""
    part: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.startswith(prefix) if prefix else not name.startswith(_BLOCKS):
            kept = not tensor.is_floating_point() or name.endswith(_SCALE_SUFFIX)
            # Matrices are copied when they are packed; anything else would keep the whole mapping.
            part[name.removeprefix(prefix)] = tensor.to(None if kept else dtype, copy=tensor.ndim != 2)
    return part


def _settings_of_file(path: Path, heads: int | None) -> tuple[int | None, tuple[int, int] | None, bool]:
    """Returns heads, grid and mutual visibility, which the shapes of tensors do not determine.

    From the file's metadata, else from the config.json beside it.
    """
    metadata = read_metadata(path)
    if "heads" in metadata:
        with content_of(path, "has metadata whose heads or grid are no integers"):
            stored = int(metadata["heads"])
            height, width = map(int, metadata["grid"].split("x"))
        if heads is not None and heads != stored:
            raise ValueError(f"heads must be {stored} as the metadata of {str(path)!r} says, got {heads}")
        return stored, as_grid((height, width)), metadata.get(_MUTUAL_VISIBILITY) != "False"
    if heads is None and path.name == MODEL_FILE and (path.parent / CONFIG_FILE).is_file():
        config = model_config(read_config(path.parent))
        return config.heads, config.grid, config.mutual_visibility
    return heads, None, True


def model_from_state_dict(
    state: Mapping[str, Tensor], config: LPDConfig, grid: tuple[int, int] | None = None
) -> LPDModel:
    """Builds an LPDModel on the tensors of a published-layout state dict; ValueError if they do not fit config."""
    state = without_prefixes(state)
    model, config = _empty_model(state, config, grid)
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise ValueError(f"the checkpoint does not fit {config}: {error}") from error
    return model


def _empty_model(
    state: dict[str, Tensor], config: LPDConfig, grid: tuple[int, int] | None
) -> tuple[LPDModel, LPDConfig]:
    """Builds a model without memory, ready to take the tensors of `state`, whose position embedding is resized."""
    if grid is not None and as_grid(grid) != config.grid:
        if "pos_embed" not in state:
            raise ValueError(f"the checkpoint does not fit {config}: pos_embed is missing")
        state["pos_embed"] = resize_position_embedding(state["pos_embed"], config.grid, grid)
        config = replace(config, grid=as_grid(grid))
    with torch.device("meta"):  # nothing is initialised or copied
        return LPDModel(config), config


def infer_config(
    state: Mapping[str, Tensor], heads: int | None = None, grid: tuple[int, int] | None = None
) -> LPDConfig:
    """Infers the config of a published-layout state dict; the grid is `grid` if that fits, else square.

    Raises ValueError naming what is missing, or asking for heads when the width does not tell.
    """
    state = without_prefixes(state)
    try:
        vocab_size, dim = state["token_emb.weight"].shape
        num_classes = state["class_emb.weight"].shape[0]
        num_tokens = state["pos_embed"].shape[1] - 1
        hidden = state["blocks.0.mlp.fc1.weight"].shape[0]
        if not dim:
            raise ValueError("the width of token_emb.weight, which is 0,")
    except (KeyError, ValueError, IndexError) as error:
        raise ValueError(f"not an LPD checkpoint of the published layout: {error} is missing or misshapen") from error
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    if grid is None or grid[0] * grid[1] != num_tokens:
        side = math.isqrt(num_tokens)
        if side * side != num_tokens:
            raise ValueError(f"the checkpoint's {num_tokens} positions are no square grid: give its grid first")
        grid = (side, side)
    if heads is None:
        if dim % _PUBLISHED_HEAD_DIM:
            raise ValueError(f"heads must be given: width {dim} is no multiple of the published head dimension 64")
        heads = dim // _PUBLISHED_HEAD_DIM
    return LPDConfig(dim, depth, heads, vocab_size, num_classes, grid, hidden // dim)


def resize_position_embedding(pos_embed: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Resizes pos_embed [1, 1 + h*w, E] bicubically to another grid; position 0, the condition, is kept."""
    if pos_embed.ndim != 3 or pos_embed.shape[1] != 1 + old[0] * old[1]:
        raise ValueError(f"pos_embed has shape {list(pos_embed.shape)}, but {old} needs {1 + old[0] * old[1]} rows")
    cells = pos_embed[:, 1:].float().unflatten(1, old).permute(0, 3, 1, 2)
    cells = F.interpolate(cells, size=tuple(new), mode="bicubic", align_corners=False, antialias=False)
    resized = cells.permute(0, 2, 3, 1).flatten(1, 2).to(pos_embed.dtype)
    return torch.cat([pos_embed[:, :1], resized], dim=1)


def read_config(directory: Path) -> dict[str, Any]:
    """Parses the config.json of a checkpoint directory; ValueError if it is not valid."""
    file = directory / CONFIG_FILE
    if not file.is_file():
        raise FileNotFoundError(f"{str(directory)!r} has no {CONFIG_FILE}: not a checkpoint directory")
    config = read_json(file)
    if not isinstance(config, dict) or not isinstance(config.get("model"), dict):
        raise ValueError(f"{str(file)!r} must be a JSON object with a 'model' entry")
    return config


def model_config(config: Mapping[str, Any]) -> LPDConfig:
    """Reads the LPDConfig from a parsed config.json; ValueError if a field is missing or unknown."""
    try:
        return LPDConfig(**config["model"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"config.json 'model': {error}") from error


def save_model(
    model: LPDModel,
    directory: str | Path,
    *,
    extra: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    beside: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> None:
    """Writes config.json and model.safetensors (floats in dtype if given, but for the scales of int8 weights).

    `extra` adds entries to config.json; `beside` maps file names to state dicts to write too. Files are replaced only
    once all are complete, so a failed save leaves the folder as it was. Raises TypeError or ValueError for entries
    that config.json cannot hold.
    """
    directory = Path(directory)
    text = _config_text(model.config, extra or {})
    height, width = model.config.grid
    metadata = {"heads": str(model.config.heads), "grid": f"{height}x{width}"}
    if not model.config.mutual_visibility:
        metadata[_MUTUAL_VISIBILITY] = "False"
    state = without_prefixes(model.state_dict())
    scales = {name: state.pop(name) for name in list(state) if name.endswith(_SCALE_SUFFIX)}
    if dtype is not None:
        state = {name: value.to(dtype) if value.is_floating_point() else value for name, value in state.items()}
    directory.mkdir(parents=True, exist_ok=True)
    beside = beside or {}
    names = [MODEL_FILE, CONFIG_FILE, *beside]
    with complete_files(*(directory / name for name in names)) as (weights, config, *rest):
        write_tensors(state | scales, weights, None, metadata)
        config.write_text(text, encoding="utf-8")
        for path, tensors in zip(rest, beside.values(), strict=True):
            write_tensors(tensors, path, dtype)


def _config_text(config: LPDConfig, extra: Mapping[str, Any]) -> str:
    """Returns the text of config.json; TypeError or ValueError naming the first entry that JSON cannot hold."""
    for name, value in extra.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name} cannot be written to {CONFIG_FILE}: {error}") from error
    return json.dumps({"model": asdict(config), **extra}, indent=2) + "\n"
