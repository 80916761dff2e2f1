"""Measures one point of the study by four instruments: two count nats, two look at pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lpd_ext.orders import make_orders
from lpd_ext.pipeline import LPDPipeline
from lpd_ext.schedule import group_sizes
from lpd_ext.tokenizer import VQTokenizer
from lpd_tools.bench.plain_decode import decode_plain
from lpd_tools.data.fashion_mnist import LabelledImages, from_pixels, to_images
from lpd_tools.evaluation.likelihood import dependency_loss, self_consistency
from lpd_tools.evaluation.metrics import frechet_distance
from lpd_tools.study.points import Measured, Point
from lpd_tools.study.times import BATCH
from lpd_tools.training.judge import Judge, grey, judge_features, predict


class Instruments:
    """The instruments of all points: pipelines by their training, a judge, real images and their tokens."""

    def __init__(
        self, pipes: Mapping[str, LPDPipeline], judge: Judge, test: LabelledImages, images: int, scored: int
    ) -> None:
        self.pipes, self.images = pipes, images
        self.device = pipes["mutual"].model.pos_embed.device
        self.judge = judge.to(self.device)
        self.real = judge_features(self.judge, grey(test))
        self.labels = test.labels[:scored]
        tokenizer = pipes["mutual"].tokenizer  # the twin's is the same
        with torch.inference_mode():
            parts = test.pixels[:scored].split(250)
            self.tokens = torch.cat([tokenizer.encode(to_images(part).to(self.device)) for part in parts])
        self.tokens = self.tokens.flatten(1).cpu()

    def measure(self, point: Point) -> Measured:
        """Measures a point by all instruments; image i has seed `point.seed * images + i`, so seeds share no image."""
        model = self.pipes[point.trained].model
        first = point.seed * self.images
        labels = torch.arange(self.images) % model.config.num_classes
        temperature = self.pipes[point.trained].defaults.temperature
        drawn = from_pixels(self._pixels(point, self._tokens(point, labels, first, temperature)))
        free_labels = labels[: len(self.tokens)]
        # Drawn without guidance at temperature 1, as the model itself scores images.
        free = self._tokens(replace(point, guidance_scale=1.0), free_labels, first, temperature=1.0)
        sizes = group_sizes(model.config.num_tokens, point.steps)
        orders = self._orders(point, sizes, first, len(self.tokens))
        visible = point.drawn == "mutual"
        dependency = dependency_loss(model, self.tokens, self.labels, orders, sizes, mutual_visibility=visible)
        return Measured(
            point,
            images=self.images,
            recognised=float((predict(self.judge, drawn) == labels).float().mean()),
            frechet=frechet_distance(judge_features(self.judge, drawn), self.real),
            dependency_nats=float(dependency.mean()),
            consistency_nats=float(self_consistency(model, free, free_labels).mean()),
        )

    def _tokens(self, point: Point, labels: Tensor, first_seed: int, temperature: float) -> Tensor:
        """Draws tokens int64 [B, N], on the CPU, with the settings of `point`, image i from seed first_seed + i."""
        draw = self._pipeline_tokens if point.drawn == "mutual" else self._plain_tokens
        batches = labels.split(BATCH)
        drawn = [draw(point, batch, first_seed + i * BATCH, temperature) for i, batch in enumerate(batches)]
        return torch.cat(drawn).cpu()

    @torch.inference_mode()
    def _pixels(self, point: Point, tokens: Tensor) -> Tensor:
        pipe = self.pipes[point.trained]
        grids = tokens.unflatten(1, pipe.model.config.grid).split(BATCH)
        return torch.cat([VQTokenizer.to_pixels(pipe.tokenizer.decode(batch.to(self.device))).cpu() for batch in grids])

    def _pipeline_tokens(self, point: Point, labels: Tensor, seed: int, temperature: float) -> Tensor:
        drawn = self.pipes[point.trained](
            labels.tolist(),
            num_inference_steps=point.steps,
            order=point.order,
            guidance_scale=point.guidance_scale,
            temperature=temperature,
            proximity_threshold=point.proximity_threshold,
            repulsion_threshold=point.repulsion_threshold,
            seeds=list(range(seed, seed + len(labels))),
            output_type="tokens",
        )
        return drawn.tokens.flatten(1)

    def _plain_tokens(self, point: Point, labels: Tensor, seed: int, temperature: float) -> Tensor:
        """Draws in plain torch, with one random stream per batch: kernels cannot hide queries from each other."""
        pipe = self.pipes[point.trained]
        sizes = group_sizes(pipe.model.config.num_tokens, point.steps)
        torch.manual_seed(seed)
        return decode_plain(
            pipe.model,
            labels.to(self.device),
            sizes,
            self._orders(point, sizes, seed, len(labels)).to(self.device),
            point.guidance_scale,
            temperature=temperature,
            mutual_visibility=False,
        )

    def _orders(self, point: Point, sizes: Sequence[int], first_seed: int, count: int) -> Tensor:
        return make_orders(
            point.order,
            [sizes] * count,
            self.pipes[point.trained].model.config.grid,
            torch.arange(first_seed, first_seed + count),
            proximity_threshold=point.proximity_threshold,
            repulsion_threshold=point.repulsion_threshold,
        )
