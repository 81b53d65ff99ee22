"""What was measured around two experts and their merge: losses on lines and in a plane, and their barriers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_zipit.schema import Plain, plain


@dataclass(frozen=True)
class Losses(Plain):
    """Losses (mean cross-entropy) and errors (shares of wrong answers) at the points of a line or grid, by task."""

    loss: Mapping[str, tuple[Any, ...]]
    error: Mapping[str, tuple[Any, ...]]


@dataclass(frozen=True)
class Curve(Losses):
    """What is measured on the line between two aligned experts.

    Attributes:
        method: how they were aligned; `"identity"` is naive interpolation.
        at: the places on the line, from 0, the first expert, to 1, the second.
        exact: whether the aligned experts compute what the experts compute.
    """

    method: str
    at: tuple[float, ...]
    exact: bool

    def barrier(self, task: str) -> float:
        """The largest excess of the task's loss over the straight line between the ends; 0 or more."""
        return barrier(self.at, self.loss[task])

    @property
    def mean_barrier(self) -> float:
        """The barrier of the tasks' mean loss."""
        return barrier(self.at, [sum(values) / len(values) for values in zip(*self.loss.values(), strict=True)])

    def to_dict(self) -> dict[str, Any]:
        barriers = {task: self.barrier(task) for task in self.loss}
        return {**super().to_dict(), "barrier": plain(barriers), "mean_barrier": plain(self.mean_barrier)}


@dataclass(frozen=True)
class Plane(Losses):
    """What is measured in a plane; `loss[task][row][column]` is the loss at `(x[column], y[row])`.

    Attributes:
        points: the aligned experts and the merge, by name; in units of the distance between the aligned experts.
        x, y: the grid's places on both axes.
        through_merge: whether the merge spans the second axis; else it is a random direction.
    """

    points: Mapping[str, tuple[float, float]]
    x: tuple[float, ...]
    y: tuple[float, ...]
    through_merge: bool


@dataclass(frozen=True)
class Landscape(Plain):
    """The loss around two experts and a merge.

    Attributes:
        pair: the two experts' tasks.
        method, depth: of the merge; the method as recipes name it, with `+refit` where it was refitted.
        answers, samples: who said what is right, and the number of samples by task.
        aligned: the line between the aligned experts.
        naive: the line between the experts as they are; None where the method is plain averaging.
        plane: None where no grid was asked for.
    """

    pair: tuple[str, str]
    method: str
    depth: float
    answers: str
    samples: Mapping[str, int]
    aligned: Curve
    naive: Curve | None
    plane: Plane | None

    @property
    def curves(self) -> list[Curve]:
        """The lines that were measured."""
        return [self.aligned, *([self.naive] if self.naive else [])]

    def to_dict(self) -> dict[str, Any]:
        found = super().to_dict()
        lines = [found.pop("aligned"), found.pop("naive")]
        return {**found, "interpolation": [line for line in lines if line]}


def barrier(at: Sequence[float], loss: Sequence[float]) -> float:
    """The largest excess of a curve from `at[0]` = 0 to `at[-1]` = 1 over the straight line between its ends.

    0 or more, because the ends have none; Git Re-Basin, arXiv 2209.04836, definition 2.2.
    """
    return max(value - ((1 - x) * loss[0] + x * loss[-1]) for x, value in zip(at, loss, strict=True))
