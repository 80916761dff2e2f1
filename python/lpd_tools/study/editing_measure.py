"""Measures one point of the study of editing: edited pictures by a judge and by the model's likelihood."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lpd_ext.drawing import Drawing
from lpd_ext.edit_plan import plan_inpaint
from lpd_ext.masks import filled
from lpd_ext.pipeline import LPDPipeline
from lpd_ext.request import DecodeRequest
from lpd_ext.tokenizer import VQTokenizer
from lpd_tools.data.fashion_mnist import LabelledImages, from_pixels, to_images
from lpd_tools.evaluation.likelihood import dependency_loss
from lpd_tools.evaluation.metrics import Statistics, frechet_distance
from lpd_tools.study.editing_points import (
    EDITED,
    FILLED,
    RECONSTRUCTION,
    Edited,
    EditPoint,
    hidden_cells,
    hidden_pixels,
)
from lpd_tools.study.times import BATCH
from lpd_tools.training.judge import Judge, grey, judge_features, predict

_PARTS = 10


class EditInstruments:
    """The instruments of all points: a pipeline, a judge, the first test images, and the others to compare with."""

    def __init__(self, pipe: LPDPipeline, judge: Judge, test: LabelledImages, images: int) -> None:
        self.pipe, self.device = pipe, pipe.model.pos_embed.device
        self.judge = judge.to(self.device)
        others = LabelledImages(test.pixels[images:], test.labels[images:])
        features = judge_features(self.judge, grey(others)).double()
        self.others = Statistics(features.mean(0), features.T.cov())
        self.pictures, self.labels = to_images(test.pixels[:images]), test.labels[:images]
        with torch.inference_mode():
            parts = self.pictures.split(BATCH)
            self.tokens = torch.cat([pipe.tokenizer.encode(part.to(self.device)) for part in parts]).flatten(1).cpu()
        self._compared: dict[EditPoint, Tensor] = {}  # nats of what points are compared with

    def measure(self, point: EditPoint) -> Edited:
        """Measures the pictures of a point; image i is drawn from seed i."""
        if point.picture != EDITED:
            pictures = VQTokenizer.to_pixels(self.compared(point))
            return Edited(point, **self._looks(pictures, pictures))
        drawings = self.drawings(point)
        pasted, plain = (torch.cat(parts) for parts in zip(*map(self.draw, drawings), strict=True))
        known, before = ~hidden_pixels(point.mask), VQTokenizer.to_pixels(self.pictures).int()
        nats = self.nats([drawing.request for drawing in drawings])
        excess = nats - self._nats_to_compare(point)
        return Edited(
            point,
            **self._looks(pasted, plain),
            known_difference=float((pasted.int() - before).abs()[:, known].max()),
            plain_known_difference=float((plain.int() - before).abs()[:, known].float().mean()),
            nats=float(nats.mean()),
            nats_error=_error(nats),
            excess_nats=float(excess.mean()),
            excess_error=_error(excess),
        )

    def drawings(self, point: EditPoint) -> list[Drawing]:
        """Plans the edits of all images, in batches."""
        return [self.plan(point, part) for part in torch.arange(len(self.labels)).split(BATCH)]

    def plan(self, point: EditPoint, rows: Tensor) -> Drawing:
        """Plans the edits of some images, int64 [n]."""
        return plan_inpaint(
            self.pipe,
            list(self.pictures[rows]),
            hidden_pixels(point.mask),
            self.labels[rows].tolist(),
            num_inference_steps=point.steps,
            order=point.order,
            seeds=rows.tolist(),
            prefill_block=point.prefill_block or None,
        )

    @torch.inference_mode()
    def draw(self, drawing: Drawing) -> tuple[Tensor, Tensor]:
        """Draws pixels uint8 [n, H, W, 3] of edits, and of the same before the known pixels are pasted."""
        assert drawing.finish is not None
        images = replace(drawing, finish=None).run("pt").images
        pasted = drawing.finish(images, torch.arange(len(images)))
        return VQTokenizer.to_pixels(pasted).cpu(), VQTokenizer.to_pixels(images).cpu()

    @torch.inference_mode()
    def compared(self, point: EditPoint) -> Tensor:
        """Returns the pictures float32 [B, 3, H, W] for comparison, which are not drawn."""
        if point.picture == RECONSTRUCTION:
            grids = self.tokens.unflatten(1, self.pipe.model.config.grid).split(BATCH)
            return torch.cat([self.pipe.tokenizer.decode(grid.to(self.device)).cpu() for grid in grids])
        if point.picture == FILLED:
            return filled(self.pictures, (~hidden_pixels(point.mask)).expand(len(self.pictures), -1, -1))
        return self.pictures

    def nats(self, requests: list[DecodeRequest]) -> Tensor:
        """Returns the teacher-forced nats float64 [B] of the true tokens of the hidden cells."""
        parts = []
        for tokens, labels, request in zip(self.tokens.split(BATCH), self.labels.split(BATCH), requests, strict=True):
            assert request.known_tokens is not None
            assert request.prefill is not None
            known = request.known_tokens.cpu()
            blocks, groups = request.prefill[0], request.group_sizes[0]
            seen = torch.where(known >= 0, known, tokens)
            sizes = [*blocks, *groups]
            orders = request.orders.cpu()
            parts.append(dependency_loss(self.pipe.model, seen, labels, orders, sizes, num_known=sum(blocks)))
        return torch.cat(parts)

    def _nats_to_compare(self, point: EditPoint) -> Tensor:
        """Returns the nats of one token at a time in random orders, or with one block of known cells."""
        if point.prefill_block:
            other = replace(point, prefill_block=0)
        else:
            cells = hidden_cells(point.mask, self.pipe.tokenizer.config.stride)
            other = EditPoint(EDITED, point.mask, "random", cells)
        if other not in self._compared:
            self._compared[other] = self.nats([drawing.request for drawing in self.drawings(other)])
        return self._compared[other]

    def _looks(self, pasted: Tensor, plain: Tensor) -> dict[str, Any]:
        """Returns the judge's measures of pixels uint8 [B, H, W, 3]."""
        images, plain_images = from_pixels(pasted), from_pixels(plain)
        features = judge_features(self.judge, images)
        return {
            "images": len(images),
            "recognised": self._recognised(images),
            "plain_recognised": self._recognised(plain_images),
            "frechet": self._distance(features),
            "frechet_error": jackknife_error(self._distance, features),
            "plain_frechet": self._distance(judge_features(self.judge, plain_images)),
        }

    def _distance(self, features: Tensor) -> float:
        return frechet_distance(features, self.others)

    def _recognised(self, images: Tensor) -> float:
        return float((predict(self.judge, images) == self.labels).float().mean())


def jackknife_error(measure: Callable[[Tensor], float], values: Tensor) -> float:
    """Returns the standard error of a measure of values [B, ...], leaving out each tenth of them in turn."""
    part_of = torch.arange(len(values)) % _PARTS
    without = torch.tensor([measure(values[part_of != part]) for part in range(_PARTS)], dtype=torch.float64)
    return math.sqrt(float(without.var(correction=0)) * (_PARTS - 1))


def _error(values: Tensor) -> float:
    """Returns the standard error of the mean of values [B]."""
    return float(values.std() / math.sqrt(len(values)))
