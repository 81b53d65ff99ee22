"""Partial merging: match one-to-one, and leave the units that match worst unmerged (PLeaS, arXiv 2407.02447).

What is matched is averaged; an unmerged unit has its own expert's weights, and is read by the matched units with its
own expert's share, as every input is. One budget for the whole trunk decides: units are left unmerged in the order of
what that gains per parameter (or multiplication) that it costs. `docs/methods/partial.md` compares this with PLeaS.

Heads are left unmerged whole, with their own attention pattern. Which spaces may be wider at all is a matter of the
architecture, which the caller finds out (`hf_zipit.assembly.widening`): the others are matched one-to-one.

Invariants: units that are the same, as in a model and its permuted copy, are merged.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import Literal

import torch
from torch import Tensor

from hf_zipit.align.cost import Cost, multiplications, parameters
from hf_zipit.align.method import Network, register
from hf_zipit.align.solver import Choice, Solver
from hf_zipit.errors import RecipeError
from hf_zipit.maps.products import merged_index, merged_sizes
from hf_zipit.maps.space_map import Alignment, Map, SpaceMap
from hf_zipit.symmetry.spec import MergeSpec, ProductKey

LEAST_GAIN = 1e-5
"""Similarities nearer than this to that of a unit with itself are the same: float32 is no better."""


@register("partial", needs={"moments", "weights", "widths"}, scope="network")
def match_partial(
    network: Network, *, budget: float = 1.2, of: Literal["parameters", "flops"] = "parameters"
) -> dict[str, SpaceMap]:
    """Maps by activations, the worst pairs left unmerged.

    Args:
        network: correlations are read, the sizes of the weights, and which spaces may be wider.
        budget: the size of the merged trunk relative to one expert's, 1 or more.
        of: what is counted: `"parameters"`, or the multiply-accumulates of a forward pass (`"flops"`).

    Raises:
        RecipeError: an option is out of range, or no space may be wider.
    """
    if not budget >= 1:
        raise RecipeError(f"partial's option budget is {budget}; it must be 1 (one expert's size) or more.")
    if of not in ("parameters", "flops"):
        raise RecipeError(f"partial's option of is {of!r}; it must be 'parameters' or 'flops'.")
    spec, opened = network.spec, network.opened
    if opened and not network.widenable:
        raise RecipeError(f"No layer of {spec.architecture} can be made wider; use permute instead of partial.")
    solver = Solver(network, dict(network.fixed_maps))
    solver.solve(dict.fromkeys(opened, Choice.of("permute", {})))
    maps = solver.maps
    gains = {name: gain for name in opened if (gain := _gain(network, name, maps)) is not None}
    cost = (parameters if of == "parameters" else multiplications)(spec, network.weights[0])
    counts = allocate(gains, cost, budget, {name: m.size for name, m in maps.items()}, network.experts)
    worst = {name: worst_units(gains[name], maps[name], count) for name, count in counts.items() if count}
    return {name: _widened(name, maps[name], worst, spec) for name in opened}


def _gain(network: Network, name: str, maps: Alignment) -> Tensor | None:
    """How much leaving the members of every merged unit of a space unmerged gains: `[*within, k]`, or None where
    that cannot be done."""
    spec = network.spec
    within = spec.spaces[name].within
    inner = {space.name for space in spec.spaces.values() if name in space.within and spec.movable(space.name)}
    # What lives within a new unit needs a map with a row for it.
    if name not in network.widenable or inner & set(network.fixed_maps) or (inner and within):
        return None
    keys = [key for key in network.correlations if {name, *within} <= set(key)]
    keys = [key for key in keys if all(one_to_one(maps[n]) for n in key if n in maps)]
    found = []
    for key in [(name,)] if (name,) in keys else keys:
        lacking = lacking_similarity(key, network.correlations[key], maps, spec, network.experts)
        rest = [i for i, factor in enumerate(key) if factor not in (*within, name)]
        ordered = lacking.permute([key.index(n) for n in (*within, name)] + rest)
        found.append(ordered.reshape(*ordered.shape[: len(within) + 1], -1).mean(-1))
    return torch.stack(found).mean(0) if found else None


def one_to_one(space_map: Map) -> bool:
    """Whether every merged unit is made of one unit of every expert."""
    if not isinstance(space_map, SpaceMap):
        return False
    return space_map.size == space_map.labels.shape[-1] and bool((space_map.counts() == space_map.experts).all())


def lacking_similarity(key: ProductKey, correlation: Tensor, maps: Alignment, spec: MergeSpec, experts: int) -> Tensor:
    """What units that one-to-one maps bring together lack to being the same, as the mean over all pairs of experts.

    Two dead units (of no variance) lack nothing, a dead and a live one half of everything.

    Returns:
        One number for every merged unit of the product `key`, `[*sizes]`.
    """
    size = spec.size(key)
    blocks = correlation.reshape(experts, size, experts, size)
    members = [merged_index(key, maps, spec, t).argsort() for t in range(experts)]
    own = torch.stack([blocks[t, members[t], t, members[t]] for t in range(experts)])
    pairs = [(own[a] + own[b]) / 2 - blocks[a, members[a], b, members[b]] for a, b in combinations(range(experts), 2)]
    return torch.stack(pairs).mean(0).reshape(merged_sizes(key, maps, spec))


def allocate(
    gains: Mapping[str, Tensor], cost: Cost, budget: float, sizes: Mapping[str, int], experts: int
) -> dict[str, int]:
    """How many units of every space are left unmerged (in every row the same number).

    Greedy: the units that gain most per cost first, at the costs of an expert's widths. A space whose next unit no
    longer fits is closed, the others go on.

    Args:
        gains: by space `[*within, k]`.
        cost: of the trunk.
        budget: the limit, in experts' costs.
        sizes: the number of merged units where everything is merged.
        experts: T: an unmerged unit adds T - 1.
    """
    queue = []
    for name, gain in gains.items():
        per_unit = max(cost.per_unit(name) * (experts - 1), 1e-12)
        ranked = gain.reshape(-1, gain.shape[-1]).sort(-1, descending=True).values
        worth = ranked.mean(0) > LEAST_GAIN
        queue += [(-g / per_unit, name) for g in ranked.sum(0)[worth].tolist()]
    parts = {name: cost.with_space(name) for name in gains}
    sizes, counts = dict(sizes), dict.fromkeys(gains, 0)
    spent, limit = cost.total(sizes), budget * cost.total({}) * (1 + 1e-9)
    closed: set[str] = set()
    for _, name in sorted(queue, key=lambda item: item[0]):
        if name in closed:
            continue
        wider = {**sizes, name: sizes[name] + experts - 1}
        more = parts[name].total(wider) - parts[name].total(sizes)
        if spent + more > limit:
            closed.add(name)
        else:
            sizes, spent, counts[name] = wider, spent + more, counts[name] + 1
    return counts


def worst_units(gain: Tensor, space_map: SpaceMap, count: int) -> Tensor:
    """The merged units that gain most by being left unmerged: int64 `[*within, count]`.

    Ties, as between dead units, must not depend on which expert's units the merged ones are counted by: they are
    broken by the sum of the members' numbers.
    """
    members = space_map.labels.argsort(-1).sum(0)
    by_number = members.argsort(dim=-1, stable=True)
    ranked = gain.round(decimals=9).gather(-1, by_number).argsort(dim=-1, descending=True, stable=True)
    return by_number.gather(-1, ranked)[..., :count]


def keep_apart(space_map: SpaceMap, units: Tensor) -> SpaceMap:
    """Give every expert but the first merged units of its own for some of a one-to-one map's `[*within, n]`."""
    size, count = space_map.size, units.shape[-1]
    place = torch.full((*units.shape[:-1], size), -1).scatter_(-1, units, torch.arange(count).expand_as(units))
    labels = space_map.labels.clone()
    for t in range(1, space_map.experts):
        own = place.gather(-1, labels[t])
        labels[t] = torch.where(own >= 0, size + (t - 1) * count + own, labels[t])
    return SpaceMap(size + (space_map.experts - 1) * count, labels)


def _widened(name: str, space_map: SpaceMap, worst: Mapping[str, Tensor], spec: MergeSpec) -> SpaceMap:
    """A space's map with its worst units unmerged, and with rows for the new units of what it lives within."""
    if name in worst:
        space_map = keep_apart(space_map, worst[name])
    for axis, outer in enumerate(spec.spaces[name].within):
        if outer in worst:
            # In a new unit things are as in the one that it was split from.
            known = torch.arange(space_map.labels.shape[1 + axis])
            rows = torch.cat([known, *[worst[outer]] * (space_map.experts - 1)])
            space_map = SpaceMap(space_map.size, space_map.labels.index_select(1 + axis, rows))
    return space_map
