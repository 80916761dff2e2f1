"""Attention of the teacher-forced pass: who sees whom, values, gradients, and what it must work under."""

from __future__ import annotations

from lpd_ext.training_attention import training_mask


def test_training_mask_spelled_out() -> None:
    # condition | group 0: 1 token | group 1: 2 tokens | group 2: 1 token (never context) ; then queries of 0, 1, 2
    wanted = [
        # c  g0 g1 g1  q0 q1 q1 q2
        [1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0, 0],
        [1, 0, 0, 0, 1, 0, 0, 0],
        [1, 1, 0, 0, 0, 1, 1, 0],
        [1, 1, 0, 0, 0, 1, 1, 0],
        [1, 1, 1, 1, 0, 0, 0, 1],
    ]
    assert training_mask([1, 2, 1]).int().tolist() == wanted
    wanted[5][6] = wanted[6][5] = 0
    assert training_mask([1, 2, 1], mutual_visibility=False).int().tolist() == wanted
