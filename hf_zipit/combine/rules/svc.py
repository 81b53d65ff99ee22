"""SVC: singular value calibration after any other rule (arXiv 2602.05536).

What several experts learnt in common is added up several times. With D = U S V^T the merged task matrix and u_r its
directions, a_r = u_r^T D and a_r^t = u_r^T d_t are the merged and the experts' responses. Every singular value is
divided by how many times an expert's own response is in the merged one, on average over the experts:
S_r <- S_r T / sum_t max(floor, <a_r, a_r^t> / |a_r^t|^2). Tensors that are no matrices are what the other rule makes
of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_zipit.combine.after import inner, surveyed
from hf_zipit.combine.matrices import svd, view_of
from hf_zipit.combine.options import above
from hf_zipit.combine.rule import register, task_vectors
from hf_zipit.planning.plan import Plan
from hf_zipit.symmetry.spec import AxisLabel


@register("svc", survey=surveyed("svc"))
def svc(
    tensors: Sequence[Tensor],
    labels: Sequence[AxisLabel],
    plan: Plan | None,
    *,
    base: Tensor,
    generator: torch.Generator,
    whole: Any = None,
    after: str = "task-arithmetic",
    options: Mapping[str, Any] | None = None,
    floor: float = 0.5,
) -> Tensor:
    """Another rule's tensor with calibrated singular values.

    Args:
        after: the other rule.
        options: its options.
        floor: alpha, the least that a response counts: singular values grow by at most 1 / floor.

    Raises:
        RecipeError: as the other rule does, or a floor that is not above 0.
    """
    above("svc", "floor", floor)
    rule, known = inner("svc", after, options)
    merged = rule.combine(tensors, labels, plan, known, base=base, whole=whole, generator=generator)
    view = view_of(base, labels)
    if view is None:
        return merged
    u, s, v = svd(view.matrix(merged - base))
    shares = 0
    for vector in task_vectors(tensors, base):
        response = u.T @ view.matrix(vector)
        # An expert without a response has not been counted even once.
        share = (s[:, None] * v * response).sum(1) / response.square().sum(1).clamp_min(1e-300)
        shares = shares + share.clamp_min(floor)
    return base + view.tensor((u * (s * len(tensors) / shares)) @ v, base)
