"""Half a minute of support/fuzz_operators.py; `make fuzz` runs it for longer, with another seed each time."""

from __future__ import annotations

from pathlib import Path

import fuzz
import pytest

SECONDS, SEED = 30, 16


def test_random_calls_are_right_or_refused() -> None:
    outcomes = fuzz.fuzz("operators", 1_000_000, SECONDS, SEED)
    assert sum(outcomes.values()) >= 1000
    assert min(outcomes["accepted"], outcomes["refused"]) > 0.2 * sum(outcomes.values())


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("os.kill(os.getpid(), 8)", "exit status -8 at case 3"),
        ("assert False, 'wrong'", "case 3 of seed 5: wrong"),
        ("bytearray(64 << 30)", "exit status 1 at case 3"),
        ("time.sleep(60)", "no end within 3 s at case 3"),
    ],
)
def test_a_fault_is_reported(fault: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = f"if index == 3:\n        {fault}\n    return 'fine'"
    (tmp_path / "fuzz_planted.py").write_text(f"import os, time\ndef case(seed, index):\n    {body}\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(fuzz, "HANGS", 3)
    with pytest.raises(RuntimeError, match=said) as raised:
        fuzz.fuzz("planted", 10, seed=5)
    assert "fuzz.py planted --seed 5 --first 3 --calls 1" in str(raised.value)
    assert fuzz.fuzz("planted", 3, seed=5) == {"fine": 3}
