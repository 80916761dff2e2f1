"""Decoding: against the published implementation, against the training pass, and what must not matter."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from decodes import random_model, recorded_logits, request_for
from golden import Golden, load_golden
from torch import Tensor

from lpd_ext import ops, reference
from lpd_ext.model import DecodingParts, LPDModel
from lpd_ext.orders import make_orders
from lpd_ext.plan import Step
from lpd_ext.request import DecodeRequest, make_request
from lpd_ext.sampler import decode, generate


@pytest.fixture(scope="module")
def golden() -> Golden:
    return load_golden()


@pytest.mark.parametrize("case", range(3))
def test_golden_decode(backend: torch.device, golden: Golden, case: int) -> None:
    request = golden.request(case)
    tokens, conditional, unconditional = recorded_logits(golden.model().to(backend), request)
    sample = golden.part(f"sample{case}.")
    assert torch.equal(tokens, sample["tokens"].long())
    wanted = sample["logits"]
    batch = len(request.labels)
    bound = 2e-5 * wanted.abs().max()
    assert (conditional - wanted[:batch]).abs().max() <= bound
    if len(wanted) > batch:
        assert (unconditional - wanted[batch:]).abs().max() <= bound


def _context_sees_queries(qkv, k, v, segments, max_rows, max_keys, first, scale, workspace, settled):
    """Every row of a segment sees everything: what a single-class attention would compute."""
    rows, _, heads, head_dim = qkv.shape
    out = qkv.new_zeros(rows, heads * head_dim)
    reference.append_kv(qkv, k, v, segments, max_rows)
    for cs, a, qs, m, c, slot in segments.tolist():
        own = torch.cat([torch.arange(cs, cs + a), torch.arange(qs, qs + m)])
        keys = torch.cat([k[slot, :, : c + a], qkv[qs : qs + m, 1].transpose(0, 1)], dim=1)
        values = torch.cat([v[slot, :, : c + a], qkv[qs : qs + m, 2].transpose(0, 1)], dim=1)
        weights = (qkv[own, 0].transpose(0, 1) @ keys.transpose(1, 2) * scale).softmax(-1)
        out[own] = (weights @ values).transpose(0, 1).flatten(1)
    return out[first:]


def _queries_blind(qkv, k, v, segments, max_rows, max_keys, first, scale, workspace, settled):
    out = [reference.group_attention(qkv, k.clone(), v.clone(), segments, max_rows, max_keys, 0, scale)]
    for row in range(max_rows):
        one = segments.clone()
        one[:, 2] += row
        one[:, 3] = (segments[:, 3] - row).clamp(0, 1)
        alone = reference.group_attention(qkv, k.clone(), v.clone(), one, max_rows, max_keys, 0, scale)
        for qs, m in one[:, 2:4].tolist():
            out[0][qs : qs + m] = alone[qs : qs + m]
    reference.append_kv(qkv, k, v, segments, max_rows)
    return out[0][first:]


@pytest.mark.parametrize("mistake", [_context_sees_queries, _queries_blind])
def test_golden_decode_sees_a_wrong_mask(
    golden: Golden, monkeypatch: pytest.MonkeyPatch, mistake: Callable[..., Tensor]
) -> None:
    monkeypatch.setattr(ops, "group_attention", mistake)
    _, conditional, _ = recorded_logits(golden.model(), golden.request(0))
    wanted = golden.tensors["sample0.logits"]
    assert (conditional - wanted[:3]).abs().max() > 1e-3 * wanted.abs().max()


@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_decoding_equals_the_training_pass(backend: torch.device, head_dim: int) -> None:
    """Cached, ragged decoding and one masked pass over the same tokens give the same logits; h != w, absent labels."""
    on_cpu, model = random_model(head_dim, (3, 4)), random_model(head_dim, (3, 4)).to(backend)
    schedules = [[1, 2, 3, 6], [1] * 12, [12], [4, 8]]
    request = request_for(model, schedules, labels=[3, None, 0, None], guidance_scale=[3.0, 2.0, 1.0, 1.0])
    tokens, conditional, unconditional = recorded_logits(model, request)
    for b, sizes in enumerate(schedules):
        one, order = tokens[b : b + 1], request.orders[b : b + 1]
        with torch.no_grad():
            label = request.labels[b]
            wanted = on_cpu(one, torch.tensor([-1 if label is None else label]), order, sizes)[0]
            bound = 2e-5 * wanted.abs().max()
            assert (conditional[b] - wanted).abs().max() <= bound
            if label is not None and request.guidance_scale[b] != 1:
                wanted = on_cpu(one, torch.tensor([-1]), order, sizes)[0]
                assert (unconditional[b] - wanted).abs().max() <= bound
            else:
                assert unconditional[b].isnan().all()


def editing_request(model: LPDModel, blocks: list[list[int]], schedules: list[list[int]]) -> DecodeRequest:
    """Known cells, other ones in every image, that enter the cache in these blocks."""
    batch, num_tokens = len(blocks), model.config.num_tokens
    request = request_for(model, [[num_tokens]] * batch)
    tokens = torch.randint(model.config.vocab_size, request.orders.shape, generator=torch.Generator().manual_seed(5))
    known = torch.full_like(tokens, -1)
    for b, sizes in enumerate(blocks):
        cells = request.orders[b, : sum(sizes)]
        known[b, cells] = tokens[b, cells]
    return dataclasses.replace(
        request,
        group_sizes=schedules,
        known_tokens=known,
        prefill=blocks,
        guidance_scale=[1.0 + b for b in range(batch)],
    )


def test_known_cells_are_seen_as_in_the_training_pass(backend: torch.device) -> None:
    """Prefilled blocks are context blocks of the masked pass; images with and without known cells share a batch."""
    on_cpu, model = random_model(32, (3, 4)), random_model(32, (3, 4)).to(backend)
    blocks, schedules = [[3, 4], [], [5], [1] * 4], [[2, 3], [1, 3, 8], [7], [3, 5]]
    request = editing_request(model, blocks, schedules)
    tokens, conditional, unconditional = recorded_logits(model, request)
    known = request.known_tokens
    assert torch.equal(tokens[known >= 0], known[known >= 0])
    assert tokens.min() >= 0
    for b in range(4):
        first = sum(blocks[b])
        for found, label in ((conditional, request.labels[b]), (unconditional, -1)):
            if label == -1 and request.guidance_scale[b] == 1:
                continue
            with torch.no_grad():
                row = slice(b, b + 1)
                wanted = on_cpu(tokens[row], torch.tensor([label]), request.orders[row], blocks[b] + schedules[b])[0]
            assert (found[b, first:] - wanted[first:]).abs().max() <= 2e-5 * wanted.abs().max(), b
            assert found[b, :first].isnan().all()


def test_an_edit_depends_on_its_own_request_alone() -> None:
    model = random_model(32, (3, 4))
    blocks, schedules = [[3, 4], [], [5], [1] * 4], [[2, 3], [1, 3, 8], [7], [3, 5]]
    request = editing_request(model, blocks, schedules)
    together = generate(model, request)
    for b in range(4):
        alone = make_request(
            model.config, [request.labels[b]], group_sizes=[schedules[b]], order=request.orders[b : b + 1],
            guidance_scale=request.guidance_scale[b], seeds=request.seeds[b],
            known_tokens=request.known_tokens[b : b + 1], prefill=[blocks[b]],
        )  # fmt: skip
        assert torch.equal(generate(model, alone)[0], together[b]), b
        assert len(list(decode(model, alone))) == alone.num_groups == len(schedules[b])
    assert len(list(decode(model, request))) == request.num_groups


def test_a_request_makes_orders_around_known_cells() -> None:
    model = random_model(32, (4, 4))
    known = torch.full((2, 16), -1)
    known[0, [5, 6, 9]], known[1, 15] = torch.tensor([1, 2, 3]), 4
    request = make_request(model.config, [0, 1], group_sizes=[[1, 12], [15]], seeds=3, known_tokens=known)
    assert [schedule.prefill for schedule in request.schedules] == [(3,), (1,)]
    assert request.orders[0, :3].tolist() == [5, 6, 9]
    free = make_orders("locality", [[1, 12], [15]], (4, 4), torch.tensor([3, 4]), known >= 0)
    assert torch.equal(request.orders[0, 3:], free[0, :13])
    assert torch.equal(request.orders[1], torch.cat([torch.tensor([15]), free[1, :15]]))
    drawn = generate(model, request)
    assert torch.equal(drawn[known >= 0], known[known >= 0])
    everything = torch.randint(50, (1, 16))
    nothing_to_draw = make_request(model.config, [0], group_sizes=[[]], seeds=3, known_tokens=everything)
    assert torch.equal(generate(model, nothing_to_draw), everything)
    assert nothing_to_draw.num_groups == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"known_tokens": torch.full((1, 8), 50)}, r"known_tokens\[0\] must lie in \[0, 50\), or be -1"),
        ({"known_tokens": torch.full((1, 8), -2)}, r"known_tokens\[0\] must lie in"),
        ({"known_tokens": torch.full((1, 7), 1)}, r"known_tokens must be int64 of shape \[1, 8\]"),
        ({"known_tokens": torch.full((1, 8), 1).int()}, "known_tokens must be int64"),
        ({"prefill": [[2]]}, "prefill must be None without known_tokens"),
        (
            {"prefill": [[2]], "known_tokens": torch.tensor([[1, 1, 1] + [-1] * 5])},
            r"prefill\[0\] must sum to 3, the num",
        ),
        ({"prefill": [[3], [1]], "known_tokens": torch.tensor([[1, 1, 1] + [-1] * 5])}, "prefill must have one entry"),
        ({"known_tokens": torch.tensor([[1, 1, 1] + [-1] * 5])}, r"group_sizes\[0\] must sum to 5"),
        (
            {
                "known_tokens": torch.tensor([[1, 1, 1] + [-1] * 5]),
                "group_sizes": [[5]],
                "order": torch.arange(7, -1, -1)[None],
            },
            r"order\[0\] must begin with the 3 cells that known_tokens\[0\] gives",
        ),
    ],
)
def test_known_cells_are_checked(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        request_for(random_model(32, (2, 4)), [[8]], **changes)


def test_kernels_and_plain_torch_twins_draw_the_same_image(
    backend: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random_model(32, (4, 4)).to(backend)
    request = request_for(
        model, [[1, 3, 5, 7]] * 3, guidance_scale=[1.0, 2.5, 4.0], temperature=[1.0, 0.7, 1.3], top_k=[0, 20, 0]
    )
    tokens, conditional, _ = recorded_logits(model, request)
    for name in ("embed_rows", "residual_layer_norm", "group_attention", "append_kv", "sample_step"):
        monkeypatch.setattr(ops, name, getattr(reference, name))
    twin_tokens, twin_conditional, _ = recorded_logits(model, request)
    assert torch.equal(tokens, twin_tokens)
    assert (conditional - twin_conditional).abs().max() <= 2e-5 * twin_conditional.abs().max()


def guidance_seen(model: LPDModel, request: DecodeRequest, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    seen = torch.full(request.orders.shape, float("nan"))
    draw = ops.sample_step

    def draw_spy(logits: Tensor, c: Tensor, u: Tensor, image: Tensor, n: Tensor, *rest: Tensor) -> None:
        guidance = rest[2]
        seen[image, n] = guidance[image, n]
        draw(logits, c, u, image, n, *rest)

    monkeypatch.setattr(ops, "sample_step", draw_spy)
    generate(model, request)
    return seen


def test_linear_guidance_divides_by_n(monkeypatch: pytest.MonkeyPatch) -> None:
    """s(n) = 1 + (cfg - 1) n / N, n counted per image whatever its schedule; N, not N - 1."""
    model = random_model(32, (2, 4))
    request = request_for(model, [[1, 3, 4], [2, 6]], guidance_scale=[5.0, 2.0])
    seen = guidance_seen(model, request, monkeypatch)
    n = torch.arange(8)
    assert torch.allclose(seen[0], 1 + 4 * n / 8)
    assert torch.allclose(seen[1], 1 + 1 * n / 8)


def test_constant_guidance(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(32, (2, 4))
    request = request_for(model, [[1, 3, 4]], guidance_scale=[5.0], guidance_schedule="constant")
    assert (guidance_seen(model, request, monkeypatch) == 5).all()


def test_guidance_one_and_absent_labels_cost_no_unconditional_rows() -> None:
    model = random_model(32, (2, 4))
    rows: list[int] = []
    run_step = model.decode_step

    def counting(contents: Tensor, positions: Tensor, parts: DecodingParts, step: Step, *rest: Any) -> Tensor | None:
        rows.append(len(step.content_index))
        return run_step(contents, positions, parts, step, *rest)

    model.decode_step = counting
    generate(model, request_for(model, [[1, 3, 4]] * 2, labels=[1, None], guidance_scale=[1.0, 9.0]))
    assert rows == [2 * (1 + 1), 2 * (1 + 3), 2 * (3 + 4)]
    rows.clear()
    generate(model, request_for(model, [[1, 3, 4]] * 2, guidance_scale=[1.0, 9.0]))
    assert rows == [3 * (1 + 1), 3 * (1 + 3), 3 * (3 + 4)]


def test_the_last_block_computes_query_rows_only(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(32, (2, 4))
    first_rows: list[int] = []
    attend = ops.group_attention

    def spy(*arguments, **options):
        first_rows.append(arguments[6])
        return attend(*arguments, **options)

    monkeypatch.setattr(ops, "group_attention", spy)
    generate(model, request_for(model, [[1, 3, 4]]))
    assert first_rows == [0, 1, 0, 1, 0, 3]


def test_an_image_depends_on_its_own_request_alone(backend: torch.device) -> None:
    """Same seed alone, in a batch of 7 at another row beside other schedules and guidance, and with 1 and 2 threads."""
    model = random_model(32, (4, 4)).to(backend)
    schedules = [[1, 3, 5, 7], [16], [1] * 16, [1, 3, 5, 7], [8, 8], [2, 14], [1, 3, 5, 7]]
    options: dict[str, list[float]] = {
        "guidance_scale": [3.0, 1.0, 2.0, 3.0, 1.0, 5.0, 4.0],
        "temperature": [1.0, 1.0, 0.5, 0.9, 2.0, 0.0, 1.1],
        "top_k": [0, 5, 0, 20, 0, 0, 7],
        "top_p": [1.0, 1.0, 0.9, 0.95, 1.0, 1.0, 0.5],
    }
    batch = request_for(model, schedules, **options)
    together = generate(model, batch)
    threads = torch.get_num_threads()
    for b in range(7):
        alone = make_request(
            model.config,
            [batch.labels[b]],
            group_sizes=[schedules[b]],
            order=batch.orders[b : b + 1],
            seeds=[batch.seeds[b]],
            **{name: [values[b]] for name, values in options.items()},
        )
        for count in (1, 2):
            torch.set_num_threads(count)
            try:
                same = generate(model, alone)[0] == together[b]
                # A GPU's GEMM rounds differently in another batch, which decides a draw now and then.
                assert same.all() if backend.type == "cpu" else same.double().mean() > 0.8, b
            finally:
                torch.set_num_threads(threads)


def test_seeds_matter_and_repeat() -> None:
    model = random_model(32, (4, 4))
    request = request_for(model, [[1, 15]] * 2)
    same_order = dataclasses.replace(request, order=request.orders[:1].expand(2, -1), labels=[1, 1])
    drawn = generate(model, same_order)
    assert not torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn, generate(model, same_order))


def test_half_precision_decodes(backend: torch.device) -> None:
    model = random_model(32, (4, 4))
    request = request_for(model, [[1, 3, 5, 7]] * 2, top_k=[1, 1])
    _, wanted, _ = recorded_logits(model, request)
    for dtype in (torch.bfloat16, torch.float16):
        _, logits, _ = recorded_logits(random_model(32, (4, 4)).to(backend, dtype), request)
        # The first group is the same input for both; a 16-bit run may draw other tokens later.
        error = (logits[:, 0].float() - wanted[:, 0]).abs().max() / wanted[:, 0].abs().max()
        assert error <= {torch.bfloat16: 0.05, torch.float16: 0.01}[dtype]


def test_stream_of_partial_grids() -> None:
    model = random_model(32, (2, 4))
    request = request_for(model, [[1, 3, 4], [8]])
    counts = [(grid >= 0).sum(dim=1).tolist() for grid in decode(model, request)]
    assert counts == [[1, 8], [4, 8], [8, 8]]


def test_an_empty_batch_gives_an_empty_grid() -> None:
    model = random_model(32, (2, 4))
    assert generate(model, request_for(model, [])).shape == (0, 8)


def test_two_threads_do_not_disturb_each_other() -> None:
    model = random_model(32, (4, 4))
    requests = [request_for(model, [[1, 3, 5, 7]] * 2, seeds=[s, s + 1]) for s in range(0, 40, 2)]
    wanted = [generate(model, request) for request in requests]
    found: dict[int, Tensor] = {}

    def work(indices: range) -> None:
        for i in indices:
            found[i] = generate(model, requests[i])

    workers = [threading.Thread(target=work, args=(range(start, 20, 2),)) for start in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert sorted(found) == list(range(20))
    assert all(torch.equal(found[i], wanted[i]) for i in range(20))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": [5, 0]}, r"labels\[0\] must be None or an integer in \[0, 5\), got 5"),
        ({"labels": [0, -1]}, r"labels\[1\]"),
        ({"group_sizes": [[1, 7], [1, 6]]}, r"group_sizes\[1\] must sum to 8.*, got 7"),
        ({"group_sizes": [[1, 0, 7], [8]]}, r"group_sizes\[0\]"),
        ({"guidance_scale": [1.0]}, r"guidance_scale must have one entry per label \(2\), got 1"),
        ({"guidance_scale": [1.0, -1e31]}, r"guidance_scale\[1\] must be in \[-1e\+30, 1e\+30\], got -1e\+31"),
        ({"guidance_scale": [1.0, float("nan")]}, r"guidance_scale\[1\]"),
        ({"temperature": [-1.0, 1.0]}, r"temperature\[0\] must be in \[0, 1e\+30\], got -1\.0"),
        ({"guidance_scale": [1.0, 1e39]}, r"guidance_scale\[1\] .* got 1e\+39"),
        ({"temperature": [1e39, 1.0]}, r"temperature\[0\] .* got 1e\+39"),
        ({"top_p": [1e-50, 1.0]}, r"top_p\[0\] .* got 1e-50"),
        ({"top_k": [0, -3]}, r"top_k\[1\] must be an integer >= 0, got -3"),
        ({"top_p": [0.0, 1.0]}, r"top_p\[0\] must be in \(0, 1\] and >= 1\.2e-38, got 0\.0"),
        ({"top_p": [1.0, 1.5]}, r"top_p\[1\]"),
        ({"seeds": [0, 2**63]}, r"seeds\[1\]"),
        ({"seeds": [0, 1, 2]}, r"seeds must have one entry per label"),
        ({"guidance_schedule": "cosine"}, r"guidance_schedule must be one of"),
        ({"guidance_schedule": ["linear"]}, r"guidance_schedule must have one entry per label \(2\), got 1"),
        ({"order": torch.arange(8).expand(2, 8).int()}, r"orders must be int64"),
        ({"order": torch.arange(7).expand(2, 7)}, r"orders must be int64 of shape \[2, 8\]"),
        ({"order": torch.tensor([list(range(8)), [0, 1, 2, 3, 4, 5, 6, 6]])}, r"orders\[1\] must be a perm"),
    ],
)
def test_bad_requests_are_refused_before_any_work(changes: dict[str, object], message: str) -> None:
    model = random_model(32, (2, 4))
    model.decode_step = None
    with pytest.raises(ValueError, match=message):
        generate(model, request_for(model, [[1, 7], [1, 7]], **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group_sizes": [8]}, r"group_sizes\[0\] must be a list of integers, got 8"),
        ({"order": [list(range(8))]}, r"orders must be an int64 tensor of shape \[1, 8\], got list"),
        ({"labels": [1.0]}, r"labels\[0\] must be an integer, got 1\.0"),
        ({"labels": [True]}, r"labels\[0\] must be an integer, got True"),
        ({"guidance_scale": ["2"]}, r"guidance_scale\[0\] must be a number, got '2'"),
        ({"top_k": [np.float32(2)]}, r"top_k\[0\] must be an integer"),
        ({"seeds": [torch.tensor(True)]}, r"seeds\[0\] must be an integer, got tensor\(True\)"),
        ({"seeds": [np.bool_(True)]}, r"seeds\[0\] must be an integer"),
    ],
)
def test_wrong_types_are_refused_before_any_work(changes: dict[str, object], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        request_for(random_model(32, (2, 4)), [[1, 7]], **changes)


def test_a_request_is_for_one_model() -> None:
    request = request_for(random_model(32, (2, 4)), [[1, 7]])
    for other in (random_model(32, (4, 2)), random_model(64, (2, 4))):
        with pytest.raises(ValueError, match="request was made for a model of LPDConfig"):
            generate(other, request)


def test_decode_checks_at_the_call() -> None:
    model = random_model(32, (2, 4))
    with pytest.raises(ValueError, match="temperature"):
        decode(model, request_for(model, [[1, 7]], temperature=[-1.0]))


def test_the_largest_guidance_and_temperature_do_not_overflow() -> None:
    model = random_model(32, (2, 4))
    for change in ({"guidance_scale": [1e30]}, {"temperature": [1e30]}):
        assert generate(model, request_for(model, [[1, 7]], **change)).min() >= 0


def test_top_k_beyond_the_vocabulary_is_the_whole_of_it() -> None:
    model = random_model(32, (2, 4))
    tokens = [generate(model, request_for(model, [[1, 7]], top_k=[k])) for k in (0, 50, 2**40)]
    assert torch.equal(tokens[0], tokens[1])
    assert torch.equal(tokens[0], tokens[2])


def test_autocast_changes_nothing_and_grids_are_ordinary_tensors() -> None:
    model = random_model(32, (2, 4))
    request = request_for(model, [[1, 7]])
    wanted = generate(model, request)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(generate(model, request), wanted)
    embedding = torch.randn(50, 2, requires_grad=True)
    torch.nn.functional.embedding(wanted, embedding).sum().backward()
    assert embedding.grad is not None
    assert embedding.grad.sum() == 2 * 8
    wanted += 1
    with torch.inference_mode():
        steps = decode(model, request)
        next(steps)
    grid = next(steps)  # a mode that ended between two steps does not matter
    grid += 1
    assert torch.equal(grid, wanted)


def test_the_callers_modes_hold_between_steps() -> None:
    model = random_model(32, (2, 4))
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients), torch.autocast("cpu", torch.bfloat16):
            for grid in decode(model, request_for(model, [[1, 3, 4]])):
                assert torch.is_grad_enabled() == gradients
                assert torch.is_autocast_enabled("cpu")
                assert not grid.requires_grad
            assert torch.is_grad_enabled() == gradients


@pytest.mark.parametrize("sizes", [[8], [1, 7]])
def test_nan_logits_are_an_error(backend: torch.device, sizes: list[int]) -> None:
    model = random_model(32, (2, 4)).to(backend)
    with torch.no_grad():
        model.head.weight[3].fill_(float("nan"))
    with pytest.raises(RuntimeError, match="NaN"):
        generate(model, request_for(model, [sizes]))
