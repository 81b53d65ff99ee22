"""Products of spaces: which merged unit every unit of `heads x head_dim` goes to, and what a product says about one
factor.

Features are observed on whole axes, and an axis is often a product of spaces: `(heads, query)`, or `(kv, group,
query)` under grouped-query attention. A space that lives within another has one map per merged unit of that other,
so a product's map is composed factor by factor, and a factor's correlations are found by *tracing out* the factors
that are aligned already: only units that the other factors' maps bring together are compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from hf_zipit.maps.space_map import Alignment, LinearMap, Map, SpaceMap
from hf_zipit.symmetry.spec import AxisLabel, MergeSpec, ProductKey, Sum, product_key


def unchanged(name: str, spec: MergeSpec, experts: int) -> SpaceMap:
    """The map of a space in which every unit stays where it is."""
    space = spec.spaces[name]
    return SpaceMap.identity(space.size, experts, [spec.spaces[outer].size for outer in space.within])


def factor_indices(key: ProductKey, maps: Alignment, spec: MergeSpec, expert: int) -> dict[str, Tensor]:
    """For every unit of a product, the merged unit of each factor that it goes to: by factor int64 `[size]`.

    Args:
        key: the factors, major to minor; a space's `within` must be among them.
        maps: a space without one keeps its units. A change of basis (`LinearMap`) groups no units, so they are
            numbered as they are: `change_basis` mixes them afterwards.
        spec: their sizes and what they live within.
        expert: whose units.
    """
    sizes = [spec.spaces[name].size for name in key]
    own = {name: grid.flatten() for name, grid in zip(key, _grid(sizes), strict=True)}
    merged: dict[str, Tensor] = {}
    for name in sorted(key, key=lambda name: len(spec.spaces[name].within)):  # a space after those it lives within
        if name not in maps or isinstance(maps[name], LinearMap):
            merged[name] = own[name]
        else:
            outer = tuple(merged[other] for other in rows_of(name, spec, maps[name]))
            merged[name] = maps[name].labels[expert][(*outer, own[name])]
    return merged


def rows_of(name: str, spec: MergeSpec, space_map: Map) -> tuple[str, ...]:
    """The spaces whose merged units a map has separate rows for."""
    within = spec.spaces[name].within
    axes = space_map.matrices.dim() - 3 if isinstance(space_map, LinearMap) else space_map.labels.dim() - 2
    assert axes == len(within), f"the map of {name} needs one axis for each of {within}"
    return within


def merged_sizes(key: ProductKey, maps: Alignment, spec: MergeSpec) -> list[int]:
    """The number of merged units of every factor."""
    return [maps[name].size if name in maps else spec.spaces[name].size for name in key]


def merged_length(label: AxisLabel, maps: Alignment, spec: MergeSpec) -> int:
    """The number of merged units on an axis."""
    return prod(
        sum(merged_length(term, maps, spec) for term in factor.terms)
        if isinstance(factor, Sum)
        else merged_sizes((factor.space,), maps, spec)[0]
        for factor in label
    )


def merged_index(key: ProductKey, maps: Alignment, spec: MergeSpec, expert: int) -> Tensor:
    """For every unit of a product, the merged unit of the merged product: int64 `[size of the product]`."""
    indices = factor_indices(key, maps, spec, expert)
    index = torch.zeros(spec.size(key), dtype=torch.int64)
    for name, size in zip(key, merged_sizes(key, maps, spec), strict=True):
        index = index * size + indices[name]
    return index


def factors_first(
    tensor: Tensor, labels: Sequence[AxisLabel], lead: Sequence[str], spec: MergeSpec, maps: Alignment, place: int = 0
) -> Tensor:
    """Some factors of a tensor's axes moved to the front, `[*lead, everything else]`; of lead[0] its `place`-th, of
    one that is named again the next.

    The tensor is in the merged units of `maps`.
    """
    names: list[str | None] = []
    sizes: list[int] = []
    for label, length in zip(labels, tensor.shape, strict=True):
        key = product_key(label)
        names += key or (None,)
        sizes += merged_sizes(key, maps, spec) or [length]
    front = [i for i, name in enumerate(names) if name in lead[:1]][place : place + 1]
    for name in lead[1:]:
        front.append(next(i for i, own in enumerate(names) if own == name and i not in front))
    rest = [i for i in range(len(sizes)) if i not in front]
    spread = tensor.reshape(sizes).permute(*front, *rest)
    return spread.reshape(*spread.shape[: len(front)], -1)


def change_basis(tensor: Tensor, axis: int, label: AxisLabel, maps: Alignment, spec: MergeSpec, expert: int) -> Tensor:
    """One expert's tensor after the changes of basis of one axis: g_t on factors it holds, g_t^-T on those it reads.

    The axis is in merged units already but for its factors with a `LinearMap`, and holds what those live within.
    """
    key = product_key(label)
    if not any(isinstance(maps.get(name), LinearMap) for name in key):
        return tensor
    x = tensor.movedim(axis, -1).unflatten(-1, merged_sizes(key, maps, spec))
    first = x.dim() - len(key)
    for place, factor in enumerate(label, first):
        found = maps.get(factor.space)
        if isinstance(found, LinearMap):
            matrix = found.acting_on(tensor, expert, factor.dual)
            if matrix is None:
                continue
            outer = [first + key.index(name) for name in rows_of(factor.space, spec, found)]
            order = [*outer, *(i for i in range(x.dim()) if i not in (*outer, place)), place]
            y = x.permute(order)
            mixed = y.reshape(*y.shape[: len(outer)], -1, y.shape[-1]) @ matrix.mT
            x = mixed.reshape(y.shape).permute([order.index(i) for i in range(x.dim())])
    return x.flatten(first).movedim(-1, axis)


def trace_out(
    correlation: Tensor, key: ProductKey, keep: ProductKey, maps: Alignment, spec: MergeSpec, experts: int
) -> Tensor:
    """The correlations of some factors of a product, averaged over the others where their maps bring units together.

    Args:
        correlation: `[T * size, T * size]` of the product `key`.
        key: its factors, major to minor.
        keep: the factors whose units are wanted. The first one's `within` says which merged units to tell apart.
        maps: of all movable factors that are not kept.
        spec, experts: the spaces, and T.

    Returns:
        `[*merged units of the spaces that keep[0] lives within, T, K, T, K]`, K the size of the product `keep`.
    """
    within = spec.spaces[keep[0]].within
    rest = tuple(name for name in key if name not in keep)
    sizes, kept = [spec.spaces[name].size for name in key], spec.size(keep)
    order = [key.index(name) for name in (*rest, *keep)]
    blocks = correlation.reshape(experts, *sizes, experts, *sizes).permute(
        0, *(1 + i for i in order), 1 + len(key), *(2 + len(key) + i for i in order)
    )
    blocks = blocks.reshape(experts, spec.size(rest), kept, experts, spec.size(rest), kept)

    lead = merged_sizes(within, maps, spec)
    merged = [merged_index(rest, maps, spec, expert) for expert in range(experts)]
    to_row = _row_of_merged(rest, within, maps, spec)
    traced = correlation.new_zeros(prod(lead), experts, kept, experts, kept)
    for a in range(experts):
        for b in range(experts):
            i, j = torch.nonzero(merged[a][:, None] == merged[b][None, :], as_tuple=True)
            unit, row = merged[a][i], to_row[merged[a][i]]
            # Every merged unit counts the same, however many units it has; those that only one expert has, not at all.
            weight = 1.0 / torch.bincount(unit, minlength=len(to_row))[unit].to(correlation)
            units = torch.zeros(prod(lead)).to(correlation).index_add_(0, row, weight)
            pairs = blocks[a, i, :, b, j, :] * (weight / units[row])[:, None, None]
            traced[:, a, :, b] = torch.zeros_like(traced[:, a, :, b]).index_add_(0, row, pairs)
    return traced.reshape(*lead, experts, kept, experts, kept)


def _row_of_merged(rest: ProductKey, within: ProductKey, maps: Alignment, spec: MergeSpec) -> Tensor:
    """For every merged unit of `rest`, the merged unit of `within`, some of its factors."""
    sizes = merged_sizes(rest, maps, spec)
    grids = dict(zip(rest, _grid(sizes), strict=True))
    row = torch.zeros(prod(sizes), dtype=torch.int64)
    for name, size in zip(within, merged_sizes(within, maps, spec), strict=True):
        row = row * size + grids[name].flatten()
    return row


def _grid(sizes: list[int]) -> list[Tensor]:
    """Every factor's index at every unit of a product."""
    if not sizes:
        return []
    return list(torch.meshgrid(*(torch.arange(size) for size in sizes), indexing="ij"))
