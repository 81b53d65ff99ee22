"""`t-switch`: T-Switch (arXiv 2412.00054): the signs of the largest entries of a task vector, and one scale."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from ...errors import RecipeError
from ..residue import Residue, TaskTensor, from_bits, register, to_bits


@register("t-switch")
class TaskSwitch(Residue):
    """R = scale sign(R_t) on the `size` entries of the largest magnitude, 0 elsewhere.

    `active` uint8 `[entries / 8]`, `signs` of the active ones uint8 `[size / 8]`, `scale` float32.
    """

    def __init__(self, shape: Sequence[int], size: int) -> None:
        super().__init__(shape, size)
        self.register_buffer("active", torch.zeros(-(-prod(shape) // 8), dtype=torch.uint8))
        self.register_buffer("signs", torch.zeros(-(-size // 8), dtype=torch.uint8))
        self.register_buffer("scale", torch.zeros(()))

    def tensor(self, shared: Any = None) -> Tensor:
        found = torch.zeros(self.shape, device=self.active.device)
        scale = self.scale.float()
        active = from_bits(self.active, self.shape)
        return found.masked_scatter(active, torch.where(from_bits(self.signs, (self.size,)), scale, -scale))

    @classmethod
    @torch.no_grad()
    def pack(cls, tensors: Sequence[TaskTensor], *, share: float = 0.5) -> tuple[Residue | None, list[Residue]]:
        """A bit for every weight and task, and one more for those that are kept.

        Task vectors start at the merged weights: where these are the base (a scale of the rule near 0), it is the
        paper's. The scale is the mean magnitude of what is kept, which leaves the least squared error.

        Args:
            tensors: one tensor of all tasks.
            share: of the entries, those of the largest magnitude, that are kept.

        Raises:
            RecipeError: a share that is not above 0 and at most 1.
        """
        if not 0 < share <= 1:
            raise RecipeError(f"t-switch's share is {share}; it must be above 0 and at most 1")
        found: list[Residue] = []
        for tensor in tensors:
            flat = tensor.residue.flatten()
            size = max(1, round(share * len(flat)))
            kept = flat.abs().topk(size).indices.sort().values
            residue = cls(tensor.merged.shape, size)
            residue.active.copy_(to_bits(torch.zeros_like(flat, dtype=torch.bool).index_fill(0, kept, True)))
            residue.signs.copy_(to_bits(flat[kept] >= 0))
            residue.scale.fill_(float(flat[kept].abs().mean()))
            found.append(residue)
        return None, found
