"""Serving on many machines: Ray Serve routes to, scales, checks and replaces replicas of `lpd serve`'s service.

    serve run lpd_tools.serve.ray:app model=lpd_l_256 max_images=16 replicas=2

A gateway speaks HTTP and hands work to a replica; each replica has a model and an engine of its own.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from fastapi import FastAPI
from pydantic import TypeAdapter, ValidationError
from ray import serve
from ray.exceptions import RayError
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy
from ray.serve.handle import DeploymentHandle

from lpd_ext.bundled import DEFAULT_MODEL
from lpd_tools.serve.app import Door, create_app
from lpd_tools.serve.errors import ApiError, unavailable
from lpd_tools.serve.service import ImageService
from lpd_tools.serve.settings import RayServing, Serving
from lpd_tools.serve.work import Accepted, Progress, Work
from lpd_tools.settings import settings_of

APP = "lpd"
_SEEDS = 2**53
_WAITING = "waiting"  # the metric that replicas are scaled by


class Replica:
    """A model and its engine, in a process of its own."""

    def __init__(self, config: Serving) -> None:
        from lpd_tools.checks import check_device
        from lpd_tools.models import load_pipeline

        pipe = load_pipeline(config.model or None, config.tokenizer or None, config.dtype, check_device(config.device))
        self.service = ImageService(pipe, config.model or DEFAULT_MODEL, config)

    async def draw(self, work: Work) -> Progress:
        """As `Backend` has it."""
        async with aclosing(self.service.draw(work)) as progress:
            async for item in progress:
                yield item

    async def describe(self) -> dict[str, Any]:
        """As `Backend` has it."""
        return await self.service.describe()

    async def ready(self) -> bool:
        """As `Backend` has it."""
        return await self.service.ready()

    async def metrics(self) -> bytes:
        """As `Backend` has it; of this replica."""
        return await self.service.metrics()

    def record_autoscaling_stats(self) -> dict[str, float]:
        """The engine's own queue, which Ray Serve asks for."""
        engine = self.service.engine
        return {_WAITING: engine.num_running + engine.num_waiting}


class Replicas:
    """A `Backend` of the replicas behind Ray's handle."""

    def __init__(self) -> None:
        self._found: DeploymentHandle | None = None

    @property
    def _handle(self) -> DeploymentHandle:
        if self._found is None:
            self._found = serve.get_deployment_handle(Replica.__name__, app_name=APP)
        return self._found

    async def draw(self, work: Work) -> Progress:
        """Draws in one replica and, if it dies, again in another; the seed is fixed before, so the images are equal."""
        if work.options.seed is None:
            seed = random.SystemRandom().randrange(_SEEDS)
            work = replace(work, options=work.options.model_copy(update={"seed": seed}))
        accepted = False
        for attempt in range(2):
            stream = self._handle.options(stream=True).draw.remote(work)
            try:
                async for item in stream:
                    if not isinstance(item, Accepted) or not accepted:
                        accepted = accepted or isinstance(item, Accepted)
                        yield item
                return
            except ApiError:
                raise
            except RayError as error:
                if isinstance(refused := getattr(error, "cause", None), ApiError):
                    raise refused from None
                if attempt:
                    raise unavailable("the replica that drew this was lost, twice") from error
            finally:
                stream.cancel()

    async def describe(self) -> dict[str, Any]:
        """As `Backend` has it."""
        described: dict[str, Any] = await self._handle.describe.remote()
        return described

    async def ready(self) -> bool:
        """As `Backend` has it."""
        return bool(await self._handle.ready.remote())

    async def metrics(self) -> bytes:
        """Returns the metrics of one replica; Ray has its own for all of them."""
        return bytes(await self._handle.metrics.remote())


def replicas_for_waiting(context: AutoscalingContext, images_per_replica: float = 8) -> tuple[int, dict[str, Any]]:
    """Returns the number of replicas needed for the images at all of them, so many each."""
    by_replica = (context.aggregated_metrics or {}).get(_WAITING, {})
    wanted = -(-sum(by_replica.values()) // images_per_replica)
    low, high = context.capacity_adjusted_min_replicas, context.capacity_adjusted_max_replicas
    return int(min(max(wanted, low), high)), {}


def read_arguments(arguments: Mapping[str, Any]) -> RayServing:
    """Parses the settings in `serve run`'s key=value arguments or in a config file; ValueError with a wrong key."""
    known = {item.name: item for item in settings_of(RayServing)}
    values = {}
    for name, value in arguments.items():
        if name not in known:
            raise ValueError(f"{name} is no argument of this application; there are {', '.join(known)}")
        try:
            values[name] = TypeAdapter(known[name].kind).validate_python(value)
        except ValidationError as error:
            raise ValueError(f"{name}: {error.errors()[0]['msg']}, got {value!r}") from None
    return RayServing(**values)


def app(arguments: Mapping[str, str]) -> Application:
    """Builds the application of `serve run lpd_tools.serve.ray:app`; arguments as of `lpd serve`, and `replicas`."""
    config = read_arguments(arguments)
    options: dict[str, Any] = {"num_replicas": config.replicas}
    if config.max_replicas > config.replicas:
        policy = AutoscalingPolicy(
            policy_function=replicas_for_waiting, policy_kwargs={"images_per_replica": 2 * config.max_images}
        )
        options = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=config.replicas,
                max_replicas=config.max_replicas,
                metrics_interval_s=2,
                look_back_period_s=6,
                upscale_delay_s=4,
                policy=policy,
            )
        }
    replica = serve.deployment(
        Replica,
        name=Replica.__name__,
        max_ongoing_requests=config.max_images + config.max_waiting,
        ray_actor_options={"num_cpus": config.cpus_per_replica, "num_gpus": config.gpus_per_replica},
        health_check_period_s=2,
        **options,
    )

    def gateway() -> FastAPI:
        return create_app(Replicas(), config, Door())

    # Handing on a request costs little, so the gateway holds as many as all replicas together.
    held = (config.max_images + config.max_waiting) * max(config.replicas, config.max_replicas)
    entrance = serve.deployment(
        serve.ingress(gateway)(), name="Gateway", max_ongoing_requests=held, ray_actor_options={"num_cpus": 0.1}
    )
    return entrance.bind(replica.bind(config))
