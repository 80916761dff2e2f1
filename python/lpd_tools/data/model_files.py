"""The files of a model by any of its names, with the tokenizer that it was trained with."""

from __future__ import annotations

from lpd_ext.bundled import bundled_model
from lpd_ext.hub import ModelFiles, find_model, find_tokenizer, how_to_bundle, is_training_folder, published_tokenizer
from lpd_tools.data.token_cache import check_tokenizer


def model_files(name: str, tokenizer: str = "") -> ModelFiles:
    """The files of a model, by any name that `LPDPipeline.from_pretrained` takes (empty: the default bundled one).

    Checked to have a tokenizer, and not another one than the model was trained with.
    """
    files = find_model(name or bundled_model())
    if not tokenizer and files.tokenizer is None and is_training_folder(files.model):
        raise ValueError(how_to_bundle(files.model))
    own = find_tokenizer(tokenizer) if tokenizer else files.tokenizer or published_tokenizer()
    if files.model.is_dir():
        check_tokenizer(files.model, own)
    return ModelFiles(files.model, own)
