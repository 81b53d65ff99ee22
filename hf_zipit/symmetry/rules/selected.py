"""Parts of a fused projection that are selected: `qkv.view(..., heads, 3, dim)[..., 0, :]`.

Op by op, queries, keys and values would be entries along an axis of three, and have one basis. So a view is followed
to what is selected from it: where nothing else happens to one of its new axes, what that axis counts are the terms of
a direct sum. A part may be several entries: all heads but the last two, which are the keys and the values (Falcon).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

from torch import fx

from hf_zipit.symmetry.atoms import Axis
from hf_zipit.symmetry.interpreter import Interpreter
from hf_zipit.symmetry.ops import Match, Value, is_in_place, neighbours, op_name, pattern, shape_of

VIEWS = {"view", "reshape", "_unsafe_view", "unflatten"}
MOST = 8
"""An axis of more entries counts heads or positions, whose single entries are no parts."""


@dataclass(frozen=True)
class Counted:
    """An axis of a view that counts the parts of one axis of its source.

    Attributes:
        view: the op.
        axis: which axis of the view.
        inside: how many axes of the view follow it within the same axis of the source.
    """

    view: fx.Node
    axis: int
    inside: int


@pattern
def find_selected(graph: fx.Graph) -> Iterator[Match]:
    """What is selected from views, where all that is done with one axis of a view is to select from it."""
    for node in graph.nodes:
        if node.op == "call_function" and op_name(node) in VIEWS and hasattr(node.meta.get("val"), "shape"):
            for counted in _counting(node):
                ends = _ends(node, counted.axis, ())
                if ends:
                    yield from (
                        Match(end, partial(pick, counted=counted, path=path), (node.args[0],), (node, *path))
                        for end, path in ends
                    )
                    break


def pick(run: Interpreter, node: fx.Node, x: Value, *, counted: Counted, path: Sequence[fx.Node]) -> Any:
    """The parts that an op selects."""
    shape, at = shape_of(counted.view), counted.axis
    last = at + counted.inside + 1
    count, inner = shape[at], shape[at + 1 : last]
    why = "it is split in pieces"
    axes = run.atoms.regroup(x.axes, [*shape[:at], count * prod(inner), *shape[last:]], why)

    def part(entries: range) -> Value:
        sizes = [n * prod(inner) for n in (entries.start, len(entries), count - entries.stop) if n]
        (piece,) = run.atoms.take(axes[at], sizes, [1 if entries.start else 0], why)
        kept, *within = run.atoms.regroup([piece], [len(entries), *inner], why)
        known: list[Axis | None] = [*axes[:at], None, *within, *axes[at + 1 :]]
        for step in path:
            known = _followed(run, step, known)
        single = op_name(node) in ("select", "unbind")
        return Value(kept if axis is None else axis for axis in known if axis is not None or not single)

    if op_name(node) == "unbind":
        return tuple(part(range(i, i + 1)) for i in range(count))
    return part(_selected(node, _axis_selected(node), count))  # type: ignore[arg-type]


def _axis_selected(node: fx.Node) -> int | None:
    """The axis of its argument that an op selects entries from; None if it may do something else."""
    name, rank = op_name(node), len(shape_of(node.args[0]))  # type: ignore[arg-type]
    if name == "index":
        used = [i for i, index in enumerate(node.args[1]) if index is not None]  # type: ignore[arg-type]
        return used[0] if len(used) == 1 and neighbours(node.args[1][used[0]]) is not None else None  # type: ignore[index, arg-type]
    if name in ("select", "unbind", "slice", "narrow"):
        return (node.args[1] if len(node.args) > 1 else 0) % rank  # type: ignore[operator]
    return None


def _selected(node: fx.Node, axis: int, count: int) -> range | None:
    """Which of the `count` entries of an axis an op selects, which stand side by side."""
    if op_name(node) == "unbind":
        return range(count)
    if op_name(node) == "select":
        start, stop = node.args[2], node.args[2] + 1  # type: ignore[operator]
    elif op_name(node) == "index":
        units = neighbours(node.args[1][axis])  # type: ignore[index, arg-type]
        start, stop = units.start, units.stop  # type: ignore[union-attr]
    else:
        start, stop, step = [*node.args[2:], *(None, None, None)][:3]
        if any(isinstance(at, fx.Node) for at in (start, stop, step)) or step not in (None, 1):
            return None
        start, stop = start or 0, count if stop is None else stop
        return range(count)[start : start + stop if op_name(node) == "narrow" else stop]  # type: ignore[operator]
    return range(start + count, stop + count) if start < 0 else range(start, stop)  # type: ignore[operator]


def _followed(run: Interpreter, step: fx.Node, axes: list[Axis | None]) -> list[Axis | None]:
    """The axes of a part after one more op; None stands for the axis that will be selected from."""
    name = op_name(step)
    if name == "transpose":
        a, b = (dim % len(axes) for dim in step.args[1:])  # type: ignore[operator]
        axes[a], axes[b] = axes[b], axes[a]
    elif name == "permute":
        axes = [axes[dim] for dim in step.args[1]]  # type: ignore[union-attr, index, misc]
    elif name in ("unsqueeze", "squeeze", *VIEWS):
        was, shape = axes.index(None), shape_of(step)
        at = _kept_place(was, step)
        sides = (axes[:was], shape[:at]), (axes[was + 1 :], shape[at + 1 :])
        before, after = (run.atoms.regroup(side, sizes, "it is cut unevenly") for side, sizes in sides)  # type: ignore[arg-type]
        axes = [*before, None, *after]
    return axes


def _kept_place(at: int, step: fx.Node) -> int:
    """Where the axis `at` of a reshape's source is in its result."""
    rank = len(shape_of(step))
    if op_name(step) == "unsqueeze":
        return at + (step.args[1] % rank <= at)  # type: ignore[operator]
    if op_name(step) == "squeeze":
        return at - (step.args[1] % (rank + 1) < at)  # type: ignore[operator]
    return at


def _counting(view: fx.Node) -> Iterator[Counted]:
    """The axes of a view that divide an axis of its source and have others inside."""
    source, shape = shape_of(view.args[0]), shape_of(view)  # type: ignore[arg-type]
    start, end, first = 0, 0, 0
    for last in range(1, len(source) + 1):
        size = prod(source[first:last])
        while end < len(shape) and prod(shape[start:end]) < size:
            end += 1
        if prod(shape[start:end]) != size:
            continue  # some axes of the source become one
        for axis in range(start, end - 1) if last - first == 1 else ():
            if shape[axis] > 1:
                yield Counted(view, axis, end - axis - 1)
        start, first = end, last


def _ends(node: fx.Node, axis: int, path: tuple[fx.Node, ...]) -> list[tuple[fx.Node, tuple[fx.Node, ...]]]:
    """The ops that select along an axis of a node, and the steps there; none if something else is done with it."""
    found = []
    for user in node.users:
        if user.op != "call_function" or is_in_place(user):
            return []
        if user.args[0] is node and _axis_selected(user) == axis:
            count = shape_of(node)[axis]
            entries = _selected(user, axis, count)
            if not entries or (count > MOST and op_name(user) in ("select", "unbind")):
                return []
            found.append((user, path))
            continue
        after = _moved(user, node, axis)
        further = [] if after is None else _ends(user, after, (*path, user))
        if not further:
            return []
        found += further
    return found


def _moved(user: fx.Node, node: fx.Node, axis: int) -> int | None:
    """Where an axis of a node is after an op that leaves it whole; None if it may not."""
    name, rank = op_name(user), len(shape_of(node))
    if user.args[0] is not node:
        return None
    if name in ("clone", "contiguous"):
        return axis
    if name == "transpose":
        a, b = (dim % rank for dim in user.args[1:])  # type: ignore[operator]
        return {a: b, b: a}.get(axis, axis)
    if name == "permute":
        return [dim % rank for dim in user.args[1]].index(axis)  # type: ignore[union-attr, operator]
    if name in ("unsqueeze", "squeeze") and len(user.args) == 2 and isinstance(user.args[1], int):
        return _kept_place(axis, user)
    if name in VIEWS and shape_of(user)[: axis + 1] == shape_of(node)[: axis + 1]:
        return axis
    return None
