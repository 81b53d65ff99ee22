"""PCB: parameter competition balancing (arXiv 2410.02396).

Entry by entry, an expert's weight grows with the square of its normalised magnitude within the expert,
exp(T norm(|d_t|)^2), and with how far it goes with all experts, tanh(d_t sum_s d_s). The `share` of the largest
products stays, between 0 at the cut and 1 at the maximum, and weighs the task vectors. Ranges are those of the whole
model. As in the published code, the .01 % smallest and largest magnitudes are clamped first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_zipit.combine.options import above, share_of
from hf_zipit.combine.ranks import Mapped, magnitudes, order_statistics
from hf_zipit.combine.rule import Vectors, register, task_vectors
from hf_zipit.planning.plan import Plan
from hf_zipit.symmetry.spec import AxisLabel

OUTLIERS = 1e-4
"""The share of magnitudes at either end that is clamped."""

Ranges = tuple[list[list[float]], list[list[float]]]
"""For every expert the least and the largest magnitude, and the cut and the maximum of its competition."""


def ranges(vectors: Vectors, *, share: float, **other: float) -> Ranges:
    """What is normalised by, over all parameters."""
    limits = order_statistics(
        magnitudes(vectors), lambda size: [int(size * OUTLIERS), max(int(size * (1 - OUTLIERS)) - 1, 0)]
    )
    cuts = order_statistics(
        Mapped(vectors, lambda part: competition(part, limits)),
        lambda size: [min(int(size * (1 - share)), size - 1), size - 1],
    )
    return limits, cuts


def competition(vectors: Sequence[Tensor], limits: Sequence[Sequence[float]]) -> list[Tensor]:
    """How much every entry counts, before the cut."""
    total = sum(vectors)
    return [
        torch.exp(len(vectors) * normalised(v.abs(), *own).square()) * torch.tanh(v * total)
        for v, own in zip(vectors, limits, strict=True)
    ]


def normalised(values: Tensor, low: float, high: float) -> Tensor:
    """Values between two limits as shares of the way, 0 and 1 beyond them."""
    return ((values - low) / (high - low)).clamp(0, 1) if high > low else torch.zeros_like(values)


@register("pcb", survey=ranges, elementwise=True)
def pcb(
    tensors: Sequence[Tensor],
    labels: Sequence[AxisLabel],
    plan: Plan | None,
    *,
    base: Tensor,
    whole: Ranges | None = None,
    share: float = 0.1,
    scale: float = 1.0,
) -> Tensor:
    """The base and the balanced mean of the task vectors.

    Args:
        share: how many entries of every expert keep a weight, in (0, 1].
        scale: lambda.

    Raises:
        RecipeError: a share or scale out of range.
    """
    share_of("pcb", "share", share)
    above("pcb", "scale", scale)
    vectors = task_vectors(tensors, base)
    limits, cuts = whole or ranges([vectors], share=share)
    weights = [normalised(x, *cut) for x, cut in zip(competition(vectors, limits), cuts, strict=True)]
    clamped = [v.sign() * v.abs().clamp(*own) for v, own in zip(vectors, limits, strict=True)]
    total = sum(weight * vector for weight, vector in zip(weights, clamped, strict=True))
    return base + scale * total / sum(weights).clamp_min(1e-12)
