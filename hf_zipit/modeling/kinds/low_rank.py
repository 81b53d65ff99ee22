"""`low-rank`: two factors (the exclusive parts of Twin-Merging, arXiv 2406.15479), by the singular value
decomposition in the metric of the layer's inputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from ...factorise import eigh, svd
from ..residue import Residue, Stepwise, TaskTensor, from_half, register, to_half


@register("low-rank")
class LowRank(Stepwise):
    """R = left right, `[out, rank]` and `[rank, in]`, both in half precision; further axes count as inputs."""

    def __init__(self, shape: Sequence[int], size: int) -> None:
        super().__init__(shape, size)
        self.register_buffer("left", torch.zeros(shape[0], size, dtype=torch.int16))
        self.register_buffer("right", torch.zeros(size, prod(shape[1:]), dtype=torch.int16))

    def tensor(self, shared: Any = None) -> Tensor:
        return (from_half(self.left) @ from_half(self.right)).reshape(self.shape)

    @classmethod
    def steps(cls, tensor: TaskTensor) -> Iterator[tuple[int, float]]:
        rows, columns = len(tensor.merged), tensor.merged.numel() // len(tensor.merged)
        for value in factors(tensor)[1].square() / tensor.output_energy:
            yield 2 * (rows + columns), float(value)

    @classmethod
    def packed(cls, tensor: TaskTensor, size: int) -> Residue:
        u, s, v = factors(tensor)
        root = s[:size].sqrt()
        return cls(tensor.merged.shape, size).set(u[:, :size] * root, root[:, None] * v[:size])

    @torch.no_grad()
    def set(self, left: Tensor, right: Tensor) -> LowRank:
        self.left.copy_(to_half(left))
        self.right.copy_(to_half(right))
        return self


def factors(tensor: TaskTensor) -> tuple[Tensor, Tensor, Tensor]:
    """U S V^T of the residue, in the metric of the layer's inputs where it is known."""
    flat = tensor.residue.flatten(1)
    if tensor.gram is None or tensor.transposed:
        return svd(flat)
    values, vectors = eigh(tensor.gram)
    root = values.clamp_min(1e-9 * float(values.max())).sqrt()
    u, s, v = svd(flat @ (vectors * root))
    return u, s, v / root @ vectors.T
