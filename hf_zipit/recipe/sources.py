"""Where recipes take their data from: a name -> a labelled `datasets.Dataset`, and of that each task's own part.

Two sources need no network: `sklearn-digits`, which scikit-learn ships, and `fashion-mnist`, read from its idx files
where they are installed. Any other name is a folder that `datasets.save_to_disk` wrote, or a data set of the Hub.

Invariants: splits are disjoint and the same in every run; a task's part carries the expert's own label ids,
matched by the classes' names, so that an expert is never measured with the labels of another data set.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_zipit.data.inputs import IMAGE_COLUMNS, TEXT_COLUMNS, first_of, process
from hf_zipit.data.labels import LABEL_COLUMNS
from hf_zipit.data.sources import is_from_datasets
from hf_zipit.errors import DataError
from hf_zipit.extras import require
from hf_zipit.files.places import folder_of
from hf_zipit.hub.cache import looks_local
from hf_zipit.hub.reasons import told
from hf_zipit.registry import suggestion

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

Arrays = tuple[np.ndarray, np.ndarray]
Class = int | str

FASHION_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # where Debian's dataset-fashion-mnist puts it
FASHION_HUB = "zalando-datasets/fashion_mnist"
FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip

READERS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text"}
"""Endings of files, and what of `datasets` reads them."""

SHUFFLE_BUFFER = 10_000
"""Samples of a stream among which the next one is drawn. A data set that is sorted by class is shuffled no further."""


def load_source(
    name: str,
    split: str = "train",
    *,
    folder: Path | None = None,
    config: str | None = None,
    columns: Mapping[str, str] | None = None,
    streaming: bool = False,
    labelled: bool | None = True,
) -> Dataset | IterableDataset:
    """A data set: its inputs, and the column `labels` whose feature names the classes.

    Args:
        name: `sklearn-digits`, `fashion-mnist`, a folder, a file (CSV, JSON, parquet) or a data set of the Hub.
        split: `train`, `validation` or `test`; for others what they call their splits.
        folder: where `fashion-mnist`'s idx files are, if not in the usual place.
        config: the configuration of a data set of the Hub.
        columns: new names of columns.
        streaming: read it as it is asked for, instead of downloading all of it first.
        labelled: whether there has to be a label; without, one that is there stays as it is. None: where there is one.

    Raises:
        DataError: if there is no such data set, split or column, or it has no rows.
    """
    if name in BUILT_IN:
        return rename(BUILT_IN[name](split, folder), columns or {}, name)
    found = rename(_from_datasets(name, split, config, streaming), columns or {}, name)
    if is_from_datasets(found) and not len(found):
        raise DataError(f"The data set {name!r} (split {split!r}) is empty; name another split, or fill it.")
    if labelled is None:
        labelled = _has_classes(found)
    return _with_labels(found, name) if labelled else found


def rename(dataset: Dataset | IterableDataset, columns: Mapping[str, str], name: str) -> Dataset | IterableDataset:
    """The data set with other names of columns; those that are in the way are dropped.

    Raises DataError if none of the columns is there.
    """
    if not columns:
        return dataset
    there = _columns(dataset)
    known = {old: new for old, new in columns.items() if old in there and old != new}
    if not any(old in there for old in columns):
        raise DataError(f"The data set {name!r} has none of the columns {list(columns)} to rename, only {there}.")
    taken = [new for new in known.values() if new in there and new not in known]
    return dataset.remove_columns(taken).rename_columns(known)


def _columns(dataset: Dataset | IterableDataset) -> list[str]:
    """The names of the columns; of a stream that does not tell them, those of its first row."""
    return dataset.column_names or list(next(iter(dataset)))


def check_source(name: str, folder: Path | None = None) -> None:
    """Whether a source can be read at all, found out without reading it; Hub names are taken on trust.

    Raises DataError if not.
    """
    if folder is not None and not folder.is_dir():
        raise DataError(f"The data folder {folder} does not exist.")
    if looks_local(name) and not Path(name).expanduser().exists():
        raise DataError(f"The data set folder {name} does not exist.")
    if name not in BUILT_IN and "/" not in name and not Path(name).exists() and get_close_matches(name, BUILT_IN):
        raise DataError(f"There is no data set {name!r}; {suggestion(name, BUILT_IN)}")


# ---------------------------------------------------------------------------------------------------- the sources


def digits(split: str, folder: Path | None = None) -> Dataset:
    """1,797 handwritten digits of 8 x 8 pixels, standardised: `[1, 8, 8]`; 60 % train, 15 % validation, 25 % test."""
    require("sklearn")
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    pixels = ((images.reshape(-1, 1, 8, 8) / 16 - 0.3053) / 0.3761).astype(np.float32)
    rest, test = train_test_split(np.arange(len(labels)), test_size=0.25, random_state=0, stratify=labels)
    train, validation = train_test_split(rest, test_size=0.2, random_state=0, stratify=labels[rest])
    rows = _split({"train": train, "validation": validation, "test": test}, split, "sklearn-digits")
    return _dataset(pixels[rows], labels[rows], [str(digit) for digit in range(10)])


def fashion_mnist(split: str, folder: Path | None = None) -> Dataset:
    """Fashion-MNIST, standardised: `[1, 28, 28]`; of the 60,000 training images the last 5,000 are `validation`."""
    part = "test" if split == "test" else "train"
    folder = folder or FASHION_FOLDER
    pixels, labels = read_idx(folder, part) if folder.is_dir() else _fashion_from_hub(part)
    rows = {"test": slice(None)} if part == "test" else {"train": slice(0, 55_000), "validation": slice(55_000, None)}
    kept = _split(rows, split, "fashion-mnist", ("train", "validation", "test"))
    standard = ((pixels[kept, None] / np.float32(255) - np.float32(0.2860)) / np.float32(0.3530)).astype(np.float32)
    return _dataset(standard, labels[kept].astype(np.int64), list(FASHION_CLASSES))


def read_idx(folder: Path, part: str) -> Arrays:
    """Images `[n, 28, 28]` and labels `[n]`, both uint8, from MNIST's idx files (gzipped)."""
    prefix = "t10k" if part == "test" else "train"
    arrays = []
    for kind, header in (("images-idx3", 16), ("labels-idx1", 8)):
        path = folder / f"{prefix}-{kind}-ubyte.gz"
        try:
            with gzip.open(path) as file:
                arrays.append(np.frombuffer(file.read(), np.uint8, offset=header))
        except (OSError, EOFError, ValueError) as error:
            raise DataError(f"The file {path} of fashion-mnist cannot be read ({error}).") from error
    images, labels = arrays
    return images.reshape(len(labels), 28, 28), labels


def _fashion_from_hub(part: str) -> Arrays:
    rows = _from_datasets(FASHION_HUB, part, None)
    return np.stack([np.asarray(image) for image in rows["image"]]), np.asarray(rows["label"])


BUILT_IN: dict[str, Callable[[str, Path | None], Any]] = {"sklearn-digits": digits, "fashion-mnist": fashion_mnist}


def _from_datasets(name: str, split: str, config: str | None, streaming: bool = False) -> Dataset | IterableDataset:
    """One split of a folder that `save_to_disk` wrote, or of what `datasets.load_dataset` finds."""
    import datasets

    folder = folder_of(name)
    source = str(folder) if folder else f"datasets/{name}"
    ways = ", neither as what `save_to_disk` wrote nor by `load_dataset`" if folder else ""
    with told(f"The data set {name!r} (split {split!r}) cannot be loaded{ways}", source, kind=DataError):
        try:
            if folder and any((folder / f"dataset_{what}.json").is_file() for what in ("dict", "info")):
                saved = datasets.load_from_disk(str(folder))
                if not isinstance(saved, datasets.Dataset):
                    saved = saved[_split({key: key for key in saved}, split, name)]
                return saved.to_iterable_dataset() if streaming else saved
            if (file := Path(name).expanduser()).is_file():
                files = {split: str(file)}
                return datasets.load_dataset(_reader(file), data_files=files, split=split, streaming=streaming)
            return datasets.load_dataset(str(folder or name), config, split=split, streaming=streaming)
        except IndexError as error:  # a saved data set without a single shard
            raise DataError(f"The data set {name!r} (split {split!r}) is empty; name another, or fill it.") from error


def _reader(file: Path) -> str:
    """What reads a file of data, by its ending; raises DataError where nothing does."""
    if file.suffix.lower() not in READERS:
        raise DataError(f"The data file {file} should be one of {', '.join(READERS)}.")
    return READERS[file.suffix.lower()]


def _split(splits: dict[str, Any], split: str, name: str, known: Sequence[str] = ()) -> Any:
    if split not in splits:
        raise DataError(f"{name} has no split {split!r}; {suggestion(split, known or splits)}")
    return splits[split]


def _dataset(pixels: np.ndarray, labels: np.ndarray, names: list[str]) -> Dataset:
    from datasets import Array3D, ClassLabel, Dataset, Features

    features = Features({"pixel_values": Array3D(pixels.shape[1:], "float32"), "labels": ClassLabel(names=names)})
    return Dataset.from_dict({"pixel_values": pixels, "labels": labels}, features=features).with_format("torch")


def _has_classes(dataset: Dataset | IterableDataset) -> bool:
    """Whether there is a label that says of which class a row is."""
    column = first_of(LABEL_COLUMNS, _columns(dataset))
    feature = (dataset.features or {}).get(column)
    names = hasattr(feature, "names")
    return names or (
        is_from_datasets(dataset) and str(getattr(feature, "dtype", "")).startswith(("int", "uint", "str"))
    )


def _with_labels(dataset: Dataset | IterableDataset, name: str) -> Dataset | IterableDataset:
    """The label column named `labels`, with a feature that names its classes."""
    there = _columns(dataset)
    column = first_of(LABEL_COLUMNS, there)
    if column is None:
        wanted = " or ".join(LABEL_COLUMNS)
        raise DataError(f"The data set {name!r} has no column {wanted}, only {there}; say in `columns` which it is.")
    if column != "labels":
        dataset = dataset.rename_column(column, "labels")
    if hasattr((dataset.features or {}).get("labels"), "names"):
        return dataset
    if not is_from_datasets(dataset):
        raise DataError(f"The labels of the streamed data set {name!r} have no names of classes; read it unstreamed.")
    return dataset.class_encode_column("labels")


# ------------------------------------------------------------------------------------------------ of a task's own


def class_names(dataset: Dataset) -> list[str]:
    """The names of the classes of a data set, by label id."""
    return list(dataset.features["labels"].names)


def choose_classes(dataset: Dataset, classes: Sequence[Class], task: str) -> list[int]:
    """Label ids of classes given by id or name. Raises DataError if there is no such class, or one is given twice."""
    names = class_names(dataset)
    ids = []
    for wanted in classes:
        found = wanted if isinstance(wanted, int) else names.index(wanted) if wanted in names else -1
        if not 0 <= found < len(names):
            raise DataError(f"The task {task!r} asks for the class {wanted!r}; {suggestion(str(wanted), names)}")
        ids.append(found)
    if len(set(ids)) < len(ids):
        raise DataError(f"The task {task!r} names a class twice in {list(classes)}.")
    return ids


def match_labels(dataset: Dataset, labels: Sequence[str], task: str) -> list[int]:
    """For each of an expert's labels, in its own order, the data set's label id of the same name.

    Labels that were never named (`LABEL_0`, ...) are taken as the data set's own, if there are as many. Raises
    DataError if a name is not among the data set's classes.
    """
    if (found := matching_labels(dataset, labels)) is not None:
        return found
    names = class_names(dataset)
    missing = next(label for label in labels if label not in names)
    raise DataError(
        f"The task {task!r} has the label {missing!r}, which is not a class of the data set ({_few(names)}); "
        f"give the expert's classes in the order of its labels: `classes` in a recipe, or --classes {task}=A,B,..."
    )


def matching_labels(dataset: Dataset, labels: Sequence[str]) -> list[int] | None:
    """The same; None where the names do not match."""
    names = class_names(dataset)
    if all(label in names for label in labels):
        return [names.index(label) for label in labels]
    unnamed = all(label == f"LABEL_{i}" for i, label in enumerate(labels))
    return list(range(len(names))) if unnamed and len(labels) == len(names) else None


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")


def read(stream: IterableDataset, samples: int | None, seed: int = 0, skip: int = 0) -> Dataset:
    """Samples of a stream, shuffled as far as its buffer goes, as a data set in memory; the order of reading stays."""
    from datasets import Dataset

    if samples is not None:
        stream = stream.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER).skip(skip).take(samples)
    return Dataset.from_list(list(stream), features=stream.features)


def some_of(dataset: Dataset | IterableDataset, samples: int | None, seed: int = 0, skip: int = 0) -> Dataset:
    """At most this many rows, drawn without replacement after `skip` others; all of them for None."""
    if not is_from_datasets(dataset):
        return read(dataset, samples, seed, skip)
    return dataset.select(_draw(np.arange(len(dataset)), samples, seed, skip))


def part_of(
    dataset: Dataset | IterableDataset,
    ids: Sequence[int],
    names: Sequence[str] | None = None,
    *,
    samples: int | None = None,
    seed: int = 0,
    skip: int = 0,
) -> Dataset:
    """At most `samples` rows of the classes `ids`, whose labels become their positions in `ids`.

    The rows are drawn without replacement, from the `seed`, after `skip` others; with `names` the classes are called
    so from now on.
    """
    from datasets import ClassLabel

    names = names or [class_names(dataset)[i] for i in ids]
    if not is_from_datasets(dataset):
        wanted = set(ids)
        dataset = read(dataset.filter(lambda label: label in wanted, input_columns="labels"), samples, seed, skip)
        skip = 0
    labels = np.asarray(dataset.with_format("numpy")["labels"])
    rows = _draw(np.flatnonzero(np.isin(labels, ids)), samples, seed, skip)
    position = {label: index for index, label in enumerate(ids)}
    relabelled = [position[label] for label in labels[rows].tolist()]
    part = dataset.select(rows).remove_columns("labels")
    return part.add_column("labels", relabelled, feature=ClassLabel(names=list(names)))


def _draw(rows: np.ndarray, samples: int | None, seed: int, skip: int = 0) -> np.ndarray:
    """At most this many of the rows, drawn without replacement after `skip` others, in their order."""
    if not skip and (samples is None or samples >= len(rows)):
        return rows
    return np.sort(np.random.default_rng(seed).permutation(rows)[skip:][:samples])


def ready(dataset: Dataset, processor: Any, channels: int | None = None) -> Dataset:
    """What a model reads (`pixel_values`, `input_ids`, ...), made by the experts' processor where it is not there yet.

    Images become RGB unless the model reads one of the `channels`. Raises DataError if there is neither a ready column
    nor a processor for the raw ones.
    """
    columns = dataset.column_names
    if is_ready(dataset):
        return dataset.with_format("torch")
    if processor is None or not first_of((*IMAGE_COLUMNS, *TEXT_COLUMNS), columns):
        raise DataError(
            f"The data has the columns {columns}, and the experts bring no processor that prepares them; "
            "save the experts with their image processor or tokenizer, or give data with pixel_values or input_ids."
        )
    others = [column for column in columns if column != "labels"]
    prepared = dataset.map(
        lambda rows: dict(process(rows, processor, channels, "np")), batched=True, remove_columns=others
    )
    return prepared.with_format("torch")


def guessed_column(dataset: Dataset) -> tuple[str, str] | None:
    """The one column that can only be the images or texts, and what it is: `("review", "text")`; None if none is."""
    from datasets import Image

    features = {name: feature for name, feature in dataset.features.items() if name not in LABEL_COLUMNS}
    if is_ready(dataset) or first_of((*IMAGE_COLUMNS, *TEXT_COLUMNS), features):
        return None
    kinds = {name: "image" for name, feature in features.items() if isinstance(feature, Image)}
    kinds = kinds or {
        n: "text" for n, f in features.items() if str(getattr(f, "dtype", "")) in ("string", "large_string")
    }
    return next(iter(kinds.items())) if len(kinds) == 1 else None


def is_ready(dataset: Dataset) -> bool:
    """Whether the data hold what a model reads, so that there is nothing to prepare."""
    return bool({"pixel_values", "input_ids"} & set(dataset.column_names))
