"""Rows of evaluation data become batches of a model's inputs, with labels that are ids of the joint classes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_zipit.data.inputs import ModelInputs, first_of, prepare, tensor_of
from hf_zipit.data.labels import IGNORED, LABEL_COLUMNS
from hf_zipit.data.sources import rename
from hf_zipit.errors import DataError, ZipItError
from hf_zipit.evaluation.side_by_side import SideBySide, answers_ahead
from hf_zipit.experts.loading import Expert, load_expert
from hf_zipit.experts.vocabulary import one_vocabulary
from hf_zipit.hub.processors import OwnProcessor
from hf_zipit.hub.reasons import first_line
from hf_zipit.modeling import ZipItModel, ZipItPreTrainedModel, ZipItWriter
from hf_zipit.modeling.empty_model import source_class


@dataclass(frozen=True)
class Reading:
    """How samples become batches."""

    processor: Any
    columns: Mapping[str, str]
    batch_size: int


@dataclass(frozen=True, eq=False)
class Subject:
    """What is evaluated.

    Attributes:
        model: a merged model that answers for all tasks, or experts side by side.
        offsets: for every task the joint id of its class 0.
        classes: how many classes a task has; None where labels are a vocabulary without names, or there are none.
        inputs: what a task's model reads.
        kind: the merged class of such models.
        answers: whether it answers with a class or token, so that there is an accuracy.
        causal: whether an answer is for the next position.
        joins: whether all tasks can be asked with one input; experts with tokenizers of their own cannot.
    """

    model: nn.Module
    offsets: Mapping[str, int]
    classes: Mapping[str, int | None]
    inputs: Mapping[str, ModelInputs]
    kind: type[ZipItPreTrainedModel]
    answers: bool
    causal: bool = False
    joins: bool = True

    @classmethod
    def of(cls, model: Expert | Mapping[str, Expert]) -> Subject:
        """A merged model, or experts by task, loaded where they are given by repo id or folder.

        Raises:
            DataError: for anything else.
            ExpertError: if one cannot be loaded.
        """
        if isinstance(model, Mapping):
            model = {task: load_expert(task, expert) for task, expert in model.items()}
        elif isinstance(model, (str, Path)):
            model = load_expert(str(model), model)
        whole = SideBySide(model) if isinstance(model, Mapping) else model
        if isinstance(whole, SideBySide):
            classes = {task: whole.classes(task) for task in whole.tasks}
            experts = dict(zip(whole.tasks, whole.experts, strict=True))
            inputs = {task: ModelInputs.of(expert) for task, expert in experts.items()}
            return cls(
                whole, whole.offsets(), classes, inputs, whole.kind, not whole.plain, whole.causal,
                one_vocabulary(experts),
            )  # fmt: skip
        if not isinstance(whole, ZipItPreTrainedModel):
            raise DataError(
                f"{type(whole).__name__} is not a merged model; pass one, or a mapping of task names to experts."
            )
        whole = whole.for_task(None)
        source = source_class(whole.config.source_architecture)
        inputs = ModelInputs.of_class(source, whole.config.source_config, source.main_input_name)
        answers = not isinstance(whole, ZipItModel)
        classes = {task: answers and len(whole.config.labels_of(task)) or None for task in whole.config.tasks}
        return cls(
            whole, whole.config.offsets(), classes, dict.fromkeys(classes, inputs), type(whole), answers,
            answers_ahead(type(whole), whole.config.source_config),
        )  # fmt: skip

    @property
    def labelled(self) -> bool:
        """Whether there have to be labels in what it reads."""
        return self.answers or issubclass(self.kind, ZipItWriter)

    def processor(self, task: str) -> OwnProcessor:
        """What belongs to a task's model."""
        if isinstance(self.model, SideBySide):
            return OwnProcessor(self.model.experts[self.model.tasks.index(task)])
        return OwnProcessor(self.model, self.model.branch_names[task])


@contextmanager
def told_in_a_sentence(subject: Subject, task: str) -> Iterator[None]:
    """What a model or its processor raises about the data of a task, as a DataError."""
    try:
        yield
    except ZipItError:
        raise
    except (ValueError, RuntimeError, IndexError, TypeError) as error:
        raise DataError(
            f"{subject.inputs[task].architecture} cannot run on the evaluation data of the task {task!r}: "
            f"{first_line(error)}; give data that were prepared as the experts' own."
        ) from error


@dataclass(frozen=True)
class Collate:
    """Rows of the task `name` -> a batch, with labels that are ids of the joint classes.

    Attributes:
        classes: how many the task has, if that is known.
        offset: the joint id of its class 0.
        labelled: whether there have to be labels; without, they say which images and texts belong together.

    Calling it raises DataError if the model's inputs or the labels are missing, or a label is not a class of the task.
    """

    inputs: ModelInputs
    reading: Reading
    name: str
    classes: int | None
    offset: int
    labelled: bool

    def __call__(self, rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
        renamed = [rename(row, self.reading.columns) for row in rows]
        columns = {column: [row[column] for row in renamed] for column in renamed[0]}
        whose = f" of the task {self.name!r}"
        inputs = replace(self.inputs, purpose="evaluation")
        batch: dict[str, Any] = prepare(columns, inputs, self.reading.processor, whose)
        given = first_of(LABEL_COLUMNS, columns)
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
