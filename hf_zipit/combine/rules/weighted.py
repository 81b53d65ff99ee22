"""The weighted average of the experts: W = sum_t w_t W_t / sum_t w_t (model soups, arXiv 2203.05482)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from hf_zipit.combine.rule import register
from hf_zipit.errors import RecipeError
from hf_zipit.planning.plan import Plan
from hf_zipit.symmetry.spec import AxisLabel


@register("weighted", elementwise=True)
def weighted(
    tensors: Sequence[Tensor],
    labels: Sequence[AxisLabel],
    plan: Plan | None,
    *,
    weights: Mapping[str, float] | Sequence[float] | None = None,
) -> Tensor:
    """The weighted mean of the experts' tensors.

    Args:
        weights: by task, or in the order of the experts; equal ones by default. Only their proportions matter.

    Raises:
        RecipeError: there is not one for every expert, or they add up to nothing.
    """
    if weights is None:
        weights = [1.0] * len(tensors)
    if isinstance(weights, Mapping):
        tasks = plan.tasks if plan is not None else tuple(weights)
        if set(weights) != set(tasks):
            raise RecipeError(f"weighted's option weights names {sorted(weights)}; the experts are {sorted(tasks)}.")
        weights = [weights[task] for task in tasks]
    if len(weights) != len(tensors):
        raise RecipeError(f"weighted's option weights has {len(weights)} numbers for {len(tensors)} experts.")
    if not sum(weights) > 0:
        raise RecipeError(f"weighted's option weights adds up to {sum(weights)}; it must be above 0.")
    return sum(weight * tensor for weight, tensor in zip(weights, tensors, strict=True)) / sum(weights)
