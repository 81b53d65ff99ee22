"""Calibration data of any usual kind -> raw batches, the columns of a few samples each.

What is taken, per task (`{"clothes": data, "shoes": data}`) or as one collection for all tasks:

- a `datasets.Dataset` or `IterableDataset`, with prepared columns (`pixel_values`, `input_ids`, ...) or with an
  `image` or `text` column and the `processor` (image processor, tokenizer or both in one) that prepares it;
- a `torch.utils.data.DataLoader`, or any other iterable of batches (dicts of tensors, tensors, or tuples of which the
  first is the input);
- a tensor or numpy array of the model's main input, or a dict of tensors;
- a list, or a `torch` dataset, of samples (dicts, tensors, or tuples of which the first is the input).

`columns` renames columns of any of these, `{"img": "image"}`.

Nothing is read before its batch is asked for, as far as the kind of the data allows that.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import IterableDataset as TorchIterableDataset

from hf_zipit.data.inputs import IMAGE_COLUMNS, TEXT_COLUMNS, Columns, ModelInputs
from hf_zipit.errors import DataError

# How many axes a batch of these inputs has: tells a list of batches from a list of samples.
_BATCH_AXES = {"pixel_values": 4, "input_ids": 2, "input_values": 2, "input_features": 3, "inputs_embeds": 3}


def rename(row: Mapping[str, Any], columns: Mapping[str, str]) -> Columns:
    """A row or batch with other names of columns; a renamed column takes the place of its namesake.

    Columns that it lacks are passed over, so that one mapping serves tasks whose data differ.
    """
    kept = {name: value for name, value in row.items() if name not in columns}
    return kept | {new: row[old] for old, new in columns.items() if old in row}


def by_task(
    calibration: Any, inputs: ModelInputs, tasks: Sequence[str], columns: Mapping[str, str]
) -> dict[str | None, Any]:
    """The collections by task; under None the one for all tasks. Raises DataError if tasks are missing or unknown."""
    if calibration is None:
        raise DataError("There is no calibration data: give some unlabelled inputs of every task.")
    if not isinstance(calibration, Mapping):
        return {None: calibration}
    named = rename(calibration, columns)
    if not any(task in calibration for task in tasks) and any(_is_input(name, inputs) for name in named):
        return {None: calibration}
    if unknown := [name for name in calibration if name not in tasks]:
        raise DataError(
            f"The calibration data has entries {unknown}, but the experts' tasks are {list(tasks)} "
            f"and the model's input is {inputs.expected()}."
        )
    if missing := [task for task in tasks if task not in calibration]:
        raise DataError(
            f"There is no calibration data for the tasks {missing}: give data for every task, or one "
            "collection for all of them."
        )
    return {task: calibration[task] for task in tasks}


def _is_input(name: str, inputs: ModelInputs) -> bool:
    return name in (inputs.accepted or (inputs.main,)) or name in (*IMAGE_COLUMNS, *TEXT_COLUMNS)


# --- collections -> raw batches: callables that give the columns of one batch ---


def raw_batches(
    data: Any, main: str, size: int, name: str, columns: Mapping[str, str] | None = None
) -> Iterator[Callable[[], Columns]]:
    """For every batch of at most `size` samples what gives its columns.

    Args:
        data: one collection; see the module's docstring.
        main: the model's main input.
        size: larger batches of a `DataLoader` or iterable are split, smaller ones are left.
        name: what to add to "the calibration data" in errors.
        columns: other names of columns.

    Raises:
        DataError: the collection is of no kind that can be read.
    """
    if columns:
        if isinstance(data, (list, tuple)):  # names tell batches from samples
            data = [rename(row, columns) if isinstance(row, Mapping) else row for row in data]
        return (partial(_renamed, columns, load) for load in raw_batches(data, main, size, name))
    if isinstance(data, (Tensor, np.ndarray)):
        data = {main: data}
    if isinstance(data, Mapping):
        data = {column: x.to_dense() if isinstance(x, Tensor) and x.is_sparse else x for column, x in data.items()}
        return _slices(partial(rows_of, dict(data)), _column_length(data, name), size)
    if is_from_datasets(data, "Dataset"):
        return _slices(lambda start, stop: data[start:stop], len(data), size)
    if is_from_datasets(data, "IterableDataset"):
        return (partial(dict, batch) for batch in data.iter(size))
    if isinstance(data, DataLoader):
        return _split(_seeded(_plain_loader(data, name)), main, size, name)
    if isinstance(data, TorchIterableDataset):
        return (partial(_collate, samples, main) for samples in _chunks(data, size))
    if isinstance(data, (str, bytes)) or not (hasattr(data, "__iter__") or hasattr(data, "__getitem__")):
        raise DataError(
            f"The calibration data{name} is of type {type(data).__name__}; give a Dataset, a DataLoader, tensors, "
            "samples or batches."
        )
    if hasattr(data, "__len__") and hasattr(data, "__getitem__") and not (len(data) and is_batch(data[0], main)):
        return _slices(lambda start, stop: _collate([data[i] for i in range(start, stop)], main), len(data), size)
    return _split(data, main, size, name)


def _renamed(columns: Mapping[str, str], load: Callable[[], Columns]) -> Columns:
    return rename(load(), columns)


def is_from_datasets(data: Any, name: str = "Dataset") -> bool:
    """Whether this is a `datasets.Dataset`, or another of the package's classes."""
    # Whoever has one of its objects has imported it; importing it for the others would take a second.
    datasets = sys.modules.get("datasets")
    return datasets is not None and isinstance(data, getattr(datasets, name))


def _slices(load: Callable[[int, int], Columns], length: int, size: int) -> Iterator[Callable[[], Columns]]:
    return (partial(load, start, min(start + size, length)) for start in range(0, length, size))


def rows_of(columns: Mapping[str, Any], start: int, stop: int) -> Columns:
    """Some rows of columns."""
    return {name: values[start:stop] for name, values in columns.items()}


def _column_length(columns: Mapping[str, Any], name: str) -> int:
    try:
        lengths = {column: len(values) for column, values in columns.items()}
    except TypeError as error:
        raise DataError(f"A column of the calibration data{name} is no sequence of samples: {error}.") from error
    if len(set(lengths.values())) > 1:
        raise DataError(f"The columns of the calibration data{name} have different numbers of samples: {lengths}.")
    return next(iter(lengths.values()), 0)


def _split(batches: Iterable[Any], main: str, size: int, name: str) -> Iterator[Callable[[], Columns]]:
    for batch in batches:
        if isinstance(batch, Mapping):
            columns = dict(batch)
        elif isinstance(batch, (tuple, list)) and batch:
            columns = {main: batch[0]}
        elif isinstance(batch, (Tensor, np.ndarray)):
            columns = {main: batch}
        else:
            raise DataError(
                f"A batch of the calibration data{name} is of type {type(batch).__name__}; it must be a dict."
            )
        yield from _slices(partial(rows_of, columns), _column_length(columns, name), size)


def _plain_loader(loader: DataLoader, name: str) -> DataLoader:
    """The loader, unless accelerate has prepared it: that shares batches out itself, and repeats samples."""
    from accelerate.data_loader import DataLoaderDispatcher, DataLoaderShard
    from accelerate.state import PartialState

    if isinstance(loader, (DataLoaderShard, DataLoaderDispatcher)) and PartialState().num_processes > 1:
        raise DataError(f"The DataLoader{name} was prepared by accelerate: give the plain one, it is shared out here.")
    return loader


def _seeded(loader: DataLoader) -> Iterator[Any]:
    """A loader's batches; one that shuffles does so in the same order every time, in every process.

    Its order is drawn from torch's global generator when the first batch is asked for.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        batches = iter(loader)
        first = list(islice(batches, 1))
    yield from first
    yield from batches


def _chunks(samples: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(samples)
    while chunk := list(islice(iterator, size)):
        yield chunk


def _collate(samples: Sequence[Any], main: str) -> Columns:
    first = samples[0]
    if isinstance(first, Mapping):
        return {name: [sample[name] for sample in samples if name in sample] for name in first}
    if isinstance(first, (tuple, list)) and first and isinstance(first[0], (Tensor, np.ndarray)):
        return {main: [sample[0] for sample in samples]}
    if isinstance(first, str):
        return {"text": list(samples)}
    if hasattr(first, "convert"):  # a PIL image
        return {"image": list(samples)}
    return {main: list(samples)}


def is_batch(first: Any, main: str) -> bool:
    """Whether the first element of a list is a batch already. An input of unknown shape counts as a sample."""
    columns = first if isinstance(first, Mapping) else {main: first}
    return any(np.ndim(columns[n]) >= axes for n, axes in _BATCH_AXES.items() if hasattr(columns.get(n), "ndim"))
