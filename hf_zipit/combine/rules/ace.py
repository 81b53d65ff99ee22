"""ACE: covariances of the inputs, estimated from the task vectors (arXiv 2603.02945).

The rows of a task vector are samples, S_t = d~_t^T d~_t with d~_t their deviations from the mean row. Then
D = (sum_t d_t (S_t + e I)) (sum_t (S_t + e I) + e I)^-1. Where the experts' energies are too different,
var_t(log |d_t|^2) / mean_t(log |d_t|^2)^2 > .3, every S_t + e I is divided by the trace of S_t. Tensors that are no
matrices are averaged. This is the closed form on task vectors, so that directions in which nobody learnt keep the
base's weights; the paper's spectral refinement after it is left out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_zipit.combine.matrices import on_matrices, solve_right
from hf_zipit.combine.options import above
from hf_zipit.combine.rule import register
from hf_zipit.planning.plan import Plan
from hf_zipit.symmetry.spec import AxisLabel

UNEQUAL = 0.3
"""The squared coefficient of variation of the log energies from which on traces are normalised."""


@register("ace")
def ace(
    tensors: Sequence[Tensor],
    labels: Sequence[AxisLabel],
    plan: Plan | None,
    *,
    base: Tensor,
    ridge: float = 1e-5,
) -> Tensor:
    """The base and the least-squares solution for the estimated covariances.

    Args:
        ridge: e; the paper's 1e-5 for ViT, 2e-4 for RoBERTa.

    Raises:
        RecipeError: a ridge that is not above 0.
    """
    above("ace", "ridge", ridge)

    def solved(vectors: list[Tensor]) -> Tensor:
        eye = torch.eye(vectors[0].shape[1], dtype=base.dtype)
        centred = [vector - vector.mean(0) for vector in vectors]
        covariances = [x.T @ x + ridge * eye for x in centred]
        energies = torch.stack([v.square().sum() for v in vectors]).clamp_min(1e-300).log()
        if energies.var(correction=0) > UNEQUAL * energies.mean().square():
            covariances = [c / x.square().sum().clamp_min(1e-300) for c, x in zip(covariances, centred, strict=True)]
        cross = sum(v @ c for v, c in zip(vectors, covariances, strict=True))
        return solve_right(cross, sum(covariances), ridge)

    return on_matrices(tensors, labels, base, solved)
