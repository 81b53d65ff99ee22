"""How similar two experts' units are, for a space together with the spaces that live within it (weights only).

A space that stands alone and those within it (`head_dim` within heads) are one *family*, solved in one go. Every pair
of blocks (heads) is scored by the best assignment of what is inside them, summed over all parameters: Q, K, V and O.
ONE assignment on the scores then orders the blocks in all of them. Where two inner spaces meet in one parameter (query
groups and value dims in the output projection of grouped-query attention) they are solved in turn, pair by pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from hf_zipit.errors import ExpertError
from hf_zipit.symmetry.spec import MergeSpec

RELATIVE_GAIN = 1e-7
"""Gains below this share of the similarity are float32's rounding."""

SAME_INDEX_BONUS = 1e-9
"""As a share of the largest similarity: decides ties, as between units that are all zero, for the same index."""

Orders = dict[str, Tensor]
"""Per space int64 `[*within, size]`: expert b's unit for each of a's units, as in `symmetry.group`; a space without
one keeps its units."""

Inside = dict[str, NDArray[np.int64]]
"""Per inner space `[units]`: the order inside one pair of blocks."""


@dataclass(frozen=True)
class Family:
    """A space that stands alone, and the open spaces within it; the root itself may be fixed.

    Or a space within several others (the hidden units of experts that come in groups): it is its own root, and what is
    in each of their `blocks` is solved while those keep their order.
    """

    root: str
    inner: tuple[str, ...]
    open: bool
    blocks: tuple[str, ...]


def families(spec: MergeSpec) -> dict[str, Family]:
    """What is solved together, by the root's name."""
    found = {}
    for root, inside in spec.families():
        inner = tuple(space.name for space in inside if space.within == (root.name,))
        found[root.name] = Family(root.name, inner, spec.movable(root.name), (root.name,))
    for name, space in spec.spaces.items():
        nested = all(spec.spaces[o].within in ((), space.within[:i]) for i, o in enumerate(space.within))
        if len(space.within) > 1 and nested and spec.movable(name):
            found[name] = Family(name, (name,), open=False, blocks=space.within)
    return found


@dataclass
class Similarity:
    """How similar the units of one family are, of `size` blocks (heads, or single units) with spaces inside.

    Attributes:
        units: the number of units in a block, by inner space.
        blocks: `[size, size]`, from parameters that have the root only.
        inner: by inner space with d units `[size, d, size, d]`, from parameters that have no other inner space.
        coupled: parameters with several inner spaces: their names, and both experts' `[size, *units, rest]`.
    """

    size: int
    units: dict[str, int]
    blocks: Tensor | None = None
    inner: dict[str, Tensor] = field(default_factory=dict)
    coupled: list[tuple[tuple[str, ...], Tensor, Tensor]] = field(default_factory=list)

    def add(self, names: tuple[str, ...], x: Tensor, y: Tensor) -> None:
        """Add one parameter, both experts' `[size, *units of the inner spaces, rest]`."""
        if len(names) > 1:
            self.coupled.append((names, x.cpu(), y.cpu()))
            return
        shape = x.shape[:-1]
        x, y = x.flatten(0, -2), y.flatten(0, -2)
        total = self.inner.get(names[0]) if names else self.blocks
        total = x @ y.T if total is None else total.reshape(len(x), len(y)).addmm_(x, y.T)
        if names:
            self.inner[names[0]] = total.reshape(*shape, *shape)
        else:
            self.blocks = total

    def best_orders(self, family: Family) -> tuple[Tensor, Orders, float, float]:
        """The best partner of every block, the best orders inside the paired blocks `[size, d]`, and the similarity
        before and after."""
        self.inner = {name: s.cpu() for name, s in self.inner.items()}
        blocks = np.zeros((self.size, self.size)) if self.blocks is None else self.blocks.cpu().double().numpy()
        if not family.inner:
            partner = _assign(blocks)
            return torch.from_numpy(partner), {}, blocks.trace(), blocks[np.arange(self.size), partner].sum()
        scores = blocks.copy()
        solved = {}
        before = 0.0
        for h in range(self.size):
            for k in range(self.size) if family.open else [h]:
                solved[h, k], score = self._best_inside(family, h, k)
                scores[h, k] += score
            before += blocks[h, h] + self._score(h, h, self._unchanged())
        partner = _assign(scores) if family.open else np.arange(self.size)
        pairs = list(enumerate(partner.tolist()))
        inside = {name: torch.from_numpy(np.stack([solved[pair][name] for pair in pairs])) for name in family.inner}
        return torch.from_numpy(partner), inside, before, float(sum(scores[pair] for pair in pairs))

    def _best_inside(self, family: Family, h: int, k: int) -> tuple[Inside, float]:
        """The best orders inside one pair of blocks, and their similarity."""
        best = self._descend(family, h, k, {})
        if h != k or not self.coupled:
            return best
        # Coupled spaces are solved in turn, which may end lower than where they stand.
        return max(best, self._descend(family, h, k, self._unchanged()), key=lambda found: found[1])

    def _descend(self, family: Family, h: int, k: int, start: Inside) -> tuple[Inside, float]:
        orders = dict(start)
        score = -np.inf
        while True:
            for name in family.inner:
                orders[name] = _assign(self._similarity(family, name, h, k, orders))
            reached = self._score(h, k, orders)
            if not self.coupled or reached - score <= RELATIVE_GAIN * abs(reached):
                return orders, reached
            score = reached

    def _similarity(self, family: Family, name: str, h: int, k: int, orders: Inside) -> NDArray[np.float64]:
        """Of an inner space's units in a pair of blocks, leaving out parameters with spaces that have no order yet."""
        total = np.zeros((self.units[name],) * 2)
        if name in self.inner:
            total += self.inner[name][h, :, k].double().numpy()
        for names, x, y in self.coupled:
            if name in names and all(other in orders for other in names if other != name):
                axis = names.index(name)
                ordered = _take(y[k], names, {n: o for n, o in orders.items() if n != name})
                rows = [side.movedim(axis, 0).flatten(1) for side in (x[h], ordered)]
                total += (rows[0] @ rows[1].T).double().numpy()
        return total

    def _score(self, h: int, k: int, orders: Inside) -> float:
        """The similarity of two blocks under orders of what is inside them."""
        score = 0.0
        for name, similarity in self.inner.items():
            score += float(similarity[h, np.arange(len(orders[name])), k, orders[name]].sum(dtype=torch.float64))
        for names, x, y in self.coupled:
            score += float((x[h] * _take(y[k], names, orders)).sum(dtype=torch.float64))
        return score

    def _unchanged(self) -> Inside:
        return {name: np.arange(units) for name, units in self.units.items()}


def _take(block: Tensor, names: Sequence[str], orders: Inside) -> Tensor:
    """A block `[*units, rest]` in other orders of its units."""
    for axis, name in enumerate(names):
        if name in orders:
            block = block.index_select(axis, torch.from_numpy(orders[name]))
    return block


def _assign(similarity: NDArray[np.float64]) -> NDArray[np.int64]:
    """The column for each row, so that the sum is largest; among equals the same index. (Works in place: scipy would
    copy a matrix that it has to maximise.) Raises ExpertError where similarities are not finite."""
    if not np.isfinite(similarity).all():
        raise ExpertError("the experts' weights are too large to be compared: similarities are not finite; check them")
    bonus = SAME_INDEX_BONUS * max(similarity.max(initial=0.0), -similarity.min(initial=0.0)) or 1.0
    similarity[np.diag_indices(len(similarity))] += bonus
    np.negative(similarity, out=similarity)
    partner = linear_sum_assignment(similarity)[1]
    np.negative(similarity, out=similarity)
    return partner
