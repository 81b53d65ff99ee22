"""DARE: drop entries of the task vectors at random and rescale the others (arXiv 2311.03099).

Every entry is dropped with probability p; what stays is divided by 1 - p, so that the expectation is the task vector.
`dare` adds the results up (task arithmetic); `dare-ties` elects signs and averages what agrees, as TIES does, whose
trimming would only take away more.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_zipit.combine.options import above, below_one
from hf_zipit.combine.rule import register, task_vectors
from hf_zipit.combine.rules.ties import elected_mean
from hf_zipit.planning.plan import Plan
from hf_zipit.symmetry.spec import AxisLabel


def dropped(vector: Tensor, drop: float | Tensor, generator: torch.Generator) -> Tensor:
    """A task vector whose entries were dropped with some probability, of each or of all, the others rescaled."""
    return vector * (torch.rand(vector.shape, generator=generator, dtype=vector.dtype) >= drop) / (1 - drop)


@register("dare")
def dare(
    tensors: Sequence[Tensor],
    labels: Sequence[AxisLabel],
    plan: Plan | None,
    *,
    base: Tensor,
    generator: torch.Generator,
    drop: float = 0.9,
    scale: float = 0.4,
) -> Tensor:
    """The base and the sum of what stays.

    Args:
        drop: p, from 0 to less than 1.
        scale: lambda of task arithmetic.

    Raises:
        RecipeError: an option out of range.
    """
    below_one("dare", "drop", drop)
    above("dare", "scale", scale)
    return base + scale * sum(dropped(vector, drop, generator) for vector in task_vectors(tensors, base))


@register("dare-ties")
def dare_ties(
    tensors: Sequence[Tensor],
    labels: Sequence[AxisLabel],
    plan: Plan | None,
    *,
    base: Tensor,
    generator: torch.Generator,
    drop: float = 0.9,
    scale: float = 1.0,
) -> Tensor:
    """The base and the elected mean of what stays; arguments as of `dare`."""
    below_one("dare-ties", "drop", drop)
    above("dare-ties", "scale", scale)
    return base + scale * elected_mean([dropped(vector, drop, generator) for vector in task_vectors(tensors, base)])
