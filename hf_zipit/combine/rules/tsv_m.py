"""TSV-M: task singular vectors, made orthogonal to each other (arXiv 2412.00081).

Of every task matrix the leading singular directions stay, 1/T of them; all experts' are put side by side, and the
stacked U and V are replaced by their nearest orthonormal ones, so that tasks interfere least: W = W_0 + scale U S V^T.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_zipit.combine.matrices import on_matrices, polar, svd
from hf_zipit.combine.options import above, share_of
from hf_zipit.combine.rule import register
from hf_zipit.planning.plan import Plan
from hf_zipit.symmetry.spec import AxisLabel


@register("tsv-m")
def tsv_m(
    tensors: Sequence[Tensor],
    labels: Sequence[AxisLabel],
    plan: Plan | None,
    *,
    base: Tensor,
    share: float | None = None,
    scale: float = 1.0,
) -> Tensor:
    """The base and the decorrelated task matrices.

    Args:
        share: of every expert's singular directions that stay; 1/T by default.
        scale: alpha.

    Raises:
        RecipeError: an option out of range.
    """
    above("tsv-m", "scale", scale)
    if share is not None:
        share_of("tsv-m", "share", share)

    def decorrelated(vectors: list[Tensor]) -> Tensor:
        directions = max(int(min(vectors[0].shape) * (share or 1 / len(vectors))), 1)
        left, values, right = zip(*([x[..., :directions] for x in transposed(v)] for v in vectors), strict=True)
        return (polar(torch.cat(left, 1)) * torch.cat(values)) @ polar(torch.cat(right, 1)).T

    return on_matrices(tensors, labels, base, lambda vectors: scale * decorrelated(vectors))


def transposed(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U, S and V, whose directions are all on the last axis."""
    u, s, v = svd(matrix)
    return u, s, v.T
