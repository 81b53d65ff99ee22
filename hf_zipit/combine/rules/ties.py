"""TIES: trim, elect signs, and average what agrees (arXiv 2306.01708).

Of every expert's task vector the largest entries stay, counted over the whole model. Every entry's sign is that of the
sum of what stayed; the entries of that sign are averaged. (Where the sum is exactly 0 there is no sign and nothing is
added; the published code takes the sign that most entries of the model have.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hf_zipit.combine.options import above, share_of
from hf_zipit.combine.ranks import magnitudes, order_statistics
from hf_zipit.combine.rule import Vectors, register, task_vectors
from hf_zipit.planning.plan import Plan
from hf_zipit.symmetry.spec import AxisLabel


def thresholds(vectors: Vectors, *, share: float, **other: float) -> list[float]:
    """For every expert the least magnitude that stays."""
    found = order_statistics(magnitudes(vectors), lambda size: [size - max(math.ceil(share * size), 1)])
    return [limit for (limit,) in found]


def elected_mean(vectors: Sequence[Tensor]) -> Tensor:
    """The mean of the entries that have the sign of the sum; 0 where there is none."""
    stacked = torch.stack(list(vectors))
    agrees = agreeing(stacked)
    return (stacked * agrees).sum(0) / agrees.sum(0).clamp_min(1)


def agreeing(stacked: Tensor) -> Tensor:
    """Which entries of vectors `[T, ...]` have the sign of the sum."""
    return (stacked.sign() == stacked.sum(0).sign()) & (stacked != 0)


def elected(vectors: Sequence[Tensor], limits: Sequence[float]) -> list[Tensor]:
    """The task vectors' parts in the trimmed and elected mean, which is their sum."""
    stacked = torch.stack([v * (v.abs() >= limit) for v, limit in zip(vectors, limits, strict=True)])
    agrees = agreeing(stacked)
    return list(stacked * agrees / agrees.sum(0).clamp_min(1))


@register("ties", survey=thresholds, elementwise=True)
def ties(
    tensors: Sequence[Tensor],
    labels: Sequence[AxisLabel],
    plan: Plan | None,
    *,
    base: Tensor,
    whole: Sequence[float] | None = None,
    share: float = 0.2,
    scale: float = 1.0,
) -> Tensor:
    """The base and the elected mean of the trimmed task vectors.

    Args:
        share: how many of a task vector's entries stay, in (0, 1].
        scale: lambda.

    Raises:
        RecipeError: a share or scale out of range.
    """
    share_of("ties", "share", share)
    above("ties", "scale", scale)
    vectors = task_vectors(tensors, base)
    limits = whole or thresholds([vectors], share=share)
    return base + scale * elected_mean([v * (v.abs() >= limit) for v, limit in zip(vectors, limits, strict=True)])
