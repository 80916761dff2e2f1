"""A trained model and its tokenizer in one folder: the tokenizer must be the one that made the tokens."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from lpd_tools.data.token_cache import check_tokenizer
from lpd_tools.evaluation.evaluate import Evaluation, evaluate
from lpd_tools.training.bundle import Bundling, bundle
from lpd_tools.training.tokenizer import tokenizer_sizes
from lpd_tools.training.transformer import train
from training_runs import lpd_config, make_cache, tokenizer_config

from lpd_ext.tokenizer import VQTokenizer


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    cache_path = make_cache(tmp_path / "data")
    train(lpd_config(cache_path, tmp_path / "lpd", steps=1))
    right = cache_path.with_name("tokenizer.safetensors")
    wrong = VQTokenizer(tokenizer_sizes(tokenizer_config(tmp_path)))
    wrong.save(tmp_path / "wrong.safetensors")
    out = bundle(Bundling(str(tmp_path / "lpd"), str(right), str(tmp_path / "bundle")))
    check_tokenizer(out, out / "tokenizer.safetensors")
    with pytest.raises(ValueError, match=r"wrong\.safetensors' is not the one whose tokens"):
        bundle(Bundling(str(tmp_path / "lpd"), str(tmp_path / "wrong.safetensors"), str(tmp_path / "other")))
    assert not (tmp_path / "other").exists()
    wrong.save(out / "tokenizer.safetensors")
    with pytest.raises(ValueError, match="is not the one whose tokens"):
        evaluate(Evaluation(out=str(tmp_path / "evaluation"), model=str(out)))
