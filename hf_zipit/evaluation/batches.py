"""Rows of evaluation data become batches of a model's inputs, with labels that are ids of the joint classes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hf_zipit.data.inputs import ModelInputs, prepare, tensor_of
from hf_zipit.data.labels import IGNORED, LABEL_COLUMNS
from hf_zipit.data.sources import Renamed
from hf_zipit.errors import DataError
from hf_zipit.evaluation.side_by_side import SideBySide
from hf_zipit.modeling.empty_model import source_class


@dataclass(frozen=True)
class Reading:
    """How samples become batches."""

    processor: Any
    columns: Mapping[str, str]
    batch_size: int


def classes_of(whole: nn.Module, task: str) -> int | None:
    """How many classes the task has; None where the labels are a vocabulary without names, or there are none."""
    if isinstance(whole, SideBySide):
        return whole.classes(task)
    return len(whole.config.labels_of(task)) or None


def inputs_of(whole: nn.Module, task: str) -> ModelInputs:
    """What the experts read; merged models pass on whatever they are given."""
    if isinstance(whole, SideBySide):
        inputs = ModelInputs.of(whole.experts[whole.tasks.index(task)])
    else:
        source = source_class(whole.config.source_architecture)
        inputs = ModelInputs.of_class(source, whole.config.source_config, source.main_input_name)
    return replace(inputs, purpose="evaluation")


class Collate:
    """Rows of the task `name` -> a batch, with labels that are ids of the joint classes.

    Args:
        classes: how many the task has, if that is known.
        offset: the joint id of its class 0.
        labelled: whether there have to be labels; without, they say which images and texts belong together.

    Raises:
        DataError: if the model's inputs or the labels are not there, or a label is not a class of the task.
    """

    def __init__(
        self, inputs: ModelInputs, reading: Reading, name: str, classes: int | None, offset: int, labelled: bool
    ) -> None:
        self.inputs, self.reading, self.name = inputs, reading, name
        self.classes, self.offset, self.labelled = classes, offset, labelled

    def __call__(self, rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
        renamed = [Renamed(None, self.reading.columns).rename(dict(row)) for row in rows]
        columns = {column: [row[column] for row in renamed] for column in renamed[0]}
        whose = f" of the task {self.name!r}"
        batch: dict[str, Any] = prepare(lambda: columns, self.inputs, self.reading.processor, whose)
        given = next((column for column in LABEL_COLUMNS if column in columns), None)
        if given is None:
            if self.labelled:
                raise DataError(f"The evaluation data{whose} has no 'labels', only {sorted(columns)}.")
            return batch
        batch["labels"] = self.labels(columns[given])
        if not self.labelled:
            batch["return_loss"] = True  # a Trainer gives no labels back where there is no loss
        return batch

    def labels(self, values: list[Any]) -> Tensor:
        labels, _ = tensor_of(values, IGNORED)
        largest = int(labels.max())
        if self.classes is not None and largest >= self.classes:
            raise DataError(
                f"The data of the task {self.name!r} has the label {largest}, but the task has {self.classes} classes."
            )
        return torch.where(labels == IGNORED, IGNORED, labels + self.offset)
