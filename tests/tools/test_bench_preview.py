"""Times of previews: of the same half-drawn images, both ways, beside a step of their decode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lpd_tools.bench.preview import APPROXIMATE, EXACT, STEP, time_previews

from lpd_ext.drawing import Drawing
from lpd_ext.pipeline import LPDPipeline


def test_both_previews_are_timed_of_half_drawn_images(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[tuple[int, int, bool]] = []
    exact, approximate = Drawing._decoded, Drawing._previewed

    def seen(real: Callable[..., Any], is_approximate: bool) -> Callable[..., Any]:
        def decode(self: Drawing, tokens: torch.Tensor, *rest: Any) -> Any:
            decoded.append((len(tokens), int((tokens[0] >= 0).sum()), is_approximate))
            return real(self, tokens, *rest)

        return decode

    monkeypatch.setattr(Drawing, "_decoded", seen(exact, False))
    monkeypatch.setattr(Drawing, "_previewed", seen(approximate, True))
    results = time_previews(LPDPipeline.from_pretrained("fashion_mnist"), 2, 4)
    assert [result.operator for result in results] == [STEP, EXACT, APPROXIMATE]
    assert all(len(result.seconds) == 4 and min(result.seconds) > 0 for result in results)
    timed = decoded[-2 * (4 + 3) :]
    assert {images for images, _, _ in timed} == {2}
    assert all(16 < cells < 48 for _, cells, _ in timed)  # of 64, about half way through
    assert [sum(way is wanted for _, _, way in timed) for wanted in (True, False)] == [7, 7]
    assert results[0].ratios == {STEP: 1.0}
    assert results[2].ratios == {STEP: pytest.approx(results[0].times.median / results[2].times.median)}
