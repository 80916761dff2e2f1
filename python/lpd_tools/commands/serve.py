"""`lpd serve`."""

from __future__ import annotations

from lpd_tools.serve.settings import Serving


def serve(config: Serving) -> None:
    """Serve a model over HTTP with OpenAI's image API.

    Example: lpd serve --model lpd_l_256 --port 8000
    """
    from lpd_ext.bundled import DEFAULT_MODEL
    from lpd_tools.checks import check_device
    from lpd_tools.listening import listen
    from lpd_tools.models import load_pipeline
    from lpd_tools.serve.limits import read_keys
    from lpd_tools.serve.server import run

    read_keys(config.api_keys)
    with listen(config.host, config.port) as bound:
        device = check_device(config.device)
        pipe = load_pipeline(config.model or None, config.tokenizer or None, config.dtype, device)
        run(pipe, config.model or DEFAULT_MODEL, config, bound)
