"""`lpd check-tokens`."""

from __future__ import annotations

from lpd_tools.console import say
from lpd_tools.data.settings import TokenCheck


def check_tokens(config: TokenCheck) -> None:
    """Read a whole token cache and compare its checksums.

    Example: lpd check-tokens --tokens tokens --tokenizer vq/tokenizer.safetensors
    """
    from lpd_tools.data import token_check

    say(f"{config.tokens}: {token_check.check_tokens(config):,} images, all files as they were written")
