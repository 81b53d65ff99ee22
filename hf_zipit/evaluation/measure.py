"""How good a merged model is: per task, joint, and beside its experts. Runs on `transformers.Trainer`.

*Per task*: argmax within the task's own classes, the task being known. *Joint*: argmax over the concatenated logits of
all tasks, the task being unknown. The experts are measured in the same way: each on its own task, and side by side
(their logits concatenated), which is the reference for the joint accuracy of any merge. Other metrics are of one task
at a time, the task being known.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from torch import Tensor

from hf_zipit.data.labels import first
from hf_zipit.data.processes import modes_kept
from hf_zipit.errors import DataError
from hf_zipit.evaluation.batches import Collate, Reading, Subject, told_in_a_sentence
from hf_zipit.evaluation.intervals import Answers, Interval, accuracy_interval, calibration_error
from hf_zipit.evaluation.kinds import answered, own_metrics
from hf_zipit.evaluation.results import Accuracies, Evaluation
from hf_zipit.experts.loading import Expert, Experts, load_experts
from hf_zipit.modeling import ZipItWriter
from hf_zipit.registry import suggestion

if TYPE_CHECKING:  # a Trainer takes seconds to import
    from transformers import EvalPrediction


Function = Callable[["EvalPrediction"], dict[str, float]]


def evaluate(
    model: Expert | Mapping[str, Expert],
    datasets: Mapping[str, Any],
    experts: Experts | None = None,
    *,
    metrics: Any = (),
    processor: Any = None,
    columns: Mapping[str, str] | None = None,
    batch_size: int = 64,
) -> Evaluation:
    """Per-task and joint accuracy of a merged model, and of its experts beside it; and further metrics per task.

    Models that answer with no class have no accuracy, but the metrics of their kind: word and character error rates of
    transcripts, exact match and F1 of answers found in a text, mean IoU, mean average precision. Language models have
    their perplexity beside the accuracy.

    Every share has its 95 % interval (bootstrap over samples); with experts, `comparison` has the paired differences
    to them and how often the model answers as they do.

    Args:
        model: a merged model, or experts by task, which are then evaluated side by side; loaded ones, repo ids or
            folders.
        datasets: for every task the samples: a `datasets.Dataset`, a streaming one, or any sequence of dicts of the
            model's inputs (or raw images and texts) and `labels`, ids of the task's own classes (-100 is not
            counted). Tasks of the model that are missing here are not measured.
            Labels of causal language models are the tokens themselves: every position answers for the next one.
            What else is read of models that answer with no class: see the guide, docs/guides/evaluating.md.
        experts: the experts by task, as `merge` takes them.
        metrics: of `hf_zipit.metrics`, by name; modules of `evaluate`; or functions of an `EvalPrediction`, such as a
            Trainer takes for `compute_metrics`. One or several; by default those of the models' kind.
        processor: image processor, tokenizer or both in one, for raw images and texts; the model's own by default.
        columns: names in the data -> names of the model's inputs, `image`, `text` or `labels`.
        batch_size: samples per forward pass and device.

    Raises:
        DataError: if there are no samples, no labels, labels out of range, or a task that the model does not have.
        RecipeError: for an unknown metric.
    """
    wanted = _find_metrics(metrics)
    reading = Reading(processor, columns or {}, batch_size)
    own = _measured(Subject.of(model), datasets, wanted, reading)
    if not experts:
        return own
    side = Subject.of(experts if isinstance(experts, Mapping) else load_experts(experts))
    beside = _measured(side, datasets, wanted, reading)
    return replace(own, experts=beside.model, expert_scores=beside.scores, comparison=own.compared(beside))


def accuracy(
    model: Expert | Mapping[str, Expert],
    datasets: Mapping[str, Any],
    *,
    processor: Any = None,
    columns: Mapping[str, str] | None = None,
    batch_size: int = 64,
) -> Accuracies:
    """The accuracies of one model; see `evaluate`."""
    return _accuracy(Subject.of(model), datasets, Reading(processor, columns or {}, batch_size))[0]


def _find_metrics(metrics: Any) -> list[Function]:
    if not callable(metrics) and not metrics:
        return []
    from hf_zipit.evaluation.metrics import find_metrics  # imports `evaluate`, which takes seconds

    return find_metrics(metrics)


def _measured(
    subject: Subject, datasets: Mapping[str, Any], metrics: Sequence[Function], reading: Reading
) -> Evaluation:
    """The accuracies, where the model has classes, and the metrics by task."""
    metrics = metrics or _find_metrics(own_metrics(subject))
    if not subject.answers and not metrics:
        raise DataError("The model answers with no class, so it has no accuracy; name metrics that fit it.")
    found, answers = _accuracy(subject, datasets, reading) if subject.answers else (None, {})
    _check(datasets, list(subject.offsets))
    scores: dict[str, dict[str, float]] = {}
    intervals: dict[str, dict[str, Interval]] = {}
    for task, data in datasets.items() if metrics else ():
        scores[task], intervals[task], passes, answers_read = {}, {}, {}, {}
        for metric in metrics:
            if reads := getattr(metric, "reads", None):
                if reads not in answers_read:
                    answers_read[reads] = answered(subject, data, task, reading, reads)
                scores[task] |= metric.measures(*answers_read[reads])
                if metric.intervals is not None:
                    intervals[task] |= metric.intervals(*answers_read[reads])
                continue
            keep = getattr(metric, "preprocess", None)
            kept = getattr(keep, "__func__", keep)  # metrics that read the same thing share a pass
            if kept not in passes:
                passes[kept] = _predict(subject, data, task, reading, keep)
            scores[task] |= metric(passes[kept])
            if hasattr(metric, "intervals"):
                intervals[task] |= metric.intervals(passes[kept])
    return Evaluation(found, scores=scores, score_intervals=intervals, answers=answers)


def _accuracy(
    subject: Subject, datasets: Mapping[str, Any], reading: Reading
) -> tuple[Accuracies, dict[str, Answers]]:
    _check(datasets, list(subject.offsets))
    # One vocabulary, or classes that all tasks share: an answer does not tell a task, so there is nothing joint.
    shared = len(subject.offsets) > 1 and len(set(subject.offsets.values())) == 1
    answers = {task: _answers(subject, data, task, reading) for task, data in datasets.items()}
    jointly = (
        {}
        if shared or not subject.joins
        else {t: _answers(subject, data, t, reading, jointly=True) for t, data in datasets.items()}
    )
    intervals, joint = ({task: accuracy_interval(a) for task, a in found.items()} for found in (answers, jointly))
    found = Accuracies(
        {task: interval.value for task, interval in intervals.items()},
        {task: interval.value for task, interval in joint.items()},
        {task: int(each.counted.sum()) for task, each in answers.items()},
        intervals, joint, {task: calibration_error(each) for task, each in answers.items()},
    )  # fmt: skip
    return found, answers


def _check(datasets: Mapping[str, Any], tasks: list[str]) -> None:
    if not datasets:
        raise DataError(f"There is nothing to evaluate on; give a data set for at least one of the tasks {tasks}.")
    for task, data in datasets.items():
        if task not in tasks:
            raise DataError(f"The model has no task {task!r}; {suggestion(task, tasks)}")
        if isinstance(data, Mapping):
            raise DataError(
                f"The evaluation data of the task {task!r} is a {type(data).__name__} of {', '.join(map(str, data))}; "
                "give a data set of one split, or a list with a mapping for each sample."
            )
        if hasattr(data, "__len__") and len(data) == 0:
            raise DataError(f"The evaluation data of the task {task!r} is empty.")


def _answers(subject: Subject, data: Any, task: str, reading: Reading, *, jointly: bool = False) -> Answers:
    """What the model answers on the data of a task; raises DataError if no label counts."""
    found = _predict(subject, data, task, reading, _class_and_confidence, jointly=jointly)
    given, confidence = found.predictions
    answers = Answers(given, confidence, first(found.label_ids))
    if not answers.counted.any():
        raise DataError(f"The evaluation data of the task {task!r} has no label that counts.")
    return answers


def _class_and_confidence(logits: Any, labels: Any) -> tuple[Tensor, Tensor]:
    """Two numbers per position instead of a vocabulary's logits."""
    best = first(logits).max(-1)
    return best.indices, (best.values - first(logits).logsumexp(-1)).exp().float()


def _predict(
    subject: Subject, data: Any, task: str, reading: Reading, keep: Callable[[Any, Any], Any] | None, *,
    jointly: bool = False,
) -> EvalPrediction:  # fmt: skip
    """What a model answers on the data of a task, and the labels.

    Args:
        keep: what is kept of a batch's outputs; everything for None.
        jointly: ask among the classes of all tasks, without telling the task.
    """
    from transformers import EvalPrediction, Trainer, TrainingArguments

    offset = subject.offsets[task] if jointly else 0
    caches = ["past_key_values"] if subject.causal or issubclass(subject.kind, ZipItWriter) else None
    if reading.processor is None:
        reading = replace(reading, processor=subject.processor(task))
    collate = Collate(subject.inputs[task], reading, task, subject.classes[task], offset, subject.labelled)
    model = subject.model.for_task(None if jointly else task)
    model.joint_labels = jointly
    with tempfile.TemporaryDirectory() as folder, modes_kept([subject.model]):  # a Trainer puts it into eval mode
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
                use_cpu=PartialState().device.type == "cpu",
                dataloader_pin_memory=torch.cuda.is_available(),
            ),
            data_collator=collate,
            preprocess_logits_for_metrics=_ahead(keep) if subject.causal else keep,
        )
        with told_in_a_sentence(subject, task):
            found = trainer.predict(data, ignore_keys=caches)
    labels = found.label_ids[:, 1:] if subject.causal else found.label_ids
    return EvalPrediction(found.predictions, labels)


def _ahead(keep: Callable[[Any, Any], Any] | None) -> Callable[[Any, Any], Any]:
    """What is kept of a batch where every position answers for the next one."""

    def kept(logits: Any, labels: Any) -> Any:
        logits, labels = first(logits)[:, :-1], first(labels)[:, 1:]
        return logits if keep is None else keep(logits, labels)

    return kept
