"""`lpd info`: shows this build, this machine and a model."""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING, Annotated

import typer

from lpd_tools.commands.model_options import DTYPE_HELP, MODEL_HELP, TOKENIZER_HELP
from lpd_tools.console import new_console
from lpd_tools.models import load_pipeline

if TYPE_CHECKING:
    from lpd_ext.model import LPDModel

_SHOWN_CLASSES = 20


def info(
    model: Annotated[str | None, typer.Option(help=MODEL_HELP)] = None,
    tokenizer: Annotated[str | None, typer.Option(help=TOKENIZER_HELP)] = None,
    dtype: Annotated[str, typer.Option(help=DTYPE_HELP)] = "",
) -> None:
    """Show the build, the instruction sets, the devices and a model.

    Example: lpd info --model lpd_l_256
    """
    import torch
    from rich.table import Table

    from lpd_ext import _C
    from lpd_ext.bundled import DEFAULT_MODEL
    from lpd_ext.linear import count_parameters

    build = _C.build_config()
    pipe = load_pipeline(model, tokenizer, dtype)
    config, defaults = pipe.model.config, pipe.defaults
    parameters, vq_parameters = count_parameters(pipe.model), count_parameters(pipe.tokenizer)
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    table = Table(show_header=False, box=None)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    rows = [
        ("lpd_ext", f"{build['version']}, built with {build['compiler']} on torch {build['torch']}"),
        ("CUDA kernels", _cuda_kernels(build)),
        ("torch", f"{torch.__version__}, {torch.get_num_threads()} threads"),
        ("processor", f"{platform.processor() or platform.machine()}"),
        ("instruction sets", f"{_C.cpu_isa()} in use, of {', '.join(_C.available_cpu_isas())}"),
        ("GPUs", ", ".join(gpus) or "none"),
        ("products", _products(pipe.model)),
        ("model", f"{model or DEFAULT_MODEL}: {parameters / 1e6:.1f} M parameters, E {config.dim}, L {config.depth}, "
                  f"H {config.heads}, grid {config.grid[0]}x{config.grid[1]}, V {config.vocab_size}, "
                  f"C {config.num_classes}"),
        ("tokenizer", f"{vq_parameters / 1e6:.1f} M parameters, stride {pipe.tokenizer.config.stride}"),
        ("sampling", f"{defaults.num_inference_steps} steps, {defaults.order} order, guidance "
                     f"{defaults.guidance_scale} {defaults.guidance_schedule}"),
        ("classes", _classes(pipe.class_names)),
    ]  # fmt: skip
    for name, value in rows:
        table.add_row(name, value)
    new_console().print(table)


def _classes(names: list[str]) -> str:
    from lpd_ext.class_names import short_name

    shown = ", ".join(map(short_name, names[:_SHOWN_CLASSES]))
    return (f"{shown}, ... ({len(names):,})" if len(names) > _SHOWN_CLASSES else shown) or "without names"


def _products(model: LPDModel) -> str:
    """Says which products decodes of this model in bfloat16 take on the current GPU."""
    import torch

    from lpd_ext.few_rows import can_multiply, chosen_products
    from lpd_ext.product_choice import known_own_rows
    from lpd_ext.products import FOLLOWING, ROW_CLASSES, step_pairs, step_products

    choice, config = chosen_products(), model.config
    if choice == "cublaslt":
        return "cublaslt; our own if LPD_PRODUCTS is own or auto"
    if not torch.cuda.is_available():
        return f"{choice} (LPD_PRODUCTS), but there is no GPU"
    device = torch.device("cuda")
    layers = step_products(config.dim, config.mlp_ratio * config.dim, config.vocab_size, torch.bfloat16)
    if not can_multiply(layers.values(), device):
        return f"cublaslt, though LPD_PRODUCTS is {choice}: this GPU, build or model has no other"
    if choice == "own":
        return "own (LPD_PRODUCTS)"
    known = known_own_rows(list(step_pairs(layers).values()), device)
    if None in known:
        return "auto: no times of this GPU and build yet; a decode takes them, or logs why our own are not used"
    found = (", ".join(str(rows) for rows in ROW_CLASSES if rows in (own or ())) or "no" for own in known)
    return "auto: our own for " + "; ".join(
        f"{a} and {b} at {rows} rows" for (a, b), rows in zip(FOLLOWING, found, strict=True)
    )


def _cuda_kernels(build: dict[str, str]) -> str:
    if not build["cuda_architectures"]:
        return "none in this build"
    return f"for compute capability {build['cuda_architectures']}, by {build['cuda_compiler']}"
