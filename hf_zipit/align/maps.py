"""Merge and unmerge maps: what alignment returns and combining applies.

For a space with k merged units and an expert with d units, `merge` M_t is k x d and `unmerge` U_t is d x k. Nearly
every
method only *groups* units, so a map is stored as one label per unit, `labels[t][i]` = the merged unit that expert t's
unit i goes to, from which M and U follow: M[g, i] = 1/|g|, U[i, g] = 1, |g| counted over the units of all experts.

A space that lives within another (a `head_dim` within `heads`) has its own grouping for every *merged* unit of that
other space, so its labels have one more leading axis.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

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

    @property
    def experts(self) -> int:
        return self.labels.shape[0]

    def counts(self) -> Tensor:
        """How many units of all experts each merged unit holds: `[*within, k]`."""
        lead = self.labels.shape[1:-1]
        flat = self.labels.movedim(0, -2).reshape(*lead, -1)
        counts = torch.zeros(*lead, self.size, dtype=torch.int64)
        return counts.scatter_add_(-1, flat, torch.ones_like(flat))


Alignment = Mapping[str, SpaceMap]
"""The map of every movable space, by name. Fixed spaces have none: they are already aligned."""
