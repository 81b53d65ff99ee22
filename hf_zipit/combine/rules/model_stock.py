"""Model stock: from the base towards the mean of the experts, as far as the experts agree (arXiv 2403.19522).

With theta the angle between task vectors (the mean of the cosines of all pairs, tensor by tensor) and T experts,
W = r mean(W_t) + (1 - r) W_0 with r = T cos(theta) / ((T - 1) cos(theta) + 1). A negative cosine counts as 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_zipit.combine.rule import register, task_vectors
from hf_zipit.planning.plan import Plan
from hf_zipit.symmetry.spec import AxisLabel


@register("model-stock")
def model_stock(tensors: Sequence[Tensor], labels: Sequence[AxisLabel], plan: Plan | None, *, base: Tensor) -> Tensor:
    """The point that is, by the geometry of experts of one task, nearest to the centre of their distribution."""
    vectors = torch.stack([vector.flatten() for vector in task_vectors(tensors, base)])
    count = len(vectors)
    if count < 2:
        return tensors[0]
    units = vectors / vectors.norm(dim=1, keepdim=True).clamp_min(1e-300)
    cosine = (((units @ units.T).sum() - units.square().sum()) / (count * (count - 1))).clamp(0, 1)
    ratio = count * cosine / ((count - 1) * cosine + 1)
    return base + ratio * vectors.mean(0).reshape(base.shape)
