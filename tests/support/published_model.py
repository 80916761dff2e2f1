"""The golden model built of modules as the published one is, whose own decoder must not run."""

from __future__ import annotations

from collections.abc import Callable

import torch
from golden import load_golden
from torch import Tensor, nn

from lpd_ext.checkpoint import infer_config, model_from_state_dict
from lpd_ext.request import make_request
from lpd_ext.sampler import generate


class _Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)


class _Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)


class _Block(nn.Module):
    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn, self.mlp = _Attention(dim, heads), _Mlp(dim, hidden)


class PublishedModel(nn.Module):
    """Weights are those of the golden file."""

    def __init__(self) -> None:
        super().__init__()
        config = load_golden().config()
        dim = config.dim
        self.token_emb, self.class_emb = nn.Embedding(config.vocab_size, dim), nn.Embedding(config.num_classes, dim)
        self.fake_latent, self.mask_token = nn.Parameter(torch.zeros(1, dim)), nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + config.num_tokens, dim))
        self.z_proj_ln, self.norm = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        blocks = (_Block(dim, config.heads, config.mlp_ratio * dim) for _ in range(config.depth))
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(dim, config.vocab_size, bias=False)
        self.load_state_dict(load_golden().part("model."))
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """So that wrappers have something to wrap."""
        logits: Tensor = self.head(x)
        return logits

    def sample_tokens(self, *arguments: object, **named: object) -> Tensor:
        raise AssertionError("the published decoder must not run")


def golden_arguments(case: int = 0) -> dict[str, object]:
    """Returns inputs of sample_tokens that draw the golden tokens of a case: the most likely ones."""
    golden = load_golden()
    spec, sample = golden.spec["cases"][case], golden.part(f"sample{case}.")
    return {
        "bsz": spec["batch"],
        "cfg": spec["cfg"],
        "cfg_schedule": spec["cfg_schedule"],
        "labels": sample["labels"].long(),
        "top_k": 1,
        "group_sizes": str(spec["group_sizes"]),
        "orders": sample["orders"].long(),
    }


def draw(model: nn.Module, case: int = 0) -> Tensor:
    """The tokens of a golden case by the model's sample_tokens."""
    sample_tokens = model.sample_tokens
    assert isinstance(sample_tokens, Callable)
    tokens: Tensor = sample_tokens(**golden_arguments(case))
    return tokens


def draw_from_state(state: dict[str, Tensor], case: int = 0) -> Tensor:
    """The same by a decoder that is made from a published state dict, for this one call."""
    state = {name: tensor.detach().clone() for name, tensor in state.items()}
    arguments = golden_arguments(case)
    model = model_from_state_dict(state, infer_config(state, load_golden().config().heads)).eval()
    request = make_request(
        model.config,
        arguments["labels"].tolist(),
        group_sizes=load_golden().spec["cases"][case]["group_sizes"],
        order=arguments["orders"],
        guidance_scale=arguments["cfg"],
        guidance_schedule=arguments["cfg_schedule"],
        top_k=1,
        seeds=0,
    )
    return generate(model, request)
