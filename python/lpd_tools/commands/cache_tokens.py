"""`lpd cache-tokens`."""

from __future__ import annotations

from lpd_tools.console import say, say_skipped
from lpd_tools.data.settings import TokenCaching


def cache_tokens(config: TokenCaching) -> None:
    """Encode the data set once, for training.

    Example: lpd cache-tokens --tokenizer vq/tokenizer.safetensors --data folder:images --out tokens
    """
    from lpd_tools.data.token_caching import run_caching
    from lpd_tools.data.token_shards import SKIPPED_FILE

    result = run_caching(config)
    say_skipped(len(result.skipped), result.path / SKIPPED_FILE)
    done = "wrote" if result.complete else "wrote a share of"
    say(f"{done} {result.path}")
