"""RegMean: the weights whose outputs are nearest to every expert's, on inputs of that expert (arXiv 2212.09849).

For a linear layer with inputs x of task t that is W = (sum_t W_t G_t) (sum_t G_t)^-1 with G_t = E[x x^T], `[in, in]`,
whose entries off the diagonal are first multiplied by `share`: with a few samples they are mostly noise. The mean over
rows, as in the published code, and not the sum: an expert does not count more because its texts are longer. Tensors of
no layer, biases and norms are averaged; inputs that no sample shows keep the mean's weights.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from hf_zipit.combine.layers import on_layers, regressed, shrunk
from hf_zipit.combine.options import share_of
from hf_zipit.combine.rule import register
from hf_zipit.planning.plan import Plan
from hf_zipit.symmetry.spec import AxisLabel


@register("regmean")
def regmean(
    tensors: Sequence[Tensor],
    labels: Sequence[AxisLabel],
    plan: Plan | None,
    *,
    grams: Sequence[Tensor] | None = None,
    share: float = 0.9,
) -> Tensor:
    """The regression on the experts' own inputs.

    Args:
        share: what is left of the entries off the diagonal, from 0 (every input for itself) to 1.

    Raises:
        RecipeError: the share is out of range.
    """
    share_of("regmean", "share", share, zero=True)
    return on_layers(
        tensors, labels, grams,
        lambda weights: regressed(weights, [shrunk(gram, share) for gram in grams], sum(weights) / len(weights)),
    )  # fmt: skip
