"""Settings of a whole process or thread change nothing that is loaded, encoded, drawn or previewed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from lpd_ext.bundled import bundled_model
from lpd_ext.pipeline import LPDPipeline
from lpd_ext.tokenizer import VQTokenizer

Setting = Callable[[], AbstractContextManager[object]]


@contextmanager
def changed(get: Callable[[], Any], put: Callable[[Any], object], value: Any) -> Iterator[None]:
    before = get()
    put(value)
    try:
        yield
    finally:
        put(before)


@contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


default_dtype = partial(changed, torch.get_default_dtype, torch.set_default_dtype)
SETTINGS: dict[str, Setting] = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "default dtype bfloat16": lambda: default_dtype(torch.bfloat16),
    "default dtype float64": lambda: default_dtype(torch.float64),
    "default device": lambda: default_device("meta"),  # stands for a GPU: nothing made there can be read here
    "no gradients": torch.no_grad,
    "inference mode": torch.inference_mode,
    "deterministic": lambda: changed(
        torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True
    ),
    "matmul precision": lambda: changed(
        torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "medium"
    ),
    "errors of numpy": lambda: np.errstate(all="raise"),
}


def everything() -> dict[str, torch.Tensor]:
    """Loads, draws, previews and encodes; returns the results as tensors."""
    pipe = LPDPipeline.from_pretrained("fashion_mnist")
    torch.manual_seed(3)
    options: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 3.0, "top_k": 100, "top_p": 0.9}
    drawn = pipe([1, 2, None], output_type="pt", **options)
    *_, preview = pipe.stream([1], num_inference_steps=3, seeds=1)
    named = ("random", "halton", "spiral", "raster")
    orders = [pipe.prepare([1], order=order, seeds=2, num_inference_steps=5).orders for order in named]
    codes = pipe.tokenizer.encode(drawn.images)
    alone = VQTokenizer.from_file(bundled_model("fashion_mnist") / "tokenizer.safetensors")
    rounded = LPDPipeline.from_pretrained("fashion_mnist", dtype="int8")(
        [1], seeds=1, num_inference_steps=3, output_type="np"
    )
    return {
        "images": drawn.images,
        "tokens": drawn.tokens,
        "seeds": torch.from_numpy(np.array(drawn.seeds)),
        "preview": torch.from_numpy(np.array(preview.images[0])),
        "codes": codes,
        "pixels": pipe.tokenizer.decode(codes).detach(),
        "tokenizer": alone.quantize.embedding.weight.detach(),
        "int8": torch.from_numpy(rounded.images),
        **dict(zip(named, orders, strict=True)),
    }


@pytest.fixture(scope="module")
def wanted() -> dict[str, torch.Tensor]:
    return everything()


@pytest.mark.parametrize("name", SETTINGS)
def test_results_are_the_same(name: str, wanted: dict[str, torch.Tensor]) -> None:
    with SETTINGS[name]():
        found = everything()
    for what, value in wanted.items():
        assert found[what].dtype == value.dtype, what
        assert torch.equal(found[what], value), what


def test_what_is_loaded_in_inference_mode_can_be_trained() -> None:
    from lpd_ext.checkpoint import load_model

    with torch.inference_mode():
        model = load_model(bundled_model("fashion_mnist"))
    model.requires_grad_(True)
    model.norm(torch.ones(1, model.config.dim)).sum().backward()
    assert model.norm.bias.grad is not None


def test_the_callers_settings_hold_again_afterwards() -> None:
    pipe = LPDPipeline.from_pretrained("fashion_mnist")
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        for _ in pipe.stream([1], num_inference_steps=2, seeds=1):
            assert torch.is_inference_mode_enabled()
            assert torch.is_autocast_enabled("cpu")
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
