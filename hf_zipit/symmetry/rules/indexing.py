"""Look-ups by index tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from hf_zipit.symmetry.interpreter import Interpreter
from hf_zipit.symmetry.ops import (
    FIXED,
    PERMUTATION,
    Value,
    input_shape,
    rule,
    shape_of,
    without,
)

LOOKED_UP = "rows are looked up by index"


@rule("index")
def index(run: Interpreter, node: fx.Node, x: Value, indices: Sequence[Any]) -> Any:
    used = [i for i, index in enumerate(indices) if isinstance(index, Value)]
    if any(node.args[1][i].meta["val"].dtype in (torch.bool, torch.uint8) for i in used):  # type: ignore[index, union-attr]
        return run.unknown(node, x, indices)  # a mask selects along as many axes as it has itself
    for i in used:
        run.atoms.restrict(x.axes[i], FIXED, LOOKED_UP)
        run.restrict_all(indices[i], FIXED, "it is an index")
    kept = without(x, used)
    run.parted(kept)
    shape = shape_of(node)
    adjacent = used == list(range(used[0], used[-1] + 1))
    start = used[0] if adjacent else 0
    new = [run.atoms.fresh(n, FIXED, LOOKED_UP) for n in shape[start : start + len(shape) - len(kept)]]
    return Value([*kept[:start], *new, *kept[start:]])


@rule("gather")
def gather(run: Interpreter, node: fx.Node, x: Value, dim: int, indices: Value, **__: Any) -> Value:
    dim %= len(x.axes)
    run.atoms.restrict(x.axes[dim], FIXED, LOOKED_UP)
    sizes = zip(input_shape(node), shape_of(node), strict=True)
    for i, (axis, other, (before, after)) in enumerate(zip(x.axes, indices.axes, sizes, strict=True)):
        if i == dim:
            run.atoms.restrict(other, PERMUTATION)
        elif before == after:
            run.atoms.tie(axis, other, "gather's axes do not fit")
            run.atoms.restrict(axis, PERMUTATION)
        else:
            run.atoms.restrict(axis, FIXED, "a part of it is gathered")
            run.atoms.restrict(other, FIXED, "a part of it is gathered")
    run.parted(without(x, [dim]))
    return Value(indices.axes)
