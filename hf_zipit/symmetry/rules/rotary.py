"""Rotary embeddings: where a graph has them, and what they allow.

A rotary embedding (RoFormer, arXiv 2104.09864) rotates every pair of a head's units by an angle that grows with the
position:

    x * cos + rotated(x) * sin,    rotated(x) = cat(-second half of x, first half of x).

Unit i is paired with unit i + d/2, and both have the same cos and sin. Rotations of a plane commute, so a rotation of
every pair by an angle of its own passes through the embedding, and cancels where a rotated query meets a key that is
rotated by the same angle. Nothing else does: whatever mixes two pairs, or changes the lengths of a pair's units, meets
their angles. Where neighbours are paired (GPT-J), the same holds of units 2 i and 2 i + 1; some models write that as a
product of complex numbers.

A norm beside the embedding (Qwen3) scales every unit by a number of its own, which no rotation passes but the half
turn: a pair of units that both change their sign. The scale itself stays as it is then.

Some models rotate the two units of all pairs by themselves, and put them side by side (GPT-OSS). DeepSeek takes
neighbours and puts out halves: there the units are numbered by their pair and their place in it on one side, by their
place and their pair on the other, and what is rotated are the two places of every pair.

Taken op by op, the halves would be pieces whose products with cos and sin fix them. So the whole forms are searched
first, and only these. An embedding of a part of the units (GPT-NeoX) is one of a term of a direct sum.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest
from math import prod
from typing import Any

from torch import fx

from hf_zipit.symmetry.atoms import Axis
from hf_zipit.symmetry.folding import PASSING
from hf_zipit.symmetry.interpreter import Interpreter
from hf_zipit.symmetry.ops import (
    FIXED,
    HALF_TURNS,
    LINEAR,
    NEIGHBOURS,
    PERMUTATION,
    ROTARY,
    Match,
    Value,
    is_in_place,
    op_name,
    pattern,
    shape_of,
)
from hf_zipit.symmetry.rules.norms import layer_norm
from hf_zipit.symmetry.spaces import Symmetry

CASTS = {"to", "_to_copy", "type_as"}

UNIT_BY_UNIT = PASSING | {"cos", "sin", "neg", "slice", "narrow"}
"""Ops that do the same to all units of the last axis, in their order, as long as it keeps its length."""


RESHAPES = {"view", "reshape", "_unsafe_view", "flatten", "reshape_as", "view_as", "unflatten"}

NUMBERED_PAIRS = "the pairs of a rotary embedding are numbered"
"""What counts pairs is no unit: it stands still while the units of every pair are rotated."""

A_SCALE = "every unit has a scale of its own, and a rotary embedding rotates its pairs of units"


@pattern
def find_rotations(graph: fx.Graph) -> Iterator[Match]:
    """The rotary embeddings of a graph, and the scales before and after them."""
    for node in graph.nodes:
        found = _rotation(node) or _complex_rotation(node) or _rotation_of_parts(node)
        if found is not None:
            yield found
            yield from _scales(found.arguments[0], before=True)
            yield from _scales(node, before=False)


def rotate(run: Interpreter, node: fx.Node, x: Value, *angles: Value, turns: Symmetry) -> Value:
    """A rotary embedding: its units allow rotations of their pairs, every other axis what a product allows."""
    others = [Value(value.axes[:-1]) for value in (x, *angles)]
    for axes in zip_longest(*(reversed(value.axes) for value in others), fillvalue=()):
        present = [axis for axis in axes if axis]
        for axis in present if len(present) > 1 else ():
            run.atoms.restrict(axis, PERMUTATION)
    kept = run.broadcast(node, others, LINEAR)
    units = x.axes[-1]
    whole = len(run.atoms.resolve(units)) == 1  # units that were split elsewhere no longer know their pairs
    run.atoms.restrict(units, turns if whole else FIXED, "a rotary embedding rotates its pairs of units")
    for value in angles:
        run.atoms.restrict(value.axes[-1], FIXED, "every pair has an angle of its own")
    return Value([*kept.axes, units])


def rotate_and_move(run: Interpreter, node: fx.Node, x: Value, *angles: Value, turns: Symmetry) -> Value:
    """A rotary embedding of pairs that are halves in x (`turns`) and neighbours after it, or the other way round."""
    count = shape_of(node)[-1] // 2
    pairs, places = run.atoms.fresh(count, FIXED, NUMBERED_PAIRS), run.atoms.fresh(2)
    before, after = pairs + places, places + pairs
    if turns is ROTARY:
        before, after = after, before
    run.atoms.tie(x.axes[-1], before, "a rotary embedding rotates its pairs of units")
    rotated = rotate(run, node, Value([*x.axes[:-1], places]), *angles, turns=ROTARY)
    return Value([*rotated.axes[:-1], run.atoms.resolve(after)])


def scale_pairs(
    run: Interpreter, node: fx.Node, x: Value, scale: Value, *, width: int, start: int, stop: int
) -> Value:
    """x times a vector along its last axis, of whose `width` units a head those from `start` to `stop` are rotated."""
    heads = run.atoms.size(x.axes[-1]) // width
    sizes = [size for size in (start, stop - start, width - stop) if size]

    def pieces(axis: Axis) -> tuple[Axis, list[Axis]]:
        major, minor = run.atoms.fresh(heads), run.atoms.fresh(width)
        run.atoms.tie(axis, major + minor, A_SCALE)
        return major, run.atoms.cut(minor, sizes, A_SCALE)

    (major, own), (other, scales) = pieces(x.axes[-1]), pieces(scale.axes[-1])
    run.atoms.tie(major, other, A_SCALE)
    run.atoms.restrict(major, PERMUTATION)
    for i, (units, scaled) in enumerate(zip(own, scales, strict=True)):
        if i == (1 if start else 0):
            run.atoms.restrict(units, HALF_TURNS if len(run.atoms.resolve(units)) == 1 else FIXED, A_SCALE)
            run.atoms.restrict(scaled, FIXED, A_SCALE)
        else:
            run.atoms.restrict(units, PERMUTATION)
            run.atoms.tie(units, scaled, A_SCALE)
    return Value(x.axes)


def norm_pairs(
    run: Interpreter, node: fx.Node, x: Value, shape: Any, scale: Value, *epsilon: Any, **where: int
) -> Value:
    """An RMSNorm with such a scale."""
    return scale_pairs(run, node, layer_norm(run, node, x, shape), scale, **where)


# Finding them --------------------------------------------------------------------------------------------------------


def _rotation(node: fx.Node) -> Match | None:
    """The rotary embedding whose result a sum is."""
    if not _is(node, "add") or len(node.args) != 2 or node.kwargs:
        return None
    if not all(_is(part, "mul") and _once(part) for part in node.args):
        return None
    for straight, crossed in (node.args, node.args[::-1]):
        for quarter, sin in _both_ways(crossed):
            x, turns, steps = _quarter_rotation(quarter)
            for same, cos in _both_ways(straight):
                if x is None or _uncast(same) is not _uncast(x):
                    continue
                if _equal_in_pairs(cos, x, turns) and _equal_in_pairs(sin, x, turns):
                    rule = partial(rotate, turns=turns)
                    return Match(node, rule, (x, cos, sin), (straight, crossed, *steps))  # type: ignore[arg-type]
    return None


def _complex_rotation(node: fx.Node) -> Match | None:
    """The rotary embedding whose result a node is: neighbours taken as one complex number, and times a phase."""
    real = node.args[0] if _is(node, *RESHAPES) else None
    product = real.args[0] if _is(real, "view_as_real") and _once(real) else None
    if not (_is(product, "mul") and _once(product)):
        return None
    for number, phase in _both_ways(product):
        pairs = number.args[0] if _is(number, "view_as_complex") and _once(number) else None
        x = pairs.args[0] if _is(pairs, *RESHAPES) and _once(pairs) else None
        if (
            x is not None
            and shape_of(pairs) == [*shape_of(x)[:-1], shape_of(x)[-1] // 2, 2]
            and (shape_of(node) == shape_of(x))
        ):
            return Match(node, partial(rotate, turns=NEIGHBOURS), (x, phase), (real, product, number, pairs))
    return None


def _quarter_rotation(node: fx.Node) -> tuple[fx.Node | None, Symmetry, tuple[fx.Node, ...]]:
    """The x of which a node is every pair turned by a quarter, in which pairs, and the ops in between.

    It is `cat(-second half, first half)` along the last axis, or `stack(-odd units, even units)` flattened.
    """
    nothing = None, FIXED, ()
    joined = node if _is(node, "cat") else _interleaved(node)
    if joined is None or not _once(node) or not _once(joined) or not _is_last(joined, 1) or len(joined.args[0]) != 2:  # type: ignore[arg-type]
        return nothing
    minus, first = joined.args[0]  # type: ignore[misc]
    if not (_is(minus, "neg") and _once(minus)):
        return nothing
    second = minus.args[0]
    x = first.args[0] if _is(first, "slice") else None
    turns = ROTARY if joined is node else NEIGHBOURS
    if x is None or not (_is_half(first, x, 0, turns) and _is_half(second, x, 1, turns)):
        return nothing
    return x, turns, (node, joined, minus, first, second)


def _rotation_of_parts(node: fx.Node) -> Match | None:
    """The rotary embedding whose result is `a cos - b sin` beside `b cos + a sin`, a and b the two parts of x."""
    joined = node if _is(node, "cat") else _interleaved(node)
    if joined is None or not _is_last(joined, 1) or len(joined.args[0]) != 2:  # type: ignore[arg-type]
        return None
    if joined is not node and not _once(joined):
        return None
    difference, total = joined.args[0]  # type: ignore[misc]
    if not (_is(difference, "sub") and _is(total, "add") and _once(difference) and _once(total)):
        return None
    products = [*difference.args, *total.args]
    if (
        len(products) != 4
        or difference.kwargs
        or total.kwargs
        or not all(_is(p, "mul") and _once(p) for p in products)
    ):
        return None
    crossed = [{*pair.args} for pair in products[2:]]
    for a, cos in _both_ways(products[0]):
        for b, sin in _both_ways(products[1]):
            if {b, cos} not in crossed or {a, sin} not in crossed or a is b or cos is sin:
                continue
            for turns in (ROTARY, NEIGHBOURS):
                x, steps = _parts(a, b, turns)
                if x is not None and shape_of(x) == shape_of(node) and _half_as_wide(cos, x) and _half_as_wide(sin, x):
                    same = turns is (ROTARY if joined is node else NEIGHBOURS)
                    rule = partial(rotate if same else rotate_and_move, turns=turns)
                    inside = (difference, total, *products, *steps, *([] if joined is node else [joined]))
                    return Match(node, rule, (x, cos, sin), inside)
    return None


def _parts(a: fx.Node, b: fx.Node, turns: Symmetry) -> tuple[fx.Node | None, tuple[fx.Node, ...]]:
    """The x whose first and second units of every pair two nodes are, each read twice, and the ops in between."""
    nothing = None, ()
    if len(a.users) != 2 or len(b.users) != 2:
        return nothing
    if _is(a, "slice") and _is(b, "slice"):
        x = a.args[0]
        halves = _cuts_half(a, x, 0, turns) and _cuts_half(b, x, 1, turns)  # type: ignore[arg-type]
        return (x, (a, b)) if halves else nothing  # type: ignore[return-value]
    (pieces, first), (others, second) = (n.args if "getitem" in str(n.target) else (None, None) for n in (a, b))
    if turns is not ROTARY or pieces is None or pieces is not others or (first, second) != (0, 1):
        return nothing
    if op_name(pieces) not in ("chunk", "split", "split_with_sizes") or len(pieces.users) != 2:
        return nothing
    dim = pieces.args[2] if len(pieces.args) > 2 else 0
    x, sizes = pieces.args[0], [list(piece.shape) for piece in pieces.meta["val"]]
    last = dim % len(shape_of(x)) == len(shape_of(x)) - 1
    return (x, (a, b, pieces)) if last and len(sizes) == 2 and sizes[0] == sizes[1] else nothing


def _half_as_wide(angles: fx.Node, x: fx.Node) -> bool:
    return shape_of(angles)[-1:] == [shape_of(x)[-1] // 2]


def _interleaved(node: fx.Node) -> fx.Node | None:
    """The stack along a new last axis of which a node is that axis and the one before it as one."""
    stacked = node.args[0] if _is(node, *RESHAPES) else None
    if not (_is(stacked, "stack") and _is_last(stacked, 1)):
        return None
    *lead, units, count = shape_of(stacked)
    return stacked if shape_of(node) == [*lead, units * count] else None


def _is_half(node: Any, x: fx.Node, number: int, turns: Symmetry) -> bool:
    """Whether a node, read once, is of x's last axis the first (0) or the second (1) of every pair."""
    return _cuts_half(node, x, number, turns) and _once(node)


def _cuts_half(node: Any, x: fx.Node, number: int, turns: Symmetry) -> bool:
    """The same, however often it is read."""
    if not (_is(node, "slice") and node.args[0] is x and _is_last(node, 1)):
        return False
    start, end, step = [*node.args[2:], *(None, None, None)][:3]
    units = shape_of(x)[-1]
    cut = (start or 0, units if end is None else min(end, units), step or 1)
    half = (number * units // 2, (number + 1) * units // 2, 1)
    return units % 2 == 0 and cut == (half if turns is ROTARY else (number, units, 2))


def _equal_in_pairs(node: fx.Node, x: fx.Node, turns: Symmetry) -> bool:
    """Whether both units of every pair on a node's last axis are surely equal: it was made as one half twice."""
    units = shape_of(x)[-1]
    while isinstance(node, fx.Node) and list(shape_of(node)[-1:]) == [units]:
        joined = node if _is(node, "cat") else _interleaved(node)
        if joined is not None:
            parts = joined.args[0]
            same = len(parts) == 2 and parts[0] is parts[1] and _is_last(joined, 1)  # type: ignore[arg-type, index]
            return same and (turns is ROTARY) == (joined is node)
        if _is(node, "repeat", "tile"):
            return node.args[1][-1] == 2 and turns is ROTARY  # type: ignore[index]
        if _is(node, "repeat_interleave"):
            return node.args[1] == 2 and turns is NEIGHBOURS and _is_last(node, 2)
        scaled = _is(node, "mul", "div") and not isinstance(node.args[1], fx.Node)
        if not scaled and not _is(node, *UNIT_BY_UNIT):
            return False
        node = node.args[0]  # type: ignore[assignment]
    return False


@dataclass(frozen=True)
class Span:
    """A node whose last axis is heads of `width` units each, of which those from `start` to `stop` are rotated."""

    node: fx.Node
    width: int
    start: int
    stop: int

    def moved(self, node: fx.Node) -> Span:
        return replace(self, node=node)

    @property
    def where(self) -> dict[str, int]:
        return {"width": self.width, "start": self.start, "stop": self.stop}


def _scales(node: fx.Node, before: bool) -> Iterator[Match]:
    """The products with a vector along the last axis that stand before or after a rotary embedding of a node."""
    units = shape_of(node)[-1]
    waiting, seen = [Span(node, units, 0, units)], {node}
    while waiting:
        span = waiting.pop()
        for result in [span.node] if before else span.node.users:
            if before or result not in seen:
                seen.add(result)
                scale, source = _scale_and_source(result)
                if scale is not None:
                    rule = scale_pairs if op_name(result) == "mul" else norm_pairs
                    shape = (result.args[1],) if rule is norm_pairs else ()
                    yield Match(result, partial(rule, **span.where), (source, *shape, scale), ())  # type: ignore[arg-type]
                if source is not None and before:
                    waiting += _before(span, source)
                elif source is span.node and _keeps_last_axis(result):
                    waiting.append(span.moved(result))


def _scale_and_source(node: fx.Node) -> tuple[fx.Node | None, fx.Node | None]:
    """The vector along the last axis that a node scales it by, if it does; and what the node goes on with."""
    if _is(node, "mul"):
        for x, factor in _both_ways(node):
            if shape_of(x) == shape_of(node) and len(shape_of(x)) > 1:
                if shape_of(factor) == shape_of(node)[-1:]:
                    return factor, x
                if shape_of(factor)[-1:] in ([], [1]):
                    return None, x
    if _is(node, "rms_norm") and len(node.args[1]) == 1:  # type: ignore[arg-type]
        return (node.args[2] if len(node.args) > 2 else None), node.args[0]  # type: ignore[return-value]
    source = node.args[0] if node.op == "call_function" and node.args else None
    return None, source if isinstance(source, fx.Node) and hasattr(source.meta.get("val"), "shape") else None


def _before(span: Span, source: fx.Node) -> Iterator[Span]:
    """The units of a span in what its node was made of."""
    node = span.node
    if _keeps_last_axis(node):
        yield span.moved(source)
    elif _is(node, *RESHAPES) and shape_of(source) == [*shape_of(node)[:-2], prod(shape_of(node)[-2:])]:
        yield span.moved(source)  # heads that stood side by side on the last axis
    elif _is(node, "slice") and _is_last(node, 1) and shape_of(node)[-1] == span.width and len(node.args) < 5:
        start = node.args[2] or 0 if len(node.args) > 2 else 0
        start = start if start >= 0 else start + shape_of(source)[-1]  # type: ignore[operator]
        yield Span(source, shape_of(source)[-1], start + span.start, start + span.stop)  # type: ignore[operator]


def _keeps_last_axis(node: fx.Node) -> bool:
    """Whether the units on the last axis of an op's first argument are those of its result."""
    source = next((arg for arg in node.args if isinstance(arg, fx.Node)), None)
    if source is None or not hasattr(source.meta.get("val"), "shape") or not shape_of(source):
        return False
    last = len(shape_of(source)) - 1
    if _is(node, "transpose"):
        return all(dim % (last + 1) != last for dim in node.args[1:])  # type: ignore[operator]
    if _is(node, "permute"):
        return node.args[1][-1] % (last + 1) == last  # type: ignore[index]
    same = _is(node, "mul", "rms_norm", *PASSING) and shape_of(node)[-1:] == shape_of(source)[-1:]
    return same and node.meta["val"].is_floating_point()


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
