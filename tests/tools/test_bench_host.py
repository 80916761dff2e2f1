"""Times of the host's share of a decode: every part, of the same request that a decode would have."""

from __future__ import annotations

import pytest
from lpd_tools.bench import host
from lpd_tools.bench.cases import SHAPES
from lpd_tools.bench.host import ALL, KEY, LOAD, ORDERS, REQUEST, time_host

from lpd_ext.decode_state import DecodeState
from lpd_ext.request import DecodeRequest


def test_every_part_is_timed_on_the_request_of_a_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[DecodeRequest] = []
    load = DecodeState.load

    def recording(self: DecodeState, request: DecodeRequest, *rest: object) -> None:
        loaded.append(request)
        load(self, request, *rest)

    monkeypatch.setattr(host.DecodeState, "load", recording)
    results = time_host(SHAPES["L-256-20"], 3, 4)
    assert [result.operator for result in results] == [ALL, REQUEST, ORDERS, KEY, LOAD]
    assert all(len(result.seconds) == 4 and min(result.seconds) > 0 for result in results)
    assert len(loaded) == 2 * (4 + 5)  # the whole and the part, warm-up included
    assert all(request.guided == (True,) * 3 and request.num_groups == 20 for request in loaded)
