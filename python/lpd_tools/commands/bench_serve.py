"""`lpd bench-serve`."""

from __future__ import annotations

from lpd_tools.serve.bench.settings import ServeBench


def bench_serve(config: ServeBench) -> None:
    """Measure the engine beside the pipeline, and the server under load and malformed requests.

    Example: lpd bench-serve --part throughput --part preview --output build/serve.json
    """
    from lpd_tools.checks import check_device
    from lpd_tools.models import load_pipeline
    from lpd_tools.serve.bench.run import run

    run(load_pipeline(config.model, None, config.dtype, check_device(config.device)), config)
