"""Task arithmetic: the base plus what every expert learnt, W = W_0 + scale * sum_t (W_t - W_0) (arXiv 2212.04089)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from hf_zipit.combine.options import above
from hf_zipit.combine.rule import register, task_vectors
from hf_zipit.planning.plan import Plan
from hf_zipit.symmetry.spec import AxisLabel


@register("task-arithmetic", elementwise=True)
def task_arithmetic(
    tensors: Sequence[Tensor], labels: Sequence[AxisLabel], plan: Plan, *, base: Tensor, scale: float = 0.4
) -> Tensor:
    """The base and the sum of the task vectors.

    Args:
        base: the same parameter in the base.
        scale: lambda; 1/T is the average of the experts. The paper's .3 to .5 suit most sets of tasks.

    Raises:
        RecipeError: a scale that is not above 0.
    """
    above("task-arithmetic", "scale", scale)
    return base + scale * sum(task_vectors(tensors, base))
