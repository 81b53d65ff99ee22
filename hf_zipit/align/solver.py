"""The solver: runs matchers of one space over a whole spec, on the correlations of the products that were observed.

Spaces are solved one after the other, those first whose similarities depend on the fewest unsolved ones. A space that
stands alone goes straight to the matcher. Where only products were observed, the other factors are traced out under
their maps (`products.py`); heads are scored over all their products and permuted (`heads.py`), then the matcher runs
inside every group of paired heads. Where activations say nothing weights do (`by_weights.py`): a space that nothing
observes is matched by them, and spaces with units that do the same are solved again, the weights deciding ties.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from hf_zipit.align.assignment import at_once, match_to_reference
from hf_zipit.align.by_weights import completed, match_by_weights, told_apart
from hf_zipit.align.heads import block_scores, holds_blocks
from hf_zipit.align.method import Method, Network, merged_size
from hf_zipit.errors import DataError
from hf_zipit.factorise import side_by_side
from hf_zipit.maps.products import merged_sizes, trace_out
from hf_zipit.maps.space_map import LinearMap, Map, SpaceMap
from hf_zipit.registry import METHODS, check_options
from hf_zipit.symmetry.spec import Factor, MergeSpec, ProductKey, Space, Symmetry

logger = logging.getLogger(__name__)

SWEEPS = 10
"""At most this many visits of the spaces whose ties weights decide: what they say depends on the other maps."""


@dataclass(frozen=True)
class Choice:
    """A method with its options."""

    method: Method
    options: dict[str, Any]

    @classmethod
    def of(cls, name: str, options: Mapping[str, Any]) -> Choice:
        method = METHODS.get(name)
        return cls(method, check_options(name, method.function, options))

    def changes_width(self, units: int, experts: int) -> bool:
        """Whether it makes more or fewer merged units of a space than an expert has."""
        return "size" in self.options and merged_size(self.options["size"], units, experts) != units

    def dry_run(self, experts: int, units: int = 2) -> None:
        """Run the method on one space of units that resemble nothing, for what it raises about its options."""
        correlation = torch.eye(experts * units, dtype=torch.float64)
        if self.method.scope == "space":
            self.method.function(correlation, experts, **self.options)
            return
        spaces = {"units": Space("units", units, Symmetry.PERMUTATION), "inputs": Space("inputs", 2, Symmetry.FIXED)}
        spec = MergeSpec("DryRun", spaces, {"weight": ((Factor("units"),), (Factor("inputs", dual=True),))})
        weights = [{"weight": torch.eye(units, 2)}] * experts
        network = Network(spec, experts, {("units",): correlation}, weights, widenable=frozenset({"units"}))
        self.method.function(network, **self.options)


@dataclass
class Solver:
    """Solves spaces one after the other, on a network's correlations; `maps` holds those that are solved."""

    network: Network
    maps: dict[str, Map] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.spec, self.experts = self.network.spec, self.network.experts
        self.correlations, self.covariances = self.network.correlations, self.network.covariances

    def solve(self, choices: Mapping[str, Choice]) -> None:
        """Add the map of every space in `choices`.

        Raises:
            DataError: nothing observes a space, and the network has no weights to match it by.
        """
        blind = [name for name, choice in choices.items() if "moments" not in choice.method.needs]
        seen = {n: choice for n, choice in choices.items() if n not in blind and self._seen(n, choice)}
        unseen = [name for name in choices if name not in blind and name not in seen]
        for name in blind:
            self.maps[name] = self._blind(name, choices[name].method.function)
        self._solve_seen(seen)
        if unseen and not self.network.weights:
            raise DataError(
                f"Nothing observes {', '.join(unseen)}; give the experts' weights to match by, or override it by "
                "'identity'."
            )
        if unseen:
            logger.info("Matched by their weights, for nothing observes them: %s.", ", ".join(unseen))
            self.maps |= match_by_weights(self.network, unseen, self.maps)
        families = [[s.name for s in (root, *inner) if s.name in seen] for root, inner in self.spec.families()]
        for _ in range(SWEEPS if self.network.weights else 0):
            changed = [self._tell_apart(family, seen) for family in families]
            if not any(changed):
                break
            if unseen:
                self.maps |= match_by_weights(self.network, unseen, self.maps)

    def _tell_apart(self, family: Sequence[str], choices: Mapping[str, Choice]) -> bool:
        """Solve a family again where weights tell apart what activations do not; returns whether a map changed."""
        clearer = told_apart(self.network, self.correlations, self.maps, family)
        if not clearer:
            return False
        network = replace(self.network, correlations={**self.correlations, **clearer})
        again = Solver(network, {name: m for name, m in self.maps.items() if name not in family})
        again._solve_seen({name: choices[name] for name in family})
        changed = [name for name in family if not again.maps[name].equals(self.maps[name])]
        self.maps |= {name: again.maps[name] for name in changed}
        return bool(changed)

    def _solve_seen(self, choices: Mapping[str, Choice]) -> None:
        alone = [name for name, choice in choices.items() if self._stands_alone(name, choice)]
        largest = max((self.spec.spaces[name].size for name in alone), default=1)
        found = side_by_side(lambda name: self._inner_map(name, choices[name]), alone, most=at_once(largest))
        self.maps |= dict(zip(alone, found, strict=True))
        waiting = [name for name in choices if name not in alone]
        while waiting:
            ready = [name for name in waiting if not set(self.spec.spaces[name].within) & set(waiting)]
            # Changes of basis come last: units that were mixed cannot be brought together one by one.
            mixing = {name: "covariances" in choices[name].method.needs for name in ready}
            unsolved = {name: min(len(self._open(name, key)) for key in self._keys(name)) for name in ready}
            name = min(ready, key=lambda name: (mixing[name], unsolved[name], not self._blocks(name)))
            self.maps[name] = self._head_map(name) if self._blocks(name) else self._inner_map(name, choices[name])
            waiting.remove(name)

    def _stands_alone(self, name: str, choice: Choice) -> bool:
        """Whether a space's units were observed by themselves, and what they do decides without other spaces' maps."""
        mixing = "covariances" in choice.method.needs
        return not mixing and (name,) in self.correlations and not self._blocks(name)

    def _seen(self, name: str, choice: Choice) -> bool:
        keys = self._keys(name)
        return any(key in self.covariances for key in keys) if "covariances" in choice.method.needs else bool(keys)

    def _keys(self, name: str) -> list[ProductKey]:
        """The observed products that say something about a space: they tell apart the spaces it lives within."""
        needed = {name, *self.spec.spaces[name].within}
        return [key for key in self.correlations if needed <= set(key)]

    def _open(self, name: str, key: ProductKey) -> ProductKey:
        """The other movable spaces of a product that have no map yet."""
        return tuple(n for n in key if n != name and self.spec.movable(n) and n not in self.maps)

    def _blocks(self, name: str) -> bool:
        return holds_blocks(name, self.spec, self.correlations)

    def _blind(self, name: str, function: Any) -> SpaceMap:
        """The map of a method that reads no correlation, only how many units there are."""
        space = self.spec.spaces[name]
        size = self.experts * space.size
        found = function(torch.empty(size, size, device="meta"), self.experts)
        lead = [self.spec.spaces[outer].size for outer in space.within]
        labels = found.labels.reshape(self.experts, *(1 for _ in lead), -1).expand(self.experts, *lead, -1)
        return SpaceMap(found.size, labels.contiguous())

    def _head_map(self, name: str) -> SpaceMap:
        """Permute blocks, by their scores summed over all products."""
        scores = 0
        for key in self._keys(name):
            inside = self._open(name, key)
            traced, lead = self._rows(key, (name, *inside), self.correlations)
            for inner in reversed(inside):
                traced = torch.stack([block_scores(row, self.spec.spaces[inner].size) for row in traced])
            # The scores are sums over all units of a block: traced-out units were averaged.
            averaged = [n for n in key if n not in (name, *inside, *self.spec.spaces[name].within)]
            scores = scores + traced * self.spec.size(tuple(averaged))
        return self._stack([match_to_reference(row) for row in scores], lead)

    def _inner_map(self, name: str, choice: Choice) -> Map:
        """Run the matcher, inside every merged unit of the spaces that this one lives within."""
        mixing = "covariances" in choice.method.needs
        products = completed(self.network, self.covariances, self.maps, name) if mixing else self.correlations
        keys = [key for key in self._keys(name) if key in products]
        if (name,) in keys:
            return choice.method.function(products[name,], self.experts, **choice.options)
        least = min((len(self._open(name, key)), len(key)) for key in keys)
        clearest = [key for key in keys if (len(self._open(name, key)), len(key)) == least]
        found = [self._rows(key, (name,), products) for key in clearest]
        rows = torch.stack([traced for traced, _ in found]).mean(0).flatten(1, 2).flatten(2, 3)
        return self._stack([choice.method.function(row, self.experts, **choice.options) for row in rows], found[0][1])

    def _rows(
        self, key: ProductKey, keep: ProductKey, products: Mapping[ProductKey, Tensor]
    ) -> tuple[Tensor, list[int]]:
        """`trace_out` with the merged units that keep[0] lives within flattened to rows, and their sizes."""
        rest = {name for name in key if name not in keep}
        # A map that is known before its heads are can only be the identity, which needs no map.
        known = {name: m for name, m in self.maps.items() if set(self.spec.spaces[name].within) <= rest}
        traced = trace_out(products[key], key, keep, known, self.spec, self.experts)
        lead = merged_sizes(self.spec.spaces[keep[0]].within, self.maps, self.spec)
        return traced.reshape(-1, *traced.shape[-4:]), lead

    def _stack(self, maps: Sequence[Map], lead: Sequence[int]) -> Map:
        """One map of the rows' maps."""
        if isinstance(maps[0], LinearMap):
            parts = (torch.stack([getattr(m, part) for m in maps], dim=1) for part in ("matrices", "inverses"))
            return LinearMap(*(x.reshape(self.experts, *lead, *x.shape[-2:]) for x in parts))
        labels = torch.stack([m.labels for m in maps], dim=1)
        return SpaceMap(maps[0].size, labels.reshape(self.experts, *lead, -1))
