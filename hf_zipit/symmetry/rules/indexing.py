"""Look-ups by index tensors, and choices of what is looked up.

A router (a mixture of experts) chooses for every token some of its experts by their numbers (`topk`) and looks up
their weights by these numbers (`index`). Experts in another order have other numbers, the same are chosen: the axis
that is looked up moves with the axis that was chosen from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from hf_zipit.symmetry.atoms import Axis
from hf_zipit.symmetry.interpreter import Interpreter
from hf_zipit.symmetry.ops import (
    FIXED,
    PERMUTATION,
    Value,
    input_shape,
    neighbours,
    op_name,
    rule,
    shape_of,
    without,
)
from hf_zipit.symmetry.rules.shapes import cut_out

LOOKED_UP = "rows are looked up by index"


@rule("topk", numbered=True)
def topk(
    run: Interpreter,
    node: fx.Node,
    x: Value,
    count: int,
    dim: int = -1,
    largest: bool = True,
    ordered: bool = True,
    **_: Any,
) -> tuple[Value, Value]:
    """Values, which stand in their own order, and the numbers of the units that have them."""
    dim %= len(x.axes)
    run.restrict_all(x, PERMUTATION)
    run.parted(without(x, [dim]))
    axes = list(x.axes)
    axes[dim] = run.atoms.fresh(count, FIXED if ordered else PERMUTATION, "it is ordered by size")
    values, numbers = Value(axes), run.choose(axes, x.axes[dim], ordered)
    run.fix_numbers(x, "the numbers of its units are compared")
    return values, numbers


@rule("one_hot", numbered=True)
def one_hot(run: Interpreter, node: fx.Node, x: Value, *_: Any) -> Any:
    if not x.names or run.atoms.size(x.names) != shape_of(node)[-1]:
        return run.unknown(node, x)
    run.restrict_all(Value([*x.axes, x.names]), PERMUTATION)
    run.parted(x.axes)
    return Value([*x.axes, x.names])


@rule("scatter", numbered=True)
def scatter(run: Interpreter, node: fx.Node, x: Value, dim: int, numbers: Value, source: Any = 0.0, **kw: Any) -> Any:
    """Numbers written to the units that were chosen."""
    dim %= len(x.axes)
    same = all(
        i == dim or a == b for i, (a, b) in enumerate(zip(input_shape(node), input_shape(node, 2), strict=True))
    )
    if not numbers.names or kw or not same or run.atoms.size(numbers.names) != input_shape(node)[dim]:
        return run.unknown(node, x, numbers, source)
    if isinstance(source, Value):
        if input_shape(node, 3) != input_shape(node, 2):
            return run.unknown(node, x, numbers, source)
        run.broadcast(node, [numbers, source], PERMUTATION)
        run.restrict_all(source, PERMUTATION)
        run.fix_numbers(source, LOOKED_UP)
    run.atoms.tie(x.axes[dim], numbers.names, "scatter's axes do not fit")
    for i, (axis, other) in enumerate(zip(x.axes, numbers.axes, strict=True)):
        if i != dim:
            run.atoms.tie(axis, other, "scatter's axes do not fit")
    run.restrict_all(x, PERMUTATION)
    run.restrict_all(numbers, PERMUTATION)
    run.parted(without(x, [dim]))
    return Value(x.axes)


@rule("index", numbered=True)
def index(run: Interpreter, node: fx.Node, x: Value, indices: Sequence[Any]) -> Any:
    used = [i for i, index in enumerate(indices) if isinstance(index, Value)]
    if any(node.args[1][i].meta["val"].dtype in (torch.bool, torch.uint8) for i in used):  # type: ignore[index, union-attr]
        return masked(run, node, x, used, indices)
    run.fix_numbers(x, LOOKED_UP)
    if len(used) == 1 and indices[used[0]].names:
        (at,) = used
        numbers = indices[at]
        run.atoms.tie(x.axes[at], numbers.names, "what is looked up does not fit what was chosen")
        run.restrict_all(numbers, PERMUTATION)
        run.atoms.restrict(x.axes[at], PERMUTATION)
        return Value([*x.axes[:at], *numbers.axes, *x.axes[at + 1 :]])
    run.fix_numbers(indices, LOOKED_UP)
    if len(used) == 1 and (units := neighbours(node.args[1][used[0]])) is not None:  # type: ignore[index]
        return cut_out(run, node, x, used[0], units.start, units.stop)
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


def masked(run: Interpreter, node: fx.Node, x: Value, used: Sequence[int], indices: Sequence[Any]) -> Any:
    """What a mask selects along as many axes as it has itself."""
    if len(used) != 1:
        return run.unknown(node, x, indices)
    (start,), mask = used, indices[used[0]]
    run.fix_numbers([x, mask], LOOKED_UP)
    along = range(start, start + len(mask.axes))
    for axis in (*mask.axes, *(x.axes[i] for i in along)):
        run.atoms.restrict(axis, FIXED, "a mask selects from it")
    kept = without(x, along)
    run.parted(kept)
    new = run.atoms.fresh(shape_of(node)[start], FIXED, "a mask selects from it")
    return Value([*kept[:start], new, *kept[start:]])


@rule("index_put")
def index_put(run: Interpreter, node: fx.Node, x: Value, indices: Sequence[Any], values: Value, *_: Any) -> Any:
    """Values written to the places that a mask or integers along neighbouring axes name, or added there."""
    used = [i for i, index in enumerate(indices) if isinstance(index, Value)]
    kinds = {node.args[1][i].meta["val"].dtype for i in used}  # type: ignore[index, union-attr]
    if kinds == {torch.bool} and len(used) == 1:
        places, along = 1, range(used[0], used[0] + len(indices[used[0]].axes))
    else:
        places, along = max(len(indices[i].axes) for i in used), range(used[0], used[-1] + 1)
        if kinds != {torch.int64} or used != [*along]:
            return run.unknown(node, x, indices, values)
    for i in used:
        run.restrict_all(indices[i], FIXED, "it is an index")
    for i in along:
        run.atoms.restrict(x.axes[i], FIXED, LOOKED_UP)
    kept = without(x, along)
    run.parted(kept)
    written: list[Axis | None] = [*kept[: used[0]], *[None] * places, *kept[used[0] :]]
    given = [*[()] * (len(written) - len(values.axes)), *values.axes]
    for own, other in zip(written, given, strict=True):
        if own is None:
            run.atoms.restrict(other, FIXED, LOOKED_UP)
        elif other:
            run.atoms.tie(own, other, "what is written does not fit")
        else:
            run.atoms.restrict(own, PERMUTATION)  # one number for all of its units
    return Value(x.axes)


@rule("masked_scatter")
def masked_scatter(run: Interpreter, node: fx.Node, x: Value, mask: Value, source: Value) -> Any:
    """Vectors written where a mask is true; known where the mask is the same for all of a vector's units."""
    wide = node.args[1]
    while isinstance(wide, fx.Node) and op_name(wide) in ("to", "clone", "contiguous", "detach"):
        wide = wide.args[0]  # type: ignore[assignment]
    spread = isinstance(wide, fx.Node) and op_name(wide) in ("expand", "expand_as") and input_shape(wide)[-1] == 1
    narrow = input_shape(node, 1)[-1] == 1
    if not (spread or narrow) or input_shape(node)[-1] != input_shape(node, 2)[-1]:
        return run.unknown(node, x, mask, source)
    for value in (x, mask, source):
        for axis in value.axes[:-1]:
            run.atoms.restrict(axis, FIXED, "a mask selects from it")
    run.atoms.tie(x.axes[-1], source.axes[-1], "what is written does not fit")
    return Value(x.axes)


@rule("nonzero")
def nonzero(run: Interpreter, node: fx.Node, x: Value) -> Value:
    run.restrict_all(x, FIXED, "a mask selects from it")
    return run.fresh_like(node, FIXED, "a mask selects from it")


@rule("gather", numbered=True)
def gather(run: Interpreter, node: fx.Node, x: Value, dim: int, indices: Value, **__: Any) -> Value:
    dim %= len(x.axes)
    run.fix_numbers(x, LOOKED_UP)
    if indices.names and run.atoms.size(indices.names) == input_shape(node)[dim]:
        run.atoms.tie(x.axes[dim], indices.names, "what is looked up does not fit what was chosen")
        run.atoms.restrict(x.axes[dim], PERMUTATION)
    else:
        run.fix_numbers(indices, LOOKED_UP)
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
