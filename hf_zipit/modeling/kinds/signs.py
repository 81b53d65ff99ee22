"""`signs`: planes of one bit a weight, each with a scale (a binarised task vector, as in T-Switch, arXiv 2412.00054,
without its zeros; and the same again of what it leaves)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..residue import Residue, Stepwise, TaskTensor, from_bits, register, to_bits

PLANES = 8
"""At most: what is left then is below half precision."""


@register("signs")
class Signs(Stepwise):
    """R = sum_k scale_k sign_k: `bits` uint8 `[planes, entries / 8]`, `scales` float32 `[planes]`."""

    def __init__(self, shape: Sequence[int], size: int) -> None:
        super().__init__(shape, size)
        self.register_buffer("bits", torch.zeros(size, -(-prod(shape) // 8), dtype=torch.uint8))
        self.register_buffer("scales", torch.zeros(size))

    def tensor(self, shared: Any = None) -> Tensor:
        total = torch.zeros(self.shape, device=self.bits.device)
        for bits, scale in zip(self.bits, self.scales.float(), strict=True):
            total += torch.where(from_bits(bits, self.shape), scale, -scale)
        return total

    @classmethod
    def steps(cls, tensor: TaskTensor) -> Iterator[tuple[int, float]]:
        left = tensor.residue
        before = tensor.energy(left)
        for _ in range(PLANES):
            scale = left.abs().mean()
            left = left - torch.where(left >= 0, scale, -scale)
            after = tensor.energy(left)
            yield -(-left.numel() // 8) + 4, before - after
            before = after

    @classmethod
    def packed(cls, tensor: TaskTensor, size: int) -> Residue:
        return cls(tensor.merged.shape, size).set(tensor.residue)

    @torch.no_grad()
    def set(self, tensor: Tensor) -> Signs:
        """The planes of a tensor: of each the signs, and the mean magnitude of what the ones before it left."""
        left = tensor.double()
        for k in range(len(self.bits)):
            scale, positive = left.abs().mean().float(), left >= 0
            self.bits[k] = to_bits(positive)
            self.scales[k] = scale
            left = left - torch.where(positive, scale, -scale)
        return self
