"""Model breadcrumbs: leave out the small entries of every task vector and the few largest (arXiv 2312.06795).

Masks are made layer by layer, here tensor by tensor, as in the paper; what stays is added up as in task arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_zipit.combine.options import above, below_one
from hf_zipit.combine.rule import register, task_vectors
from hf_zipit.planning.plan import Plan
from hf_zipit.symmetry.spec import AxisLabel


@register("breadcrumbs")
def breadcrumbs(
    tensors: Sequence[Tensor],
    labels: Sequence[AxisLabel],
    plan: Plan | None,
    *,
    base: Tensor,
    smallest: float = 0.85,
    largest: float = 0.007,
    scale: float = 0.3,
) -> Tensor:
    """The base and the sum of what stays.

    Args:
        smallest: beta, the share of the entries of least magnitude that is left out.
        largest: the share of the entries of largest magnitude that is left out: the paper's 1 - gamma.
        scale: alpha.

    Raises:
        RecipeError: an option out of range, or shares that leave nothing.
    """
    above("breadcrumbs", "scale", scale)
    for name, share in (("smallest", smallest), ("largest", largest), ("smallest and largest", smallest + largest)):
        below_one("breadcrumbs", name, share)
    total = torch.zeros_like(base)
    for vector in task_vectors(tensors, base):
        order = vector.abs().flatten().argsort(stable=True)
        size = len(order)
        stays = order[int(smallest * size) : size - int(largest * size)]
        mask = torch.zeros(size, dtype=torch.bool)
        mask[stays] = True
        total = total + vector * mask.reshape(vector.shape)
    return base + scale * total
