"""`lpd train-tokenizer`."""

from __future__ import annotations

from lpd_tools.console import say, say_skipped
from lpd_tools.training.settings import TokenizerTraining


def train_tokenizer(config: TokenizerTraining) -> None:
    """Train the VQ tokenizer.

    Example: lpd train-tokenizer --out-dir vq --data folder:images --image-size 64
    """
    from lpd_tools.data.image_reader import read_skipped
    from lpd_tools.data.token_shards import SKIPPED_FILE
    from lpd_tools.training import tokenizer

    path = tokenizer.train_tokenizer(config)
    list_of_skipped = path.with_name(SKIPPED_FILE)
    say_skipped(len(read_skipped(list_of_skipped)), list_of_skipped)
    say(f"wrote {path}")
