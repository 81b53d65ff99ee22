"""Spherical linear interpolation of two experts, tensor by tensor (as in mergekit).

With a the angle between the flattened tensors, W = sin((1 - at) a) / sin(a) W_1 + sin(at a) / sin(a) W_2:
the norm does not shrink as it does half-way along the straight line. Directions that are nearly parallel are
interpolated along the line.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_zipit.combine.options import share_of
from hf_zipit.combine.rule import register
from hf_zipit.errors import RecipeError
from hf_zipit.planning.plan import Plan
from hf_zipit.symmetry.spec import AxisLabel

PARALLEL = 1 - 1e-9
"""Cosines beyond this leave no angle to divide by."""


@register("slerp")
def slerp(tensors: Sequence[Tensor], labels: Sequence[AxisLabel], plan: Plan | None, *, at: float = 0.5) -> Tensor:
    """The point on the arc from the first expert to the second.

    Args:
        at: from 0, the first expert, to 1, the second.

    Raises:
        RecipeError: there are not exactly two experts, or `at` is not between 0 and 1.
    """
    if len(tensors) != 2:
        raise RecipeError(f"slerp is for two experts, not {len(tensors)}; 'karcher' does the same for any number.")
    share_of("slerp", "at", at, zero=True)
    first, second = tensors
    cosine = torch.dot(first.flatten(), second.flatten()) / (first.norm() * second.norm()).clamp_min(1e-300)
    if cosine.abs() > PARALLEL:
        return (1 - at) * first + at * second
    angle = cosine.arccos()
    return (torch.sin((1 - at) * angle) * first + torch.sin(at * angle) * second) / torch.sin(angle)
