"""Leaves out unreadable images of a set before anything is drawn or measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from lpd_ext.picture import UnreadableImageError
from lpd_tools.evaluation.images import ImageSet
from lpd_tools.evaluation.reference import Reference, balanced_sample
from lpd_tools.progress import track


def readable_reference(reference: Reference, num_sampled: int, seed: int) -> Reference:
    """The reference without the images that cannot be read, as training and caching skip them; `skipped` says why.

    All of its images are read, and of the further ones those that a sample of up to `num_sampled` by `seed` takes.
    ValueError if none can be read.
    """
    images, more, skipped = reference.images, reference.more, list(reference.skipped)
    if images is not None:
        images, errors = without_unreadable(images, lambda left: range(len(left)))
        skipped += errors
    if more is not None:
        more, errors = without_unreadable(
            more, lambda left: balanced_sample(left.labels, len(left), num_sampled, seed).tolist()
        )
        skipped += errors
    return replace(reference, images=images, more=more, skipped=tuple(skipped))


def without_unreadable(images: ImageSet, used: Callable[[ImageSet], Sequence[int]]) -> tuple[ImageSet, list[str]]:
    """Returns the set without its unreadable images, and the reasons; `used` returns the images that will be read.

    Leaving out images brings others into use, so this repeats until all used images can be read; returns the set itself
    if they can at once. Raises ValueError if nothing is left.
    """
    if not images.from_files:
        return images, []
    left, read, kept = images, set[int](), list(range(len(images)))
    errors: dict[int, str] = {}
    while todo := [i for i in (kept[j] for j in used(left)) if i not in read]:
        errors |= unreadable(images, todo)
        read.update(todo)
        if errors.keys() & set(kept):
            kept = [i for i in kept if i not in errors]
            left = images.subset(kept, images.name)
        if not kept:
            raise ValueError(f"none of the {len(images)} images of {images.name} can be read: {errors[min(errors)]}")
    return left, [errors[i] for i in sorted(errors)]


def check_readable(images: ImageSet) -> None:
    """UnreadableImageError naming the first image of the set that cannot be read."""
    if images.from_files and (errors := unreadable(images, range(len(images)))):
        raise UnreadableImageError(errors[min(errors)])


def unreadable(images: ImageSet, index: Iterable[int]) -> dict[int, str]:
    """Returns the images at `index` that cannot be read, with the reasons."""
    index = list(index)

    def error_of(i: int) -> str | None:
        try:
            images.read([i])
        except UnreadableImageError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(2, thread_name_prefix="image-check") as pool:
        errors = list(track(pool.map(error_of, index), f"reading {images.name}", len(index)))
    return {i: error for i, error in zip(index, errors, strict=True) if error is not None}
