"""How good a merged model is: per task, joint, and beside its experts. Runs on `transformers.Trainer`.

*Per task*: argmax within the task's own classes, the task being known. *Joint*: argmax over the concatenated logits of
all tasks, the task being unknown. The experts are measured in the same way: each on its own task, and side by side
(their logits concatenated), which is the reference for the joint accuracy of any merge. Other metrics are of one task
at a time, the task being known.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hf_zipit.data.labels import IGNORED, first
from hf_zipit.errors import DataError
from hf_zipit.evaluation.batches import Collate, Reading, classes_of, inputs_of
from hf_zipit.evaluation.results import Accuracies, Evaluation
from hf_zipit.evaluation.side_by_side import SideBySide
from hf_zipit.modeling import ZipItModel, ZipItPreTrainedModel
from hf_zipit.registry import suggestion

if TYPE_CHECKING:  # a Trainer takes seconds to import
    from transformers import EvalPrediction


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
    reading = Reading(processor, columns or {}, batch_size)
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
) -> Accuracies:
    """The accuracies of one model; see `evaluate`."""
    return _accuracy(_whole(model), datasets, Reading(processor, columns or {}, batch_size))


def _find_metrics(metrics: Any) -> list[Callable[[EvalPrediction], dict[str, float]]]:
    if not callable(metrics) and not metrics:
        return []
    from hf_zipit.evaluation.metrics import find_metrics  # imports `evaluate`, which takes seconds

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
        f"{type(model).__name__} is not a merged model; pass a merged model, or a mapping of task names to experts."
    )


def _measured(
    whole: nn.Module,
    datasets: Mapping[str, Any],
    metrics: list[Callable[[EvalPrediction], dict[str, float]]],
    reading: Reading,
) -> tuple[Accuracies | None, dict[str, dict[str, float]]]:
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
            kept = getattr(keep, "__func__", keep)  # metrics that read the same thing share a pass
            if kept not in passes:
                passes[kept] = _predict(whole, data, task, task, 0, reading, keep)
            scores[task] |= metric(passes[kept])
    return found, scores


def _accuracy(whole: nn.Module, datasets: Mapping[str, Any], reading: Reading) -> Accuracies:
    _check(datasets, _tasks(whole))
    offsets = whole.offsets() if isinstance(whole, SideBySide) else whole.config.offsets()
    # One vocabulary, or classes that all tasks share: an answer does not tell a task, so there is nothing joint.
    shared = len(offsets) > 1 and len(set(offsets.values())) == 1
    runs = {task: _share_right(whole, data, task, task, 0, reading) for task, data in datasets.items()}
    joint = {}
    if not shared:
        for task, data in datasets.items():
            joint[task], _ = _share_right(whole, data, task, None, offsets[task], reading)
    return Accuracies(
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
    whole: nn.Module, data: Any, name: str, task: str | None, offset: int, reading: Reading
) -> tuple[float, int]:
    """Share of right answers and their number, on the data of the task `name`."""
    # Keeps one number per position instead of a vocabulary's logits.
    found = _predict(whole, data, name, task, offset, reading, lambda logits, labels: first(logits).argmax(-1))
    answers, labels = first(found.predictions), first(found.label_ids)
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
    reading: Reading,
    keep: Callable[[Any, Any], Any] | None,
) -> EvalPrediction:
    """What a model answers on the data of the task `name`, and the labels, `offset` added.

    Args:
        task: whom to ask: one task, or all jointly.
        keep: what is kept of a batch's outputs; everything for None.
    """
    from transformers import EvalPrediction, Trainer, TrainingArguments

    model = whole.for_task(task)
    collate = Collate(inputs_of(whole, name), reading, name, classes_of(whole, name), offset, _answers(whole))
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
                # A Trainer makes Accelerate's state again, which without this forgets other processes on CPUs.
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
