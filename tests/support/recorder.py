"""A stand-in for CUDA's graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence


class Recorder:
    """Captures by keeping the function; like CUDA's it runs it before, and counts captures and replays."""

    def __init__(self) -> None:
        self.captures = self.replays = 0

    def __call__(self, runs: Sequence[Callable[[], None]]) -> list[Callable[[], None]]:
        return [self.capture(run) for run in runs]

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        self.captures += 1
        run()

        def replay() -> None:
            self.replays += 1
            run()

        return replay
