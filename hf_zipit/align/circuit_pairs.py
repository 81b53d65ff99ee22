"""Circuits compared: which heads of two experts are similar, and the change of basis inside a pair of heads.

The cosines of any two heads' circuits (`circuit_bases.py`), summed over query-key and output-value circuits, score the
pair, and ONE assignment on the scores pairs the heads of a layer. Grouped queries: the copies inside two key/value
groups are assigned first, and score the groups. Then the bases inside the paired heads are found.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations

import torch
from torch import Tensor

from hf_zipit.align.aligned import comparable, known_around
from hf_zipit.align.assignment import assign
from hf_zipit.align.circuit_bases import FREE, Bases
from hf_zipit.align.method import Network
from hf_zipit.maps.products import factors_first
from hf_zipit.maps.space_map import LinearMap, Map, SpaceMap
from hf_zipit.maps.transform import to_merged
from hf_zipit.symmetry.spec import MergeSpec, Symmetry, product_key


@dataclass(frozen=True)
class CircuitFamily:
    """Spaces whose bases circuits can find, with the heads that they live within.

    Attributes:
        heads: the space of the heads; None for spaces that stand alone.
        inner: the spaces between two linear maps, whose symmetry is in `FREE`.
        copies: the space of the queries inside a key/value group, where there is one; of all where there is one group.
        paired: whether the heads are to be paired; else their map is fixed.
    """

    heads: str | None
    inner: tuple[str, ...]
    copies: str | None = None
    paired: bool = True

    @property
    def members(self) -> tuple[str, ...]:
        """The spaces that this family decides."""
        own = (self.heads,) if self.paired and self.heads else ()
        return (*own, *self.inner, *((self.copies,) if self.copies else ()))


def circuit_families(spec: MergeSpec, fixed_maps: Mapping[str, Map]) -> list[CircuitFamily]:
    """The families that circuits can decide: heads with at most one other movable space inside.

    What has a fixed map is not touched; a family whose heads are open but something inside them has one is left alone.
    """
    found = []
    alone = [root for root, inner in spec.families() if not inner and root.name not in fixed_maps]
    free_alone = [root.name for root in alone if root.symmetry in FREE]
    axes = [set(product_key(label)) for labels in spec.axes.values() for label in labels]
    for root in alone:  # a single group of keys and values: its queries stand alone beside what is inside
        shared = set().union(*(axis for axis in axes if root.name in axis)).intersection(free_alone)
        if root.name not in free_alone and shared:
            found.append(CircuitFamily(None, tuple(name for name in free_alone if name in shared), root.name))
            free_alone = [name for name in free_alone if name not in shared]
    found += [CircuitFamily(None, (name,)) for name in free_alone]
    for root, inner in spec.families():
        if not inner:
            continue
        free = tuple(s.name for s in inner if s.symmetry in FREE)
        others = [s.name for s in inner if s.symmetry not in FREE]
        nested = any(s.within != (root.name,) for s in inner) or root.symmetry > Symmetry.PERMUTATION
        if free and len(others) <= 1 and not nested and not any(s.name in fixed_maps for s in inner):
            paired = spec.movable(root.name) and root.name not in fixed_maps
            found.append(CircuitFamily(root.name, free, others[0] if others else None, paired))
    return found


def circuits_of(network: Network) -> tuple[Network, list[CircuitFamily]]:
    """The families that circuits can decide, and the network, in which rotary spaces of no family are fixed.

    No other method knows what to do with those.
    """
    families = circuit_families(network.spec, network.fixed_maps)
    inside = {name for family in families for name in family.inner}
    rotary = (name for name, space in network.spec.spaces.items() if space.symmetry.in_pairs)
    spec = network.spec.with_fixed(set(rotary) - inside, "its heads are not matched by circuits")
    return replace(network, spec=spec), families


def match_family(family: CircuitFamily, network: Network, maps: Mapping[str, Map]) -> dict[str, Map]:
    """The maps of a family's members, with those of all other spaces from `maps`.

    They lead to the expert whose circuits are most similar to the others', in its balanced coordinates: those do not
    depend on the basis that any expert came in.
    """
    sides = Sides.of(family, network, {name: m for name, m in maps.items() if name not in family.members})
    experts = range(network.experts)
    own = [sides.norms(t) for t in experts]
    pairings = {(a, b): sides.pair(a, b, own) for a, b in combinations(experts, 2)}
    total = [sum(found.score for pair, found in pairings.items() if t in pair) for t in experts]
    reference = max(experts, key=lambda t: (total[t], -t))
    # The reference with itself is paired head by head, and its bases stay.
    to = []
    for t in experts:
        known = Pairing.unchanged(sides.shape) if t == reference else pairings.get((reference, t))
        to.append(known or sides.pair(reference, t, own))
    found: dict[str, Map] = {}
    if family.heads and family.paired:
        found[family.heads] = SpaceMap(sides.shape[0], torch.stack([pairing.heads.argsort() for pairing in to]))
    if family.copies:
        labels = torch.stack([pairing.copies.argsort(-1) for pairing in to])
        found[family.copies] = SpaceMap(sides.shape[1], labels if family.heads else labels[:, 0])
    for name in family.inner:
        bases = [sides.bases(name, reference, t, to[t]) for t in experts]
        matrices, inverses = (torch.stack(part) for part in zip(*bases, strict=True))
        lead = (sides.shape[0],) if family.heads else ()
        size = matrices.shape[-1]
        found[name] = LinearMap(*(x.reshape(len(to), *lead, size, size) for x in (matrices, inverses)))
    return found


@dataclass(frozen=True)
class Pairing:
    """Which of expert b's heads is each of a's, `[heads]`, which copy in it, `[heads, copies]`, and how similar."""

    heads: Tensor
    copies: Tensor
    score: float = 0.0

    @classmethod
    def unchanged(cls, shape: tuple[int, int]) -> Pairing:
        return cls(torch.arange(shape[0]), torch.arange(shape[1]).expand(shape).contiguous())


@dataclass
class Sides:
    """The weights of one family by expert: what writes and what reads every inner space, and what knows only heads.

    Attributes:
        shape: the numbers of heads and of copies inside each, 1 where there are none.
        paired: whether the heads may move.
        free: by inner space what its symmetry means for circuits.
        inner: by space and expert the two sides A and B, float64 `[heads, copies or 1, d, everything else]`.
        direct: by expert, weights without an inner space, `[heads, copies or 1, everything else]`.
    """

    shape: tuple[int, int]
    paired: bool
    free: dict[str, Bases]
    inner: dict[str, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    direct: list[list[Tensor]] = field(default_factory=list)

    @classmethod
    def of(cls, family: CircuitFamily, network: Network, maps: Mapping[str, Map]) -> Sides:
        spec = network.spec
        sizes = [spec.spaces[name].size if name else 1 for name in (family.heads, family.copies)]
        free = {name: FREE[spec.spaces[name].symmetry] for name in family.inner}
        sides = cls((sizes[0], sizes[1]), family.paired, free)
        parts: dict[tuple[str | None, bool, bool], list[list[Tensor]]] = {}
        for name in comparable(network):
            labels = spec.axes[name]
            factors = [factor for label in labels for factor in label]
            names = [factor.space for factor in factors]
            inner = [n for n in names if n in family.inner]
            lead = [n for n in (family.heads, family.copies, *inner) if n in names]
            if not lead or any(names.count(n) > 1 for n in lead) or len(inner) > 1:
                continue
            if not known_around(labels, maps, spec, family.members) or (family.heads and family.heads not in lead):
                continue
            copied = family.copies in lead if family.copies else False
            dual = bool(inner) and factors[names.index(inner[0])].dual
            for t in range(network.experts):
                rows = unit_rows(network, name, maps, t, lead)
                shape = [sizes[0] if family.heads else 1, sizes[1] if copied else 1]
                shape += [spec.spaces[inner[0]].size] if inner else []
                kind = (inner[0] if inner else None, dual, copied)
                parts.setdefault(kind, [[] for _ in range(network.experts)])[t].append(rows.reshape(*shape, -1))
        for name in family.inner:
            sides.inner[name] = [
                tuple(_side(parts, name, dual, t, sides.shape, spec.spaces[name].size) for dual in (False, True))
                for t in range(network.experts)
            ]  # type: ignore[misc]
        sides.direct = [
            [torch.cat(found[t], -1) for (name, _, _), found in parts.items() if name is None]
            for t in range(network.experts)
        ]
        return sides

    def norms(self, t: int) -> list[Tensor]:
        """The length of every head's circuits, `[heads]` each."""
        terms = self._terms(t, t)
        squares = [torch.stack([term[h, :, h].trace() for h in range(self.shape[0])]) for term in terms]
        return [square.clamp_min(1e-300).sqrt() for square in squares]

    def pair(self, a: int, b: int, own: Sequence[Sequence[Tensor]]) -> Pairing:
        """The best pairing of two experts' heads; `own` are the norms of all experts."""
        heads, copies = self.shape
        scores = torch.zeros(heads, heads, dtype=torch.float64)
        inner = torch.zeros(heads, copies, heads, copies, dtype=torch.float64)
        for term, x, y in zip(self._terms(a, b), own[a], own[b], strict=True):
            cosines = term / torch.outer(x, y)[:, None, :, None]
            if term.shape[1] == copies and copies > 1:
                inner += cosines
            else:
                scores += cosines[:, 0, :, 0]
        order = torch.arange(copies).repeat(heads, heads, 1)
        if copies > 1:
            for i in range(heads):
                for j in range(heads):
                    block = inner[i, :, j]
                    order[i, j] = torch.from_numpy(assign(block))
                    scores[i, j] += float(block[range(copies), order[i, j]].sum())
        partner = torch.from_numpy(assign(scores)) if self.paired else torch.arange(heads)
        rows = torch.arange(heads)
        return Pairing(partner, order[rows, partner], float(scores[rows, partner].sum()))

    def bases(self, name: str, reference: int, t: int, pairing: Pairing) -> tuple[Tensor, Tensor]:
        """g and g^-1 of every head, `[heads, d, d]`: see `Bases`."""
        ours = self.inner[name][reference]
        theirs = [self._ordered(side, pairing) for side in self.inner[name][t]]
        heads = zip(*(side.movedim(1, 2).flatten(2) for side in (*ours, *theirs)), strict=True)
        matrices, inverses = zip(*(self.free[name].matrices(*sides) for sides in heads), strict=True)
        return torch.stack(matrices), torch.stack(inverses)

    def _terms(self, a: int, b: int) -> list[Tensor]:
        """Products of circuits (and of what knows only heads), `[heads, copies or 1, heads, copies or 1]` each."""
        terms = []
        for name, sides in self.inner.items():
            if all(side.shape[-1] for side in sides[a]):
                terms.append(self.free[name].similarity(*sides[a], *sides[b]))
        for x, y in zip(self.direct[a], self.direct[b], strict=True):
            product = x.flatten(0, 1) @ y.flatten(0, 1).T
            terms.append(product.reshape(*x.shape[:2], *y.shape[:2]))
        return terms

    def _ordered(self, side: Tensor, pairing: Pairing) -> Tensor:
        side = side[pairing.heads]
        if side.shape[1] == 1:
            return side
        return torch.stack([head[order] for head, order in zip(side, pairing.copies, strict=True)])


def in_own_basis(found: Map) -> Map:
    """The same changes of basis, but to the first expert's own basis: it keeps its weights as they are."""
    if isinstance(found, SpaceMap):
        return found
    own, back = found.matrices[0], found.inverses[0]
    return LinearMap(back @ found.matrices, found.inverses @ own)


def unit_rows(network: Network, name: str, maps: Mapping[str, Map], expert: int, lead: Sequence[str]) -> Tensor:
    """One expert's tensor in the merged units of `maps`, float64 `[*lead, everything else]`."""
    spec, labels = network.spec, network.spec.axes[name]
    merged = to_merged(network.weights[expert][name].double().cpu(), labels, maps, spec, expert)
    return factors_first(merged, labels, lead, spec, maps)


def _side(
    parts: Mapping[tuple[str | None, bool, bool], list[list[Tensor]]],
    name: str,
    dual: bool,
    t: int,
    shape: tuple[int, int],
    units: int,
) -> Tensor:
    """All weights on one side of an inner space, `[heads, copies or 1, d, everything else]`."""
    alone, copied = (parts.get((name, dual, many)) for many in (False, True))
    found = [*(alone[t] if alone else []), *(copied[t] if copied else [])]
    if not found:
        return torch.zeros(shape[0], 1, units, 0, dtype=torch.float64)
    most = max(tensor.shape[1] for tensor in found)
    return torch.cat([tensor.expand(-1, most, -1, -1) for tensor in found], -1)
