"""The points of the study and the sweeps that they belong to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Point:
    """One way to draw images: which model, whether its queries see each other, order, steps and the knobs."""

    trained: str  # "mutual" or "blind": whether the queries of a group saw each other in training
    drawn: str  # the same, while drawing and scoring
    order: str
    steps: int
    guidance_scale: float
    proximity_threshold: float
    repulsion_threshold: int
    seed: int


@dataclass(frozen=True)
class Measured:
    """The four measurements at a point."""

    point: Point
    images: int
    recognised: float  # share of guided images that the judge reads as their class
    frechet: float  # Fréchet distance of their judge features to the test set's
    dependency_nats: float  # teacher-forced nats per real test image, groups drawn as at this point
    consistency_nats: float  # nats per image drawn without guidance at temperature 1, scored one token at a time


@dataclass(frozen=True)
class Sweeps:
    """The values of the sweeps; `base` has those that a sweep leaves alone, and the default T."""

    base: Point
    steps: Sequence[int]
    orders: Sequence[str]
    seeds: int
    proximities: Sequence[float]
    repulsions: Sequence[int]
    guidance_scales: Sequence[float]
    twin: bool

    def order_points(self) -> list[Point]:
        """Steps x orders x seeds."""
        return self._seeds(
            (replace(self.base, order=order, steps=steps) for steps in self.steps for order in self.orders), self.seeds
        )

    def visibility_points(self) -> list[Point]:
        """Steps x seeds: the mutual model drawn blind and, if there is one, the twin that was trained blind."""
        kinds = [("mutual", "blind")] + [("blind", "blind")] * self.twin
        return self._seeds(
            (replace(self.base, trained=t, drawn=d, steps=steps) for steps in self.steps for t, d in kinds), self.seeds
        )

    def threshold_points(self) -> list[Point]:
        """Proximity x repulsion at the default T, two seeds."""
        return self._seeds(
            (
                replace(self.base, proximity_threshold=p, repulsion_threshold=r)
                for p in self.proximities
                for r in self.repulsions
            ),
            2,
        )

    def guidance_points(self) -> list[Point]:
        """Guidance scales at the default T, two seeds."""
        return self._seeds((replace(self.base, guidance_scale=scale) for scale in self.guidance_scales), 2)

    def all_points(self) -> list[Point]:
        """Returns every point once, those of seed 0 first, so that an interrupted study covers all sweeps."""
        sweeps = (self.order_points(), self.visibility_points(), self.threshold_points(), self.guidance_points())
        unique = dict.fromkeys(point for sweep in sweeps for point in sweep)
        return sorted(unique, key=lambda point: point.seed)

    @staticmethod
    def _seeds(points: Iterable[Point], seeds: int) -> list[Point]:
        return [replace(point, seed=seed) for point in points for seed in range(seeds)]
