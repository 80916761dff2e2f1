"""The plan of a batch: which rows, segments and table columns each step feeds."""

from __future__ import annotations

import torch

from lpd_ext.plan import plan_decoding

CPU = torch.device("cpu")


def test_two_images_with_different_schedules_one_guided() -> None:
    # N = 4, so a sequence's columns are 0 condition, 1..4 tokens, 5 mask; 6 columns per sequence.
    plan = plan_decoding([[1, 3], [2, 1, 1]], [False, True], 4, CPU)
    assert plan.places.sources.tolist() == [0, 1, 1]
    assert plan.capacity.sequences == 3
    assert plan.capacity.cache_positions == 4  # 1 + N - 1: the last group of image 1 is never fed back
    first, second, third = plan.steps

    assert first.segments.tolist() == [[0, 1, 3, 1, 0, 0], [1, 1, 4, 2, 0, 1], [2, 1, 6, 2, 0, 2]]
    assert first.content_index.tolist() == [0, 6, 12, 5, 11, 11, 17, 17]
    assert first.position_index.tolist() == [0, 6, 12, 1, 7, 8, 13, 14]
    assert (first.num_context_rows, first.num_query_rows, first.max_rows, first.max_keys) == (3, 5, 3, 3)
    assert first.image.tolist() == [0, 1, 1]
    assert first.token_index.tolist() == [0, 0, 1]
    assert first.conditional_row.tolist() == [0, 1, 2]
    assert first.unconditional_row.tolist() == [-1, 3, 4]
    assert first.write_index.tolist() == [1, 7, 8]
    assert first.twin_index.tolist() == [-1, 13, 14]

    assert second.segments.tolist() == [[0, 1, 5, 3, 1, 0], [1, 2, 8, 1, 1, 1], [3, 2, 9, 1, 1, 2]]
    assert second.content_index.tolist() == [1, 7, 8, 13, 14, 5, 5, 5, 11, 17]
    assert second.max_keys == 5

    # Image 0 is finished: it has no segment.
    assert third.segments.tolist() == [[0, 1, 2, 1, 3, 1], [1, 1, 3, 1, 3, 2]]
    assert third.image.tolist() == [1]
    assert third.unconditional_row.tolist() == [1]
    assert third.write_index.tolist() == [10]
    assert third.twin_index.tolist() == [16]


def test_every_token_is_drawn_once_and_every_cached_position_fed_once() -> None:
    schedules = [[1, 2, 5], [8], [3, 3, 2], [1] * 8]
    plan = plan_decoding(schedules, [True, False, True, True], 8, CPU)
    drawn = [(b, n) for step in plan.steps for b, n in zip(step.image.tolist(), step.token_index.tolist(), strict=True)]
    assert sorted(drawn) == [(b, n) for b in range(4) for n in range(8)]
    fed: dict[int, list[int]] = {s: [] for s in range(plan.capacity.sequences)}
    for step in plan.steps:
        for context_start, num_context, _, _, cached, slot in step.segments.tolist():
            columns = (step.content_index[context_start : context_start + num_context] - slot * 10).tolist()
            assert cached == len(fed[slot])
            fed[slot] += columns
    for slot, columns in fed.items():
        last = schedules[int(plan.places.sources[slot])][-1]
        assert columns == list(range(1 + 8 - last))
        assert len(columns) <= plan.capacity.cache_positions


def test_repeated_layouts_share_one_plan() -> None:
    first = plan_decoding([[1, 3]], [True], 4, CPU)
    assert plan_decoding(((1, 3),), (True,), 4, CPU) is first
    assert plan_decoding([[1, 3]], [False], 4, CPU) is not first
    assert plan_decoding([], [], 4, CPU).steps == ()
