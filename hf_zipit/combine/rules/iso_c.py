"""Iso-C: the sum of the task matrices with a flat spectrum (arXiv 2502.04959).

D = sum_t d_t = U S V^T; W = W_0 + scale mean(S) U V^T: no direction of one task drowns those of the others. The mean
is taken within the numerical rank of D.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_zipit.combine.matrices import on_matrices, svd
from hf_zipit.combine.options import above
from hf_zipit.combine.rule import register
from hf_zipit.planning.plan import Plan
from hf_zipit.symmetry.spec import AxisLabel


@register("iso-c")
def iso_c(
    tensors: Sequence[Tensor],
    labels: Sequence[AxisLabel],
    plan: Plan | None,
    *,
    base: Tensor,
    scale: float = 1.0,
) -> Tensor:
    """The base and the isotropic sum of the task matrices.

    Args:
        scale: alpha.

    Raises:
        RecipeError: a scale that is not above 0.
    """
    above("iso-c", "scale", scale)

    def flat(vectors: list[Tensor]) -> Tensor:
        u, s, v = svd(sum(vectors))
        return s.mean() * (u @ v) if len(s) else torch.zeros_like(vectors[0])

    return on_matrices(tensors, labels, base, lambda vectors: scale * flat(vectors))
