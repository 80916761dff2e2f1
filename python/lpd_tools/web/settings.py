"""What `lpd demo` can be told. No library of its own is imported here: `lpd --help` must be quick."""

from __future__ import annotations

from dataclasses import dataclass

from lpd_tools.settings import AT_LEAST_ONE, Range, Settings, setting


@dataclass(frozen=True)
class Demo(Settings):
    """The model, where the page is, and how many pictures are drawn at once."""

    model: str = setting("", "published model, hub id, folder or weight file (the bundled model if empty)")
    tokenizer: str = setting("", "tokenizer of a model that brings none: weight file, folder or hub id")
    dtype: str = setting("", "of the transformer: float32, bfloat16, float16 or int8")
    device: str = setting("", "cpu, cuda or cuda:<index> (empty: cuda if there is one)")
    host: str = setting("127.0.0.1", "address to listen on; 0.0.0.0 is all of the machine's")
    port: int = setting(7860, "port to listen on; 0 takes a free one", range=Range(0, 65535))
    max_images: int = setting(8, "images drawn at once; their KV cache is taken at the start", range=AT_LEAST_ONE)
    max_waiting: int = setting(64, "images that may wait; beyond, visitors are asked to come back", range=AT_LEAST_ONE)
