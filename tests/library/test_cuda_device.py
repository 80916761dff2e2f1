"""Tests that need a GPU: graphs, streams, no waiting, and equality with the CPU. `make test-gpu` requires them."""

from __future__ import annotations

import dataclasses
import threading

import pytest
import torch
from decodes import random_model, request_for
from lpd_tools.cli import app
from steps import Layout, make_step
from test_cuda_graphs import requests_of_one_layout
from typer.testing import CliRunner

from lpd_ext import LPDPipeline, ops
from lpd_ext.cuda_graphs import DecodeGraphs
from lpd_ext.sampler import decode, generate

pytestmark = pytest.mark.cuda

CUDA = torch.device("cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_captured_decode_equals_the_eager_one(dtype: torch.dtype) -> None:
    model = random_model(64, (4, 4)).to(CUDA, dtype)
    graphs = DecodeGraphs()
    for request in requests_of_one_layout(model):
        assert torch.equal(generate(model, request, graphs), generate(model, request))
    assert len(graphs) == 1


def test_many_steps_take_a_graph_each() -> None:
    model = random_model(32, (9, 9)).to(CUDA)
    request = request_for(model, [[1] * 81], guidance_scale=[3.0])
    graphs = DecodeGraphs()
    for _ in range(2):
        assert torch.equal(generate(model, request, graphs), generate(model, request))


def test_threads_on_streams_of_their_own_share_captured_decodes() -> None:
    model = random_model(32, (4, 4)).to(CUDA)
    first = requests_of_one_layout(model)[0]
    graphs, wrong = DecodeGraphs(), []

    def work(seed: int) -> None:
        request = dataclasses.replace(first, seeds=[seed, seed + 1])
        with torch.cuda.stream(torch.cuda.Stream()):
            wanted = generate(model, request).tolist()
            wrong.extend(i for i in range(100) if generate(model, request, graphs).tolist() != wanted)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 1000)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(graphs) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_split_keys_are_combined_from_what_this_launch_wrote(dtype: torch.dtype) -> None:
    """Partials of the launch before, in L1 or in the workspace, must not be taken for this one's."""
    steps = [
        make_step([Layout(18, 19, 700)], heads=2, head_dim=64, dtype=dtype, seed=seed).copy(CUDA) for seed in (1, 2)
    ]
    workspace = ops.group_attention_workspace(64, CUDA)
    wanted = [ops.group_attention(*step.arguments(), workspace=workspace) for step in steps]
    outputs = [[ops.group_attention(*step.arguments(), workspace=workspace) for step in steps] for _ in range(500)]
    assert all(torch.equal(output, want) for pair in outputs for output, want in zip(pair, wanted, strict=True))


def test_the_benchmark_runs() -> None:
    result = CliRunner().invoke(app, ["bench", "--device", "cuda", "--repeats", "3"])
    assert result.exit_code == 0, result.output


@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")  # torch's own
def test_steps_do_not_wait_for_the_device() -> None:
    model = random_model(32, (4, 4)).to(CUDA)
    steps = decode(model, requests_of_one_layout(model)[0])
    next(steps)
    try:
        torch.cuda.set_sync_debug_mode("error")
        with pytest.raises(RuntimeError, match="synchronizing"):
            torch.ones(1, device=CUDA).item()  # so what follows would raise, too
        for _ in range(2):  # the last of the four ends with a look at the tokens
            next(steps)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_fp32_tokens_equal_the_cpu() -> None:
    model = random_model(32, (4, 4))
    request = dataclasses.replace(requests_of_one_layout(model)[0], temperature=[0.0, 0.0])
    assert torch.equal(generate(model.to(CUDA), request).cpu(), generate(model.cpu(), request))


def test_orders_equal_the_cpu_bit_for_bit() -> None:
    sizes, seeds = torch.tensor([1, 5, 10, 20, 28], dtype=torch.int32), torch.arange(500)
    on_cpu = ops.locality_order(sizes, 8, 8, 1.0, 1, seeds)
    assert torch.equal(ops.locality_order(sizes.to(CUDA), 8, 8, 1.0, 1, seeds.to(CUDA)).cpu(), on_cpu)


def test_operators_run_on_the_current_stream() -> None:
    """A kernel on another stream would read x before the long fill in front of it has ended."""
    x = torch.zeros(64, 1024, device=CUDA)
    ones = torch.ones(1024, device=CUDA)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        x.copy_(torch.arange(1024, device=CUDA).expand(64, -1))
        normed = ops.residual_layer_norm(x, None, ones, 0 * ones)
    torch.cuda.synchronize()
    wanted = torch.nn.functional.layer_norm(x, (1024,), eps=1e-6)
    assert (normed - wanted).abs().max() <= 1e-5


def test_mixed_devices_are_refused() -> None:
    x, weight = torch.zeros(2, 8, device=CUDA), torch.ones(8)
    with pytest.raises(RuntimeError, match=r"weight must be on the same device as the other arguments \(cuda:0\)"):
        ops.residual_layer_norm(x, None, weight, weight)


def test_the_bundled_pipeline_draws_on_the_gpu() -> None:
    pipe = LPDPipeline.from_pretrained("fashion_mnist", device="cuda")
    first, again = (pipe(["bag", "sneaker"], seeds=5) for _ in range(2))
    assert torch.equal(first.tokens, again.tokens)
    on_cpu = LPDPipeline.from_pretrained("fashion_mnist")(["bag", "sneaker"], seeds=5)
    same = (first.tokens.cpu() == on_cpu.tokens).double().mean()
    assert same > 0.9  # a draw differs only where rounding decides it, but then what follows may, too
