"""Rotary embeddings: where a graph has them, and what they allow.

A rotary embedding (RoFormer, arXiv 2104.09864) rotates every pair of a head's units by an angle that grows with the
position:

    x * cos + rotated(x) * sin,    rotated(x) = cat(-second half of x, first half of x).

Unit i is paired with unit i + d/2, and both have the same cos and sin. Rotations of a plane commute, so a rotation of
every pair by an angle of its own passes through the embedding, and cancels where a rotated query meets a key that is
rotated by the same angle. Nothing else does: whatever mixes two pairs, or changes the lengths of a pair's units, meets
their angles.

Taken op by op, the halves would be pieces whose products with cos and sin fix them. So the whole form is searched
first, and only this one: units paired in another way (GPT-J's neighbours) are walked op by op, and stay fixed. An
embedding of a part of the units (GPT-NeoX) is one of a term of a direct sum.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest
from typing import Any

from torch import fx

from hf_zipit.symmetry.folding import PASSING
from hf_zipit.symmetry.interpreter import Interpreter
from hf_zipit.symmetry.ops import (
    FIXED,
    LINEAR,
    PERMUTATION,
    ROTARY,
    Match,
    Value,
    is_in_place,
    op_name,
    pattern,
    shape_of,
)

CASTS = {"to", "_to_copy", "type_as"}

UNIT_BY_UNIT = PASSING | {"cos", "sin", "neg", "slice", "narrow"}
"""Ops that do the same to all units of the last axis, in their order, as long as it keeps its length."""


@pattern
def find_rotations(graph: fx.Graph) -> Iterator[Match]:
    """The rotary embeddings of a graph."""
    found = (_rotation(node) for node in graph.nodes if _is(node, "add"))
    return (match for match in found if match is not None)


def rotate(run: Interpreter, node: fx.Node, x: Value, cos: Value, sin: Value) -> Value:
    """A rotary embedding: its units allow rotations of their pairs, every other axis what a product allows."""
    others = [Value(value.axes[:-1]) for value in (x, cos, sin)]
    for axes in zip_longest(*(reversed(value.axes) for value in others), fillvalue=()):
        present = [axis for axis in axes if axis]
        for axis in present if len(present) > 1 else ():
            run.atoms.restrict(axis, PERMUTATION)
    kept = run.broadcast(node, others, LINEAR)
    units = x.axes[-1]
    whole = len(run.atoms.resolve(units)) == 1  # units that were split elsewhere no longer know their pairs
    run.atoms.restrict(units, ROTARY if whole else FIXED, "a rotary embedding rotates its pairs of units")
    for angles in (cos, sin):
        run.atoms.restrict(angles.axes[-1], FIXED, "every pair has an angle of its own")
    return Value([*kept.axes, units])


# Finding them --------------------------------------------------------------------------------------------------------


def _rotation(node: fx.Node) -> Match | None:
    """The rotary embedding whose result a sum is."""
    if len(node.args) != 2 or node.kwargs or not all(_is(part, "mul") and _once(part) for part in node.args):
        return None
    for straight, crossed in (node.args, node.args[::-1]):
        for quarter, sin in _both_ways(crossed):
            x, steps = _quarter_rotation(quarter)
            for same, cos in _both_ways(straight):
                known = x is not None and _uncast(same) is _uncast(x)
                if known and _equal_in_pairs(cos, x) and _equal_in_pairs(sin, x):  # type: ignore[arg-type]
                    return Match(node, rotate, (x, cos, sin), (straight, crossed, *steps))  # type: ignore[arg-type]
    return None


def _quarter_rotation(node: fx.Node) -> tuple[fx.Node | None, tuple[fx.Node, ...]]:
    """The x of which a node is `cat(-second half, first half)` along the last axis, and the ops in between."""
    nothing = None, ()
    if not _is(node, "cat") or not _once(node) or not _is_last(node, 1) or len(node.args[0]) != 2:  # type: ignore[arg-type]
        return nothing
    minus, first = node.args[0]  # type: ignore[misc]
    if not (_is(minus, "neg") and _once(minus)):
        return nothing
    second = minus.args[0]
    x = first.args[0] if _is(first, "slice") else None
    if x is None or not (_is_half(first, x, 0) and _is_half(second, x, 1)):
        return nothing
    return x, (node, minus, first, second)


def _is_half(node: Any, x: fx.Node, number: int) -> bool:
    """Whether a node, read once, is the first (0) or the second (1) half of x's last axis."""
    if not (_is(node, "slice") and _once(node) and node.args[0] is x and _is_last(node, 1)):
        return False
    _, _, start, end, *step = [*node.args, *(None, None, 1)][: max(4, len(node.args))]
    units = shape_of(x)[-1]
    bounds = [(start or 0), units if end is None else min(end, units)]
    return units % 2 == 0 and bounds == [number * units // 2, (number + 1) * units // 2] and step in ([], [1])


def _equal_in_pairs(node: fx.Node, x: fx.Node) -> bool:
    """Whether the two halves of a node's last axis are surely equal: it was made as one half twice."""
    units = shape_of(x)[-1]
    while isinstance(node, fx.Node) and list(shape_of(node)[-1:]) == [units]:
        if _is(node, "cat"):
            parts = node.args[0]
            return len(parts) == 2 and parts[0] is parts[1] and _is_last(node, 1)  # type: ignore[arg-type, index]
        if _is(node, "repeat", "tile"):
            return node.args[1][-1] == 2  # type: ignore[index]
        scaled = _is(node, "mul", "div") and not isinstance(node.args[1], fx.Node)
        if not scaled and not _is(node, *UNIT_BY_UNIT):
            return False
        node = node.args[0]  # type: ignore[assignment]
    return False


def _is(node: Any, *names: str) -> bool:
    """Whether a node is one of some ops, and changes nothing in place."""
    known = isinstance(node, fx.Node) and node.op == "call_function" and hasattr(node.meta.get("val"), "shape")
    return known and op_name(node) in names and not is_in_place(node)


def _uncast(node: fx.Node) -> fx.Node:
    """What a node was before it changed its floating-point type."""
    while _is(node, *CASTS) and node.meta["val"].is_floating_point():
        node = node.args[0]  # type: ignore[assignment]
    return node


def _once(node: fx.Node) -> bool:
    return len(node.users) == 1


def _is_last(node: fx.Node, argument: int) -> bool:
    """Whether an op works along the last axis."""
    dim = node.args[argument] if len(node.args) > argument else 0
    return isinstance(dim, int) and dim % len(shape_of(node)) == len(shape_of(node)) - 1


def _both_ways(product: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    """The factors of a product of two tensors, in both orders."""
    one, other = (*product.args, None, None)[:2]
    if isinstance(one, fx.Node) and isinstance(other, fx.Node):
        yield one, other
        yield other, one
