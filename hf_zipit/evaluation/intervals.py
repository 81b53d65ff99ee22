"""How sure a measured share is: bootstrap over samples, and what follows from it for two models on the same samples.

A sample is drawn as a whole: the tokens of one text stay together. Two models are compared on the same draws, so that
what is hard for both cancels (a paired bootstrap). Draws come from one seed, and the same answers give the same
intervals. (Efron, Bootstrap methods: another look at the jackknife, Ann. Statist. 7, 1979: percentile intervals.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from hf_zipit.data.labels import IGNORED
from hf_zipit.errors import DataError
from hf_zipit.schema import Plain

DRAWS = 1000
LEVEL = 0.95
BINS = 15
"""Of the expected calibration error: as many as in its paper (Guo et al., ICML 2017)."""

AT_ONCE = 2_000_000
"""So many numbers of draws are held in memory."""


@dataclass(frozen=True)
class Interval(Plain):
    """A number with the interval that holds it in 95 of 100 cases."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, value: float, draws: np.ndarray) -> Interval:
        low, high = np.quantile(draws, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
        return cls(float(value), float(low), float(high))

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True, eq=False)
class Answers:
    """What a model answered on the samples of one task.

    Attributes:
        given: the class of every position, `[samples, ...]`.
        confidence: the probability of that class, of the same shape.
        labels: the right classes; those of -100 do not count.
    """

    given: np.ndarray
    confidence: np.ndarray
    labels: np.ndarray

    def __post_init__(self) -> None:
        for name in ("given", "confidence", "labels"):
            object.__setattr__(self, name, getattr(self, name).reshape(len(self.labels), -1))

    @property
    def counted(self) -> np.ndarray:
        """Which positions count."""
        return self.labels != IGNORED

    @property
    def right(self) -> np.ndarray:
        """Which positions are answered rightly; none that does not count."""
        return (self.given == self.labels) & self.counted

    def calibration(self) -> np.ndarray:
        """By sample and bin of confidence, the sum of confidence less the right answers: `[samples, bins]`."""
        bins = np.clip(np.ceil(self.confidence * BINS).astype(int) - 1, 0, BINS - 1)
        gap = np.where(self.counted, self.confidence - self.right, 0.0)
        return np.stack([np.where(bins == b, gap, 0.0).sum(1) for b in range(BINS)], axis=1)


def resampled(sums: np.ndarray, counts: np.ndarray, draws: int = DRAWS, seed: int = 0) -> np.ndarray:
    """Sums over drawn samples divided by their counts: `[draws, k]`.

    Args:
        sums: of every sample, `[samples, k]`.
        counts: how many positions of each sample count, `[samples]`.
    """
    generator = np.random.default_rng(seed)
    columns = np.concatenate([sums, counts[:, None]], axis=1).astype(np.float64)
    size = max(1, AT_ONCE // columns.size)
    found = []
    for start in range(0, draws, size):
        rows = generator.integers(len(columns), size=(min(size, draws - start), len(columns)))
        found.append(columns[rows].sum(1))
    totals = np.concatenate(found)
    return totals[:, :-1] / np.maximum(totals[:, -1:], 1)


def accuracy_interval(answers: Answers) -> Interval:
    """The share of right answers."""
    right, counts = answers.right.sum(1), answers.counted.sum(1)
    return Interval.of(right.sum() / counts.sum(), resampled(right[:, None], counts)[:, 0])


def calibration_error(answers: Answers) -> Interval:
    """The expected calibration error: how far confidence and accuracy are apart on average (Guo et al., 2017)."""
    gaps, counts = answers.calibration(), answers.counted.sum(1)
    return Interval.of(np.abs(gaps.sum(0)).sum() / counts.sum(), np.abs(resampled(gaps, counts)).sum(1))


@dataclass(frozen=True)
class Comparison(Plain):
    """Two models on the same samples.

    Attributes:
        difference: by task, the accuracy of the first less that of the second.
        mean: the mean of these over the tasks.
        agreement: by task, the share of positions that both answer in the same way, rightly or not.
    """

    difference: Mapping[str, Interval]
    mean: Interval
    agreement: Mapping[str, Interval]

    @classmethod
    def of(cls, first: Mapping[str, Answers], second: Mapping[str, Answers]) -> Comparison | None:
        """The comparison on the tasks that both have; None where there is none.

        Raises DataError if the samples are not the same.
        """
        difference, agreement, draws = {}, {}, []
        for task in (task for task in first if task in second):
            one, other = first[task], second[task]
            if one.labels.shape != other.labels.shape or not np.array_equal(one.labels, other.labels):
                raise DataError(f"The two models were not measured on the same samples of the task {task!r}.")
            counts = one.counted.sum(1)
            same = ((one.given == other.given) & one.counted).sum(1)
            sums = np.stack([one.right.sum(1).astype(np.int64) - other.right.sum(1), same], axis=1)
            drawn, values = resampled(sums, counts), sums.sum(0) / counts.sum()
            difference[task] = Interval.of(values[0], drawn[:, 0])
            agreement[task] = Interval.of(values[1], drawn[:, 1])
            draws.append(drawn[:, 0])
        if not draws:
            return None
        mean = Interval.of(np.mean([found.value for found in difference.values()]), np.mean(draws, axis=0))
        return cls(difference, mean, agreement)
