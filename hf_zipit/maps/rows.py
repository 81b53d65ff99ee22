"""Axes whose units live within the units of another axis: the inputs of a grouped convolution.

Its weight is `[groups x outputs, inputs, ...]`: every group has its own basis of the inputs, and the groups are on the
first axis. So that axis is merged first, and then the second one, apart for every merged group. (Where experts of a
mixture are chosen in groups, an expert's hidden units live within its group and its place in it, both on one axis.)
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from itertools import product
from math import prod

import torch
from torch import Tensor

from hf_zipit.errors import SpecError
from hf_zipit.maps.products import merged_sizes
from hf_zipit.maps.space_map import Alignment, LinearMap, Map, SpaceMap
from hf_zipit.symmetry.spec import AxisLabel, MergeSpec, ProductKey, Space, product_key, products

Along = Callable[[Tensor, int, AxisLabel, Alignment, MergeSpec, int], Tensor]
"""Brings one axis of one expert's tensor into merged units."""


def outer_elsewhere(label: AxisLabel, spec: MergeSpec) -> tuple[str, ...]:
    """The spaces that units on an axis live within, but that are not on the axis."""
    key = product_key(label)
    return tuple(dict.fromkeys(o for name in key for o in spec.spaces[name].within if o not in key))


def check_axes(label_axes: Sequence[AxisLabel], spec: MergeSpec) -> None:
    """Raise what `row_by_row` would.

    Raises:
        SpecError: units of an axis live within units that do not stand side by side on one other axis.
    """
    if any(len(products(label)) > 1 for label in label_axes):  # each of what they are sums of, with the others
        for together in product(*map(products, label_axes)):
            check_axes(together, spec)
        return
    for label in label_axes:
        movable = tuple(factor for factor in label if spec.movable(factor.space))
        outer = outer_elsewhere(movable, spec)
        keys = [key for other in label_axes if not set(outer).isdisjoint(key := product_key(other))]
        if outer and (len(keys) != 1 or not _side_by_side(outer, keys[0])):
            raise SpecError(
                f"its axis {' x '.join(product_key(label))} has units that live within {' and '.join(outer)}, which "
                "do not stand side by side on one other axis; leave this layer out of the trunk by a smaller depth"
            )


def axes_to_merge(label_axes: Sequence[AxisLabel], alignment: Alignment, spec: MergeSpec) -> list[int]:
    """The axes with a map, those last that need another one in merged units first."""
    mapped = [i for i, label in enumerate(label_axes) if any(factor.space in alignment for factor in label)]
    return sorted(mapped, key=lambda i: bool(outer_elsewhere(label_axes[i], spec)))


def row_by_row(
    tensor: Tensor,
    axis: int,
    label_axes: Sequence[AxisLabel],
    alignment: Alignment,
    spec: MergeSpec,
    expert: int,
    along: Along,
) -> Tensor:
    """Bring one axis into merged units; where its units live within those of another axis, apart for each of them.

    That other axis must be in merged units already (`axes_to_merge`). `along` is done to an axis that stands alone.
    """
    outer = outer_elsewhere(label_axes[axis], spec)
    if not outer:
        return along(tensor, axis, label_axes[axis], alignment, spec, expert)
    check_axes(label_axes, spec)
    other = next(i for i, label in enumerate(label_axes) if outer[0] in product_key(label))
    key = product_key(label_axes[other])
    sizes = merged_sizes(key, alignment, spec)
    start, stop = key.index(outer[0]), key.index(outer[0]) + len(outer)
    shape = (prod(sizes[:start]), prod(sizes[start:stop]), prod(sizes[stop:]))
    alone = replace(spec, spaces={**spec.spaces, **_without(label_axes[axis], outer, spec)})
    places = product(*map(range, sizes[start:stop]))
    rows = tensor.unflatten(other, shape).movedim(other + 1, 0)
    merged = torch.stack(
        [
            along(
                row.flatten(other, other + 1),
                axis,
                label_axes[axis],
                {**alignment, **_row_maps(label_axes[axis], dict(zip(outer, at, strict=True)), alignment, spec)},
                alone,
                expert,
            )
            for at, row in zip(places, rows, strict=True)
        ]
    )
    return merged.unflatten(other + 1, (shape[0], shape[2])).movedim(0, other + 1).flatten(other, other + 2)


def _side_by_side(outer: tuple[str, ...], key: ProductKey) -> bool:
    """Whether some spaces are factors of a product one after another, in this order."""
    start = key.index(outer[0]) if outer[0] in key else len(key)
    return key[start : start + len(outer)] == outer


def _without(label: AxisLabel, outer: Collection[str], spec: MergeSpec) -> dict[str, Space]:
    """The spaces of a label, within everything but `outer`."""
    spaces = (spec.spaces[name] for name in product_key(label))
    return {s.name: replace(s, within=tuple(name for name in s.within if name not in outer)) for s in spaces}


def _row_maps(label: AxisLabel, at: Mapping[str, int], alignment: Alignment, spec: MergeSpec) -> dict[str, Map]:
    """The maps of a label's spaces inside one merged unit of each of some spaces: the one whose number `at` gives."""
    maps: dict[str, Map] = {}
    for name in product_key(label):
        within, found = spec.spaces[name].within, alignment.get(name)
        if found is None or set(within).isdisjoint(at):
            continue
        rows = (slice(None), *(at.get(outer, slice(None)) for outer in within))
        if isinstance(found, LinearMap):
            maps[name] = LinearMap(found.matrices[rows], found.inverses[rows])
        else:
            maps[name] = SpaceMap(found.size, found.labels[rows])
    return maps
