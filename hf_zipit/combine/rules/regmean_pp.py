"""RegMean++: RegMean on the inputs that the *merged* model feeds into a layer (arXiv 2508.03121).

Layers are merged in the order they run. The inputs of each are those that the layers before it, merged already, give
on every task's data, so that it is fitted to what it will see. Here that holds for every linear map, also within a
block. All else is as in `regmean`.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from hf_zipit.combine.layers import Layer, on_layers, regressed, shrunk
from hf_zipit.combine.options import share_of
from hf_zipit.combine.rule import register
from hf_zipit.planning.plan import Plan
from hf_zipit.symmetry.spec import AxisLabel


@register("regmean++")
def regmean_pp(
    tensors: Sequence[Tensor],
    labels: Sequence[AxisLabel],
    plan: Plan | None,
    *,
    layer: Layer | None = None,
    share: float = 0.9,
) -> Tensor:
    """The regression on the merged model's own inputs.

    Args:
        share: what is left of the Gram matrices' entries off the diagonal, from 0 to 1.

    Raises:
        RecipeError: the share is out of range.
    """
    share_of("regmean++", "share", share, zero=True)
    grams = None if layer is None else [shrunk(gram, share) if gram.dim() == 2 else gram for gram in layer.merged]
    return on_layers(tensors, labels, grams, lambda weights: regressed(weights, grams, sum(weights) / len(weights)))
