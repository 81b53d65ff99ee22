"""MuDSC: match units by what they do and by their weights at once (Xu et al., Training-Free Pretrained Model Merging,
CVPR 2024).

Units that are alike in activation space may have unlike weights, and the other way round. Both are told as Pearson
correlations between units, so that they can be added: S = balance * R_weights + (1 - balance) * R_activations. A
unit's weights are the rows of all parameter axes that hold or read it, the other axes in the merged units of the
current maps; so the spaces are visited again and again, in a seeded random order, as in weight matching. The sweep
with the best mean similarity wins.

Every product of spaces that is observed or is a parameter's axis has its own S, and a space's S are solved as they
would be from activations alone (`solver.py`): heads and GroupNorm's groups get ONE order from all of them. The
published code orders heads in Q/K and in V/O independently, after which a permuted copy of a model no longer merges
into that model.

The balance is the caller's. It cannot be read off the moments: whatever they measure (correlation of what is joined,
variance that is kept) is largest by construction where the activations decide alone, as the weights' similarity is
where the weights do, and a merged model is often best in between. So it takes merged models that are measured on
held-out data, as `hf_zipit.search` does over `dual.balance` and as the paper does over .1 ... .9.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import combinations
from typing import Literal

import torch
from torch import Tensor

from hf_zipit.align.aligned import comparable, resolvable
from hf_zipit.align.method import Network, register
from hf_zipit.align.methods.weights import random_orders
from hf_zipit.align.solver import Choice, Solver
from hf_zipit.errors import RecipeError
from hf_zipit.maps.products import merged_index, merged_sizes
from hf_zipit.maps.space_map import SpaceMap
from hf_zipit.maps.transform import to_merged
from hf_zipit.symmetry.spec import ProductKey, product_key

LEAST_IMPROVEMENT = 1e-9


@register("dual", needs={"weights", "moments"}, scope="network")
def match_dual(
    network: Network,
    *,
    balance: float = 0.5,
    variant: Literal["align", "zip"] = "align",
    alpha: float = 0.5,
    beta: float = 1.0,
    sweeps: int = 100,
    patience: int = 5,
    seed: int = 0,
) -> dict[str, SpaceMap]:
    """Match all open spaces by weights and activations.

    Args:
        network: the spaces, the experts' correlations and weights, and the maps that are fixed already.
        balance: lambda, the share of the weights in the similarity, 0 to 1; worth a search. What is only observed, or
            only seen in weights, counts as it is.
        variant: `"align"` matches units one-to-one (`permute`), `"zip"` also joins units of one expert (`zip`).
        alpha, beta: zip's options; the published runs all have these defaults.
        sweeps: at most so many visits of every space, 1 or more.
        patience: stop after so many sweeps without a better mean similarity.
        seed: of the order of the visits.

    Returns:
        The maps of all movable spaces without a fixed map.

    Raises:
        RecipeError: an option is out of range.
    """
    if variant not in ("align", "zip"):
        raise RecipeError(f"dual's option variant is {variant!r}; it must be 'align' or 'zip'.")
    if not 0 <= balance <= 1:
        raise RecipeError(f"dual's option balance is {balance}; it must be between 0 and 1.")
    if sweeps < 1 or patience < 1:
        raise RecipeError(f"dual's options sweeps and patience are {sweeps} and {patience}; they must be 1 or more.")
    choice = Choice.of("zip", {"alpha": alpha, "beta": beta}) if variant == "zip" else Choice.of("permute", {})
    state = _State(network, balance, choice)
    best, kept, waited = -float("inf"), state.open_maps(), 0
    for order in random_orders(tuple(state.families), sweeps, seed):
        changed = [state.visit(root) for root in order]
        waited += 1
        if state.mean_similarity() > best + LEAST_IMPROVEMENT:
            best, kept, waited = state.mean_similarity(), state.open_maps(), 0
        # What no visit changed, no further sweep will.
        if waited == patience or not any(changed):
            break
    return kept


@dataclass
class _State:
    """Where the descent stands: the map of every movable space, and how similar what they join is.

    Attributes:
        families: by root, the open spaces that are solved together: a space that stands alone, and those within it.
        maps: of all movable spaces; open ones start at identity.
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
            self.maps |= {name: self._identity(name) for name in opened}
            if opened:
                self.families[root.name] = opened
        self.names = comparable(self.network)

    def visit(self, root: str) -> bool:
        """Solve one family while all others stay; returns whether that changed a map."""
        spec, family = self.network.spec, self.families[root]
        similarities = self._similarities(family)
        seen = [n for n in family if any({n, *spec.spaces[n].within} <= set(key) for key in similarities)]
        others = {name: space_map for name, space_map in self.maps.items() if name not in seen}
        solver = Solver(spec, similarities, self.network.experts, others)
        solver.solve(dict.fromkeys(seen, self.choice))
        changed = any(not torch.equal(solver.maps[n].labels, self.maps[n].labels) for n in seen)
        self.maps = {name: solver.maps[name] for name in self.maps}
        found = [self._joined(key, similarity) for key, similarity in similarities.items()]
        self.similarities[root] = sum(found) / max(len(found), 1)
        return changed

    def mean_similarity(self) -> float:
        return sum(self.similarities.values()) / max(len(self.similarities), 1)

    def open_maps(self) -> dict[str, SpaceMap]:
        """The maps of the open spaces, which are replaced and never changed."""
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
        spec = self.network.spec
        moments: dict[ProductKey, _Rows] = {}
        for name in self.names:
            labels = spec.axes[name]
            for axis, label in enumerate(labels):
                key = product_key(label)
                others = (*labels[:axis], (), *labels[axis + 1 :])
                within = {outer for n in key for outer in spec.spaces[n].within if spec.movable(n)}
                # The axis of a grouped convolution that leaves out the groups says nothing alone.
                if set(key) & set(family) and within <= set(key) and resolvable(others, self.maps, spec):
                    rows = [
                        to_merged(weights[name].double(), others, self.maps, spec, t).movedim(axis, 0)
                        for t, weights in enumerate(self.network.weights)
                    ]
                    moments.setdefault(key, _Rows()).add(
                        torch.cat(rows).flatten(1) if len(labels) > 1 else torch.cat(rows)[:, None]
                    )
        return {key: rows.correlation() for key, rows in moments.items()}

    def _joined(self, key: ProductKey, similarity: Tensor) -> float:
        """The mean, over merged units and pairs of experts, of the mean similarity of the units joined there."""
        spec, experts, size = self.network.spec, self.network.experts, self.network.spec.size(key)
        merged = 1
        for factor in merged_sizes(key, self.maps, spec):
            merged *= factor
        index = [merged_index(key, self.maps, spec, t).to(similarity.device) for t in range(experts)]
        share = [1.0 / torch.bincount(i, minlength=merged)[i].double() for i in index]
        blocks = similarity.reshape(experts, size, experts, size)
        total = 0.0
        for a, b in combinations(range(experts), 2):
            joined = blocks[a, :, b] * (index[a][:, None] == index[b][None, :])
            total += float(share[a] @ joined @ share[b])
        return total / (merged * experts * (experts - 1) / 2)

    def _identity(self, name: str) -> SpaceMap:
        space, experts = self.network.spec.spaces[name], self.network.experts
        lead = [self.network.spec.spaces[outer].size for outer in space.within]
        return SpaceMap.identity(space.size, experts, lead)


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
