"""Low-rank updates as two factors, and what can be done with them without their product.

Shapes: an update is d = B A `[out, in]` with B `[out, r]` and A `[r, in]`; r = 0 is an update of nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hf_zipit import factorise
from hf_zipit.combine.matrices import svd


class Factors(NamedTuple):
    """B `[out, r]` and A `[r, in]`, float64."""

    b: Tensor
    a: Tensor

    @property
    def rank(self) -> int:
        return self.b.shape[1]


def none_like(other: Factors) -> Factors:
    """The update of nothing, for the same layer."""
    return Factors(other.b[:, :0], other.a[:0])


def side_by_side(updates: Sequence[Factors]) -> Factors:
    """The sum of updates: all B next to each other, all A below each other. Its rank is the sum of theirs."""
    return Factors(torch.cat([own.b for own in updates], 1), torch.cat([own.a for own in updates]))


def span(matrix: Tensor) -> Tensor:
    """An orthonormal basis of a matrix's columns, `[n, numerical rank]`: its left singular vectors."""
    return svd(matrix)[0]


def singular(update: Factors) -> tuple[Tensor, Tensor, Tensor]:
    """U `[out, k]`, S `[k]` and V^T `[k, in]` of B A, k its numerical rank: the SVD of a core of `[r, r]`."""
    left, core = factorise.qr(update.b)
    right, other = factorise.qr(update.a.T)
    u, s, v = svd(core @ other.T)
    return left @ u, s, v @ right.T


def truncated(update: Factors, rank: int) -> Factors:
    """The nearest update of a rank, or the update itself where it has no more."""
    if update.rank <= rank:
        return update
    u, s, v = singular(update)
    return Factors(u[:, :rank] * s[:rank], v[:rank])
