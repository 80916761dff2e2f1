"""Bodies of requests: OpenAI's image parameters, and those of the decoder as extensions."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

_SEEDS = 2**53  # JSON's numbers are float64 in browsers


class Sampling(BaseModel):
    """Sampling settings that OpenAI's clients send in `extra_body`; None is the model's default."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    seed: Annotated[int, Field(ge=0, lt=_SEEDS)] | None = None
    num_inference_steps: Annotated[int, Field(ge=1)] | None = None
    guidance_scale: Annotated[float, Field(ge=-1e6, le=1e6)] | None = None
    temperature: Annotated[float, Field(ge=0, le=1e6)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    order: str | None = None


class ImageOptions(Sampling):
    """Fields shared by generations and edits."""

    prompt: Annotated[str, Field(min_length=1, max_length=1000)]
    model: Annotated[str, Field(max_length=500)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    size: Annotated[str, Field(max_length=20)] | None = None
    response_format: Literal["b64_json"] | None = None
    output_format: Literal["png", "webp", "jpeg"] | None = None
    output_compression: Annotated[int, Field(ge=0, le=100)] | None = None
    stream: bool | None = None
    partial_images: Annotated[int, Field(ge=0, le=3)] | None = None
    # Clients send these by default; they have no meaning for a class-conditional model.
    background: Literal["opaque", "auto"] | None = None
    quality: str | None = None
    style: str | None = None
    moderation: str | None = None
    user: str | None = None
    safety_identifier: str | None = None


class Generation(ImageOptions):
    """`POST /v1/images/generations`."""


class Edit(ImageOptions):
    """The text fields of `POST /v1/images/edits`, where numbers are text."""

    model_config = ConfigDict(strict=False)

    input_fidelity: str | None = None  # has no meaning here
    dilate: Annotated[int, Field(ge=0, le=1000)] | None = None  # cells
    feather: Annotated[int, Field(ge=0, le=1000)] | None = None  # pixels
    resize: Literal["stretch", "crop"] | None = None
