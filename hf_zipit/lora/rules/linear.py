"""The weighted sum of the updates, exactly: their factors next to each other (PEFT's `cat`).

sum_t w_t B_t A_t = [w_1 B_1, ..., w_T B_T] [A_1; ...; A_T], of the rank sum_t r_t; LoRA is arXiv 2106.09685, task
arithmetic with adapters arXiv 2306.14870.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hf_zipit.errors import RecipeError
from hf_zipit.lora.factors import Factors, side_by_side
from hf_zipit.lora.rule import Given, Updates, register


@register("linear")
def linear(
    updates: Updates, given: Given, *, weights: Mapping[str, float] | Sequence[float] | None = None
) -> dict[str, Factors]:
    """The sum.

    Args:
        weights: by task, or in the order of the experts; 1/T each by default, the average. 1 for each is the sum.

    Raises:
        RecipeError: there is not one for every expert.
    """
    if weights is None:
        weights = [1 / len(given.tasks)] * len(given.tasks)
    if isinstance(weights, Mapping):
        if set(weights) != set(given.tasks):
            raise RecipeError(
                f"linear's option weights names {sorted(weights)}; the experts are {sorted(given.tasks)}."
            )
        weights = [weights[task] for task in given.tasks]
    if len(weights) != len(given.tasks):
        raise RecipeError(f"linear's option weights has {len(weights)} numbers for {len(given.tasks)} experts.")
    return {
        name: side_by_side([Factors(weight * own.b, own.a) for weight, own in zip(weights, layer, strict=True)])
        for name, layer in updates.items()
    }
