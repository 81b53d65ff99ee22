"""ZipIt!: greedily join the most correlated units, across experts and within one (arXiv 2305.03053).

Start with every unit of every expert alone; join the most correlated two groups until k are left. A joined group
keeps the smaller of its members' correlations, times alpha, so that large groups are built last. Joins inside one
expert come out of that expert's budget, set by beta.

A join is inside an expert if it brings two of its units together, alone or with others'. A spent budget forbids all
further joins of that expert's units; where k groups cannot be reached otherwise (k < d, or three experts whose groups
block each other), the budgets are lifted for the last joins.

The published code copies the whole matrix at every join and searches it again. Here each row's maximum is cached, and
only rows whose maximum was touched are searched again. The trap in this: a negative correlation *rises* when
multiplied by alpha < 1, so a cached maximum can also be overtaken by a joined group's column.

Ties. What is the same in both experts must be joined first, or the merge of a model with itself would not be that
model: *twins*, units of different experts that are as correlated with each other as each is with itself, are joined
one-to-one before the greedy search starts, those of the same index first. This covers dead units, whose correlations
are all zero: left to the greedy search they would come last, after joins of live groups at any positive correlation.
Duplicated units inside an expert are also joined with their twins, not with each other, so that they spend no
budget. Which of several twins is decided by weights where the caller has added what they say (`by_weights.py`).
Everything else keeps the published order: the first maximum, row by row.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hf_zipit.align.assignment import SAME_INDEX_BONUS
from hf_zipit.align.by_weights import SAME
from hf_zipit.align.method import merged_size, register
from hf_zipit.errors import RecipeError
from hf_zipit.maps.space_map import SpaceMap


@register("zip", needs={"moments"})
def zip_units(
    correlation: Tensor,
    experts: int,
    *,
    alpha: float = 0.3,
    beta: float = 0.125,
    size: float = 1.0,
    compat: bool = False,
) -> SpaceMap:
    """Units are joined greedily; the merged ones are in the order of their first members.

    Args:
        correlation: float64 `[T * d, T * d]`.
        experts: T.
        alpha: what a group's correlations are multiplied by when it is joined, 0 to 1.
        beta: the share of an expert's joins that may be inside it, 0 to 1; 0 means none.
        size: k, the number of merged units, as a share of d; in an override an integer is their number.
        compat: do as the published code does: a joined group counts as its first unit's expert, a join inside an
            expert whose budget is 0 passes once, and twins are not looked for.
    """
    units = correlation.shape[-1] // experts
    count = merged_size(size, units, experts)
    budget = _budget(experts, units, count, alpha, beta)
    values = correlation.detach().cpu().numpy()
    groups = _Groups(values, experts, alpha, budget, compat)
    if not compat:
        for kept, gone in _twins(values, experts)[: experts * units - count]:
            groups.join(kept, gone)
    while groups.count > count:
        groups.join(*groups.best_pair())
    return SpaceMap(count, torch.from_numpy(groups.labels()).reshape(experts, units))


def _budget(experts: int, units: int, count: int, alpha: float, beta: float) -> int:
    """How many joins inside itself every expert is allowed; checks the options on the way."""
    for name, value in (("alpha", alpha), ("beta", beta)):
        if not 0 <= value <= 1:
            raise RecipeError(f"zip's option {name} is {value}; it must be between 0 and 1.")
    return int(((experts * units - count) / experts) * beta + 1e-4)


def _twins(correlation: NDArray[np.float64], experts: int) -> list[tuple[int, int]]:
    """Joins (kept, gone) of groups of units of different experts that are the same, at most one unit of each expert in
    a group: the most similar first, among equals those of the same index.

    The expert that correlates most with the others is the first to which they are compared, so that their order does
    not matter.
    """
    units = len(correlation) // experts
    to_itself = correlation.diagonal()
    blocks = correlation.reshape(experts, units, experts, units).sum((1, 3))
    order = np.argsort(blocks.diagonal() - blocks.sum(1), kind="stable")
    known = order[0] * units + np.arange(units)  # one unit of each group
    root = np.arange(len(correlation))  # of the group that a unit stands for
    joins = []
    for expert in order[1:]:
        own = expert * units + np.arange(units)
        lacking = np.maximum.outer(to_itself[known], to_itself[own])
        np.subtract(correlation[np.ix_(known, own)], lacking, out=lacking)
        i, j = np.nonzero(lacking >= -SAME)
        similarity = lacking[i, j] + SAME_INDEX_BONUS * (known[i] % units == j)
        free = np.ones(len(correlation), dtype=bool)
        for pair in np.lexsort((j, i, -similarity)):
            unit, twin = known[i[pair]], own[j[pair]]
            if free[unit] and free[twin]:
                free[unit] = free[twin] = False
                kept, gone = sorted((root[unit], twin))
                joins.append((kept, gone))
                root[unit] = kept
        known = np.concatenate([known, own[free[own]]])
    return joins


class _Groups:
    """The groups of a greedy search, each known by its first unit, with their similarities and every row's maximum."""

    def __init__(self, correlation: NDArray[np.float64], experts: int, alpha: float, budget: int, compat: bool):
        units = len(correlation)
        self.correlation = correlation
        self.similarity = correlation.copy()
        np.fill_diagonal(self.similarity, -np.inf)
        self.alpha, self.compat = alpha, compat
        self.count = units
        self.parent = np.arange(units)
        self.holds = np.arange(experts) == self.parent[:, None] // (units // experts)  # whose units are in a group
        self.budget = np.full(experts, budget)
        self.best = np.empty(units)
        self.partner = np.empty(units, dtype=np.int64)
        self._search(self.parent)
        if budget == 0 and not compat:
            for expert in range(experts):
                self._forbid(expert)

    def best_pair(self) -> tuple[int, int]:
        """The most correlated two groups, the first of them first; among equals the first, row by row."""
        row = int(self.best.argmax())
        if self.best[row] == -np.inf:
            self._lift_budget()
            row = int(self.best.argmax())
        partner = int(self.partner[row])
        # A matrix product's two halves may differ in the last bit, so that the second group's row holds the maximum.
        return min(row, partner), max(row, partner)

    def join(self, kept: int, gone: int) -> None:
        """Join group `gone` to group `kept`, which comes before it."""
        joined = np.minimum(self.similarity[kept], self.similarity[gone])
        # `where`: a forbidden pair stays forbidden when alpha is 0, instead of becoming 0 * -inf = nan.
        np.multiply(joined, self.alpha, out=joined, where=joined > -np.inf)
        joined[gone] = -np.inf
        self.similarity[kept] = self.similarity[:, kept] = joined
        self.similarity[gone] = self.similarity[:, gone] = -np.inf
        self.parent[gone] = kept
        self.count -= 1

        # A maximum is overtaken where a negative correlation rose; of equal columns the first is the maximum.
        risen = (joined > self.best) | ((joined == self.best) & (kept < self.partner) & (joined > -np.inf))
        lost = ((self.partner == kept) | (self.partner == gone)) & ~risen & (self.best > -np.inf)
        lost[kept], lost[gone] = True, False
        self.best[risen], self.partner[risen] = joined[risen], kept
        self.best[gone] = -np.inf
        self._search(np.flatnonzero(lost))

        for expert in np.flatnonzero(self.holds[kept] & self.holds[gone]):
            self.budget[expert] -= 1
            if self.budget[expert] <= 0:
                self._forbid(expert)
        if not self.compat:
            self.holds[kept] |= self.holds[gone]

    def labels(self) -> NDArray[np.int64]:
        """The number of every unit's group, in the order of the groups' first units."""
        root = self.parent.copy()
        for unit, parent in enumerate(self.parent):
            root[unit] = root[parent]  # a parent comes before its unit, so it has found its root
        return np.unique(root, return_inverse=True)[1]

    def _forbid(self, expert: int) -> None:
        """Allow no more joins inside an expert."""
        own = np.flatnonzero(self.holds[:, expert] & self._left())
        self.similarity[np.ix_(own, own)] = -np.inf
        self._search(own)

    def _lift_budget(self) -> None:
        """Allow every join: two groups are as similar as the least correlated of their members."""
        self.budget[:] = len(self.parent)
        left, labels = np.flatnonzero(self._left()), self.labels()
        by_group = labels.argsort(kind="stable")
        first = np.searchsorted(labels[by_group], np.arange(len(left)))
        rows = np.minimum.reduceat(self.correlation[np.ix_(by_group, by_group)], first, axis=0)
        least = np.minimum.reduceat(rows, first, axis=1)
        np.fill_diagonal(least, -np.inf)
        self.similarity[np.ix_(left, left)] = least
        self._search(left)

    def _left(self) -> NDArray[np.bool_]:
        """Which units stand for a group."""
        return self.parent == np.arange(len(self.parent))

    def _search(self, rows: NDArray[np.int64]) -> None:
        for row in rows:
            partner = self.similarity[row].argmax()
            self.partner[row] = partner
            self.best[row] = self.similarity[row, partner]
