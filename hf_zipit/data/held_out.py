"""Samples that models are scored on without touching test data: held out of the calibration data, with answers.

The right answers are the data's own `labels` where every task has them. Where there are none, the experts answer:
the share of right answers is then the share of samples on which a merged model agrees with the expert of the task.
Both go through the same evaluation.

What must hold: the division depends on the data's length and the seed alone, and no sample is on both sides.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_zipit.data.inputs import ModelInputs
from hf_zipit.data.labels import IGNORED
from hf_zipit.data.sources import by_task, calibration_batches, is_batch
from hf_zipit.errors import DataError, RecipeError

Answers = Literal["auto", "labels", "experts"]


@dataclass(frozen=True, eq=False)
class Columns(Sequence[Mapping[str, Tensor]]):
    """The samples of one task as tensors `[samples, ...]`, the model's inputs and `labels`; a sequence of samples."""

    tensors: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(self.tensors["labels"])

    def __getitem__(self, row: Any) -> Any:
        return {name: tensor[row] for name, tensor in self.tensors.items()}

    def batches(self, size: int) -> Iterator[dict[str, Tensor]]:
        """The samples in order, `size` at a time."""
        for start in range(0, len(self), size):
            yield self[start : start + size]


@dataclass(frozen=True, eq=False)
class HeldOut:
    """What models are scored on.

    Attributes:
        tasks: the samples by task.
        answers: who says what is right: the data's `labels`, or the `experts`.
    """

    tasks: Mapping[str, Columns]
    answers: Literal["labels", "experts"]

    @property
    def counts(self) -> dict[str, int]:
        """The number of samples, by task."""
        return {task: len(columns) for task, columns in self.tasks.items()}


def divide(
    calibration: Any, model: nn.Module, tasks: Sequence[str], share: float, seed: int = 0
) -> tuple[dict[str | None, Any], dict[str | None, Any]]:
    """Divide calibration data: what is left for merging, and what is held out.

    Args:
        calibration: see `hf_zipit.data.sources`, but nothing that can be read only in order.
        model: an expert.
        tasks: the experts' tasks.
        share: of every task's samples that is held out, rounded up, above 0 and below 1.
        seed: of the draw.

    Returns:
        The two parts by task; under None where one collection serves all tasks.

    Raises:
        RecipeError: the share is out of range.
        DataError: there are fewer than two samples, or they cannot be picked one by one.
    """
    if not 0 < share < 1:
        raise RecipeError(f"The share that is held out is {share}; it must be above 0 and below 1.")
    inputs = ModelInputs.of(model)
    rest, held = {}, {}
    for task, data in by_task(calibration, inputs, tasks).items():
        name = "" if task is None else f" for the task {task!r}"
        count = _length(data, inputs.main, name)
        if count < 2:
            raise DataError(f"The calibration data{name} has {count} samples; to hold some out takes at least two.")
        order = np.random.default_rng(seed).permutation(count)
        cut = min(count - 1, int(np.ceil(share * count)))
        held[task], rest[task] = (_pick(data, np.sort(rows)) for rows in (order[:cut], order[cut:]))
    return rest, held


def limit(data: Any, model: nn.Module, tasks: Sequence[str], samples: int, seed: int = 0) -> dict[str | None, Any]:
    """At most `samples` samples of every task, drawn without replacement; raises as `divide` does."""
    inputs = ModelInputs.of(model)
    found = {}
    for task, part in by_task(data, inputs, tasks).items():
        count = _length(part, inputs.main, "" if task is None else f" for the task {task!r}")
        order = np.random.default_rng(seed).permutation(count)[:samples]
        found[task] = _pick(part, np.sort(order))
    return found


def whole(parts: Mapping[str | None, Any]) -> Any:
    """Parts by task as the other stages take them: the one collection itself where there is one for all tasks."""
    return parts[None] if None in parts else dict(parts)


def held_out(
    data: Mapping[str | None, Any],
    experts: Mapping[str, PreTrainedModel],
    *,
    answers: Answers = "auto",
    processor: Any = None,
    batch_size: int = 64,
) -> HeldOut:
    """Samples with answers.

    Args:
        data: by task, or under None one collection for all tasks, as `divide` returns it.
        experts: the experts by task.
        answers: `"labels"` of the data, ids of each task's own classes; the `"experts"`' answers; `"auto"`: labels
            where every task has them.
        processor: image processor or tokenizer for raw data.
        batch_size: samples per forward pass of an expert.

    Raises:
        DataError: if there are no samples, labels are asked for and missing, or the experts answer with no logits.
        RecipeError: for another value of `answers`.
    """
    if answers not in ("auto", "labels", "experts"):
        raise RecipeError(f"answers is {answers!r}; it must be 'auto', 'labels' or 'experts'.")
    labels = {task: _labels(part) for task, part in data.items()}
    complete = None not in data and all(found is not None for found in labels.values())
    if answers == "labels" and not complete:
        raise DataError(
            "The held-out data has no 'labels' for every task; give them, or take answers='experts', which needs none."
        )
    by_labels = complete and answers != "experts"
    tasks = {}
    for task, expert in experts.items():
        found = task if task in data else None
        inputs = _prepared(data[found], expert, task, processor)
        told = labels[found] if by_labels else _answers(expert, inputs, task, batch_size)
        tasks[task] = Columns({**inputs, "labels": told})
    return HeldOut(tasks, "labels" if by_labels else "experts")


def _length(data: Any, main: str, name: str) -> int:
    """How many samples a collection has."""
    if isinstance(data, Mapping):
        return len(next(iter(data.values()), ()))
    sized = hasattr(data, "__len__") and hasattr(data, "__getitem__") and not isinstance(data, (str, bytes))
    whole_samples = isinstance(data, (Tensor, np.ndarray)) or _is_dataset(data)
    if not sized or not (whole_samples or not len(data) or not is_batch(data[0], main)):
        raise DataError(
            f"Single samples cannot be picked from the data{name}, which is of type {type(data).__name__}; give a "
            "Dataset, tensors or a list of samples, or data of its own to score on."
        )
    return len(data)


def _is_dataset(data: Any) -> bool:
    return hasattr(data, "select") and hasattr(data, "column_names")


def _pick(data: Any, rows: np.ndarray) -> Any:
    """Some samples of a collection, as a collection of the same kind."""
    if isinstance(data, Mapping):
        return {name: _pick(values, rows) for name, values in data.items()}
    if isinstance(data, Tensor):
        return data[torch.from_numpy(rows).to(data.device)]
    if isinstance(data, np.ndarray):
        return data[rows]
    return data.select(rows) if _is_dataset(data) else [data[int(row)] for row in rows]


def _labels(data: Any) -> Tensor | None:
    """The labels of a collection, if it has any."""
    if isinstance(data, Columns):
        return data.tensors["labels"]
    if isinstance(data, Mapping):
        return torch.as_tensor(data["labels"]) if "labels" in data else None
    if _is_dataset(data):
        return torch.as_tensor(np.asarray(data["labels"])) if "labels" in data.column_names else None
    if isinstance(data, Sequence) and len(data) and isinstance(data[0], Mapping) and "labels" in data[0]:
        return torch.as_tensor(np.stack([np.asarray(sample["labels"]) for sample in data]))
    return None


def _prepared(data: Any, expert: PreTrainedModel, task: str, processor: Any) -> dict[str, Tensor]:
    """The model's inputs as one batch, so that texts are padded to one length."""
    count = max(_length(data, ModelInputs.of(expert).main, f" for the task {task!r}"), 1)
    found = list(calibration_batches({task: data}, expert, [task], processor=processor, batch_size=count))
    return dict(found[0].inputs)


@torch.no_grad()
def _answers(expert: PreTrainedModel, inputs: Mapping[str, Tensor], task: str, batch_size: int) -> Tensor:
    """What an expert answers: the most likely class, at every position that is no padding where there are several."""
    answers = []
    mode = expert.training
    expert.eval()
    for start in range(0, len(next(iter(inputs.values()))), batch_size):
        batch = {name: tensor[start : start + batch_size].to(expert.device) for name, tensor in inputs.items()}
        out = expert(**batch)
        if "logits" not in out:
            raise DataError(
                f"The expert {task!r} is a {type(expert).__name__}, which answers with {list(out)} and no logits; "
                "give a score of your own."
            )
        answer = out["logits"].argmax(-1)
        if answer.ndim == 2 and "attention_mask" in batch:
            answer = answer.masked_fill(batch["attention_mask"] == 0, IGNORED)
        answers.append(answer.cpu())
    expert.train(mode)
    return torch.cat(answers)
