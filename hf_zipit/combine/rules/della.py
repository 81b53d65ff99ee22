"""DELLA: drop small entries more often than large ones, elect signs, and average what agrees (arXiv 2406.11617).

Within every row (the weights of one output unit; the whole tensor where there is one axis) entries are ranked by their
magnitude: the smallest is dropped with probability p + spread / 2, the largest with p - spread / 2, those between
evenly in between. What stays is divided by its probability to stay.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_zipit.combine.options import above
from hf_zipit.combine.rule import register, task_vectors
from hf_zipit.combine.rules.dare import dropped
from hf_zipit.combine.rules.ties import elected_mean
from hf_zipit.errors import RecipeError
from hf_zipit.planning.plan import Plan
from hf_zipit.symmetry.spec import AxisLabel


def probabilities(vector: Tensor, drop: float, spread: float) -> Tensor:
    """Every entry's probability to be dropped."""
    rows = vector.abs().reshape(len(vector), -1) if vector.dim() > 1 else vector.abs().reshape(1, -1)
    ranks = rows.argsort(dim=1, descending=True, stable=True).argsort(dim=1).to(vector)
    return (drop - spread / 2 + spread * ranks / max(rows.shape[1] - 1, 1)).reshape(vector.shape)


@register("della")
def della(
    tensors: Sequence[Tensor],
    labels: Sequence[AxisLabel],
    plan: Plan | None,
    *,
    base: Tensor,
    generator: torch.Generator,
    drop: float = 0.5,
    spread: float = 0.15,
    scale: float = 1.0,
) -> Tensor:
    """The base and the elected mean of what stays.

    Args:
        drop: p, the mean probability.
        spread: epsilon, between the largest entry's probability and the smallest one's.
        scale: lambda.

    Raises:
        RecipeError: a scale that is not above 0, or probabilities that are not from 0 to less than 1.
    """
    above("della", "scale", scale)
    if not 0 <= drop - spread / 2 <= drop + spread / 2 < 1:
        raise RecipeError(
            f"della's options drop {drop} and spread {spread} give probabilities from {drop - spread / 2} to "
            f"{drop + spread / 2}; they must be from 0 to less than 1."
        )
    vectors = task_vectors(tensors, base)
    kept = [dropped(vector, probabilities(vector, drop, spread), generator) for vector in vectors]
    return base + scale * elected_mean(kept)
