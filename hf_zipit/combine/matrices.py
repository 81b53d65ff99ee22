"""What rules on matrices have in common: which tensors are matrices, and a little linear algebra.

A matrix is a weight that reads a space: its label says which axis that is. Convolutions are matrices of their unfolded
patches, `[out, in * height * width]`. Vectors, embedding and position tables and depthwise convolutions read nothing
that the published rules would decompose; they are averaged, as in the published codes (which average convolutions,
too).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_zipit import factorise
from hf_zipit.symmetry.spec import AxisLabel, factors

RELATIVE_ZERO = 1e-10
"""Singular values below this share of the largest one are rounding errors: their directions mean nothing."""


@dataclass(frozen=True)
class MatrixView:
    """How a weight is a matrix `[out, in]`; `transposed` where its first axis is the one that reads."""

    transposed: bool

    def matrix(self, tensor: Tensor) -> Tensor:
        tensor = tensor.transpose(0, 1) if self.transposed else tensor
        return tensor.flatten(1)

    def tensor(self, matrix: Tensor, like: Tensor) -> Tensor:
        if not self.transposed:
            return matrix.reshape(like.shape)
        return matrix.reshape(like.transpose(0, 1).shape).transpose(0, 1)


def view_of(tensor: Tensor, labels: Sequence[AxisLabel]) -> MatrixView | None:
    """How a tensor is a matrix; None where it is none. Without labels the first axis is the one that is put out."""
    if tensor.dim() < 2:
        return None
    reads = [bool(label) and all(factor.dual for factor in factors(label)) for label in labels[:2]] or [False, True]
    return MatrixView(transposed=reads[0] and not reads[1]) if any(reads) else None


def on_matrices(
    tensors: Sequence[Tensor],
    labels: Sequence[AxisLabel],
    base: Tensor,
    function: Callable[[list[Tensor]], Tensor],
) -> Tensor:
    """The base and what a function makes of the task vectors, matrices `[out, in]`; other tensors' mean."""
    view = view_of(base, labels)
    if view is None:
        return sum(tensors) / len(tensors)
    return base + view.tensor(function([view.matrix(tensor - base) for tensor in tensors]), base)


def svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U `[m, r]`, S `[r]`, V^T `[r, n]` with r the numerical rank."""
    u, s, v = factorise.svd(matrix)
    rank = int((s > RELATIVE_ZERO * s[0]).sum()) if len(s) else 0
    return u[:, :rank], s[:rank], v[:rank]


def polar(matrix: Tensor) -> Tensor:
    """The nearest partial isometry: U V^T of the SVD, within the matrix's own rank."""
    u, _, v = svd(matrix)
    return u @ v


def solve_right(cross: Tensor, gram: Tensor, ridge: float = 0.0) -> Tensor:
    """X with X (gram + ridge I) = cross, for a symmetric gram; without a ridge cross times its pseudo-inverse."""
    if ridge:
        return torch.linalg.solve(gram + ridge * torch.eye(len(gram), dtype=gram.dtype), cross, left=False)
    return cross @ torch.linalg.pinv(gram, hermitian=True, rtol=RELATIVE_ZERO)
