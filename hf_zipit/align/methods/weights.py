"""Weight matching: one-to-one assignments of units from the weights alone, without data (Git Re-Basin, arXiv
2209.04836).

The permutations pi that bring expert b nearest to expert a maximise sum <W_a, pi(W_b)> over all parameters: for one
space at a time a linear assignment. Heads are assigned together with what is inside them (`similarity.py`). A space
whose surroundings have not changed since its last visit has nothing to gain and is passed over.
`docs/methods/weights.md` tells why there are two starts.

Invariants: exchanging the experts inverts the maps; a visit never lowers the similarity (but where a parameter has
one space on two axes, which are assigned as if they were independent).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np
import torch
from torch import Tensor

from hf_zipit.align.aligned import Expert, with_fixed_maps
from hf_zipit.align.method import Network, register
from hf_zipit.align.similarity import RELATIVE_GAIN, Family, Orders, Similarity, families
from hf_zipit.errors import RecipeError
from hf_zipit.maps.products import factors_first, unchanged
from hf_zipit.maps.space_map import SpaceMap
from hf_zipit.symmetry.group import transform
from hf_zipit.symmetry.spec import MergeSpec


@register("weights", needs={"weights"}, scope="network")
def match_weights(network: Network, *, sweeps: int = 100) -> dict[str, SpaceMap]:
    """One-to-one maps by coordinate descent.

    With more than two experts every pair is matched, and all are brought to the one that is most similar to the others
    in total (as cosines: an expert with large weights is not nearer to anybody).

    Args:
        network: the experts' weights are read; its seed draws the order of the visits.
        sweeps: at most this many visits of every space, 1 or more.
    """
    if sweeps < 1:
        raise RecipeError(f"the option sweeps is {sweeps}; it must be 1 or more.")
    spec, experts = with_fixed_maps(network)
    pairs = {}
    total = np.zeros(network.experts)
    for a, b in combinations(range(network.experts), 2):
        starts = Descent(spec, experts[a], experts[b]), Descent(spec, experts[a], experts[b])
        starts[1].propagate()
        for descent in starts:
            descent.run(network.random_orders(tuple(descent.families), sweeps))
        cosine, _, pairs[a, b] = max((descent.cosine(), -i, descent.orders) for i, descent in enumerate(starts))
        total[[a, b]] += cosine
    return maps_to(int(total.argmax()), pairs, spec, network.experts)


@dataclass
class Descent:
    """Coordinate descent on one pair of experts; `orders` is where it stands.

    Expert b is always seen in its current order, so that the assignment that is found is a change of it.
    """

    spec: MergeSpec
    a: Expert
    b: Expert
    orders: Orders = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.families = families(self.spec)
        self.factors = {name: [f.space for label in self.spec.axes[name] for f in label] for name in self.a.names}
        self.tensors = {
            root: [n for n, factors in self.factors.items() if {*family.inner, *([root] * family.open)} & {*factors}]
            for root, family in self.families.items()
        }

    def run(self, visits: Iterable[Sequence[str]]) -> Orders:
        """Visit the families (by their roots' names) in the given order of every sweep, until one gains nothing."""
        stale = set(self.families)
        for sweep in visits:
            for root in sweep:
                if root in stale:
                    stale.discard(root)
                    if self.visit(self.families[root]):
                        stale |= self._neighbours(root)
            if not stale:
                break
        return self.orders

    def propagate(self) -> None:
        """Visit every family once, looking only at parameters whose other spaces are fixed or were visited before:
        first the family for which these are the largest share. Where a parameter has one space on two axes, only what
        does not depend on the order of the other one is looked at."""
        unknown = {name for name in self.spec.spaces if self.spec.movable(name)}
        waiting = dict(self.families)
        while waiting:
            root = max(waiting, key=lambda root: self._known(root, unknown))
            family = waiting.pop(root)
            self.visit(family, unknown - {root, *family.inner}, alone=True)
            unknown -= {root, *family.inner}

    def _known(self, root: str, unknown: set[str]) -> float:
        """The share of a family's parameters, by their size, that have no other unknown space."""
        unknown = unknown - {root, *self.families[root].inner}
        sizes = {n: self.spec.size(tuple(self.factors[n])) for n in self.tensors[root]}
        known = sum(size for name, size in sizes.items() if not unknown & set(self.factors[name]))
        return known / max(sum(sizes.values()), 1)

    def cosine(self) -> float:
        """<W_a, pi(W_b)> / (|W_a| |W_b|) over all weights that are compared."""
        products = np.zeros(3)
        for name in self.a.names:
            x, y = self.a[name].flatten(), self._current(name).flatten()
            products += [float(x.dot(y)), float(x.dot(x)), float(y.dot(y))]
        return float(products[0] / max(np.sqrt(products[1] * products[2]), 1e-30))

    def visit(self, family: Family, unknown: Collection[str] = (), alone: bool = False) -> bool:
        """Solve one family while all others stay, without the parameters of `unknown` spaces and, if it is to be seen
        `alone`, without its own order on other axes; returns whether that gained anything."""
        similarity = self._similarity(family, unknown, alone)
        pairing, inside, before, after = similarity.best_orders(family)
        if after - before <= RELATIVE_GAIN * abs(after):
            return False
        for name, space in self.spec.spaces.items():
            if family.root in space.within and name in self.orders and name not in inside:  # deeper: its blocks move
                rows = self.orders[name].movedim(space.within.index(family.root), 0)[pairing]
                for inner in set(inside) & set(space.within):
                    first = space.within.index(inner)  # not 0, which is the root's
                    chosen = inside[inner].reshape(*inside[inner].shape, *(1 for _ in rows.shape[2:]))
                    rows = rows.movedim(first, 1).take_along_dim(chosen, 1).movedim(1, first)
                self.orders[name] = rows.movedim(0, space.within.index(family.root))
        for name, chosen in inside.items():
            own = self.orders.get(name, torch.arange(chosen.shape[1]).expand(chosen.shape)).reshape(chosen.shape)
            sizes = [self.spec.spaces[outer].size for outer in family.blocks]
            self.orders[name] = own[pairing].gather(1, chosen).reshape(*sizes, -1)
        if family.open:
            self.orders[family.root] = self.orders.get(family.root, torch.arange(len(pairing)))[pairing]
        return True

    def _neighbours(self, root: str) -> set[str]:
        """The families that share a tensor with a family; that family itself if solving it once may not be enough."""
        own = {root, *self.families[root].inner}
        near = {
            other for other, names in self.tensors.items() if other != root and set(names) & set(self.tensors[root])
        }
        twice = any(
            self.factors[n].count(root) > 1 or sum(f in own - {root} for f in self.factors[n]) > 1
            for n in self.tensors[root]
        )
        return near | ({root} if twice else set())

    def _current(self, name: str) -> Tensor:
        return transform(self.b[name], self.spec.axes[name], self.spec, self.orders)

    def _similarity(self, family: Family, unknown: Collection[str], alone: bool) -> Similarity:
        units = {name: self.spec.spaces[name].size for name in family.inner}
        similarity = Similarity(self.spec.size(family.blocks), units)
        for name in self.tensors[family.root]:
            factors, labels = self.factors[name], self.spec.axes[name]
            if not set(factors).isdisjoint(unknown):
                continue
            present = [inner for inner in family.inner if inner in factors]
            # A space that is on two axes is seen from each of them, while the other keeps its order.
            for place in range(1 if present else factors.count(family.root)):
                twice = alone and not present and factors.count(family.root) == 2
                lead = [*family.blocks, *present, *[family.root] * twice]
                x, y = (
                    factors_first(own, labels, lead, self.spec, {}, place)
                    for own in (self.a[name], self._current(name))
                )
                if twice:
                    x, y = in_any_order(x), in_any_order(y)
                similarity.add(tuple(present), *(part.flatten(0, len(family.blocks) - 1) for part in (x, y)))
        return similarity


def in_any_order(x: Tensor) -> Tensor:
    """Of `[n, n, rest]` what stays with a unit whatever the order of the others: `[n, 2 rest]`, itself and the sum."""
    return torch.cat([x.diagonal().T, x.sum(1) / len(x) ** 0.5], 1)


def maps_to(
    reference: int, pairs: Mapping[tuple[int, int], Orders], spec: MergeSpec, experts: int
) -> dict[str, SpaceMap]:
    """The maps of all movable spaces, from the orders that were found for the pairs of the reference with others."""
    maps = {}
    for name, space in spec.spaces.items():
        if not spec.movable(name):
            continue
        labels = unchanged(name, spec, experts).labels
        for expert in range(experts):
            if expert > reference and name in (orders := pairs[reference, expert]):
                # orders[i] is the expert's unit for the reference's unit i; labels go the other way.
                labels[expert] = orders[name].argsort(-1)
            elif expert < reference and name in (orders := pairs[expert, reference]):
                # The rows are counted by the expert's own blocks there, by the reference's in a map.
                rows = orders[name]
                for place, outer in enumerate(space.within):
                    if outer in orders:
                        rows = by_reference(rows, place, outer, orders, spec)
                labels[expert] = rows
        maps[name] = SpaceMap(space.size, labels)
    return maps


def by_reference(rows: Tensor, place: int, outer: str, orders: Orders, spec: MergeSpec) -> Tensor:
    """Rows along the axis `place`, of the units of `outer`, in the order of the reference's units.

    The axes before it are in that order already.
    """
    order = orders[outer]
    for i, around in enumerate(spec.spaces[outer].within):
        if around in orders:
            order = by_reference(order, i, around, orders, spec)
    order = order.argsort(-1)
    if not spec.spaces[outer].within:
        return rows.index_select(place, order)
    index = order.reshape(*order.shape, *(1 for _ in rows.shape[place + 1 :]))
    return rows.take_along_dim(index, place)
