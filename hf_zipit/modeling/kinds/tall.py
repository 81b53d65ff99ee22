"""`tall`: TALL masks (arXiv 2405.07813): of the sum of all task vectors every task takes the entries that are mostly
its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...errors import RecipeError
from ..residue import Masked, Residue, TaskTensor, register


@register("tall")
class TallMasks(Masked):
    """W_t = origin + m_t d, d = sum_t d_t, m_t = 1[|d_t| >= threshold |d - d_t|]."""

    @classmethod
    @torch.no_grad()
    def pack(cls, tensors: Sequence[TaskTensor], *, threshold: float = 0.4) -> tuple[Residue | None, list[Residue]]:
        """A bit for every weight and task, and the sum of the task vectors.

        Args:
            tensors: one tensor of all tasks.
            threshold: lambda, the paper's .2 to .6; at 1 every entry is taken where that is nearer to the task's own.

        Raises:
            RecipeError: a threshold that is not above 0.
        """
        if not threshold > 0:
            raise RecipeError(f"tall's threshold is {threshold}; it must be above 0")
        if not tensors:
            return None, []
        total = torch.stack([tensor.vector for tensor in tensors]).sum(0)
        masks = [t.vector.abs() >= threshold * (total - t.vector).abs() for t in tensors]
        return cls.pair(tensors, total, masks, [1.0] * len(masks))
