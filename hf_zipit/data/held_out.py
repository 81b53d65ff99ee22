"""Samples that models are scored on without touching test data: held out of the calibration data, with answers.

The right answers are the data's own `labels` where every task has them. Where there are none, the experts answer:
the share of right answers is then the share of samples on which a merged model agrees with the expert of the task.
Both go through the same evaluation.

Invariants: the division depends on the data's length and the seed alone, and no sample is on both sides.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from hf_zipit.data.calibration import LABELS, Calibration, pieces, where_of
from hf_zipit.data.labels import IGNORED
from hf_zipit.data.processes import running
from hf_zipit.errors import DataError, RecipeError
from hf_zipit.modeling import ZipItForCausalLM, merged_class

Answers = Literal["auto", "labels", "experts"]


@dataclass(frozen=True, eq=False)
class HeldOutTask(Sequence[Mapping[str, Tensor]]):
    """The samples of one task as tensors `[samples, ...]`, the model's inputs and `labels`; a sequence of samples."""

    tensors: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(self.tensors[LABELS])

    def __getitem__(self, row: Any) -> Any:
        return {name: tensor[row] for name, tensor in self.tensors.items()}

    def batches(self, size: int) -> Iterator[dict[str, Tensor]]:
        """The samples in order, `size` at a time."""
        return pieces(self.tensors, size)


@dataclass(frozen=True, eq=False)
class HeldOut:
    """What models are scored on.

    Attributes:
        tasks: the samples by task.
        answers: who says what is right: the data's `labels`, or the `experts`.
    """

    tasks: Mapping[str, HeldOutTask]
    answers: Literal["labels", "experts"]

    @property
    def counts(self) -> dict[str, int]:
        """The number of samples, by task."""
        return {task: len(columns) for task, columns in self.tasks.items()}


def divide(calibration: Calibration, share: float, seed: int = 0) -> tuple[Calibration, Calibration]:
    """What is left for merging, and what is held out: a `share` of every task's samples, rounded up.

    Raises:
        RecipeError: the share is not above 0 and below 1.
        DataError: there are fewer than two samples.
    """
    if not 0 < share < 1:
        raise RecipeError(f"The share that is held out is {share}; it must be above 0 and below 1.")
    rest, held = {}, {}
    for task, count in calibration.counts.items():
        if count < 2:
            where = where_of(task)
            raise DataError(f"The calibration data{where} has {count} samples; to hold some out takes at least two.")
        order = _shuffled(count, seed)
        cut = min(count - 1, int(np.ceil(share * count)))
        held[task], rest[task] = np.sort(order[:cut]), np.sort(order[cut:])
    return calibration.select(rest), calibration.select(held)


def read_divided(
    calibration: Any, validation: Any, experts: Mapping[str, PreTrainedModel], share: float, seed: int, **reading: Any
) -> tuple[Calibration, Calibration]:
    """What merges may read, and what is held out: the validation data, or without it a share of the calibration data.

    `reading` are settings of `Calibration`; for `share` and `seed` see `divide`.
    """
    data = Calibration.of(calibration, **reading).read(experts)
    if validation is None:
        return divide(data, share, seed)
    return data, Calibration.of(validation, **reading).read(experts)


def limit(calibration: Calibration, samples: int, seed: int = 0) -> Calibration:
    """At most `samples` samples of every task, drawn without replacement."""
    counts = calibration.counts.items()
    return calibration.select({task: np.sort(_shuffled(count, seed)[:samples]) for task, count in counts})


def _shuffled(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(count)


def held_out(
    calibration: Calibration, experts: Mapping[str, PreTrainedModel], *, answers: Answers = "auto"
) -> HeldOut:
    """Samples with answers.

    Args:
        calibration: the samples, read for the experts.
        answers: `"labels"` of the data, ids of each task's own classes; the `"experts"`' answers; `"auto"`: labels
            where every task has them.

    Raises:
        DataError: if labels are asked for and missing, or the experts answer with no logits.
        RecipeError: for another value of `answers`.
    """
    if answers not in ("auto", "labels", "experts"):
        raise RecipeError(f"answers is {answers!r}; it must be 'auto', 'labels' or 'experts'.")
    samples = {task: calibration.whole(task) for task in experts}
    complete = calibration.by_task and all(LABELS in found for found in samples.values())
    if answers == "labels" and not complete:
        raise DataError(
            "The held-out data has no 'labels' for every task; give them, or take answers='experts', which needs none."
        )
    by_labels = complete and answers != "experts"
    tasks = {}
    for task, found in samples.items():
        inputs = {name: tensor for name, tensor in found.items() if name != LABELS}
        told = found[LABELS] if by_labels else _answers(experts[task], inputs, task, calibration.batch_size)
        tasks[task] = HeldOutTask({**inputs, LABELS: told})
    return HeldOut(tasks, "labels" if by_labels else "experts")


def _answers(expert: PreTrainedModel, inputs: Mapping[str, Tensor], task: str, batch_size: int) -> Tensor:
    """What an expert answers: the most likely class, at every position that is no padding where there are several.

    What a causal model answers at a position stands at the next one, where labels have the token itself.
    """
    ahead = merged_class(type(expert).__name__) is ZipItForCausalLM
    answers = []
    with running([expert], expert.device):
        for batch in pieces(inputs, batch_size):
            batch = {name: tensor.to(expert.device) for name, tensor in batch.items()}
            try:
                out = expert(**batch)
            except (RuntimeError, ValueError, IndexError, TypeError) as error:
                raise DataError(f"The expert {task!r} cannot run on the samples that are held out: {error}") from error
            if "logits" not in out:
                raise DataError(
                    f"The expert {task!r} is a {type(expert).__name__}, which answers with {list(out)} and no logits; "
                    "give a score of your own."
                )
            answer = out["logits"].argmax(-1)
            if answer.ndim == 2 and "attention_mask" in batch:
                answer = answer.masked_fill(batch["attention_mask"] == 0, IGNORED)
            if ahead:
                answer = functional.pad(answer[:, :-1], (1, 0), value=IGNORED)
            answers.append(answer.cpu())
    return torch.cat(answers)
