"""MuDSC: match units by what they do and by their weights at once (Xu et al., Training-Free Pretrained Model Merging,
CVPR 2024).

Both similarities are Pearson correlations between units: S = balance * R_weights + (1 - balance) * R_activations. A
unit's weights are the rows of all parameter axes that hold or read it, the other axes in the merged units of the
current maps. So the spaces are visited again and again, as in weight matching, starting from the match of the
activations. Every product of spaces that is observed or is a parameter's axis has its own S, and a space's S are
solved as they would be from activations alone (`solver.py`): heads and GroupNorm's groups get ONE order from all of
them. `docs/methods/dual.md` tells how the balance is searched and what the published code does differently.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import combinations
from math import prod
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from hf_zipit.align.by_weights import product_rows
from hf_zipit.align.method import Network, register
from hf_zipit.align.solver import Choice, Solver
from hf_zipit.errors import RecipeError
from hf_zipit.maps.products import merged_index, merged_sizes, unchanged
from hf_zipit.maps.space_map import SpaceMap
from hf_zipit.symmetry.spec import ProductKey

logger = logging.getLogger(__name__)

LEAST_IMPROVEMENT = 1e-9

BALANCES = tuple(tenth / 10 for tenth in range(1, 10))
"""What is tried where no balance is given."""


@register("dual", needs={"weights", "moments"}, scope="network")
def match_dual(
    network: Network,
    *,
    balance: float | None = None,
    variant: Literal["align", "zip"] = "align",
    alpha: float = 0.5,
    beta: float = 1.0,
    sweeps: int = 100,
    patience: int = 5,
) -> dict[str, SpaceMap]:
    """Maps by weights and activations.

    Args:
        network: correlations and weights are read; its seed draws the order of the visits.
        balance: lambda, the share of the weights in the similarity, 0 to 1; None tries .1 ... .9. What is only
            observed, or only seen in weights, counts as it is.
        variant: `"align"` matches units one-to-one (`permute`), `"zip"` also joins units of one expert (`zip`).
        alpha, beta: zip's options; the published runs all have these defaults.
        sweeps: at most this many visits of every space, 1 or more.
        patience: stop after this many sweeps without a better mean similarity.
    """
    if variant not in ("align", "zip"):
        raise RecipeError(f"dual's option variant is {variant!r}; it must be 'align' or 'zip'.")
    if balance is not None and not (isinstance(balance, (int, float)) and 0 <= balance <= 1):
        raise RecipeError(f"dual's option balance is {balance!r}; it must be between 0 and 1, or none to search it.")
    if sweeps < 1 or patience < 1:
        raise RecipeError(f"dual's options sweeps and patience are {sweeps} and {patience}; they must be 1 or more.")
    choice = Choice.of("zip", {"alpha": alpha, "beta": beta}) if variant == "zip" else Choice.of("permute", {})
    found = [_descended(network, b, choice, sweeps, patience) for b in (BALANCES if balance is None else (balance,))]
    if len(found) == 1:
        return found[0].open_maps()
    reached = np.array([state.both_similarities() for state in found])
    kept = found[int((reached / reached.max(0).clip(1e-12)).sum(1).argmax())]
    logger.info("dual: the balance %.1f keeps most of both similarities.", kept.balance)
    return kept.open_maps()


def _descended(network: Network, balance: float, choice: Choice, sweeps: int, patience: int) -> _State:
    """Where a descent was after its best sweep."""
    state = _State(network, balance, choice)
    best, kept, waited = -float("inf"), state.maps, 0
    for order in network.random_orders(tuple(state.families), sweeps):
        changed = [state.visit(root) for root in order]
        waited += 1
        if (reached := state.mean_similarity()) > best + LEAST_IMPROVEMENT:
            best, kept, waited = reached, state.maps, 0
        # What no visit changed, no further sweep will.
        if waited == patience or not any(changed):
            break
    state.maps = kept
    return state


@dataclass
class _State:
    """Where the descent stands: the map of every movable space, and how similar what they join is.

    Attributes:
        families: by root, the open spaces that are solved together: a space that stands alone, and those within it.
        maps: of all movable spaces; replaced, never changed. Open ones start at the match of the activations, or at
            identity where nothing observes them.
        similarities: by root, at its last visit.
    """

    network: Network
    balance: float
    choice: Choice
    families: dict[str, tuple[str, ...]] = field(init=False)
    maps: dict[str, SpaceMap] = field(init=False)
    similarities: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        spec, fixed = self.network.spec, self.network.fixed_maps
        self.maps = dict(fixed)
        self.families = {}
        for root, inner in spec.families():
            members = (root, *inner) if spec.movable(root.name) else inner
            opened = tuple(space.name for space in members if space.name not in self.maps)
            self.maps |= {name: unchanged(name, spec, self.network.experts) for name in opened}
            if opened:
                self.families[root.name] = opened
                self._solve(opened, {key: r for key, r in self.network.correlations.items() if set(key) & {*opened}})

    def visit(self, root: str) -> bool:
        """Solve one family while all others stay; returns whether that changed a map."""
        similarities = self._similarities(self.families[root])
        changed = self._solve(self.families[root], similarities)
        found = [self._joined(key, similarity) for key, similarity in similarities.items()]
        self.similarities[root] = sum(found) / max(len(found), 1)
        return changed

    def _solve(self, family: tuple[str, ...], similarities: Mapping[ProductKey, Tensor]) -> bool:
        """Solve one family on some similarities; returns whether that changed a map."""
        spec = self.network.spec
        seen = [n for n in family if any({n, *spec.spaces[n].within} <= set(key) for key in similarities)]
        others = {name: space_map for name, space_map in self.maps.items() if name not in seen}
        solver = Solver(replace(self.network, correlations=similarities, weights=()), others)
        solver.solve(dict.fromkeys(seen, self.choice))
        changed = any(not solver.maps[n].equals(self.maps[n]) for n in seen)
        self.maps = {name: solver.maps[name] for name in self.maps}
        return changed

    def both_similarities(self) -> tuple[float, float]:
        """How similar the units that are joined are by activations and by weights, on average."""
        found: tuple[list[float], list[float]] = ([], [])
        for family in self.families.values():
            acting = {key: r for key, r in self.network.correlations.items() if set(key) & set(family)}
            for own, similarities in zip(found, (acting, self._weight_correlations(family)), strict=True):
                own += [self._joined(key, similarity.double()) for key, similarity in similarities.items()]
        return tuple(sum(own) / max(len(own), 1) for own in found)  # type: ignore[return-value]

    def mean_similarity(self) -> float:
        return sum(self.similarities.values()) / max(len(self.similarities), 1)

    def open_maps(self) -> dict[str, SpaceMap]:
        """The maps of the open spaces."""
        return {name: space_map for name, space_map in self.maps.items() if name not in self.network.fixed_maps}

    def _similarities(self, family: tuple[str, ...]) -> dict[ProductKey, Tensor]:
        """S of every product with a space of the family, `[T * size, T * size]`."""
        mixed = {key: r.double() for key, r in self.network.correlations.items() if set(key) & set(family)}
        for key, correlation in self._weight_correlations(family).items():
            acting = mixed.get(key)
            mixed[key] = correlation if acting is None else torch.lerp(acting, correlation.to(acting), self.balance)
        return mixed

    def _weight_correlations(self, family: tuple[str, ...]) -> dict[ProductKey, Tensor]:
        """The correlations of the units' weights, for every product with a space of the family that is an axis."""
        moments: dict[ProductKey, _Rows] = {}
        for key, rows in product_rows(self.network, self.maps, family):
            moments.setdefault(key, _Rows()).add(rows)
        return {key: rows.correlation() for key, rows in moments.items()}

    def _joined(self, key: ProductKey, similarity: Tensor) -> float:
        """The mean, over merged units and pairs of experts, of the mean similarity of the units joined there."""
        spec, experts, size = self.network.spec, self.network.experts, self.network.spec.size(key)
        merged = prod(merged_sizes(key, self.maps, spec))
        index = [merged_index(key, self.maps, spec, t).to(similarity.device) for t in range(experts)]
        share = [1.0 / torch.bincount(i, minlength=merged)[i].double() for i in index]
        blocks = similarity.reshape(experts, size, experts, size)
        total = 0.0
        for a, b in combinations(range(experts), 2):
            joined = blocks[a, :, b] * (index[a][:, None] == index[b][None, :])
            total += float(share[a] @ joined @ share[b])
        return total / (merged * experts * (experts - 1) / 2)


@dataclass
class _Rows:
    """Moments of units' weights `[units, entries]`, added up over parameters."""

    count: int = 0
    total: Tensor | float = 0.0
    second: Tensor | float = 0.0

    def add(self, rows: Tensor) -> None:
        self.count += rows.shape[1]
        self.total = self.total + rows.sum(1)
        self.second = self.second + rows @ rows.T

    def correlation(self) -> Tensor:
        """Pearson's, zero for units whose weights are all the same."""
        mean = self.total / self.count
        covariance = self.second / self.count - torch.outer(mean, mean)
        variance = covariance.diagonal()
        alive = variance > 1e-12 * (self.second / self.count).diagonal()
        scale = torch.where(alive, variance.clamp_min(1e-300).rsqrt(), 0.0)
        return covariance * scale[:, None] * scale[None, :]
