"""Settings of the training programs. Imports no heavy library: `lpd --help` must be quick."""

from __future__ import annotations

from dataclasses import dataclass

from lpd_tools.data.settings import DATA_HELP, FASHION_MNIST_DIR
from lpd_tools.settings import ANY_AMOUNT, AT_LEAST_ONE, SHARE, Range, Settings, setting
from lpd_tools.training.loop_settings import LoopSettings

_BELOW_ONE = Range(0, 1, open_high=True)


@dataclass(frozen=True)
class JudgeTraining(Settings):
    """Settings of `lpd train-judge`; 12 epochs take about five minutes on two cores."""

    out: str = setting(..., "safetensors file to write")
    data_dir: str = setting(str(FASHION_MNIST_DIR), "folder of the Fashion-MNIST IDX files")
    seed: int = setting(1, "random seed", range=Range(0, 2**32))
    epochs: int = setting(12, "passes over the training set", range=AT_LEAST_ONE)
    batch_size: int = setting(128, "images per step", range=AT_LEAST_ONE)
    learning_rate: float = setting(2e-3, "peak learning rate", range=ANY_AMOUNT)
    weight_decay: float = setting(0.02, "AdamW weight decay", range=ANY_AMOUNT)
    precision: str = setting("auto", "auto, fp32 or bf16")


@dataclass(frozen=True, kw_only=True)
class TokenizerTraining(LoopSettings):
    """Settings of `lpd train-tokenizer`.

    On resuming, `steps` and `decay_steps` may change (the decay moves with them), and settings that change no weight.
    """

    data: str = setting("fashion-mnist", DATA_HELP, resumable=True)
    image_size: int = setting(
        0, "side of the square images in pixels; 0: 32 for fashion-mnist, else 256", range=ANY_AMOUNT
    )
    background: str = setting("white", "colour behind transparent images, by name or #rrggbb")
    strict: bool = setting(
        False, "stop at the first image that cannot be read, rather than skip and list it", resumable=True
    )
    mirror: bool = setting(False, "mirror half of the images, chosen at random")
    judge: str = setting(
        "",
        "a Fashion-MNIST judge: enables the perceptual loss and logs the share of images recognised",
        resumable=True,
    )
    perceptual_weight: float = setting(0.05, "weight of the perceptual loss", range=ANY_AMOUNT)
    ch: int = setting(32, "base width")
    ch_mult: tuple[int, ...] = setting((1, 1, 2), "width of each resolution as a multiple of ch, highest first")
    z_channels: int = setting(32, "width between encoder and codebook")
    codebook_size: int = setting(512, "number of codes V")
    codebook_dim: int = setting(8, "length of a code")
    encoder_res_blocks: int = setting(1, "residual blocks per resolution")
    decoder_res_blocks: int = setting(2, "residual blocks per resolution")
    init_from: str = setting(
        "", "tokenizer of these sizes to start from; its codes are used from the first step", resumable=True
    )
    steps: int = setting(5300)
    batch_size: int = setting(32)
    learning_rate: float = setting(8e-4)
    warmup_steps: int = setting(
        100, "linear warm-up, not quantised; the codebook is initialised at its end", range=AT_LEAST_ONE
    )
    decay_steps: int = setting(2500)
    beta2: float = setting(0.99)
    commitment_weight: float = setting(0.025, "weight of the commitment loss", range=ANY_AMOUNT)
    codebook_decay: float = setting(0.99, "decay of the moving averages that make the codebook", range=SHARE)
    revive_every: int = setting(20, "steps between replacements of dead codes", range=AT_LEAST_ONE)
    revive_below: float = setting(0.05, "a code used less than this share of the mean is dead", range=ANY_AMOUNT)
    evaluate_images: int = setting(1000)


@dataclass(frozen=True, kw_only=True)
class LPDTraining(LoopSettings):
    """Settings of `lpd train`.

    On resuming, `steps` and `decay_steps` may change (the decay moves with them), and settings that change no weight.
    """

    tokens: str = setting(..., "token cache to train on", resumable=True)
    dim: int = setting(192, "width E")
    depth: int = setting(6, "blocks L")
    heads: int = setting(6, "attention heads H")
    init_from: str = setting(
        "", "model to start from; its pos_embed is resized to the grid of the tokens", resumable=True
    )
    steps: int = setting(3700)
    learning_rate: float = setting(1.5e-3)
    warmup_steps: int = setting(200)
    decay_steps: int = setting(2000)
    weight_decay: float = setting(0.02)
    ema_decay: float = setting(0.998)
    label_drop: float = setting(0.1, "share of labels replaced by the unconditional one", range=SHARE)
    dropout: float = setting(0.0, "after proj, GELU and fc2", range=_BELOW_ONE)
    attention_dropout: float = setting(0.0, "of the attention probabilities", range=_BELOW_ONE)
    mutual_visibility: bool = setting(True, "the position queries of a group see each other")
    decoding_steps: tuple[int, ...] = setting(
        (6, 8, 10, 12, 16, 24, 32, 64), "numbers of steps T whose group-size tables are trained", range=AT_LEAST_ONE
    )
    tokenizer: str = setting("", "tokenizer weights: switches on pictures in samples/", resumable=True)
    sample_images: int = setting(20, "images in a picture", range=Range(1, 10_000), resumable=True)
    sample_guidance: float = setting(3.0, "constant guidance of the images in a picture", resumable=True)


@dataclass(frozen=True)
class Replay(Settings):
    """Settings of `lpd replay`."""

    file: str = setting(..., "file in out_dir/failed")
    precision: str = setting("", "auto, fp32 or bf16 (empty: as the training had it)")
    device: str = setting("", "cpu or cuda (empty: cuda if there is one)")


@dataclass(frozen=True)
class PreviewTraining(Settings):
    """Settings of `lpd train-preview`; of `fashion_mnist` it takes five minutes on two cores."""

    out: str = setting(..., "safetensors file to write; preview.safetensors in a model's folder is loaded with it")
    model: str | None = setting(None, "a published model, hub id, folder or weight file (default: the bundled one)")
    images: int = setting(2000, "images that the model draws to train on", range=AT_LEAST_ONE)
    draw_batch: int = setting(50, "images drawn at once", range=AT_LEAST_ONE)
    seed: int = setting(1_000_000, "random seed, and that of the first image", range=Range(0, 2**32))
    width: int = setting(32, "channels", range=Range(1, 1024))
    steps: int = setting(3000, "optimisation steps", range=AT_LEAST_ONE)
    batch_size: int = setting(32, "images per step", range=AT_LEAST_ONE)
    learning_rate: float = setting(3e-3, "peak learning rate", range=ANY_AMOUNT)
    device: str = setting("", "cpu or cuda (empty: cuda if there is one)")


@dataclass(frozen=True)
class Export(Settings):
    """Settings of `lpd export`."""

    checkpoint: str = setting(..., "file in out_dir/checkpoints, say best.pt")
    out: str = setting(..., "folder to write")


@dataclass(frozen=True, kw_only=True)
class Bundling(Settings):
    """Settings of `lpd bundle`; a sampling default that is left out is the model's own, or the published one."""

    model: str = setting(..., "folder of a training; or a published model, hub id, folder or weight file")
    tokenizer: str = setting(
        "", "weight file, folder or hub id (empty: the model's, else the published one; a training needs it)"
    )
    out: str = setting(..., "folder to write")
    weights: str = setting("best", "of a training: best (lowest test loss, if measured) or last")
    num_inference_steps: int | None = setting(
        None, "default number of decoding steps; of a training 10 if nothing else is known", range=AT_LEAST_ONE
    )
    guidance_scale: float | None = setting(None, "default guidance; of a training 8")
    guidance_schedule: str | None = setting(None, "linear or constant; of a training linear")
    temperature: float | None = setting(None, "default temperature; of a training 0.9", range=ANY_AMOUNT)
    repulsion_threshold: int | None = setting(
        None, "default spacing of the cells of a group in the locality order; of a training 2", range=ANY_AMOUNT
    )


@dataclass(frozen=True)
class Curves(Settings):
    """Settings of `lpd curves`."""

    tokenizer_log: str = setting(..., "log.csv of train-tokenizer")
    train_log: str = setting(..., "log.csv of train")
    out: str = setting(..., "PNG file to write")
