"""Masks: which cells a pixel mask touches, what fills a hole, how much of a pixel is new."""

from __future__ import annotations

import torch

from lpd_ext.masks import filled, masked_cells, painted_share


def test_a_cell_is_masked_by_any_of_its_pixels() -> None:
    masks = torch.zeros(2, 8, 12, dtype=torch.bool)
    masks[0, 3, 4] = masks[1, 7, 11] = True
    assert masked_cells(masks, 4).nonzero().tolist() == [[0, 0, 1], [1, 1, 2]]
    assert masked_cells(masks, 4, dilate=1)[0].all()
    assert masked_cells(masks, 4, dilate=1)[1].tolist() == [[False, True, True], [False, True, True]]
    assert masked_cells(masks[:0], 4, dilate=1).shape == (0, 2, 3)


def test_a_hole_is_filled_from_around_it() -> None:
    ramp = torch.linspace(-1, 1, 16).expand(1, 3, 13, 16).contiguous()
    known = torch.ones(1, 13, 16, dtype=torch.bool)
    known[:, 4:9, 5:11] = False
    spoiled = ramp.where(known[:, None], float("nan"))
    found = filled(spoiled, known)
    assert torch.equal(found[:, :, :4], ramp[:, :, :4])
    assert (found - ramp).abs().max() < 0.25
    assert torch.equal(filled(ramp, torch.ones_like(known)), ramp)
    assert torch.equal(filled(ramp, torch.zeros_like(known)), torch.zeros_like(ramp))
    only = torch.zeros_like(known)
    only[0, 3, 7] = True
    assert torch.allclose(filled(ramp, only), ramp[0, 0, 3, 7].expand_as(ramp))


def test_a_feathered_edge_falls_linearly() -> None:
    masks = torch.zeros(1, 5, 9, dtype=torch.bool)
    masks[0, 2, 2:4] = True
    assert torch.equal(painted_share(masks)[:, 0], masks.float())
    row = painted_share(masks, feather=3)[0, 0, 2]
    assert torch.allclose(row, torch.tensor([0.5, 0.75, 1, 1, 0.75, 0.5, 0.25, 0, 0]))
