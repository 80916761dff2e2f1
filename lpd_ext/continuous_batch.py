"""Continuous batching: images join and leave between two steps, each at a step of its own."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from heapq import heappop, heappush

from torch import Tensor

from lpd_ext.cuda_graphs import CapturedDecode, DecodeGraphs
from lpd_ext.decode_state import DecodeState, Filters
from lpd_ext.model import LPDModel
from lpd_ext.modes import decoding_modes
from lpd_ext.plan import Capacity, Place, Places, Schedule, plan_step
from lpd_ext.request import DecodeRequest
from lpd_ext.sampler import advance, begin
from lpd_ext.weights_key import weights_of

_STEPS_KEPT = 256  # plans of steps that may recur


@dataclass(eq=False)
class RunningImage:
    """An image in a batch, and the number of its steps that are done."""

    place: Place
    schedule: Schedule
    filters: Filters
    steps_done: int = 0

    @property
    def finished(self) -> bool:
        """Whether all tokens of the image are drawn."""
        return self.steps_done == self.schedule.num_steps


class ContinuousBatch:
    """A batch that images may join and leave between any two steps; for one thread at a time.

    An image takes a cache slot, or two with guidance, from a pool allocated once. Its tokens are those of
    `sampler.generate`, since an image depends on its own request alone. Raises ValueError for sizes below 1.
    """

    def __init__(
        self, model: LPDModel, max_images: int, max_sequences: int | None = None, graphs: DecodeGraphs | None = None
    ) -> None:
        """max_sequences: cache slots; by default two per image. graphs: on CUDA, for steps that recur."""
        slots = 2 * max_images if max_sequences is None else max_sequences
        if max_images < 1 or slots < 1:
            raise ValueError(f"max_images and max_sequences must be >= 1, got {max_images} and {slots}")
        num_tokens = model.config.num_tokens
        self._device = model.pos_embed.device
        with decoding_modes(self._device):
            capacity = Capacity(max_images, slots, cache_positions=num_tokens, most_rows=0)
            self._state = DecodeState(model, capacity, Filters(False, False))
        self._weights = weights_of(model)
        self._begun = False  # since the last image came: weights may have been written to before
        # Always the lowest first, so that similar images get the places of those before them.
        self._free_rows, self._free_slots = list(range(max_images)), list(range(slots))
        self._plan_step = lru_cache(maxsize=_STEPS_KEPT)(plan_step)
        self._graphs = graphs if graphs is not None and graphs.supports(self._device) else None
        self._seen: OrderedDict[Hashable, None] = OrderedDict()  # steps seen before
        self.running: list[RunningImage] = []

    @property
    def cache_bytes(self) -> int:
        """Size of the pool of cache slots."""
        return sum(layer.k_cache.nbytes + layer.v_cache.nbytes for layer in self._state.parts.layers)

    def fits(self, request: DecodeRequest) -> bool:
        """Whether there is room for the request's images now."""
        sequences = len(request.labels) + sum(request.guided)
        return len(request.labels) <= len(self._free_rows) and sequences <= len(self._free_slots)

    def admit(self, request: DecodeRequest) -> list[RunningImage]:
        """Gives the request's images places; the next `advance` starts them. RuntimeError if they do not fit."""
        if request.config != self._state.model.config:
            raise ValueError(f"request was made for a model of {request.config}, got {self._state.model.config}")
        if not self.fits(request):
            rows, slots = len(self._free_rows), len(self._free_slots)
            raise RuntimeError(
                f"no room for {len(request.labels)} images, {sum(request.guided)} of them guided: {rows} rows and "
                f"{slots} cache slots are free"
            )
        places = [
            Place(heappop(self._free_rows), heappop(self._free_slots), heappop(self._free_slots) if guided else None)
            for guided in request.guided
        ]
        with decoding_modes(self._device):
            self._state.load(request, Places.of(places, self._device))
        self._begun = False
        filters = [Filters(k > 0, p < 1) for k, p in zip(request.top_k, request.top_p, strict=True)]
        images = list(map(RunningImage, places, request.schedules, filters))
        self.running += images
        return images

    def advance(self) -> list[RunningImage]:
        """Runs one step of every unfinished image; returns the images that it finished."""
        images = [image for image in self.running if not image.finished]
        if not images:
            return []
        places, rows = zip(*((image.place, image.schedule.rows(image.steps_done)) for image in images), strict=True)
        self._state.filters = Filters(any(i.filters.top_k for i in images), any(i.filters.top_p for i in images))
        with decoding_modes(self._device):
            self._follow_weights()
            if not self._begun:
                begin(self._state)
                self._begun = True
            self._draw(places, rows)
        for image in images:
            image.steps_done += 1
        return [image for image in images if image.finished]

    def _follow_weights(self) -> None:
        """Uses replaced layers and weights from now on; RuntimeError if they were moved away from the caches."""
        model = self._state.model
        if (weights := weights_of(model)) == self._weights:
            return
        ours, theirs = ((t.device, t.dtype) for t in (self._state.parts.layers[0].k_cache, model.pos_embed))
        if ours != theirs:
            raise RuntimeError(
                f"the model was moved to {theirs[0]}, {theirs[1]}; the caches are on {ours[0]}, {ours[1]}"
            )
        self._state.look_up_weights()
        self._begun = False
        self._weights = weights

    def _draw(self, places: tuple[Place, ...], rows: tuple[tuple[int, int, int], ...]) -> None:
        step = self._plan_step(places, rows, self._state.model.config.num_tokens, self._device)
        run = partial(advance, self._state, step)
        if self._graphs is None:
            run()
            return
        # Capturing takes longer than a step, so it is worth it only for a mix of images seen before.
        mix = (places, rows, self._state.filters)
        captured = None
        if mix in self._seen:
            with self._graphs.lock:
                captured = self._graphs.find(self._weights, mix, partial(CapturedDecode, self._state, [run]))
                if captured is not None:
                    captured.replay()
        else:
            self._seen[mix] = None
            if len(self._seen) > _STEPS_KEPT:
                self._seen.popitem(last=False)
        if captured is None:
            run()

    def tokens(self, image: RunningImage) -> Tensor:
        """Returns the image's tokens so far, int64 [N] in raster order, -1 where not drawn."""
        return self._state.grid[image.place.image].clone()

    def release(self, images: Sequence[RunningImage]) -> None:
        """Frees the places of images, finished or not."""
        for image in images:
            self.running.remove(image)
            heappush(self._free_rows, image.place.image)
            for slot in (image.place.slot, image.place.twin):
                if slot is not None:
                    heappush(self._free_slots, slot)
