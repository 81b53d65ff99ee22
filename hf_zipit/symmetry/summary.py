"""What a merge spec says about a model, as plain rows and counts for tables and reports."""

from __future__ import annotations

from collections import Counter
from math import prod
from typing import Any

from torch import nn

from hf_zipit.symmetry.spaces import Symmetry, Trace


def spec_rows(spec: Trace, model: nn.Module) -> list[dict[str, Any]]:
    """One row per space, in order of first use.

    Returns:
        Rows with `name`; `symmetry`, in words; `size`, the number of units per unit of the spaces it lives within;
        `heads`, how many such units there are (the number of heads a `head_dim` is repeated for; 1 for a space that
        stands alone); `parameters`, how many elements of the model's parameters and buffers have the space on an axis
        (tied tensors count once); and `frozen_by`, what fixes it, empty where it can move.
    """
    elements: Counter[str] = Counter()
    for name, count in _elements(model).items():
        for space in {factor.space for label in spec.axes.get(name, ()) for factor in label}:
            elements[space] += count
    return [
        {
            "name": space.name,
            "symmetry": str(space.symmetry),
            "size": space.size,
            "heads": prod(spec.spaces[outer].size for outer in space.within),
            "parameters": elements[space.name],
            "frozen_by": (space.frozen_by or "") if space.symmetry is Symmetry.FIXED else "",
        }
        for space in spec.spaces.values()
    ]


def coverage(spec: Trace, model: nn.Module) -> dict[str, int]:
    """How many elements of the model's parameters and buffers can move.

    Returns:
        `movable`: elements of tensors with a movable space on some axis; `fixed`: of tensors with fixed axes only;
        `unused`: of tensors that the forward pass does not read. Together they are all elements, tied tensors once.
    """
    counts = dict.fromkeys(("movable", "fixed", "unused"), 0)
    for name, count in _elements(model).items():
        spaces = {factor.space for label in spec.axes.get(name, ()) for factor in label}
        kind = "unused" if name in spec.unused else "movable" if any(map(spec.movable, spaces)) else "fixed"
        counts[kind] += count
    return counts


def _elements(model: nn.Module) -> dict[str, int]:
    """The number of elements of every tensor, tied ones under their first name only."""
    return {name: tensor.numel() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
