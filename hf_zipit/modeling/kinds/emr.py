"""`emr`: EMR-Merging (arXiv 2405.17461): one elected task vector, a mask and a scale for every task."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..residue import Masked, Residue, TaskTensor, register


@register("emr")
class Emr(Masked):
    """W_t = origin + s_t m_t v, m_t = 1[d_t v > 0], s_t = sum |d_t| / sum |m_t v|, for every tensor by itself."""

    @classmethod
    @torch.no_grad()
    def pack(cls, tensors: Sequence[TaskTensor]) -> tuple[Residue | None, list[Residue]]:
        """A bit for every weight and task, and v: the sign of the task vectors' sum, the largest entry of that sign.

        Args:
            tensors: one tensor of all tasks.
        """
        if not tensors:
            return None, []
        vectors = torch.stack([tensor.vector for tensor in tensors])
        sign = vectors.sum(0).sign()
        elected = sign * (vectors * sign).amax(0).clamp_min(0)
        masks = [vector * elected > 0 for vector in vectors]
        taken = [(mask * elected).abs().sum() for mask in masks]
        scales = [vector.abs().sum() / size if size else 0.0 for vector, size in zip(vectors, taken, strict=True)]
        return cls.pair(tensors, elected, masks, scales)
