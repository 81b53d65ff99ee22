"""Data that say which task they are of, so that a `transformers.Trainer` measures or trains a merged model rightly.

    data = hf_zipit.task_datasets(merged, {"clothes": clothes, "shoes": shoes})
    Trainer(model=merged, args=args, eval_dataset=data, compute_metrics=hf_zipit.metrics.accuracy).evaluate()

A Trainer hands over batches and does not say whose they are. A merged model that is told no task answers jointly: its
logits are the classes of all tasks, and labels are taken for ids of these. So data of one task need a `task` column;
then logits and labels are the task's own. The column holds the task's position, not its name: transformers' default
collator drops texts without a word.

With `joint=True` the labels become ids of the joint classes instead and no task is told, which measures the joint
answer. Without any of this the labels of every task but the first would be read as those of another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import IterableDataset as TorchIterableDataset

from hf_zipit.data.labels import IGNORED, LABEL_COLUMNS
from hf_zipit.data.sources import is_from_datasets
from hf_zipit.errors import DataError
from hf_zipit.modeling import ZipItPreTrainedModel

if TYPE_CHECKING:
    from datasets import Dataset

Sample = Mapping[str, Any]


def task_datasets(model: ZipItPreTrainedModel, datasets: Mapping[str, Any], *, joint: bool = False) -> dict[str, Any]:
    """The same data sets, each with its task: a Trainer's `eval_dataset`; concatenated, a `train_dataset`.

    Args:
        model: a merged model.
        datasets: for every task a `datasets.Dataset`, a streaming one, or any other collection of dicts. Labels are in
            the column `labels` or `label` and are ids of the task's own classes.
        joint: make the labels ids of the joint classes and name no task.

    Raises:
        ZipItError: for an unknown task.
        DataError: if joint labels are asked for and the tasks share their classes, so that there are none.
    """
    config = model.for_task(None).config
    offsets = config.offsets()
    if joint and len(config.tasks) > 1 and config.joint == "vote":
        raise DataError("The tasks of this model share their classes, so the labels are joint ones already.")
    names = list((config.id2label or {}).values())
    positions = {task: config.tasks.index(model.known(task)) for task in datasets}
    if joint:
        return {task: _joint(data, offsets[task], names) for task, data in datasets.items()}
    return {task: _tagged(data, positions[task]) for task, data in datasets.items()}


def _tagged(data: Any, position: int) -> Any:
    """The data with the column `task`."""
    if is_from_datasets(data):
        return _with_column(data, "task", [position] * len(data))
    return _changed(data, lambda row: {**row, "task": position})


def _joint(data: Any, offset: int, names: list[str]) -> Any:
    """The data with joint labels and no task."""
    if not is_from_datasets(data):

        def change(row: Sample) -> dict[str, Any]:
            shifted = {name: _plus(row[name], offset) for name in LABEL_COLUMNS if name in row}
            return {name: shifted.get(name, value) for name, value in row.items() if name != "task"}

        return _changed(data, change)
    from datasets import ClassLabel

    data = data.remove_columns([name for name in data.column_names if name == "task"])
    for name in LABEL_COLUMNS:
        if name in data.column_names:
            old = data.features[name]
            feature = ClassLabel(names=names) if isinstance(old, ClassLabel) else old
            data = _with_column(data, name, _plus(list(data.with_format(None)[name]), offset), feature)
    return data


def _with_column(data: Dataset, name: str, values: list[Any], feature: Any = None) -> Dataset:
    """The data with one column more, or another one of that name, in the same format."""
    form = data.format
    columns = None if set(form["columns"]) == set(data.column_names) else [*{*form["columns"], name}]
    plain = data.with_format(None)
    plain = plain.remove_columns([name]) if name in plain.column_names else plain
    return plain.add_column(name, values, feature=feature).with_format(
        form["type"], columns=columns, output_all_columns=form["output_all_columns"], **form["format_kwargs"]
    )


def _plus(labels: Any, offset: int) -> Any:
    """Labels of a sample or of its positions as joint ids; those that do not count stay."""
    if isinstance(labels, torch.Tensor):
        return torch.where(labels == IGNORED, labels, labels + offset)
    if isinstance(labels, (list, tuple)):
        return [_plus(label, offset) for label in labels]
    return labels if labels == IGNORED else labels + offset


def _changed(data: Any, change: Callable[[Sample], dict[str, Any]]) -> Any:
    """Rows that are changed when they are read: nothing is copied or written."""
    if is_from_datasets(data, "IterableDataset"):
        return data.map(change)
    return Changed(data, change) if hasattr(data, "__getitem__") else ChangedStream(data, change)


@dataclass(frozen=True, eq=False)
class Changed(TorchDataset):
    """A collection of rows that are changed when they are read."""

    rows: Any
    change: Callable[[Sample], dict[str, Any]]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.change(self.rows[index])


@dataclass(frozen=True, eq=False)
class ChangedStream(TorchIterableDataset):
    """The same for a stream."""

    rows: Any
    change: Callable[[Sample], dict[str, Any]]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return map(self.change, self.rows)
