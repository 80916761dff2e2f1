"""Reads the modules of a model built like the published one, including adapters and computed weights."""

from __future__ import annotations

from contextlib import suppress

import torch
from torch import Tensor, nn

from lpd_ext.checkpoint import infer_config
from lpd_ext.linear import DecodingLinear, is_plain
from lpd_ext.model import LPDConfig

TABLES = ("token_emb.weight", "class_emb.weight", "fake_latent", "mask_token")  # in the order of LPDModel.content
_LAYERS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
_WRAPPERS = ("module", "_orig_mod", "base_model", "model")  # where DDP, torch.compile and PEFT hold the model


def unwrapped(model: nn.Module) -> list[nn.Module]:
    """Returns the model and the modules inside its wrappers, down to the one with the embeddings."""
    models = [model]
    while "token_emb" not in (children := models[-1]._modules):
        inner = next((child for name in _WRAPPERS if (child := children.get(name)) is not None), None)
        if inner is None:
            break
        models.append(inner)
    return models


def linear_paths(depth: int) -> list[str]:
    """Returns the paths of the linear layers."""
    return [*(f"blocks.{i}.{layer}" for i in range(depth) for layer in _LAYERS), "head"]


def module_at(model: nn.Module, path: str) -> nn.Module:
    """Returns a submodule by its path; ValueError if there is none."""
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise ValueError(f"the model is not built as the published one: {path} is missing") from None


def plain_module_at(model: nn.Module, path: str, kind: type[nn.Module]) -> nn.Module:
    """Returns a submodule that computes what `kind` does; ValueError for any other, such as an adapter.

    Only linear layers are called in place (see linear.linear_step).
    """
    module = module_at(model, path)
    if type(module).forward not in (kind.forward, nn.Module.forward):
        found = type(module).__name__
        raise ValueError(
            f"{path} must be a plain {kind.__name__}, got {found}: merge an adapter there into its weights"
        )
    return module


def owner_of(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    """Returns the module that has a tensor, and the tensor's name in it."""
    parent, _, name = path.rpartition(".")
    return module_at(model, parent), name


def tensor_at(model: nn.Module, path: str) -> Tensor:
    """Returns a weight by its path, computed if parametrized; ValueError if it is missing or not a plain tensor."""
    owner, name = owner_of(model, path)
    value = getattr(owner, name, None)
    if value is None:
        raise ValueError(f"the model is not built as the published one: {path} is missing")
    if type(value) not in (Tensor, nn.Parameter):
        raise ValueError(f"{path} must be a plain tensor, got {type(value).__name__}: gather or convert it first")
    tensor: Tensor = value.detach()
    return tensor


def config_of(model: nn.Module, heads: int | None = None) -> LPDConfig:
    """Infers the config of a model; heads None: those of its attention, else of 64 numbers each. ValueError if neither.

    The grid is one row, since only the number of cells is known.
    """
    for name in ("token_emb", "class_emb"):
        if name in model._modules:
            plain_module_at(model, name, nn.Embedding)
    state = {}
    for path in ("token_emb.weight", "class_emb.weight", "pos_embed"):
        with suppress(ValueError):
            state[path] = tensor_at(model, path)
    positions, depth = state.get("pos_embed"), len(getattr(model, "blocks", nn.Module())._modules)
    if depth and positions is not None and positions.ndim == 3:
        hidden = width_of_result(model, "blocks.0.mlp.fc1", positions[0, :1])
        shape = torch.empty(hidden, positions.shape[-1], device="meta")
        state |= {f"blocks.{i}.mlp.fc1.weight": shape for i in range(depth)}
    if heads is None:
        with suppress(AttributeError):
            found = model.get_submodule("blocks.0.attn").num_heads
            heads = found if isinstance(found, int) else None
    row = None if positions is None or positions.ndim != 3 else (1, positions.shape[1] - 1)
    return infer_config(state, heads, row)


def width_of_result(model: nn.Module, path: str, row: Tensor) -> int:
    """Returns the width of the result of the linear layer at path, or of an adapter around one, for row [1, K].

    Calls an adapter to find out. Raises ValueError if it cannot be used as a layer on rows.
    """
    layer = module_at(model, path)
    if isinstance(layer, DecodingLinear):
        return layer.out_features
    if is_plain(layer):
        return len(tensor_at(model, f"{path}.weight"))
    name = f"{path} ({type(layer).__name__})"
    try:
        result = layer(row)
    except Exception as error:
        raise ValueError(f"{name} cannot be called on rows {list(row.shape)}: {error}") from error
    if not isinstance(result, Tensor) or result.ndim != 2 or len(result) != 1 or result.dtype != row.dtype:
        found = f"{result.dtype} {list(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
        raise ValueError(f"{name} must make rows [1, N] of {row.dtype} rows, got {found}")
    return result.shape[1]
