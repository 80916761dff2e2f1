"""Small models and requests for the tests of decoding, and the logits that a decode goes through."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from lpd_ext.model import DecodingParts, LPDConfig, LPDModel
from lpd_ext.plan import Step
from lpd_ext.request import DecodeRequest, make_request
from lpd_ext.sampler import generate


def recorded_logits(model: LPDModel, request: DecodeRequest) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, conditional and unconditional logits [B, N, V] in decoding order (NaN where not computed), on the CPU."""
    batch, num_tokens = request.orders.shape
    conditional = torch.full((batch, num_tokens, model.config.vocab_size), float("nan"))
    unconditional = conditional.clone()
    run_step = model.decode_step

    def recording(ids: Tensor, positions: Tensor, parts: DecodingParts, step: Step, *rest: Tensor) -> Tensor | None:
        logits = run_step(ids, positions, parts, step, *rest)
        assert logits is not None
        on_cpu = logits.float().cpu()
        image, index = step.image.cpu(), step.token_index.cpu()
        conditional[image, index] = on_cpu[step.conditional_row.cpu().long()]
        twin = step.unconditional_row.cpu().long()
        guided = twin >= 0
        unconditional[image[guided], index[guided]] = on_cpu[twin[guided]]
        return logits

    model.decode_step = recording
    try:
        return generate(model, request).cpu(), conditional, unconditional
    finally:
        model.decode_step = run_step


def random_model(head_dim: int, grid: tuple[int, int], seed: int = 0) -> LPDModel:
    torch.manual_seed(seed)
    config = LPDConfig(2 * head_dim, depth=2, heads=2, vocab_size=50, num_classes=5, grid=grid)
    model = LPDModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # larger than at the start of training: attention must matter
            parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.dim() > 1 else 0.5))
    return model


def request_for(model: LPDModel, schedules: list[list[int]], **changes: object) -> DecodeRequest:
    batch, num_tokens = len(schedules), model.config.num_tokens
    generator = torch.Generator().manual_seed(1)
    request = make_request(
        model.config,
        [b % model.config.num_classes for b in range(batch)],
        group_sizes=schedules,
        order=torch.stack([torch.randperm(num_tokens, generator=generator) for _ in range(batch)])
        if batch
        else torch.empty(0, num_tokens, dtype=torch.int64),
        seeds=100,
    )
    return dataclasses.replace(request, **changes)
