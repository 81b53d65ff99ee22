"""LOT: task vectors combined by regression on the experts' own inputs (arXiv 2505.23859).

D = (sum_t d_t G_t) (sum_t G_t)^+ with G_t = E[x x^T] of the layer's inputs on task t, W = W_0 + D: directions that the
data does not show keep W_0, so that few samples are enough. A norm's scale is the mean weighted by E[x^2] of its
normalised inputs, unit by unit. Other tensors are averaged.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_zipit.combine.layers import on_layers, regressed
from hf_zipit.combine.rule import register
from hf_zipit.planning.plan import Plan
from hf_zipit.symmetry.spec import AxisLabel


@register("lot")
def lot(
    tensors: Sequence[Tensor],
    labels: Sequence[AxisLabel],
    plan: Plan | None,
    *,
    base: Tensor,
    grams: Sequence[Tensor] | None = None,
) -> Tensor:
    """The base and the least-squares task vector."""
    if grams is not None and grams[0].dim() == 1:
        total = sum(grams)
        weighted = sum(gram * (tensor - base) for gram, tensor in zip(grams, tensors, strict=True))
        return base + torch.where(total > 0, weighted / total.clamp_min(1e-300), 0.0)
    if grams is None:
        return sum(tensors) / len(tensors)
    return base + on_layers(
        [tensor - base for tensor in tensors], labels, grams,
        lambda vectors: regressed(vectors, grams, torch.zeros_like(vectors[0])),
    )  # fmt: skip
