"""Merge and unmerge maps: what alignment returns and combining applies.

For a space with k merged units and an expert with d units, `merge` M_t is k x d and `unmerge` U_t is d x k. Most
methods only *group* units: a `SpaceMap` holds one label per unit, `labels[t][i]` = the merged unit that expert t's
unit i goes to, from which M and U follow: M[g, i] = 1/|g|, U[i, g] = 1, |g| counted over the units of all experts.
Where a space allows more than permutations, a `LinearMap` brings every expert into one basis by an invertible matrix:
M_t = g_t / T, U_t = g_t^-1.

A space that lives within another (a `head_dim` within `heads`) has its own map for every *merged* unit of that other
space, so its labels or matrices have one more leading axis.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class SpaceMap:
    """A grouping of all experts' units of one space into merged units.

    Attributes:
        size: k, the number of merged units.
        labels: int64, `[experts, *sizes of the merged spaces it lives within, units]`; `labels[t, ..., i]` is the
            merged unit of expert t's unit i. Where the space lives within heads, row h is the grouping inside merged
            head h, and i counts the units of the expert's head that was matched to h.
    """

    size: int
    labels: Tensor

    @classmethod
    def identity(cls, size: int, experts: int, within: Sequence[int] = ()) -> SpaceMap:
        """The map in which every expert's unit i is the merged unit i, in every row."""
        return cls(size, torch.arange(size).expand(experts, *within, size).contiguous())

    @property
    def experts(self) -> int:
        return self.labels.shape[0]

    @property
    def is_identity(self) -> bool:
        """Whether every unit stays where it is."""
        units = self.labels.shape[-1]
        return self.size == units and bool((self.labels == torch.arange(units).to(self.labels)).all())

    def equals(self, other: Map) -> bool:
        return isinstance(other, SpaceMap) and self.size == other.size and torch.equal(self.labels, other.labels)

    def of_experts(self, index: Tensor) -> SpaceMap:
        """The map of other experts, each of which has the units of one of these."""
        return SpaceMap(self.size, self.labels[index])

    def counts(self) -> Tensor:
        """How many units of all experts each merged unit holds: `[*within, k]`."""
        lead = self.labels.shape[1:-1]
        flat = self.labels.movedim(0, -2).reshape(*lead, -1)
        counts = torch.zeros(*lead, self.size, dtype=torch.int64)
        return counts.scatter_add_(-1, flat, torch.ones_like(flat))


@dataclass(frozen=True)
class LinearMap:
    """A change of basis of every expert's units of one space. Units are mixed, not grouped: k = d.

    Invariants: where all matrices are the identity, it does what the `SpaceMap` of equal labels does.

    Attributes:
        matrices: g_t, float64, `[experts, *sizes of the merged spaces it lives within, k, d]`; row h is the change of
            basis inside merged head h, of the units of the expert's head that was matched to h.
        inverses: g_t^-1, `[experts, *within, d, k]`.
    """

    matrices: Tensor
    inverses: Tensor
    _moved: dict[tuple[int, bool, torch.device, torch.dtype], Tensor | None] = field(
        default_factory=dict, init=False, compare=False, repr=False
    )

    @classmethod
    def of(cls, matrices: Tensor) -> LinearMap:
        """The map of invertible matrices."""
        return cls(matrices, torch.linalg.inv(matrices))

    @classmethod
    def rotation(cls, matrices: Tensor) -> LinearMap:
        """The map of orthogonal matrices."""
        return cls(matrices, matrices.mT)

    def equals(self, other: Map) -> bool:
        return isinstance(other, LinearMap) and torch.equal(self.matrices, other.matrices)

    def of_experts(self, index: Tensor) -> LinearMap:
        """The map of other experts, each of which has the units of one of these."""
        return LinearMap(self.matrices[index], self.inverses[index])

    def unchanged(self, expert: int) -> bool:
        """Whether one expert's units stay as they are."""
        own = self.matrices[expert]
        return torch.equal(own, torch.eye(own.shape[-1]).to(own).expand_as(own))

    def acting_on(self, tensor: Tensor, expert: int, dual: bool) -> Tensor | None:
        """What an expert's units are multiplied by, g_t or g_t^-T, as the tensor is; None where they stay as they are.

        It is remembered: a refit asks for the same ones a thousand times.
        """
        key = (expert, dual, tensor.device, tensor.dtype)
        if key not in self._moved:
            matrix = self.inverses[expert].mT if dual else self.matrices[expert]
            self._moved[key] = None if self.unchanged(expert) else matrix.to(tensor)
        return self._moved[key]

    @property
    def is_identity(self) -> bool:
        """Whether every unit stays what it is."""
        return all(map(self.unchanged, range(self.experts)))

    @property
    def size(self) -> int:
        return self.matrices.shape[-2]

    @property
    def experts(self) -> int:
        return self.matrices.shape[0]


Map = SpaceMap | LinearMap

Alignment = Mapping[str, Map]
"""The map of every movable space, by name. Fixed spaces have none: they are already aligned."""
