"""Axes whose units live within the units of another axis: the inputs of a grouped convolution.

Its weight is `[groups x outputs, inputs, ...]`: every group has its own basis of the inputs, and the groups are on the
first axis. So that axis is merged first, and then the second one, apart for every merged group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from math import prod

import torch
from torch import Tensor

from hf_zipit.errors import SpecError
from hf_zipit.maps.products import merged_sizes
from hf_zipit.maps.space_map import Alignment, LinearMap, Map, SpaceMap
from hf_zipit.symmetry.spec import AxisLabel, MergeSpec, Space, product_key, products

Along = Callable[[Tensor, int, AxisLabel, Alignment, MergeSpec, int], Tensor]
"""Brings one axis of one expert's tensor into merged units."""


def outer_elsewhere(label: AxisLabel, spec: MergeSpec) -> tuple[str, ...]:
    """The spaces that units on an axis live within, but that are not on the axis."""
    key = product_key(label)
    return tuple(dict.fromkeys(o for name in key for o in spec.spaces[name].within if o not in key))


def check_axes(label_axes: Sequence[AxisLabel], spec: MergeSpec) -> None:
    """Raise what `row_by_row` would.

    Raises:
        SpecError: units of an axis live within units that are on no other axis, or within those of several.
    """
    if any(len(products(label)) > 1 for label in label_axes):  # each of what they are sums of, with the others
        for together in product(*map(products, label_axes)):
            check_axes(together, spec)
        return
    for label in label_axes:
        movable = tuple(factor for factor in label if spec.movable(factor.space))
        outer = outer_elsewhere(movable, spec)
        found = sum(name in product_key(other) for name in outer for other in label_axes)
        if len(outer) > 1 or found != len(outer):
            raise SpecError(
                f"its axis {' x '.join(product_key(label))} has units that live within {' and '.join(outer)}, which "
                "is not on one other axis; leave this layer out of the trunk by a smaller depth"
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
    place = key.index(outer[0])
    shape = (prod(sizes[:place]), sizes[place], prod(sizes[place + 1 :]))
    alone = replace(spec, spaces={**spec.spaces, **_without(label_axes[axis], outer[0], spec)})
    rows = tensor.unflatten(other, shape).movedim(other + 1, 0)
    merged = torch.stack(
        [
            along(
                row.flatten(other, other + 1),
                axis,
                label_axes[axis],
                {**alignment, **_row_maps(label_axes[axis], outer[0], number, alignment, spec)},
                alone,
                expert,
            )
            for number, row in enumerate(rows)
        ]
    )
    return merged.unflatten(other + 1, (shape[0], shape[2])).movedim(0, other + 1).flatten(other, other + 2)


def _without(label: AxisLabel, outer: str, spec: MergeSpec) -> dict[str, Space]:
    """The spaces of a label, within everything but `outer`."""
    spaces = (spec.spaces[name] for name in product_key(label))
    return {s.name: replace(s, within=tuple(name for name in s.within if name != outer)) for s in spaces}


def _row_maps(label: AxisLabel, outer: str, row: int, alignment: Alignment, spec: MergeSpec) -> dict[str, Map]:
    """The maps of a label's spaces inside one merged unit of `outer`."""
    maps: dict[str, Map] = {}
    for name in product_key(label):
        within, found = spec.spaces[name].within, alignment.get(name)
        if found is None or outer not in within:
            continue
        axis = 1 + within.index(outer)
        if isinstance(found, LinearMap):
            maps[name] = LinearMap(found.matrices.select(axis, row), found.inverses.select(axis, row))
        else:
            maps[name] = SpaceMap(found.size, found.labels.select(axis, row))
    return maps
