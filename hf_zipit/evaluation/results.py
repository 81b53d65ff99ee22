"""What an evaluation found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hf_zipit.evaluation.intervals import Answers, Comparison, Interval
from hf_zipit.files import write_json
from hf_zipit.schema import Plain

Scores = Mapping[str, Mapping[str, float]]
"""Metrics of one model, `{task: {name: value}}`."""


@dataclass(frozen=True)
class Accuracies(Plain):
    """Shares of right answers of one model, in 0..1.

    Attributes:
        per_task: by task, within the task's own classes.
        joint_per_task: by task, over the classes of all tasks; empty where the tasks share their classes.
        samples: by task, the number of answers counted.
        intervals, joint_intervals: of both by task, where the answers are known.
        calibration_error: by task, how far the model's confidence and its accuracy are apart on average.
    """

    per_task: Mapping[str, float]
    joint_per_task: Mapping[str, float]
    samples: Mapping[str, int]
    intervals: Mapping[str, Interval] = field(default_factory=dict)
    joint_intervals: Mapping[str, Interval] = field(default_factory=dict)
    calibration_error: Mapping[str, Interval] = field(default_factory=dict)

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

    @property
    def margin(self) -> float:
        """Half the width of the 95 % interval of `mean`, as of independent answers (Agresti and Coull, 1998)."""
        counts = np.array([self.samples[task] for task in self.per_task], dtype=float)
        shares = (np.array(list(self.per_task.values())) * counts + 2) / (counts + 4)
        return float(1.96 * np.sqrt((shares * (1 - shares) / (counts + 4)).sum()) / len(counts))

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "mean": self.mean, "joint": self.joint}


@dataclass(frozen=True)
class Measurement(Plain):
    """One merge of several of the same experts, and what was measured of it.

    Attributes:
        method: as the recipe calls it.
        depth: the share of the blocks that was merged.
        parameters: of the merged model.
        accuracy: None where nothing was evaluated, or the model has no classes.
        seconds: that merging took, the observation not counted.
        scores: further metrics.
        agreement: the shares of samples that it answers as the experts do, where there were no labels to measure on.
        comparison: with the experts, on the same samples.
    """

    method: str
    depth: float
    parameters: int
    accuracy: Accuracies | None
    seconds: float = 0.0
    scores: Scores = field(default_factory=dict)
    agreement: Accuracies | None = None
    comparison: Comparison | None = None

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "seconds": round(self.seconds, 3)}


@dataclass(frozen=True)
class Evaluation(Plain):
    """What was measured of a model and, where they were given, of its experts side by side.

    Attributes:
        model, experts: their accuracies; None for models without classes, such as CLIP.
        scores, expert_scores: further metrics.
        score_intervals: of the metrics that come with this package, as `scores`.
        comparison: of the model with its experts, on the same samples.
        answers: what the model answered, by task: what another evaluation on the same samples is compared with.
    """

    model: Accuracies | None
    experts: Accuracies | None = None
    scores: Scores = field(default_factory=dict)
    expert_scores: Scores = field(default_factory=dict)
    score_intervals: Mapping[str, Mapping[str, Interval]] = field(default_factory=dict)
    comparison: Comparison | None = None
    answers: Mapping[str, Answers] = field(default_factory=dict, repr=False, compare=False)

    def compared(self, other: Evaluation) -> Comparison | None:
        """This model beside another one that was measured on the same samples; raises DataError if it was not."""
        return Comparison.of(self.answers, other.answers)

    def to_dict(self) -> dict[str, Any]:
        found = super().to_dict()
        del found["answers"]
        return found

    def to_json(self, path: str | Path) -> Path:
        """Write the accuracies; an earlier file is replaced only by a complete one."""
        return write_json(path, self.to_dict())
