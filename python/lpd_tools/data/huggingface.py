"""Data sets of the `datasets` library: saved on disk, or from the hub where a name is given."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from PIL import Image

from lpd_ext.picture import UnreadableImageError, open_image
from lpd_tools.data.image_source import DataSet, ImageSource, check_share, check_splits, digest, few, held_out
from lpd_tools.data.names import in_order

OPTIONS = {
    "image": "",  # column of the pictures; by default the only one of that type
    "label": "",  # column of the labels; by default label, fine_label or the only ClassLabel
    "train": "train",
    "test": "",  # by default test, validation or val; where there is none, a share is held out
    "config": "",
    "held_out": "0.1",
}


class HuggingFaceSource(ImageSource):
    """Rows of a table with a column of pictures, as they are stored: decoded here and not by the library."""

    def __init__(
        self, table: Any, split: str, column: str, rows: torch.Tensor, labels: torch.Tensor, names: tuple[str, ...]
    ) -> None:
        self._table, self._split, self._column, self._rows = table, split, column, rows
        self.labels = labels
        self.class_names = names

    def image(self, index: int) -> Image.Image:
        """Picture `index`, decoded; UnreadableImageError if it cannot be."""
        stored = self._table[int(self._rows[index])][self._column]
        if stored is None or (stored["bytes"] is None and not stored["path"]):
            raise UnreadableImageError("the row holds no picture")
        return open_image(stored["path"] if stored["bytes"] is None else stored["bytes"])

    def name(self, index: int) -> str:
        """The split and row of picture `index`."""
        return _row_name(self._split, int(self._rows[index]))

    def fingerprint(self) -> str:
        """SHA-256 of the library's fingerprint of the table, and of rows, labels and class names."""
        parts = (self._rows.numpy().tobytes(), self.labels.numpy().tobytes())
        return digest(self._table._fingerprint, self._column, *parts, *self.class_names)


def open_huggingface(location: str, options: dict[str, str]) -> DataSet:
    """A data set saved by `save_to_disk` at `location`, or the one of that name on the hub.

    Raises ImportError without the library, FileNotFoundError if there is none, ValueError for unfit columns or splits.
    """
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise ImportError("data hf: needs the library datasets: pip install 'lpd-ext[train]'") from error
    loaded = _load(datasets, location, options["config"])
    tables = dict(loaded) if isinstance(loaded, dict) else {options["train"]: loaded}
    train = _table(tables, options["train"], location, "train")
    image, label = _columns(datasets, train, options, location)
    for option in ("train", "test"):
        table = tables.get(options[option])
        if table is not None and label in table.features and len(table) and not _has_labels(table, label):
            labelled = few([name for name, other in tables.items() if _has_labels(other, label)]) or "none"
            raise ValueError(
                f"data: {option}={options[option]!r} of {location!r} has no labels ({label} is -1 or missing in all "
                f"rows); splits with labels: {labelled}"
            )
    # The test split of a competition has no labels.
    usual = (name for name in ("test", "validation", "val") if name in tables and _has_labels(tables[name], label))
    test_name = options["test"] or next(usual, "")
    names, numbers = _classes(train, label)
    share = check_share(options["held_out"])
    splits = []
    if test_name:
        for name in (options["train"], test_name):
            table = _table(tables, name, location, "test")
            splits.append((table, name, torch.arange(len(table))))
    else:
        name = options["train"]
        out = torch.tensor([held_out(_row_name(name, row), share) for row in range(len(train))], dtype=torch.bool)
        splits = [(train, name, (~out).nonzero().flatten()), (train, name, out.nonzero().flatten())]
    sources = []
    for table, name, rows in splits:
        labels = _labels(table, label, numbers, location, name)[rows]
        undecoded = table.select_columns([image]).cast_column(image, datasets.Image(decode=False))
        # Casting gives the table a new fingerprint at random on some versions; the one it was stored with stays.
        undecoded._fingerprint = table._fingerprint
        sources.append(HuggingFaceSource(undecoded, name, image, rows, labels, names))
    check_splits("hf", location, sources[0].labels, sources[1].labels, names)
    return DataSet("hf", sources[0], sources[1])


def _row_name(split: str, row: int) -> str:
    return f"{split}[{row}]"


def _load(datasets: ModuleType, location: str, config: str) -> Any:
    if Path(location).exists():
        try:
            return datasets.load_from_disk(location)
        except Exception as error:  # a damaged folder can raise anything
            raise ValueError(f"data: {location!r} is no data set saved by save_to_disk: {error}") from error
    if not location or location.startswith(("/", ".", "~")):
        raise FileNotFoundError(f"data: there is no data set at {location!r}")
    try:
        return datasets.load_dataset(location, config or None)
    except Exception as error:  # no such name, no network, a gated or damaged data set
        raise FileNotFoundError(
            f"data: {location!r} is neither on disk nor a data set that the hub gives: {error}"
        ) from error


def _table(tables: dict[str, Any], name: str, location: str, option: str) -> Any:
    if name not in tables:
        raise ValueError(f"data: {option}={name!r} is no split of {location!r}; it has {few(sorted(tables))}")
    return tables[name]


def _columns(datasets: ModuleType, table: Any, options: dict[str, str], location: str) -> tuple[str, str]:
    features = table.features
    images = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    classes = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    image = options["image"] or (images[0] if len(images) == 1 else "image")
    label = options["label"] or next((name for name in ("label", "fine_label") if name in features), "")
    label = label or (classes[0] if len(classes) == 1 else "label")
    for option, name in (("image", image), ("label", label)):
        if name not in features:
            raise ValueError(f"data: {option}={name!r} is no column of {location!r}; it has {few(sorted(features))}")
    if image not in images:
        raise ValueError(f"data: image={image!r} of {location!r} is no column of pictures but of {features[image]}")
    return image, label


def _classes(table: Any, label: str) -> tuple[tuple[str, ...], dict[Any, int]]:
    """Class names, and the class number of each value where values are not numbers already."""
    names = getattr(table.features[label], "names", None)
    if names:
        return tuple(names), {}
    values = set(table.select_columns([label])[:][label]) - {None}
    if all(isinstance(value, int) for value in values):
        return tuple(str(number) for number in range(max(values, default=-1) + 1)), {}
    ordered = in_order(str(value) for value in values)
    return tuple(ordered), {name: number for number, name in enumerate(ordered)}


def _has_labels(table: Any, label: str) -> bool:
    """Whether any row has a label; the library writes -1 for none."""
    return label in table.features and not set(table.select_columns([label])[:][label]) <= {None, -1}


def _labels(table: Any, label: str, numbers: dict[Any, int], location: str, split: str) -> torch.Tensor:
    if label not in table.features:
        raise ValueError(f"data: split {split!r} of {location!r} has no column {label!r}")
    values = table.select_columns([label])[:][label]
    strange = [value for value in values if value is None or (numbers and str(value) not in numbers)]
    if strange:
        raise ValueError(
            f"data: split {split!r} of {location!r} has the label {strange[0]!r}, which no train image has"
        )
    return torch.tensor([numbers[str(value)] if numbers else value for value in values], dtype=torch.int64)
