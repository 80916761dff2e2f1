"""Copies of a pipeline, and those handed to other processes: each draws what the original draws, by its own weights."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lpd_ext.linear import unpack
from lpd_ext.pipeline import LPDPipeline

KINDS: dict[str, Callable[[], LPDPipeline]] = {
    "plain": lambda: with_plain_layers(LPDPipeline.from_pretrained("fashion_mnist")),
    "packed": LPDPipeline.from_pretrained,
    "int8": lambda: LPDPipeline.from_pretrained("fashion_mnist", dtype="int8"),
}


def with_plain_layers(pipe: LPDPipeline) -> LPDPipeline:
    unpack(pipe.model)
    return pipe


def through_a_pickle(pipe: LPDPipeline) -> LPDPipeline:
    copied: LPDPipeline = pickle.loads(pickle.dumps(pipe))
    return copied


def drawn(pipe: LPDPipeline) -> bytes:
    pixels: bytes = pipe([1, 2], num_inference_steps=3, seeds=1, output_type="np").images.tobytes()
    return pixels


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", [copy.deepcopy, through_a_pickle])
def test_a_copy_draws_by_its_own_weights(way: Callable[[LPDPipeline], LPDPipeline], kind: str) -> None:
    pipe = KINDS[kind]()
    before = drawn(pipe)
    other = way(pipe)
    assert drawn(other) == before
    with torch.no_grad():
        for weight in (other.model.content, other.model.norm.bias, other.tokenizer.quantize.embedding.weight):
            weight.normal_()
    assert drawn(other) != before
    assert drawn(pipe) == before


def test_a_shallow_copy_has_the_same_networks_and_settings_of_its_own() -> None:
    pipe = LPDPipeline.from_pretrained("fashion_mnist")
    other = copy.copy(pipe)
    assert other.model is pipe.model
    other.class_names = []
    assert len(pipe.class_names) == 10
    assert drawn(other) == drawn(pipe)


def test_a_pickle_shares_no_memory_with_other_processes() -> None:
    """torch.multiprocessing moves every tensor that it pickles to memory that all processes write to."""
    from multiprocessing.reduction import ForkingPickler

    for kind in KINDS.values():
        pipe = kind()
        ForkingPickler.dumps(pipe)
        weights = [*pipe.model.parameters(), *pipe.tokenizer.parameters()]
        assert not any(weight.is_shared() for weight in weights)


SCRIPT = """
import multiprocessing, sys
from concurrent.futures import ProcessPoolExecutor
import torch
from lpd_ext.linear import unpack
from lpd_ext.pipeline import LPDPipeline

def drawn(pipe):
    return pipe([1, 2], num_inference_steps=3, seeds=1, output_type="np").images.tobytes()

def send(queue, pipes):
    queue.put([drawn(pipe) for pipe in pipes])

if __name__ == "__main__":
    torch.set_num_threads(2)
    context = multiprocessing.get_context(sys.argv[1])
    pipes = [LPDPipeline.from_pretrained("fashion_mnist", dtype=dtype) for dtype in (None, None, "int8")]
    unpack(pipes[0].model)
    wanted = [drawn(pipe) for pipe in pipes]
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        assert [pool.submit(drawn, pipe).result(timeout=60) for pipe in pipes] == wanted
    for library in (multiprocessing, torch.multiprocessing):
        queue = context.Queue()
        process = library.get_context(sys.argv[1]).Process(target=send, args=(queue, pipes))
        process.start()
        assert queue.get(timeout=60) == wanted
        process.join()
    print("the same")
"""


@pytest.mark.parametrize("method", ["spawn", "forkserver", "fork"])
def test_every_way_to_start_a_process(method: str, tmp_path: Path) -> None:
    """Two threads, since a forked process would wait for the other one in vain."""
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, str(tmp_path / "script.py"), method]
    process = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert process.stdout == "the same\n", process.stderr
    assert ("a forked process computes with one thread" in process.stderr) == (method == "fork")
