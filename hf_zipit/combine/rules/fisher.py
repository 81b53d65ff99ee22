"""Fisher averaging: every parameter's mean, weighted by how much the experts' outputs depend on it (arXiv 2111.09832).

W = sum_t w_t F_t W_t / sum_t w_t F_t, entry by entry, F_t the diagonal of expert t's Fisher information on its own
data, with outcomes drawn from its own predictions. F_t takes gradients, one backward pass a sample, but nothing is
trained. An F_t below `floor` times the tensor's largest counts as that: where no expert depends on a weight, the mean
is taken.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_zipit.combine.options import above
from hf_zipit.combine.rule import register
from hf_zipit.errors import RecipeError
from hf_zipit.planning.plan import Plan
from hf_zipit.symmetry.spec import AxisLabel


@register("fisher")
def fisher_average(
    tensors: Sequence[Tensor],
    labels: Sequence[AxisLabel],
    plan: Plan | None,
    *,
    fisher: Sequence[Tensor] | None = None,
    weights: Sequence[float] | None = None,
    floor: float = 1e-6,
) -> Tensor:
    """The weighted mean.

    Args:
        weights: w_t, one for each expert; all the same by default.
        floor: the least F_t, relative to the largest one of the tensor.

    Raises:
        RecipeError: the floor is not above 0, or there are not as many weights as experts.
    """
    above("fisher", "floor", floor)
    if weights is not None and (len(weights) != len(tensors) or not all(w > 0 for w in weights)):
        raise RecipeError(f"fisher's option weights is {list(weights)}; give {len(tensors)} numbers above 0.")
    shares = torch.ones(len(tensors), dtype=tensors[0].dtype) if weights is None else torch.tensor(weights)
    largest = 0.0 if fisher is None else max(float(own.max()) for own in fisher)
    if not largest:
        fisher, largest = [torch.ones_like(tensor) for tensor in tensors], 1.0
    known = [share * own.clamp_min(floor * largest) for share, own in zip(shares, fisher, strict=True)]
    return sum(f * tensor for f, tensor in zip(known, tensors, strict=True)) / sum(known)
