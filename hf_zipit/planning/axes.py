"""Axes whose units live within the units of another axis, and whether a tensor with such axes can be merged."""

from __future__ import annotations

from collections.abc import Sequence

from hf_zipit.errors import SpecError
from hf_zipit.symmetry.spec import AxisLabel, MergeSpec, product_key


def outer_elsewhere(label: AxisLabel, spec: MergeSpec) -> tuple[str, ...]:
    """The spaces that units on an axis live within, but that are not on the axis."""
    key = product_key(label)
    return tuple(dict.fromkeys(o for name in key for o in spec.spaces[name].within if o not in key))


def check_axes(label_axes: Sequence[AxisLabel], spec: MergeSpec) -> None:
    """Raise what `row_by_row` would.

    Raises:
        SpecError: units of an axis live within units that are on no other axis, or within those of several.
    """
    for label in label_axes:
        movable = tuple(factor for factor in label if spec.movable(factor.space))
        outer = outer_elsewhere(movable, spec)
        found = sum(name in product_key(other) for name in outer for other in label_axes)
        if len(outer) > 1 or found != len(outer):
            raise SpecError(
                f"its axis {' x '.join(product_key(label))} has units that live within {' and '.join(outer)}, which "
                "is not on one other axis; leave this layer out of the trunk by a smaller depth"
            )
