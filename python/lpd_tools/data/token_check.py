"""Checks a whole token cache, of which loading reads only the headers."""

from __future__ import annotations

from pathlib import Path

from lpd_tools.data.settings import TokenCheck
from lpd_tools.data.token_cache import load_token_cache
from lpd_tools.data.token_shards import INDEX_FILE, SPLITS, file_hash, read_index, read_shard
from lpd_tools.progress import track


def check_tokens(config: TokenCheck) -> int:
    """Reads every shard and compares checksums, tokens and labels with the index; returns the number of images.

    Raises ValueError naming the first file that does not agree, and what `load_token_cache` raises.
    """
    cache = load_token_cache(config.tokens, config.tokenizer or None)
    _, class_names, entries = read_index(Path(config.tokens))
    rows = 0
    listed = [entry for split in SPLITS for entry in entries[split]]
    for entry in track(listed, "checking"):
        file = Path(config.tokens) / entry.file
        if file_hash(file) != entry.sha256:
            raise ValueError(f"{str(file)!r} is damaged: its SHA-256 is not the one in {INDEX_FILE}")
        shard = read_shard(file)
        for name, values, count in (
            ("tokens", shard.tokens, cache.vocab_size),
            ("labels", shard.labels, len(class_names)),
        ):
            wide = values.int()
            if wide.numel() and not 0 <= int(wide.min()) <= int(wide.max()) < count:
                raise ValueError(f"{str(file)!r} has {name} outside [0, {count})")
        rows += entry.rows
    return rows
