"""Settings of drawing and measuring. Imports no heavy library: `lpd --help` must be quick."""

from __future__ import annotations

from dataclasses import dataclass

from lpd_tools.data.settings import DATA_HELP, FASHION_MNIST_DIR
from lpd_tools.settings import ANY_AMOUNT, AT_LEAST_ONE, Range, Settings, setting

REFERENCE_HELP = (
    "real images: a folder, an .npz file (images arr_0, or mu and sigma of Inception), or the test split of a "
    + DATA_HELP
)
MODEL_HELP = "bundled or published model, hub id, folder or weight file"
_IMAGES = Range(0, 10**6)


@dataclass(frozen=True)
class Generation(Settings):
    """Settings of `lpd generate`; image i of the run has label i mod C and seed `seed` + i.

    Images are drawn in batches of `batch_size` that do not depend on the process, so that the result is the same, bit
    for bit, for any number of processes and after any interruption.
    """

    out: str = setting(..., "folder to write, or to resume if begun with the same settings")
    model: str = setting("", f"{MODEL_HELP} (the default bundled model if empty)")
    tokenizer: str = setting("", "tokenizer for a model without one: weight file, folder or hub id")
    images_per_class: int = setting(200, "images to draw of each class", range=AT_LEAST_ONE)
    seed: int = setting(0, "seed of the first image; the next ones count up")
    batch_size: int = setting(100, "images per batch", range=AT_LEAST_ONE)
    format: str = setting("png", "png: class/number.png; npz: samples.npz with arr_0 (pixels) and arr_1 (labels)")
    dtype: str = setting(
        "", "of the transformer: float32, bfloat16, float16 or int8 (empty: float32, or the file's int8)"
    )
    device: str = setting("", "cpu, cuda or cuda:<index> (empty: cuda if there is one)")
    num_inference_steps: int | None = setting(None, "decoding steps; without: the model's default, as for all below")
    guidance_scale: float | None = setting(None, "classifier-free guidance; 1 switches it off")
    guidance_schedule: str | None = setting(None, "linear or constant")
    order: str | None = setting(None, "locality, random, raster, halton, spiral or outward")
    proximity_threshold: float | None = setting(None, "of the locality order")
    repulsion_threshold: int | None = setting(None, "of the locality order")
    temperature: float | None = setting(None, "0 means argmax")
    top_k: int | None = setting(None, "0 switches it off")
    top_p: float | None = setting(None, "1 switches it off")


@dataclass(frozen=True, kw_only=True)
class Comparison(Settings):
    """Settings of the comparison with real images."""

    floor: str = setting(
        "", "further real images for the floor (without: a data set's training split, else two halves)"
    )
    features: tuple[str, ...] = setting(
        (), "of efficientnet, judge, inception (without: those whose file is given, else efficientnet)"
    )
    judge: str = setting("", "a judge of Fashion-MNIST that was not used for tuning")
    inception: str = setting("", "the standard Inception network as a TorchScript file")
    k: int = setting(3, "neighbours of precision and recall", range=Range(1, 1000))
    learned_images: int = setting(
        0, "labelled real images outside the reference for a linear classifier of the features (0: none)", range=_IMAGES
    )
    neighbours: int = setting(0, "drawn images to show beside the nearest learned ones (0: none)", range=Range(0, 1000))


@dataclass(frozen=True)
class Measurement(Comparison):
    """Settings of `lpd measure`."""

    images: tuple[str, ...] = setting(..., "folder or .npz file of generated images; several are repeats")
    reference: str = setting(..., REFERENCE_HELP)
    size: int = setting(0, "side to bring all images to (0: that of the generated images)", range=ANY_AMOUNT)
    batch_size: int = setting(100, "images per batch of the feature networks", range=AT_LEAST_ONE)
    device: str = setting("", "cpu, cuda or cuda:<index> (empty: cuda if there is one)")
    seed: int = setting(0, "seed of the samples drawn for the floor, the kernel distance and the inception score")
    out: str = setting("", "JSON file to write")


@dataclass(frozen=True)
class Evaluation(Comparison, Generation):
    """Settings of `lpd evaluate`: a generation, repeated with other seeds, and its measures; `out` gets the results.

    Repeat r draws seeds `seed` + r·n to `seed` + (r + 1)·n - 1 of n = images_per_class · C images.
    """

    model: str = setting("fashion_mnist", MODEL_HELP)
    repeats: int = setting(1, "runs with seeds of their own; three give a 95 % interval", range=Range(1, 1000))
    reference: str = setting("fashion-mnist", REFERENCE_HELP)
    reconstructed_images: int = setting(2000, "real images to put through the tokenizer (0: none)", range=_IMAGES)
    nats_images: int = setting(1000, "real images for the teacher-forced nats (0: none)", range=_IMAGES)
    self_images: int = setting(200, "images to draw without guidance for the self-consistency (0: none)", range=_IMAGES)
    nats_steps: tuple[int, ...] = setting(
        (), "numbers of steps for both (without: 4, 6, 10, 16 and one for each token)", range=AT_LEAST_ONE
    )
    nats_orders: tuple[str, ...] = setting(("random", "locality", "raster"), "orders for both")


@dataclass(frozen=True)
class Int8Quality(Settings):
    """Settings of `lpd int8-quality`, which uses the same images, seeds and orders in float32 and in int8."""

    judge: str = setting(..., "a trained judge that was not used for tuning")
    model: str = setting("fashion_mnist", "bundled or published model, hub id, folder or file of float weights")
    out: str = setting("", "JSON file to write")
    data_dir: str = setting(str(FASHION_MNIST_DIR), "folder of the Fashion-MNIST IDX files")
    num_inference_steps: int = setting(10, "decoding steps", range=AT_LEAST_ONE)
    images: int = setting(2000, "images to generate from each seed", range=AT_LEAST_ONE)
    seeds: tuple[int, ...] = setting((0, 100_000, 200_000), "seeds of the first image; none: no images are drawn")
    forced_images: int = setting(1000, "real test images for the teacher-forced comparison", range=AT_LEAST_ONE)
    forced_orders: tuple[str, ...] = setting(("locality", "random", "raster"), "orders for it")
    lpd_l_depth: int = setting(
        24, "layers of an lpd_l with random weights to compare as well; 0: none", range=ANY_AMOUNT
    )
