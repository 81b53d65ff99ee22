"""The Karcher mean: the point on the sphere with the least squared angles to all experts, tensor by tensor (Karcher
1977, doi 10.1002/cpa.3160300502; as a merging rule in mergekit).

Directions are averaged on the sphere, by steps of Riemannian gradient descent; the length is the mean of the experts'
lengths. For two experts of one length it is slerp half-way.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_zipit.combine.options import above
from hf_zipit.combine.rule import register
from hf_zipit.planning.plan import Plan
from hf_zipit.symmetry.spec import AxisLabel


@register("karcher")
def karcher(
    tensors: Sequence[Tensor],
    labels: Sequence[AxisLabel],
    plan: Plan | None,
    *,
    steps: int = 100,
    tolerance: float = 1e-12,
) -> Tensor:
    """The mean direction times the mean length.

    Args:
        steps: at most this many; a step that moves by less than the tolerance, an angle, is the last.

    Raises:
        RecipeError: steps or tolerance are not above 0.
    """
    above("karcher", "steps", steps)
    above("karcher", "tolerance", tolerance)
    norms = torch.stack([tensor.norm() for tensor in tensors])
    points = torch.stack(
        [(x / n).flatten() for x, n in zip(tensors, norms, strict=True) if n > 0] or [tensors[0].flatten()]
    )
    mean = points.mean(0)
    if not mean.norm() > 0:  # nothing but zeros, or directions that cancel
        return torch.zeros_like(tensors[0])
    mean = mean / mean.norm()
    for _ in range(steps):
        cosines = (points @ mean).clamp(-1, 1)
        across = points - cosines[:, None] * mean
        lengths = across.norm(dim=1)
        # The angle by both its sine and its cosine: arccos alone has no digits left where points are near.
        step = (torch.atan2(lengths, cosines) / lengths.clamp_min(1e-300))[:, None] * across
        step = step.mean(0)
        length = step.norm()
        if length < tolerance:
            break
        mean = torch.cos(length) * mean + torch.sin(length) / length * step
        mean = mean / mean.norm()
    return (norms.mean() * mean).reshape(tensors[0].shape)
