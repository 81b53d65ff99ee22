"""How one tensor's residue can be kept, step by step: what each step costs and what it makes better.

What counts is the squared error of a layer's output relative to the output itself, |E X|^2 / |W X|^2 with E what is
left of the residue and X the layer's inputs. Without data inputs count as white. A vector has no inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_zipit.factorise import eigh, svd
from hf_zipit.modeling.residues import Dense, LowRank, Residue, Signs

PLANES = 8
"""Of signs, at most: what is left then is below half precision."""


@dataclass
class Candidate:
    """The residue of one tensor of one task.

    Attributes:
        task, tensor: whose, and its name in the trunk.
        residue: R, float64.
        own: the task's own tensor, which the merged one would be with all of it.
        gram: E[x x^T] of the layer's inputs `[in, in]`, where it is known.
        kind: how it is kept.
    """

    task: str
    tensor: str
    residue: Tensor
    own: Tensor
    gram: Tensor | None
    kind: str
    transposed: bool = False

    def energy(self, error: Tensor) -> float:
        """The squared output error of an error of the tensor, relative to the output."""
        return self._square(error) / max(self._square(self.own), 1e-300)

    def _square(self, tensor: Tensor) -> float:
        if self.gram is None:
            return float(tensor.square().sum())
        matrix = self.matrix(tensor)
        return float((matrix @ self.gram * matrix).sum())

    def matrix(self, tensor: Tensor) -> Tensor:
        """`[out, in]`."""
        return (tensor.transpose(0, 1) if self.transposed else tensor).flatten(1)

    def steps(self) -> Iterator[tuple[int, float]]:
        """Of every further step the bytes that it costs, and by how much the squared output error falls."""
        before = self.energy(self.residue)
        if self.kind == "dense":
            yield 2 * self.residue.numel(), before
        elif self.kind == "signs":
            left = self.residue
            for _ in range(PLANES):
                scale = left.abs().mean()
                left = left - torch.where(left >= 0, scale, -scale)
                after = self.energy(left)
                yield -(-left.numel() // 8) + 4, before - after
                before = after
        else:
            rows, columns = len(self.residue), self.residue.numel() // len(self.residue)
            for value in self._factors()[1].square() / max(self._square(self.own), 1e-300):
                yield 2 * (rows + columns), float(value)

    def _factors(self) -> tuple[Tensor, Tensor, Tensor]:
        """U S V^T of the residue, in the metric of the layer's inputs where it is known."""
        flat = self.residue.flatten(1)
        if self.gram is None or self.transposed:
            return svd(flat)
        values, vectors = eigh(self.gram)
        root = values.clamp_min(1e-9 * float(values.max())).sqrt()
        u, s, v = svd(flat @ (vectors * root))
        return u, s, v / root @ vectors.T

    def setting(self, size: int) -> dict[str, Any]:
        """Its entry in `config.residues`."""
        shape = list(self.residue.shape)
        return {"task": self.task, "tensor": self.tensor, "shape": shape, "kind": self.kind, "size": size}

    def fill(self, residue: Residue) -> None:
        """Pack it, as far as it is kept."""
        if isinstance(residue, (Signs, Dense)):
            residue.set(self.residue)
        elif isinstance(residue, LowRank):
            u, s, v = self._factors()
            rank = residue.left.shape[1]
            root = s[:rank].sqrt()
            residue.set(u[:, :rank] * root, root[:, None] * v[:rank])
