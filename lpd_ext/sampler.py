"""The decode loop: draws groups of tokens from orders, schedules and a KV cache, without waiting for the device."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor

from lpd_ext import ops
from lpd_ext.cancel import Cancel, as_check
from lpd_ext.cuda_graphs import CapturedDecode, DecodeGraphs
from lpd_ext.decode_state import DecodeState, Filters, Layout
from lpd_ext.few_rows import chosen_products
from lpd_ext.model import LPDModel
from lpd_ext.modes import decoding_modes
from lpd_ext.pace import Pace
from lpd_ext.plan import Plan, Step
from lpd_ext.request import DecodeRequest
from lpd_ext.weights_key import weights_of


def begin(state: DecodeState, steps: Sequence[Step] | None = None) -> None:
    """Computes what steps, or any that may come, need of the weights as they are now; to be called before the first."""
    few_rows = state.parts.few_rows
    if few_rows is None:
        return
    # The last block leaves out the rows of the context.
    rows = {n for step in steps or () for n in (step.num_rows, step.num_query_rows) if n}
    if steps is None or any(map(few_rows.takes, rows)):
        few_rows.fold()


def prefill(state: DecodeState, step: Step) -> None:
    """Runs a step of context rows alone: known cells, or the condition before them, enter the KV cache."""
    state.model.decode_step(state.contents, state.positions, state.parts, step, state.workspace)


def decode_step(state: DecodeState, step: Step) -> Tensor:
    """Feeds the last step's tokens and asks for the next groups: logits [rows, V], overwritten by the next step."""
    logits = state.model.decode_step(state.contents, state.positions, state.parts, step, state.workspace)
    assert logits is not None  # the step has query rows
    return logits


def sample(state: DecodeState, step: Step, logits: Tensor) -> None:
    """Draws the step's tokens from its logits, into the grids and to where the next step reads them."""
    ops.sample_step(
        logits,
        step.conditional_row,
        step.unconditional_row,
        step.image,
        step.token_index,
        step.write_index,
        step.twin_index,
        state.guidance,
        state.temperature,
        state.top_k if state.filters.top_k else None,
        state.top_p if state.filters.top_p else None,
        state.seeds,
        state.positions,
        state.contents,
        state.grid,
    )


def advance(state: DecodeState, step: Step) -> None:
    """Runs one step, without waiting for the device."""
    if step.num_query_rows == 0:
        prefill(state, step)
    else:
        sample(state, step, decode_step(state, step))


def decode(
    model: LPDModel, request: DecodeRequest, cancel: Cancel | None = None, graphs: DecodeGraphs | None = None
) -> Iterator[Tensor]:
    """Draws images step by step; yields the grids int64 [B, N] (raster order, -1 not yet drawn) after each group.

    Yields the same tensor each time, updated in place. cancel, an event or a callable, is polled before each step and
    ends the iterator, leaving the grids as they are. graphs: as in `generate`; each step is captured by itself. Raises
    ValueError at once for a request made for a model of other sizes, and RuntimeError if logits are NaN. Computes
    without gradients and in the model's own dtypes, even under torch.autocast.
    """
    _check_model(model, request)
    cancelled = as_check(cancel)
    if graphs is not None and graphs.supports(model.pos_embed.device) and request.num_groups:
        return _replay_steps(model, request, cancelled, graphs)
    return _decode(model, request, cancelled)


def _decode(model: LPDModel, request: DecodeRequest, cancelled: Callable[[], bool]) -> Iterator[Tensor]:
    # Left at each yield, so that the caller's own modes hold between two steps.
    device, layout = model.pos_embed.device, Layout.of(request)
    with decoding_modes(device):
        plan = layout.plan(model.config.num_tokens, device)
        state = DecodeState(model, plan.capacity, layout.filters)
        state.load(request, plan.places)
        begin(state, plan.steps)
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
    """Draws images and returns their tokens int64 [B, N] in raster order; errors as in `decode`.

    graphs: on CUDA, captured decodes of this model to replay and extend; a decode that cannot be captured runs without.
    """
    _check_model(model, request)
    if graphs is not None and graphs.supports(model.pos_embed.device) and request.num_groups:
        try:
            if (tokens := _replay(model, request, graphs)) is not None:
                return tokens
        except torch.OutOfMemoryError:
            graphs.clear()  # graphs hold the caches of several batches; one alone may fit
    grid = undrawn(model, request)  # the result if nothing is to be drawn
    for drawn_so_far in _decode(model, request, as_check(None)):
        grid = drawn_so_far
    return grid


def undrawn(model: LPDModel, request: DecodeRequest) -> Tensor:
    """Returns the grids int64 [B, N] before anything is drawn: known tokens, elsewhere -1."""
    known = request.known_tokens
    return (torch.full_like(request.orders, -1) if known is None else known.clone()).to(model.pos_embed.device)


def _replay(model: LPDModel, request: DecodeRequest, graphs: DecodeGraphs) -> Tensor | None:
    """Returns the tokens, or None if the decode could not be captured."""
    layout, device = Layout.of(request), model.pos_embed.device
    with decoding_modes(device), graphs.lock:
        plan = layout.plan(model.config.num_tokens, device)
        # A graph reads the weights at their addresses when it was captured.
        captured = graphs.find(_weights_of(model), layout, partial(_to_capture, model, request, plan))
        if captured is None:
            return None
        state = captured.state
        try:
            state.load(request, plan.places)
            captured.replay()
            tokens = state.grid.clone()
        finally:
            _wait_for(device)  # the next caller may use these buffers on another stream
        state.check_drawn()
        return tokens


def _replay_steps(
    model: LPDModel, request: DecodeRequest, cancelled: Callable[[], bool], graphs: DecodeGraphs
) -> Iterator[Tensor]:
    """Runs `_decode` on one graph per step."""
    layout, device = Layout.of(request), model.pos_embed.device
    with ExitStack() as stack:
        with decoding_modes(device):
            plan = layout.plan(model.config.num_tokens, device)
            weights, new = _weights_of(model), partial(_to_capture, model, request, plan)
            captured = stack.enter_context(graphs.lent(weights, layout, new))
            if captured is not None:
                stack.callback(_wait_for, device)
                captured.state.load(request, plan.places)
            pace, grid = Pace(device), undrawn(model, request)
        if captured is None:
            yield from _decode(model, request, cancelled)
            return
        for step, replay in zip(plan.steps, captured.replays(each_step=True), strict=True):
            if cancelled():
                return
            with decoding_modes(device):
                # The caller may have replaced weights meanwhile, which a graph would still read where they lay.
                replay() if _weights_of(model) == weights else advance(captured.state, step)
                pace.keep()
                grid.copy_(captured.state.grid)  # others will draw into that
                if step is plan.steps[-1]:
                    captured.state.check_drawn()
            if step.num_query_rows:
                yield grid


def _to_capture(model: LPDModel, request: DecodeRequest, plan: Plan) -> CapturedDecode[DecodeState]:
    """A decode of the request's layout, ready to be recorded."""
    state = DecodeState(model, plan.capacity, Filters.of(request))
    state.load(request, plan.places)
    return CapturedDecode(
        state, [partial(_begin_and_advance, state, plan.steps), *(partial(advance, state, s) for s in plan.steps[1:])]
    )


def _begin_and_advance(state: DecodeState, steps: Sequence[Step]) -> None:
    begin(state, steps)
    advance(state, steps[0])


def _weights_of(model: LPDModel) -> Hashable:
    """Returns a key of everything that a captured decode depends on besides its layout."""
    return weights_of(model), chosen_products()


def _wait_for(device: torch.device) -> None:
    """Waits until a GPU is done, except where the garbage collector ends a decode during a capture."""
    if device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
        torch.cuda.current_stream(device).synchronize()
