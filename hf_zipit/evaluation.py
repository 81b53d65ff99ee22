"""How good a merged model is: per task, joint, and beside its experts. Runs on `transformers.Trainer`.

*Per task*: argmax within the task's own classes, the task being known. *Joint*: argmax over the concatenated logits of
all tasks, the task being unknown. The experts are measured in the same way: each on its own task, and side by side
(their logits concatenated), which is the reference for the joint accuracy of any merge. Other metrics look at one task
at a time, the task being known.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import EvalPrediction, Trainer, TrainingArguments
from transformers.utils import ModelOutput

from hf_zipit.errors import DataError
from hf_zipit.files import write_json
from hf_zipit.modeling import ZipItForMaskedLM, ZipItModel, ZipItPreTrainedModel, merged_class
from hf_zipit.modeling.joint import vote
from hf_zipit.modeling.skeleton import source_class
from hf_zipit.observe.data import Renamed
from hf_zipit.observe.inputs import ModelInputs, prepare, tensor_of
from hf_zipit.registry import suggestion

LABEL_COLUMNS = ("labels", "label")

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
    """What was measured of a model and, where they were given, of its experts side by side.

    Attributes:
        model, experts: their accuracies; None for models without classes, such as CLIP.
        scores, expert_scores: further metrics, `{task: {name: value}}`.
    """

    model: Accuracy | None
    experts: Accuracy | None = None
    scores: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    expert_scores: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {
            "model": self.model.to_dict() if self.model else None,
            "experts": self.experts.to_dict() if self.experts else None,
            "scores": {task: dict(found) for task, found in self.scores.items()},
            "expert_scores": {task: dict(found) for task, found in self.expert_scores.items()},
        }

    def to_json(self, path: str | Path) -> Path:
        """Write the accuracies; an earlier file is replaced only by a complete one."""
        return write_json(path, self.to_dict())


class SideBySide(nn.Module):
    """Experts as one model: the upper reference, called like a merged model.

    `forward(task=name)` is that expert, without a task the logits of all are concatenated along the classes; experts
    of one vocabulary vote.
    """

    accepts_loss_kwargs = False  # Trainer would pass the number of items on to the experts

    def __init__(self, experts: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.tasks = list(experts)
        self.experts = nn.ModuleList(experts.values())
        self.vocabulary = any(merged_class(type(expert).__name__) is ZipItForMaskedLM for expert in self.experts)
        self.contrastive = any(hasattr(expert, "get_image_features") for expert in self.experts)

    def classes(self, task: str) -> int | None:
        """How many classes a task has; None where there is a vocabulary, or nothing to choose from."""
        if self.vocabulary or self.contrastive:
            return None
        return int(self.experts[self.tasks.index(task)].config.num_labels)

    def offsets(self) -> dict[str, int]:
        """For every task the joint id of its class 0."""
        ends = np.cumsum([0, *(self.classes(task) or 0 for task in self.tasks)]).tolist()
        return dict(zip(self.tasks, ends, strict=False))

    def for_task(self, task: str | None) -> nn.Module:
        """All of them, or one."""
        if task is None:
            return self
        expert = self.experts[self.tasks.index(task)]
        return expert if self.contrastive else SideBySide({task: expert})

    def forward(self, task: str | None = None, labels: Tensor | None = None, **inputs: Any) -> ModelOutput:
        chosen = self.experts if task is None else [self.experts[self.tasks.index(task)]]
        all_logits = [expert(**inputs).logits for expert in chosen]
        logits = vote(all_logits) if self.vocabulary else torch.cat(all_logits, dim=-1)
        if labels is None:
            return ModelOutput(logits=logits)
        loss = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED)
        return ModelOutput(loss=loss, logits=logits)


def evaluate(
    model: nn.Module | Mapping[str, nn.Module],
    datasets: Mapping[str, Any],
    experts: Mapping[str, nn.Module] | None = None,
    *,
    metrics: Any = (),
    processor: Any = None,
    columns: Mapping[str, str] | None = None,
    batch_size: int = 64,
) -> Evaluation:
    """Per-task and joint accuracy of a merged model, and of its experts beside it; and further metrics per task.

    Args:
        model: a merged model, or experts by task, which are then evaluated side by side.
        datasets: for every task the samples: a `datasets.Dataset`, a streaming one, or any sequence of dicts of the
            model's inputs (or raw images and texts) and `labels`, ids of the task's own classes (-100 is not
            counted). Tasks of the model that are missing here are not measured.
        experts: the experts by task.
        metrics: of `hf_zipit.metrics`, by name; modules of `evaluate`; or functions of an `EvalPrediction`, such as a
            Trainer takes for `compute_metrics`. One or several.
        processor: image processor, tokenizer or both in one, for raw images and texts.
        columns: names in the data -> names of the model's inputs, `image`, `text` or `labels`.
        batch_size: samples per forward pass and device.

    Raises:
        DataError: if there are no samples, no labels, labels out of range, or a task that the model does not have.
        RecipeError: for an unknown metric.
    """
    wanted = _find_metrics(metrics)
    reading = _Reading(processor, columns or {}, batch_size)
    own, scores = _measured(_whole(model), datasets, wanted, reading)
    beside, expert_scores = (None, {}) if experts is None else _measured(_whole(experts), datasets, wanted, reading)
    return Evaluation(own, beside, scores, expert_scores)


def accuracy(
    model: nn.Module | Mapping[str, nn.Module],
    datasets: Mapping[str, Any],
    *,
    processor: Any = None,
    columns: Mapping[str, str] | None = None,
    batch_size: int = 64,
) -> Accuracy:
    """The accuracies of one model; see `evaluate`."""
    return _accuracy(_whole(model), datasets, _Reading(processor, columns or {}, batch_size))


@dataclass(frozen=True)
class _Reading:
    """How samples become batches."""

    processor: Any
    columns: Mapping[str, str]
    batch_size: int


def _find_metrics(metrics: Any) -> list[Callable[[EvalPrediction], dict[str, float]]]:
    if not callable(metrics) and not metrics:
        return []
    from hf_zipit.metrics import find_metrics  # imports `evaluate`, which takes seconds

    return find_metrics(metrics)


def _whole(model: nn.Module | Mapping[str, nn.Module]) -> nn.Module:
    """The experts side by side, or the merged model that answers for all tasks."""
    if isinstance(model, Mapping):
        return SideBySide(model)
    if isinstance(model, SideBySide):
        return model
    if isinstance(model, ZipItPreTrainedModel):
        return model.for_task(None)
    raise DataError(
        f"{type(model).__name__} is no merged model; pass a merged model, or a mapping of task names to experts."
    )


def _measured(
    whole: nn.Module,
    datasets: Mapping[str, Any],
    metrics: list[Callable[[EvalPrediction], dict[str, float]]],
    reading: _Reading,
) -> tuple[Accuracy | None, dict[str, dict[str, float]]]:
    """The accuracies, where the model has classes, and the metrics by task."""
    answering = _answers(whole)
    if not answering and not metrics:
        raise DataError("The model answers with no class, so it has no accuracy; name metrics that fit it.")
    found = _accuracy(whole, datasets, reading) if answering else None
    _check(datasets, _tasks(whole))
    scores: dict[str, dict[str, float]] = {}
    for task, data in datasets.items() if metrics else ():
        scores[task], passes = {}, {}
        for metric in metrics:
            keep = getattr(metric, "preprocess", None)
            kept = getattr(keep, "__func__", keep)  # metrics that look at the same thing share a pass
            if kept not in passes:
                passes[kept] = _predict(whole, data, task, task, 0, reading, keep)
            scores[task] |= metric(passes[kept])
    return found, scores


def _accuracy(whole: nn.Module, datasets: Mapping[str, Any], reading: _Reading) -> Accuracy:
    _check(datasets, _tasks(whole))
    offsets = whole.offsets() if isinstance(whole, SideBySide) else whole.config.offsets()
    # One vocabulary, or classes that all tasks share: an answer does not tell a task, so there is nothing joint.
    shared = len(offsets) > 1 and len(set(offsets.values())) == 1
    runs = {task: _share_right(whole, data, task, task, 0, reading) for task, data in datasets.items()}
    joint = {}
    if not shared:
        for task, data in datasets.items():
            joint[task], _ = _share_right(whole, data, task, None, offsets[task], reading)
    return Accuracy(
        per_task={task: right for task, (right, _) in runs.items()},
        joint_per_task=joint,
        samples={task: count for task, (_, count) in runs.items()},
    )


def _answers(whole: nn.Module) -> bool:
    """Whether the model answers with a class or token, so that there is an accuracy."""
    return not whole.contrastive if isinstance(whole, SideBySide) else not isinstance(whole, ZipItModel)


def _tasks(whole: nn.Module) -> list[str]:
    return list(whole.tasks if isinstance(whole, SideBySide) else whole.config.tasks)


def _check(datasets: Mapping[str, Any], tasks: list[str]) -> None:
    if not datasets:
        raise DataError(f"There is nothing to evaluate on; give a data set for at least one of the tasks {tasks}.")
    for task, data in datasets.items():
        if task not in tasks:
            raise DataError(f"The model has no task {task!r}; {suggestion(task, tasks)}")
        if hasattr(data, "__len__") and len(data) == 0:
            raise DataError(f"The evaluation data of the task {task!r} is empty.")


def _share_right(
    whole: nn.Module, data: Any, name: str, task: str | None, offset: int, reading: _Reading
) -> tuple[float, int]:
    """Share of right answers and their number, on the data of the task `name`."""
    # Keeps one number per position instead of a vocabulary's logits.
    found = _predict(whole, data, name, task, offset, reading, lambda logits, labels: _first(logits).argmax(-1))
    answers, labels = _first(found.predictions), _first(found.label_ids)
    counted = labels != IGNORED
    if not counted.any():
        raise DataError(f"The evaluation data of the task {name!r} has no label that counts.")
    return float((answers == labels)[counted].mean()), int(counted.sum())


def _predict(
    whole: nn.Module,
    data: Any,
    name: str,
    task: str | None,
    offset: int,
    reading: _Reading,
    keep: Callable[[Any, Any], Any] | None,
) -> EvalPrediction:
    """What a model answers on the data of the task `name`, and the labels, `offset` added.

    Args:
        task: whom to ask: one task, or all jointly.
        keep: what is kept of a batch's outputs; everything for None.
    """
    model = whole.for_task(task)
    collate = _Collate(_inputs_of(whole, name), reading, name, _classes(whole, name), offset, _answers(whole))
    with tempfile.TemporaryDirectory() as folder, _modes_kept(whole):
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=folder,
                per_device_eval_batch_size=reading.batch_size,
                remove_unused_columns=False,  # by the signature, which a merged model leaves open
                label_names=["labels"],
                report_to=[],
                disable_tqdm=True,
                # A Trainer makes Accelerate's state anew, which without this forgets other processes on CPUs.
                use_cpu=not (torch.cuda.is_available() or torch.backends.mps.is_available()),
                dataloader_pin_memory=torch.cuda.is_available(),
            ),
            data_collator=collate,
            preprocess_logits_for_metrics=keep,
        )
        found = trainer.predict(data)
    return EvalPrediction(found.predictions, found.label_ids)


@contextmanager
def _modes_kept(whole: nn.Module) -> Iterator[None]:
    """A Trainer puts what it evaluates into eval mode; afterwards every module is in its own again."""
    modes = [(module, module.training) for module in whole.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _classes(whole: nn.Module, task: str) -> int | None:
    """How many classes the task has; None where the labels are a vocabulary without names, or there are none."""
    if isinstance(whole, SideBySide):
        return whole.classes(task)
    return len(whole.config.labels_of(task)) or None


def _inputs_of(whole: nn.Module, task: str) -> ModelInputs:
    """What the experts read; merged models pass on whatever they are given."""
    if isinstance(whole, SideBySide):
        inputs = ModelInputs.of(whole.experts[whole.tasks.index(task)])
    else:
        source = source_class(whole.config.source_architecture)
        inputs = ModelInputs.of_class(source, whole.config.source_config, source.main_input_name)
    return replace(inputs, purpose="evaluation")


class _Collate:
    """Rows of the task `name` -> a batch, with labels that are ids of the joint classes.

    Args:
        classes: how many the task has, if that is known.
        offset: the joint id of its class 0.
        labelled: whether there have to be labels; without, they say which images and texts belong together.

    Raises:
        DataError: if the model's inputs or the labels are not there, or a label is no class of the task.
    """

    def __init__(
        self, inputs: ModelInputs, reading: _Reading, name: str, classes: int | None, offset: int, labelled: bool
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


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, tuple) else value
