"""Iso-CTS: Iso-C with room for directions of single tasks (arXiv 2502.04959).

The leading directions of D = sum_t d_t stay, the common space; the rest of the rank is divided among the experts, each
of which fills its part with the leading directions of what the common space leaves of it, (I - U U^T) d_t. All are
made orthonormal, and their spectrum flat.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_zipit.combine.matrices import on_matrices, polar
from hf_zipit.combine.options import above, share_of
from hf_zipit.combine.rule import register
from hf_zipit.combine.rules.tsv_m import transposed
from hf_zipit.planning.plan import Plan
from hf_zipit.symmetry.spec import AxisLabel


@register("iso-cts")
def iso_cts(
    tensors: Sequence[Tensor],
    labels: Sequence[AxisLabel],
    plan: Plan | None,
    *,
    base: Tensor,
    common: float = 0.8,
    scale: float = 1.0,
) -> Tensor:
    """The base and the isotropic common and task-specific directions.

    Args:
        common: the share of the directions that are the sum's, in (0, 1].
        scale: alpha.

    Raises:
        RecipeError: an option out of range.
    """
    share_of("iso-cts", "common", common)
    above("iso-cts", "scale", scale)

    def flat(vectors: list[Tensor]) -> Tensor:
        rank, count = min(vectors[0].shape), len(vectors)
        own = round((rank - int(rank * common)) / count)  # of every task
        parts = [tuple(x[..., : rank - own * count] for x in transposed(sum(vectors)))]
        left = parts[0][0]
        parts += [tuple(x[..., :own] for x in transposed(v - left @ (left.T @ v))) for v in vectors]
        u, s, v = (torch.cat(same, -1) for same in zip(*parts, strict=True))
        return s.mean() * (polar(u) @ polar(v).T) if len(s) else torch.zeros_like(vectors[0])

    return on_matrices(tensors, labels, base, lambda vectors: scale * flat(vectors))
