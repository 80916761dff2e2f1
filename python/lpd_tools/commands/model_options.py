"""Help texts of the options that select a model."""

from __future__ import annotations

MODEL_HELP = "Bundled or published model (lpd_l_256, ...), hub id, folder or weight file; default: a small bundled one."
TOKENIZER_HELP = "For a model without one: weight file, folder or hub id; default: the published one."
DTYPE_HELP = "Of the transformer: float32, bfloat16, float16 or int8; default: float32, or the file's int8."
