"""Alignment of a whole model: one map per movable space, from the correlations of the products that were observed.

Spaces are solved one after the other, those first whose evidence depends on the fewest unsolved ones. A space that
stands alone goes straight to the matcher. Where only products were observed, the other factors are traced out under
their maps (`products.py`); heads are scored over all their products and permuted (`heads.py`), then the matcher runs
inside every group of paired heads. A space that nothing observed keeps its units, and is named in a warning.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor

from hf_zipit.align.heads import block_scores, holds_blocks
from hf_zipit.align.maps import SpaceMap
from hf_zipit.align.permute import match_to_reference
from hf_zipit.align.products import merged_sizes, trace_out
from hf_zipit.align.registry import METHODS, Method, Network
from hf_zipit.errors import DataError, RecipeError
from hf_zipit.registry import check_options
from hf_zipit.symmetry.spec import MergeSpec, ProductKey

logger = logging.getLogger(__name__)

Residual = Literal["match", "identity"]
Overrides = Mapping[str, "str | Mapping[str, Any]"]


def align(
    spec: MergeSpec,
    correlations: Mapping[ProductKey, Tensor],
    experts: int,
    method: str,
    *,
    options: Mapping[str, Any] | None = None,
    residual: Residual = "match",
    overrides: Overrides | None = None,
    weights: Sequence[Mapping[str, Tensor]] = (),
) -> dict[str, SpaceMap]:
    """Align the experts in every movable space.

    Args:
        spec: the architecture's spaces.
        correlations: per observed product of spaces, float64 `[T * size, T * size]`; may be empty for a method that
            does not need moments.
        experts: T.
        method: a registered method's name.
        options: the method's options.
        residual: `"identity"` leaves the residual streams (`residual_spaces`) as they are.
        overrides: for spaces whose name matches a pattern (as in `fnmatch`), another method: its name, or a mapping of
            `method` and its options. The first pattern that matches decides, also over `residual`.
        weights: the experts' state dicts, for methods that need weights.

    Returns:
        One map for every movable space, in the spec's order. Heads are always matched one-to-one.

    Raises:
        RecipeError: an unknown method, option or `residual`, or a pattern that matches nothing.
        DataError: correlations of another size than the spec's, or not finite.
    """
    default = _Choice.of(method, options or {})
    choices = _choices(spec, default, residual, overrides or {})
    _check(spec, correlations, experts)
    solver = _Solver(spec, correlations, experts)
    if default.method.scope == "network":
        settled = {name: choice for name, choice in choices.items() if choice is not default}
        for name, choice in settled.items():
            if "moments" in choice.method.needs and not set(spec.spaces[name].within) <= set(settled):
                raise RecipeError(f"{name} cannot be matched before the heads it lives within; override them too.")
        solver.solve(settled)
        network = Network(spec, experts, correlations, weights, solver.maps)
        solver.maps |= default.method.function(network, **default.options)
    else:
        solver.solve(choices)
    return {name: solver.maps[name] for name in choices}


def check_settings(
    spec: MergeSpec,
    experts: int,
    method: str,
    *,
    options: Mapping[str, Any] | None = None,
    residual: Residual = "match",
    overrides: Overrides | None = None,
) -> frozenset[str]:
    """Raise what `align` would raise about its settings, before any data is read.

    Every matcher is run once on the smallest space that it is for, with units that resemble nothing: values of options
    that are out of range show there.

    Returns:
        What the methods that are used look at: a subset of `{"moments", "weights"}`.

    Raises:
        RecipeError: as `align` does.
    """
    rehearsed: list[_Choice] = []
    choices = _choices(spec, _Choice.of(method, options or {}), residual, overrides or {})
    for name, choice in sorted(choices.items(), key=lambda item: spec.spaces[item[0]].size):
        if choice.method.scope == "space" and choice not in rehearsed:
            rehearsed.append(choice)
            units = torch.eye(experts * spec.spaces[name].size, dtype=torch.float64)
            choice.method.function(units, experts, **choice.options)
    return frozenset().union(*(choice.method.needs for choice in choices.values()))


def residual_spaces(spec: MergeSpec) -> tuple[str, ...]:
    """The residual streams: free movable spaces that the weights of three or more modules write into.

    Not heads: query, key and value write into those, but as blocks, with a space of their own inside.
    """
    writers: dict[str, set[str]] = defaultdict(set)
    for parameter, labels in spec.axes.items():
        # One axis alone is a bias or a norm's scale, which changes a stream but does not write into it.
        if len(labels) > 1:
            for label in labels:
                for factor in label:
                    if not factor.dual:
                        writers[factor.space].add(parameter.rpartition(".")[0])
    outer = {name for space in spec.spaces.values() for name in space.within}
    free = (name for name, s in spec.spaces.items() if spec.movable(name) and not s.within and name not in outer)
    return tuple(name for name in free if len(writers[name]) >= 3)


@dataclass(frozen=True)
class _Choice:
    """A method with its options."""

    method: Method
    options: dict[str, Any]

    @classmethod
    def of(cls, name: str, options: Mapping[str, Any]) -> _Choice:
        method = METHODS.get(name)
        return cls(method, check_options(name, method.function, options))


def _choices(spec: MergeSpec, default: _Choice, residual: Residual, overrides: Overrides) -> dict[str, _Choice]:
    """The method of every movable space."""
    if residual not in ("match", "identity"):
        raise RecipeError(f"residual is {residual!r}; it must be 'match' or 'identity'.")
    choices = {name: default for name in spec.spaces if spec.movable(name)}
    if residual == "identity":
        choices |= {name: _Choice.of("identity", {}) for name in residual_spaces(spec)}
    for pattern, override in reversed(overrides.items()):  # the first pattern has the last word
        settings = {"method": override} if isinstance(override, str) else dict(override)
        if "method" not in settings:
            raise RecipeError(f"The override for {pattern!r} names no method; give it as 'method'.")
        choice = _Choice.of(settings.pop("method"), settings)
        if choice.method.scope == "network":
            raise RecipeError(f"{choice.method.name!r} aligns whole networks; it cannot be used on {pattern!r} alone.")
        matched = [name for name in choices if fnmatchcase(name, pattern)]
        if not matched:
            raise RecipeError(f"The override for {pattern!r} matches no movable space; `hf-zipit inspect` lists them.")
        choices |= dict.fromkeys(matched, choice)
    return choices


def _check(spec: MergeSpec, correlations: Mapping[ProductKey, Tensor], experts: int) -> None:
    for key, correlation in correlations.items():
        size = experts * spec.size(key)
        if tuple(correlation.shape) != (size, size):
            raise DataError(
                f"The correlations of {' x '.join(key)} are {list(correlation.shape)} where {experts} experts need "
                f"[{size}, {size}]; observe these experts anew."
            )
        if not torch.isfinite(correlation).all():
            raise DataError(f"The correlations of {' x '.join(key)} are not finite; an expert's activations are not.")


@dataclass
class _Solver:
    """Solves spaces one after the other; `maps` holds those that are solved."""

    spec: MergeSpec
    correlations: Mapping[ProductKey, Tensor]
    experts: int
    maps: dict[str, SpaceMap] = field(default_factory=dict)

    def solve(self, choices: Mapping[str, _Choice]) -> None:
        """Add the map of every space in `choices`."""
        blind = [name for name, choice in choices.items() if "moments" not in choice.method.needs]
        unseen = [name for name in choices if name not in blind and not self._keys(name)]
        if unseen:
            logger.warning("Left as they are, for nothing observes them: %s.", ", ".join(unseen))
        identity = METHODS.get("identity").function
        for name in blind + unseen:
            self.maps[name] = self._blind(name, identity if name in unseen else choices[name].method.function)
        waiting = [name for name in choices if name not in self.maps]
        while waiting:
            ready = [name for name in waiting if not set(self.spec.spaces[name].within) & set(waiting)]
            name = min(ready, key=lambda name: (self._unsolved(name), not self._blocks(name)))
            self.maps[name] = self._head_map(name) if self._blocks(name) else self._inner_map(name, choices[name])
            waiting.remove(name)

    def _keys(self, name: str) -> list[ProductKey]:
        """The observed products that say something about a space: they tell apart the spaces it lives within."""
        needed = {name, *self.spec.spaces[name].within}
        return [key for key in self.correlations if needed <= set(key)]

    def _open(self, name: str, key: ProductKey) -> ProductKey:
        """The other movable spaces of a product that have no map yet."""
        return tuple(n for n in key if n != name and self.spec.movable(n) and n not in self.maps)

    def _unsolved(self, name: str) -> int:
        return min(len(self._open(name, key)) for key in self._keys(name))

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
            traced, lead = self._rows(key, (name, *inside))
            for inner in reversed(inside):
                traced = torch.stack([block_scores(row, self.spec.spaces[inner].size) for row in traced])
            # The scores are sums over all units of a block: traced-out units were averaged.
            averaged = [n for n in key if n not in (name, *inside, *self.spec.spaces[name].within)]
            scores = scores + traced * self.spec.size(tuple(averaged))
        return self._stack([match_to_reference(row) for row in scores], lead)

    def _inner_map(self, name: str, choice: _Choice) -> SpaceMap:
        """Run the matcher, inside every merged unit of the spaces that this one lives within."""
        keys = self._keys(name)
        if (name,) in keys:
            return choice.method.function(self.correlations[name,], self.experts, **choice.options)
        least = min((len(self._open(name, key)), len(key)) for key in keys)
        clearest = [key for key in keys if (len(self._open(name, key)), len(key)) == least]
        found = [self._rows(key, (name,)) for key in clearest]
        rows = torch.stack([traced for traced, _ in found]).mean(0).flatten(1, 2).flatten(2, 3)
        return self._stack([choice.method.function(row, self.experts, **choice.options) for row in rows], found[0][1])

    def _rows(self, key: ProductKey, keep: ProductKey) -> tuple[Tensor, list[int]]:
        """`trace_out` with the merged units that keep[0] lives within flattened to rows, and their sizes."""
        rest = {name for name in key if name not in keep}
        # A map that is known before its heads are can only be the identity, which needs no map.
        known = {name: m for name, m in self.maps.items() if set(self.spec.spaces[name].within) <= rest}
        traced = trace_out(self.correlations[key], key, keep, known, self.spec, self.experts)
        lead = merged_sizes(self.spec.spaces[keep[0]].within, self.maps, self.spec)
        return traced.reshape(-1, *traced.shape[-4:]), lead

    def _stack(self, maps: Sequence[SpaceMap], lead: Sequence[int]) -> SpaceMap:
        """One map of the rows' maps."""
        labels = torch.stack([m.labels for m in maps], dim=1)
        return SpaceMap(maps[0].size, labels.reshape(self.experts, *lead, -1))
