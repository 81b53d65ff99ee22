"""WUDI in closed form: the merged task vector that interferes least with every expert's rows (arXiv 2503.08099).

It minimises sum_t |(D - d_t) d_t^T|^2 / |d_t|^2, which the paper does by gradient descent and arXiv 2604.01329 solves:
D = (sum_t w_t d_t d_t^T d_t) (sum_t w_t d_t^T d_t + ridge I)^-1 with w_t = 1 / |d_t|^2. Tensors that are no matrices
are averaged.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from hf_zipit.combine.matrices import on_matrices, solve_right
from hf_zipit.combine.options import above
from hf_zipit.combine.rule import register
from hf_zipit.planning.plan import Plan
from hf_zipit.symmetry.spec import AxisLabel


@register("wudi")
def wudi(
    tensors: Sequence[Tensor],
    labels: Sequence[AxisLabel],
    plan: Plan | None,
    *,
    base: Tensor,
    ridge: float = 1e-8,
) -> Tensor:
    """The base and the solution.

    Args:
        ridge: beside Gram matrices whose traces add up to T.

    Raises:
        RecipeError: a ridge that is not above 0.
    """
    above("wudi", "ridge", ridge)

    def solved(vectors: list[Tensor]) -> Tensor:
        grams = [vector.T @ vector / vector.square().sum().clamp_min(1e-300) for vector in vectors]
        return solve_right(sum(v @ gram for v, gram in zip(vectors, grams, strict=True)), sum(grams), ridge)

    return on_matrices(tensors, labels, base, solved)
