"""`lpd demo`."""

from __future__ import annotations

from lpd_tools.web.settings import Demo


def demo(config: Demo) -> None:
    """Draw, inpaint and compare orders in a browser page that works offline.

    Example: lpd demo --model lpd_l_256 --port 7860
    """
    from lpd_ext.bundled import DEFAULT_MODEL
    from lpd_tools.checks import check_device
    from lpd_tools.listening import listen
    from lpd_tools.models import load_pipeline
    from lpd_tools.web.server import run

    with listen(config.host, config.port) as bound:
        device = check_device(config.device)
        pipe = load_pipeline(config.model or None, config.tokenizer or None, config.dtype, device)
        run(pipe, config.model or DEFAULT_MODEL, config, bound)
