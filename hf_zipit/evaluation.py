"""How good a merged model is: per task, joint, and beside its experts. Runs on `transformers.Trainer`.

*Per task*: argmax within the task's own classes, the task being known. *Joint*: argmax over the concatenated logits of
all tasks, the task being unknown. The experts are measured in the same way: each on its own task, and side by side
(their logits concatenated), which is the reference for the joint accuracy of any merge.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, Trainer, TrainingArguments, default_data_collator
from transformers.utils import ModelOutput

from hf_zipit.errors import DataError
from hf_zipit.files import write_json
from hf_zipit.registry import suggestion

IGNORED = -100
"""The label of positions that do not count, as everywhere in transformers."""


@dataclass(frozen=True)
class Accuracy:
    """Shares of right answers of one model, in 0..1.

    Attributes:
        per_task: by task, within the task's own classes.
        joint_per_task: by task, over the classes of all tasks; empty where the tasks share their classes.
        samples: by task, the number of answers counted.
    """

    per_task: Mapping[str, float]
    joint_per_task: Mapping[str, float]
    samples: Mapping[str, int]

    @property
    def mean(self) -> float:
        """Mean of the per-task accuracies."""
        return float(np.mean(list(self.per_task.values())))

    @property
    def joint(self) -> float | None:
        """Joint accuracy over the samples of all tasks together."""
        if not self.joint_per_task:
            return None
        return float(np.average(list(self.joint_per_task.values()), weights=list(self.samples.values())))

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "mean": self.mean, "joint": self.joint}


@dataclass(frozen=True)
class Evaluation:
    """The accuracies of a model and, where they were given, of its experts side by side."""

    model: Accuracy
    experts: Accuracy | None = None

    def to_dict(self) -> dict[str, Any]:
        return {"model": self.model.to_dict(), "experts": self.experts.to_dict() if self.experts else None}

    def to_json(self, path: str | Path) -> Path:
        """Write the accuracies; an earlier file is replaced only by a complete one."""
        return write_json(path, self.to_dict())


class SideBySide(nn.Module):
    """Experts as one model: the upper reference, called like a merged model.

    `forward(task=name)` is that expert, without a task the logits of all are concatenated along the classes.
    """

    accepts_loss_kwargs = False  # Trainer would pass the number of items on to the experts

    def __init__(self, experts: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.tasks = list(experts)
        self.experts = nn.ModuleList(experts.values())
        self.widths = {task: int(expert.config.num_labels) for task, expert in experts.items()}

    def offsets(self) -> dict[str, int]:
        """For every task the joint id of its class 0."""
        ends = np.cumsum([0, *self.widths.values()]).tolist()
        return dict(zip(self.tasks, ends, strict=False))

    def forward(self, task: str | None = None, labels: Tensor | None = None, **inputs: Any) -> ModelOutput:
        chosen = self.experts if task is None else [self.experts[self.tasks.index(task)]]
        logits = torch.cat([expert(**inputs).logits for expert in chosen], dim=-1)
        if labels is None:
            return ModelOutput(logits=logits)
        loss = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED)
        return ModelOutput(loss=loss, logits=logits)


def evaluate(
    model: nn.Module | Mapping[str, nn.Module],
    datasets: Mapping[str, Any],
    experts: Mapping[str, nn.Module] | None = None,
    *,
    batch_size: int = 64,
) -> Evaluation:
    """Per-task and joint accuracy of a merged model, and of its experts beside it.

    Args:
        model: a merged model, or experts by task, which are then evaluated side by side.
        datasets: for every task the samples, each a dict of the model's inputs and `labels`, ids of the task's own
            classes (-100 is not counted). Tasks of the model that are missing here are not measured.
        experts: the experts by task.
        batch_size: samples per forward pass and device.

    Raises:
        DataError: if there are no samples, no labels, labels out of range, or a task that the model does not have.
    """
    own = accuracy(model, datasets, batch_size=batch_size)
    beside = accuracy(experts, datasets, batch_size=batch_size) if experts is not None else None
    return Evaluation(model=own, experts=beside)


def accuracy(
    model: nn.Module | Mapping[str, nn.Module], datasets: Mapping[str, Any], *, batch_size: int = 64
) -> Accuracy:
    """The accuracies of one model; see `evaluate`."""
    model = SideBySide(model) if isinstance(model, Mapping) else model
    offsets = _offsets(model)
    _check(datasets, list(offsets))
    # One vocabulary, or classes that all tasks share: an answer does not tell a task, so there is nothing joint.
    shared = len(offsets) > 1 and len(set(offsets.values())) == 1
    mode = model.training
    try:
        runs = {task: _share_right(model, data, task, task, 0, batch_size) for task, data in datasets.items()}
        joint = {}
        if not shared:
            for task, data in datasets.items():
                joint[task], _ = _share_right(model, data, task, None, offsets[task], batch_size)
    finally:
        model.train(mode)
    return Accuracy(
        per_task={task: right for task, (right, _) in runs.items()},
        joint_per_task=joint,
        samples={task: count for task, (_, count) in runs.items()},
    )


def _classes(model: nn.Module, task: str) -> int | None:
    """How many classes the task has; None where the labels are a vocabulary without names."""
    if isinstance(model, SideBySide):
        return model.widths[task]
    return len(model.config.labels_of(task)) or None


def _offsets(model: nn.Module) -> dict[str, int]:
    """For every task the joint id of its class 0."""
    if isinstance(model, SideBySide):
        return model.offsets()
    if isinstance(model, PreTrainedModel) and hasattr(model.config, "offsets"):
        return model.config.offsets()
    raise DataError(
        f"{type(model).__name__} is no merged model; pass a merged model, or a mapping of task names to experts."
    )


def _check(datasets: Mapping[str, Any], tasks: list[str]) -> None:
    if not datasets:
        raise DataError(f"There is nothing to evaluate on; give a data set for at least one of the tasks {tasks}.")
    for task, data in datasets.items():
        if task not in tasks:
            raise DataError(f"The model has no task {task!r}; {suggestion(task, tasks)}")
        if len(data) == 0:
            raise DataError(f"The evaluation data of the task {task!r} is empty.")
        if "labels" not in data[0]:
            raise DataError(f"The evaluation data of the task {task!r} has no 'labels', only {sorted(data[0])}.")


def _share_right(
    model: nn.Module, data: Any, name: str, task: str | None, offset: int, batch_size: int
) -> tuple[float, int]:
    """Share of right answers and their number, on the data of the task `name`."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=folder,
                per_device_eval_batch_size=batch_size,
                remove_unused_columns=False,  # by the signature, which a merged model leaves open
                label_names=["labels"],
                report_to=[],
                disable_tqdm=True,
                dataloader_pin_memory=torch.cuda.is_available(),
            ),
            data_collator=partial(_collate, name=name, classes=_classes(model, name), task=task, offset=offset),
            # Keeps one number per position instead of a vocabulary's logits.
            preprocess_logits_for_metrics=lambda logits, labels: _first(logits).argmax(-1),
        )
        found = trainer.predict(data)
    answers, labels = _first(found.predictions), _first(found.label_ids)
    counted = labels != IGNORED
    if not counted.any():
        raise DataError(f"The evaluation data of the task {name!r} has no label that counts.")
    return float((answers == labels)[counted].mean()), int(counted.sum())


def _collate(
    rows: Iterable[Mapping[str, Any]], name: str, classes: int | None, task: str | None, offset: int
) -> dict[str, Any]:
    """A batch whose labels are ids of the joint classes, with the task where there is one."""
    batch = default_data_collator(list(rows))
    largest = int(batch["labels"].max())
    if classes is not None and largest >= classes:
        raise DataError(f"The data of the task {name!r} has the label {largest}, but the task has {classes} classes.")
    batch["labels"] = torch.where(batch["labels"] == IGNORED, IGNORED, batch["labels"] + offset)
    return batch if task is None else {**batch, "task": task}


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, tuple) else value
