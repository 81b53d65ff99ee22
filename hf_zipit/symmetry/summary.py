"""What a merge spec says about a model, as plain rows and counts for tables and reports."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from math import prod
from typing import Any

from torch import nn

from hf_zipit.symmetry.spaces import Symmetry, Trace, factors


def space_rows(spec: Trace, model: nn.Module) -> list[dict[str, Any]]:
    """One row per space, in order of first use.

    Returns:
        Rows with `name`; `symmetry`, in words; `size`, the number of units per unit of the spaces it lives within;
        `within`, the names of those; `heads`, how many units they have together (the number of heads a `head_dim` is
        repeated for; None for a space that stands alone); `parameters`, how many elements of the model's parameters
        and buffers have the space on an axis (tied tensors count once); and `frozen_by`, what fixes it, None where it
        can move.
    """
    elements: Counter[str] = Counter()
    for name, count in _elements(model).items():
        for space in _spaces(spec, name):
            elements[space] += count
    return [
        {
            "name": space.name,
            "symmetry": str(space.symmetry),
            "size": space.size,
            "within": list(space.within),
            "heads": prod(spec.spaces[outer].size for outer in space.within) if space.within else None,
            "parameters": elements[space.name],
            "frozen_by": space.frozen_by if space.symmetry is Symmetry.FIXED else None,
        }
        for space in spec.spaces.values()
    ]


def coverage(spec: Trace, model: nn.Module, names: Collection[str] | None = None) -> dict[str, int]:
    """How many elements of the model's parameters and buffers can move.

    Args:
        names: count these only.

    Returns:
        `movable`: elements of tensors with a movable space on some axis; `fixed`: of tensors with fixed axes only;
        `unused`: of tensors that the forward pass does not read. Together they are all elements, tied tensors once.
    """
    counts = dict.fromkeys(("movable", "fixed", "unused"), 0)
    for name, count in _elements(model).items():
        if names is None or name in names:
            movable = any(map(spec.movable, _spaces(spec, name)))
            counts["unused" if name in spec.unused else "movable" if movable else "fixed"] += count
    return counts


def _spaces(spec: Trace, name: str) -> set[str]:
    """The spaces on any axis of a tensor."""
    return {factor.space for label in spec.axes.get(name, ()) for factor in factors(label)}


def _elements(model: nn.Module) -> dict[str, int]:
    """The number of elements of every tensor, tied ones under their first name only."""
    return {name: tensor.numel() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
