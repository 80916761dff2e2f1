"""Labels in, images out: a transformer, a tokenizer and their sampling defaults in one object."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lpd_ext import editing, published
from lpd_ext.bundled import bundled_model
from lpd_ext.cancel import Cancel
from lpd_ext.checkpoint import ModelDType, load_model, read_config, save_model
from lpd_ext.checks import as_int, as_positive_int, as_real, as_scalar
from lpd_ext.class_names import find_class
from lpd_ext.content import content_of
from lpd_ext.cuda_graphs import DecodeGraphs
from lpd_ext.drawing import Drawing, LPDPipelineOutput, OutputType, StepCallback, StepPreview, check_output_type
from lpd_ext.editing import Margins
from lpd_ext.hub import (
    CONFIG_FILE,
    PREVIEW_FILE,
    TOKENIZER_FILE,
    HubOptions,
    find_model,
    find_tokenizer,
    how_to_bundle,
    is_training_folder,
    published_tokenizer,
)
from lpd_ext.image_input import Pictures
from lpd_ext.linear import pack, unpack
from lpd_ext.model import LPDConfig, LPDModel
from lpd_ext.modes import own_modes
from lpd_ext.orders import Order
from lpd_ext.pixel_decoder import DTYPES
from lpd_ext.preview_decoder import PreviewDecoder
from lpd_ext.quantize import is_quantized
from lpd_ext.request import DecodeRequest, GuidanceSchedule, OrderPolicy, make_request
from lpd_ext.tokenizer import VQTokenizer

log = logging.getLogger(__name__)
Label = int | str | None
_CHECKED_BY_REQUEST = ("guidance_scale", "guidance_schedule", "temperature", "top_k", "top_p")
_ANY_MODEL = LPDConfig(dim=8, depth=1, heads=1, vocab_size=1, num_classes=1, grid=(1, 1))


@dataclass(frozen=True)
class SamplingDefaults:
    """Settings of calls that leave them out; stored in config.json under 'sampling'."""

    num_inference_steps: int = 20
    guidance_scale: float = 1.0
    guidance_schedule: GuidanceSchedule = "linear"
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    order: str = "locality"
    proximity_threshold: float = 1.0
    repulsion_threshold: int | None = None  # None: orders.default_repulsion_threshold of the grid

    def __post_init__(self) -> None:
        """Converts the values to plain Python types; TypeError or ValueError with the name of a wrong one."""
        if not isinstance(self.order, str):
            raise TypeError(f"order must be the name of a policy, got {self.order!r}")
        policy = OrderPolicy(self.order, self.proximity_threshold, self.repulsion_threshold)
        given = {name: getattr(self, name) for name in _CHECKED_BY_REQUEST}
        request = make_request(_ANY_MODEL, [None], num_inference_steps=1, order=policy, seeds=0, **given)
        values = {name: getattr(request, name)[0] for name in _CHECKED_BY_REQUEST} | {
            "num_inference_steps": as_positive_int(self.num_inference_steps, "num_inference_steps"),
            "proximity_threshold": as_real(self.proximity_threshold, "proximity_threshold"),
        }
        if self.repulsion_threshold is not None:
            values["repulsion_threshold"] = as_int(self.repulsion_threshold, "repulsion_threshold")
        for name, value in values.items():
            object.__setattr__(self, name, value)


@dataclass
class LPDPipeline:
    """Class-conditional image generation with locality-aware parallel decoding.

    cuda_graphs: on a GPU, captures each new batch layout as a CUDA graph and replays it (the KV caches of the last four
    stay allocated). False saves that memory, and captures that are never replayed.
    max_images: how many images are drawn at once; a larger batch is drawn in parts, with the same result. None: as many
    as free memory allows, with a logged warning if that takes parts.
    pixel_dtype: on a CPU with AVX512_BF16, bfloat16 decodes tokens to pixels faster, at 40 dB or more to float32; see
    `pixel_decoder.PixelDecoder`.
    preview_decoder: draws the previews of `stream` and of an engine, which are exact and slower without it.
    """

    model: LPDModel
    tokenizer: VQTokenizer
    defaults: SamplingDefaults = field(default_factory=SamplingDefaults)
    class_names: list[str] = field(default_factory=list)
    cuda_graphs: bool = True
    pixel_dtype: torch.dtype = torch.float32
    max_images: int | None = None
    preview_decoder: PreviewDecoder | None = None
    _graphs: DecodeGraphs = field(default_factory=DecodeGraphs, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.tokenizer.config.codebook_size != self.model.config.vocab_size:
            raise ValueError(
                f"tokenizer has {self.tokenizer.config.codebook_size} codes, but the model's vocabulary is "
                f"{self.model.config.vocab_size}"
            )
        if self.preview_decoder is not None:
            self.preview_decoder.check(self.tokenizer.config)
        if self.max_images is not None:
            self.max_images = as_positive_int(self.max_images, "max_images")
        if self.pixel_dtype not in DTYPES:
            raise ValueError(f"pixel_dtype must be torch.float32 or torch.bfloat16, got {self.pixel_dtype}")

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles by value: torch.multiprocessing would otherwise share the memory of both networks' weights."""
        return _from_bytes, (type(self), pickle.dumps(self._parts()))

    def __copy__(self) -> LPDPipeline:
        return type(self)(**self._parts())

    def __deepcopy__(self, memo: dict[int, Any]) -> LPDPipeline:
        return type(self)(**copy.deepcopy(self._parts(), memo))

    def _parts(self) -> dict[str, Any]:
        """Returns the fields of the pipeline, without the state of earlier calls."""
        return {item.name: getattr(self, item.name) for item in fields(self) if item.init}

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path | None = None,
        *,
        tokenizer: str | Path | None = None,
        grid: tuple[int, int] | None = None,
        heads: int | None = None,
        dtype: ModelDType | None = None,
        device: torch.device | str = "cpu",
        revision: str | None = None,
        token: str | bool | None = None,
        ema: bool = False,
    ) -> LPDPipeline:
        """Loads a pipeline by name; by default the bundled icons model.

        path is a bundled model ("icons", "fashion_mnist"), a published one ("lpd_l_256"), a hub id, a folder, or a
        weight file. tokenizer is a weight file, a folder or a hub id, for a model that comes without one; None takes
        the published tokenizer if the vocabulary has its size. revision and token are passed to the hub. grid, heads,
        dtype (None, a float dtype or "int8") and ema are the transformer's, as in `load_model`. Models of published
        size get the published sampling defaults and ImageNet's class names. On a CPU the linear layers are packed
        for decoding; `linear.unpack(pipe.model)` undoes that, for training. Raises ValueError, ImportError (hub without
        huggingface_hub), or an OSError (FileNotFoundError, ConnectionError, PermissionError), see `hub.find_model`.
        """
        options = HubOptions(revision, token)
        files = find_model(bundled_model() if path is None else path, options)
        config: Mapping[str, Any] = read_config(files.model) if files.model.is_dir() else {}
        with content_of(files.model / CONFIG_FILE):
            defaults, names = _sampling_defaults(config), _class_names(config)
        if tokenizer is not None:
            tokenizer = find_tokenizer(tokenizer)
        model = load_model(files.model, grid=grid, heads=heads, dtype=dtype, device=device, packed=True, ema=ema)
        if tokenizer is None and files.tokenizer is None and model.config.vocab_size != published.TOKENIZER_CODES:
            if is_training_folder(files.model):
                raise ValueError(how_to_bundle(files.model))
            raise ValueError(f"tokenizer must be given (a weight file): {str(files.model)!r} comes without one")
        vq_file = tokenizer or files.tokenizer or published_tokenizer()
        vq = VQTokenizer.from_file(vq_file).to(device)
        log.info("%s, %s, tokenizer %s", files.weights, model.config, vq_file)
        if "sampling" not in config:
            defaults = SamplingDefaults(**published.sampling_settings(model.config))
            log.info("no sampling settings beside the weights: %s", defaults)
        names = names or published.class_names(model.config)
        with content_of(vq_file):
            pipe = cls(model, vq, defaults, names)
        if files.preview is None:
            return pipe
        if tokenizer is not None and not (files.tokenizer is not None and Path(tokenizer).samefile(files.tokenizer)):
            log.info("%s is left out: it was trained for another tokenizer's pixels", files.preview)
            return pipe
        with content_of(files.preview):
            return replace(pipe, preview_decoder=PreviewDecoder.from_file(files.preview).to(device))

    def save_pretrained(
        self, directory: str | Path, dtype: torch.dtype | None = None, *, extra: Mapping[str, Any] | None = None
    ) -> None:
        """Writes config.json, model.safetensors and tokenizer.safetensors (floats in dtype, if given).

        A preview decoder is written to preview.safetensors; without one, a file of that name is removed, as it would be
        taken for this model's. extra: further entries of config.json. A failed save leaves the folder as it was; see
        `save_model`.
        """
        entries = {"sampling": asdict(self.defaults), "class_names": list(self.class_names), **(extra or {})}
        _class_names(entries)  # refuses names that could not be loaded again
        parts = {TOKENIZER_FILE: self.tokenizer.state_dict()}
        if self.preview_decoder is not None:
            parts[PREVIEW_FILE] = self.preview_decoder.state_dict()
        save_model(self.model, directory, extra=entries, dtype=dtype, beside=parts)
        if self.preview_decoder is None:
            (Path(directory) / PREVIEW_FILE).unlink(missing_ok=True)  # of the model that was there before

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> LPDPipeline:
        """Moves both networks to device and casts the transformer to dtype; ValueError if its weights are int8."""
        if is_quantized(self.model) and not (dtype is None and torch.device(device or "cpu").type == "cpu"):
            raise ValueError(f"an int8 transformer stays on the CPU and computes in float32, got {device}, {dtype}")
        unpack(self.model).to(device=device, dtype=dtype)
        if not self.model.training:
            pack(self.model)
        self.tokenizer.to(device=device)
        if self.preview_decoder is not None:
            self.preview_decoder.to(device=device)
        self._graphs = DecodeGraphs()  # the old graphs read weights that have moved
        return self

    def __call__(
        self,
        class_labels: Label | Sequence[Label],
        *,
        output_type: OutputType = "pil",
        callback_on_step_end: StepCallback | None = None,
        cancel: Cancel | None = None,
        **options: Any,
    ) -> LPDPipelineOutput:
        """Draws one image per label.

        class_labels are class indices, class names, or None (unconditional); options as in `prepare`; output_type,
        callback_on_step_end and cancel as in `drawing.Drawing.run`. Raises ValueError or TypeError with the name of a
        wrong argument before any work.
        """
        check_output_type(output_type)
        return self.drawing(self.prepare(class_labels, **options)).run(output_type, callback_on_step_end, cancel)

    def stream(
        self,
        class_labels: Label | Sequence[Label],
        *,
        cancel: Cancel | None = None,
        preview_every: int = 1,
        exact_previews: bool = False,
        **options: Any,
    ) -> Iterator[StepPreview]:
        """Draws like a call, yielding the partial grid and a preview (undrawn cells grey) after each group.

        cancel, preview_every and exact_previews as in `drawing.Drawing.stream`. Raises ValueError or TypeError with the
        name of a wrong argument at once.
        """
        return self.drawing(self.prepare(class_labels, **options)).stream(cancel, preview_every, exact_previews)

    def drawing(self, request: DecodeRequest, **finish: Any) -> Drawing:
        """Returns a drawing of the request by this pipeline; finish as in `Drawing`."""
        graphs = self._graphs if self.cuda_graphs else None
        finish = {"max_images": self.max_images, "preview_decoder": self.preview_decoder, **finish}
        return Drawing(self.model, self.tokenizer, request, self.pixel_dtype, graphs, **finish)

    def inpaint(
        self, images: Pictures, masks: Pictures, class_labels: Label | Sequence[Label], **options: Any
    ) -> LPDPipelineOutput:
        """Redraws the masked parts of pictures; see `editing.inpaint`."""
        return editing.inpaint(self, images, masks, class_labels, **options)

    def outpaint(
        self,
        images: Pictures,
        margins: Margins | Sequence[Margins],
        class_labels: Label | Sequence[Label] = None,
        **options: Any,
    ) -> LPDPipelineOutput:
        """Continues pictures beyond their edges; see `editing.outpaint`."""
        return editing.outpaint(self, images, margins, class_labels, **options)

    def class_edit(
        self, images: Pictures, masks: Pictures, new_labels: Label | Sequence[Label], **options: Any
    ) -> LPDPipelineOutput:
        """Redraws the masked parts of pictures as another class; see `editing.class_edit`."""
        return editing.class_edit(self, images, masks, new_labels, **options)

    def variations(
        self,
        images: Pictures,
        keep: float | Sequence[float],
        class_labels: Label | Sequence[Label] = None,
        **options: Any,
    ) -> LPDPipelineOutput:
        """Redraws pictures, keeping a share of the cells; see `editing.variations`."""
        return editing.variations(self, images, keep, class_labels, **options)

    def prepare(
        self,
        class_labels: Label | Sequence[Label],
        *,
        num_inference_steps: int | Sequence[int] | None = None,
        group_sizes: Sequence[int] | Sequence[Sequence[int]] | None = None,
        order: Order | None = None,
        proximity_threshold: float | Sequence[float] | None = None,
        repulsion_threshold: int | Sequence[int] | None = None,
        guidance_scale: float | Sequence[float] | None = None,
        guidance_schedule: GuidanceSchedule | Sequence[GuidanceSchedule] | None = None,
        temperature: float | Sequence[float] | None = None,
        top_k: int | Sequence[int] | None = None,
        top_p: float | Sequence[float] | None = None,
        seeds: int | Sequence[int] | None = None,
        known_tokens: Tensor | None = None,
        prefill: Sequence[Sequence[int]] | None = None,
    ) -> DecodeRequest:
        """Returns the checked request of a call; None means the pipeline's default. Raises ValueError or TypeError.

        Each option is one value, or a list with one entry per label. num_inference_steps (in [1, N]) selects the
        published or cosine group sizes; group_sizes replaces it. order is a policy of `orders.ORDER_POLICIES`, a
        permutation of the cells, or a priority map (an image, bright parts first, or floats [h, w]); the thresholds are
        those of `orders.locality_order`. One seed s means s, s + 1, ...; None draws seeds from torch's generator.
        known_tokens and prefill are as in `DecodeRequest`.
        """
        defaults = self.defaults
        if num_inference_steps is None and group_sizes is None:
            num_inference_steps = defaults.num_inference_steps
        if repulsion_threshold is None:
            repulsion_threshold = defaults.repulsion_threshold
        return make_request(
            self.model.config,
            self._labels(class_labels),
            num_inference_steps=num_inference_steps,
            group_sizes=group_sizes,
            order=OrderPolicy(
                _given(order, defaults.order),
                _given(proximity_threshold, defaults.proximity_threshold),
                repulsion_threshold,
                self.model.pos_embed.device,
            ),
            guidance_scale=_given(guidance_scale, defaults.guidance_scale),
            guidance_schedule=_given(guidance_schedule, defaults.guidance_schedule),
            temperature=_given(temperature, defaults.temperature),
            top_k=_given(top_k, defaults.top_k),
            top_p=_given(top_p, defaults.top_p),
            seeds=seeds,
            known_tokens=known_tokens,
            prefill=prefill,
        )

    def _labels(self, class_labels: Label | Sequence[Label]) -> list[int | None]:
        class_labels = as_scalar(class_labels)
        if isinstance(class_labels, str) or not isinstance(class_labels, Iterable):
            class_labels = [class_labels]
        labels: list[int | None] = []
        for b, label in enumerate(class_labels):
            if not isinstance(label, str):
                labels.append(None if label is None else as_int(label, f"class_labels[{b}]"))
            else:
                labels.append(find_class(label, self.class_names))
        return labels


def _from_bytes(kind: type[LPDPipeline], parts: bytes) -> LPDPipeline:
    with own_modes():
        return kind(**pickle.loads(parts))


def _sampling_defaults(config: Mapping[str, Any]) -> SamplingDefaults:
    known = {item.name for item in fields(SamplingDefaults)}
    values = config.get("sampling", {})
    if not isinstance(values, Mapping):
        raise ValueError(f"config.json 'sampling' must be a JSON object, got {values!r}")
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError(f"config.json 'sampling' has unknown entries {unknown}; known are {sorted(known)}")
    return SamplingDefaults(**values)


def _class_names(config: Mapping[str, Any]) -> list[str]:
    names = config.get("class_names", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"config.json 'class_names' must be a list of strings, got {names!r}")
    return names


def _given(value: Any, default: Any) -> Any:
    return default if value is None else value
