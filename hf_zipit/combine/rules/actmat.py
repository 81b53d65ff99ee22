"""ACTMat: regression on the experts' activations, whose Gram matrices are estimated from the task vectors (arXiv
2604.01329).

A gradient is a sum of outputs' gradients times inputs, so that d_t^T d_t says where the inputs of task t lie:
D = (sum_t d_t d_t^T d_t) (sum_t d_t^T d_t)^+, W = W_0 + D. Tensors that are no matrices are averaged.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from hf_zipit.combine.matrices import on_matrices, solve_right
from hf_zipit.combine.rule import register
from hf_zipit.planning.plan import Plan
from hf_zipit.symmetry.spec import AxisLabel


@register("actmat")
def actmat(tensors: Sequence[Tensor], labels: Sequence[AxisLabel], plan: Plan | None, *, base: Tensor) -> Tensor:
    """The base and the least-squares solution for the estimated inputs."""

    def solved(vectors: list[Tensor]) -> Tensor:
        grams = [vector.T @ vector for vector in vectors]
        return solve_right(sum(v @ gram for v, gram in zip(vectors, grams, strict=True)), sum(grams))

    return on_matrices(tensors, labels, base, solved)
