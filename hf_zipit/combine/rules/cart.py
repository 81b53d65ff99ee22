"""CART: low-rank task vectors from the experts' mean, not from the base (arXiv 2412.12153).

W = W_0 + mean(d) + scale sum_t SVD_r(d_t - mean(d)): what distinguishes an expert from the mean has few directions,
and these are added up. Tensors that are no matrices are averaged.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from hf_zipit.combine.matrices import on_matrices, svd
from hf_zipit.combine.options import above, share_of
from hf_zipit.combine.rule import register
from hf_zipit.planning.plan import Plan
from hf_zipit.symmetry.spec import AxisLabel


@register("cart")
def cart(
    tensors: Sequence[Tensor],
    labels: Sequence[AxisLabel],
    plan: Plan | None,
    *,
    base: Tensor,
    share: float = 0.5,
    scale: float = 0.5,
) -> Tensor:
    """The mean of the experts and their centred task matrices of low rank.

    Args:
        share: of the rank that stays, in (0, 1].
        scale: lambda.

    Raises:
        RecipeError: an option out of range.
    """
    share_of("cart", "share", share)
    above("cart", "scale", scale)

    def centred(vectors: list[Tensor]) -> Tensor:
        mean = sum(vectors) / len(vectors)
        directions = max(int(share * min(mean.shape)), 1)
        return mean + scale * sum(_low_rank(vector - mean, directions) for vector in vectors)

    return on_matrices(tensors, labels, base, centred)


def _low_rank(matrix: Tensor, directions: int) -> Tensor:
    u, s, v = svd(matrix)
    return (u[:, :directions] * s[:directions]) @ v[:directions]
