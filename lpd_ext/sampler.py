"""The decode loop: groups of tokens from orders, schedules and a KV cache; it never waits for the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from lpd_ext import ops
from lpd_ext.cancel import Cancel, as_check
from lpd_ext.cuda_graphs import CapturedDecode, DecodeGraphs, weights_of
from lpd_ext.decode_state import DecodeState, Layout
from lpd_ext.few_rows import chosen_products
from lpd_ext.model import LPDModel
from lpd_ext.modes import decoding_modes
from lpd_ext.plan import Step
from lpd_ext.request import DecodeRequest


def begin(state: DecodeState) -> None:
    """Compute what steps need of the weights as they are now; before the first step, and where weights have changed."""
    if state.parts.few_rows is not None:
        state.parts.few_rows.fold()


def prefill(state: DecodeState, step: Step) -> None:
    """Feed a step of context rows alone: known cells, or the condition before them, enter the KV cache."""
    state.model.decode_step(*_rows_of(state, step), state.parts, step, state.workspace)


def decode_step(state: DecodeState, step: Step) -> Tensor:
    """Feed what the step before drew and ask for the next groups: logits [rows, V], which the next step overwrites."""
    logits = state.model.decode_step(*_rows_of(state, step), state.parts, step, state.workspace)
    assert logits is not None  # the step has query rows
    return logits


def sample(state: DecodeState, step: Step, logits: Tensor) -> None:
    """Draw the step's tokens from its logits, into the grids and to where the next step reads them."""
    image = step.image
    cells = state.positions.view(-1)[step.write_index[: len(image)]] - 1
    tokens = ops.sample_tokens(
        logits,
        step.conditional_row,
        step.unconditional_row,
        state.guidance[image, step.token_index],
        state.temperature[image],
        state.top_k[image] if state.filters.top_k else None,
        state.top_p[image] if state.filters.top_p else None,
        state.seeds[image],
        cells,
    )
    state.contents.view(-1).index_copy_(0, step.write_index, tokens[step.write_source])
    state.grid.index_put_((image, cells), tokens)


def advance(state: DecodeState, step: Step) -> None:
    """One step: waits for nothing, allocates by torch only."""
    if step.num_query_rows == 0:
        prefill(state, step)
    else:
        sample(state, step, decode_step(state, step))


def _rows_of(state: DecodeState, step: Step) -> tuple[Tensor, Tensor]:
    """Content ids and positions of the step's rows."""
    return state.contents.view(-1)[step.content_index], state.positions.view(-1)[step.position_index]


def decode(model: LPDModel, request: DecodeRequest, cancel: Cancel | None = None) -> Iterator[Tensor]:
    """Draw images step by step; yields the grids int64 [B, N] (raster order, -1 not yet drawn) after each group.

    The yielded tensor is the same one each time, updated in place. cancel, an event or a callable, is asked before each
    step: once it says so, what is drawn stays as it is and the iterator ends. Raises ValueError at once for a request
    made for a model of other sizes, and RuntimeError when logits are NaN. No gradients, and the model's own dtypes even
    under torch.autocast.
    """
    _check_model(model, request)
    return _decode(model, request, as_check(cancel))


def _decode(model: LPDModel, request: DecodeRequest, cancelled: Callable[[], bool]) -> Iterator[Tensor]:
    # Left at each yield: between two steps the caller's own modes hold.
    device, layout = model.pos_embed.device, Layout.of(request)
    with decoding_modes(device):
        plan = layout.plan(model.config.num_tokens, device)
        state = DecodeState(model, plan.capacity, layout.filters)
        state.load(request, plan.places)
        begin(state)
        plan.record_stream()
    for t, step in enumerate(plan.steps):
        if cancelled():
            return
        with decoding_modes(device):
            advance(state, step)
            if t + 1 == len(plan.steps):
                state.check_drawn()
        if step.num_query_rows:
            yield state.grid


def _check_model(model: LPDModel, request: DecodeRequest) -> None:
    if request.config != model.config:
        raise ValueError(f"request was made for a model of {request.config}, got one of {model.config}")


def generate(model: LPDModel, request: DecodeRequest, graphs: DecodeGraphs | None = None) -> Tensor:
    """Draw images and return their tokens int64 [B, N] in raster order; errors as in `decode`.

    graphs: on CUDA, captured decodes of this model to replay and to add to; what cannot be captured is decoded without.
    """
    _check_model(model, request)
    if graphs is not None and graphs.supports(model.pos_embed.device) and request.num_groups:
        try:
            if (tokens := _replay(model, request, graphs)) is not None:
                return tokens
        except torch.OutOfMemoryError:
            graphs.clear()  # they hold the caches of several batches; one alone may fit
    grid = undrawn(model, request)  # all there is where nothing is to be drawn
    for drawn_so_far in _decode(model, request, as_check(None)):
        grid = drawn_so_far
    return grid


def undrawn(model: LPDModel, request: DecodeRequest) -> Tensor:
    """The grids int64 [B, N] before anything is drawn: known tokens, elsewhere -1."""
    known = request.known_tokens
    return (torch.full_like(request.orders, -1) if known is None else known.clone()).to(model.pos_embed.device)


def _replay(model: LPDModel, request: DecodeRequest, graphs: DecodeGraphs) -> Tensor | None:
    """The tokens, or None if the decode could not be captured."""
    layout, device = Layout.of(request), model.pos_embed.device
    with decoding_modes(device), graphs.lock:
        plan = layout.plan(model.config.num_tokens, device)

        def capture() -> CapturedDecode[DecodeState]:
            state = DecodeState(model, plan.capacity, layout.filters)
            state.load(request, plan.places)
            first = [] if state.parts.few_rows is None else [partial(begin, state)]
            return graphs.capture(state, [*first, *(partial(advance, state, step) for step in plan.steps)])

        # A graph reads the weights where they lay when it was captured.
        captured = graphs.find((weights_of(model), chosen_products()), layout, capture)
        if captured is None:
            return None
        state = captured.state
        try:
            state.load(request, plan.places)
            captured.replay()
            tokens = state.grid.clone()
        finally:
            if device.type == "cuda":  # the next caller may use these buffers on another stream
                torch.cuda.current_stream().synchronize()
        state.check_drawn()
        return tokens
