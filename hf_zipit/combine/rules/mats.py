"""MaTS: the linear system sum_t (W - W_t) G_t = 0 by conjugate gradients (arXiv 2312.04339).

G_t is the Gram matrix of the layer's inputs on task t, as in `regmean`; the solution would be RegMean's without
shrinking. From the mean of the experts a few steps go along the directions that the data shows most, and stop before
those that are noise: the number of steps regularises, no inverse is taken. (The paper's other choice of matrix, the
Kronecker-factored Fisher information, is left out.) Other tensors are averaged.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from hf_zipit.combine.layers import on_layers
from hf_zipit.combine.options import above
from hf_zipit.combine.rule import register
from hf_zipit.planning.plan import Plan
from hf_zipit.symmetry.spec import AxisLabel

CONVERGED = 1e-14
"""Steps end where the residual's norm is this share of the right-hand side's."""


def conjugate_gradients(matrix: Tensor, right: Tensor, start: Tensor, steps: int) -> Tensor:
    """W `[out, in]` with W matrix = right, a symmetric matrix `[in, in]`, from a first guess, after some steps."""
    found, residual = start, right - start @ matrix
    direction, energy, least = residual, residual.square().sum(), right.square().sum() * CONVERGED**2
    for _ in range(steps):
        if energy <= least:
            break
        ahead = direction @ matrix
        length = energy / (direction * ahead).sum()
        found, residual = found + length * direction, residual - length * ahead
        before, energy = energy, residual.square().sum()
        direction = residual + energy / before * direction
    return found


@register("mats")
def mats(
    tensors: Sequence[Tensor],
    labels: Sequence[AxisLabel],
    plan: Plan | None,
    *,
    grams: Sequence[Tensor] | None = None,
    steps: int = 100,
) -> Tensor:
    """Some steps from the mean towards the regression on the experts' own inputs.

    Args:
        steps: at most.

    Raises:
        RecipeError: steps are not above 0.
    """
    above("mats", "steps", steps)

    def solved(weights: list[Tensor]) -> Tensor:
        right = sum(weight @ gram for weight, gram in zip(weights, grams, strict=True))
        return conjugate_gradients(sum(grams), right, sum(weights) / len(weights), steps)

    return on_layers(tensors, labels, grams, solved)
