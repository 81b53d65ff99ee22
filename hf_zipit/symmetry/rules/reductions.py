"""Ops that reduce, scan or normalise along an axis without parameters: sums, spreads, norms, extrema, softmax."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from hf_zipit.symmetry.interpreter import Interpreter
from hf_zipit.symmetry.ops import (
    FIXED,
    ONES,
    ORTHOGONAL,
    PERMUTATION,
    Value,
    dims,
    op_name,
    rule,
    shape_of,
    without,
)


def reduced_value(node: fx.Node, x: Value, reduced: Sequence[int]) -> Value:
    """What is left of a value after a reduction; whether axes of size one are kept is read off the result's shape."""
    if len(shape_of(node)) == len(x.axes):
        return Value(() if i in reduced else axis for i, axis in enumerate(x.axes))
    return Value(without(x, reduced))


@rule("sum", "mean")
def all_reduce(run: Interpreter, node: fx.Node, x: Value, dim: Any = None, *_: Any, **__: Any) -> Value:
    reduced = dims(dim, len(x.axes))
    for i in reduced:
        run.atoms.restrict(x.axes[i], ORTHOGONAL if node.args[0] in run.squares else ONES)
    return reduced_value(node, x, reduced)


@rule("var", "std")
def spread(run: Interpreter, node: fx.Node, x: Value, dim: Any = None, *_: Any, **__: Any) -> Value:
    reduced = dims(None if isinstance(dim, bool) else dim, len(x.axes))  # var(x, unbiased) has no dim
    for i, axis in enumerate(x.axes):
        run.atoms.restrict(axis, ONES if i in reduced else PERMUTATION)
    return reduced_value(node, x, reduced)


@rule("linalg_vector_norm", "norm")
def norm(run: Interpreter, node: fx.Node, x: Value, order: Any = 2, dim: Any = None, *_: Any, **__: Any) -> Value:
    reduced = dims(dim, len(x.axes))
    for i, axis in enumerate(x.axes):
        run.atoms.restrict(axis, ORTHOGONAL if i in reduced and order == 2 else PERMUTATION)
    return reduced_value(node, x, reduced)


@rule("amax", "amin", "prod", "any", "all", "logsumexp")
def symmetric_reduction(run: Interpreter, node: fx.Node, x: Value, dim: Any = None, *_: Any, **__: Any) -> Value:
    run.restrict_all(x, PERMUTATION)
    return reduced_value(node, x, dims(dim, len(x.axes)))


@rule("argmax", "argmin")
def which(run: Interpreter, node: fx.Node, x: Value, dim: Any = None, *_: Any, **__: Any) -> Value:
    run.restrict_all(x, PERMUTATION)
    reduced = dims(dim, len(x.axes))
    for i in reduced:
        run.atoms.restrict(x.axes[i], FIXED, "the place of its largest unit is used")
    return reduced_value(node, x, reduced)


@rule("cumsum", "flip", "roll", "triu", "tril")
def ordered(run: Interpreter, node: fx.Node, x: Value, *args: Any, **__: Any) -> Value:
    """Ops that depend on the order of the units along some axes, and are linear."""
    name = op_name(node)
    if name == "roll":
        along = dims(args[1] if len(args) > 1 else None, len(x.axes))  # without dims, the flattened tensor is rolled
    else:
        along = dims([-2, -1] if name in {"triu", "tril"} else args[0], len(x.axes))
    for i in along:
        run.atoms.restrict(x.axes[i], FIXED, f"the op {name} depends on its order")
    run.parted(without(x, along))
    return Value(x.axes)


@rule("diff")
def differences(run: Interpreter, node: fx.Node, x: Value, n: int = 1, dim: int = -1, *others: Any) -> Any:
    if others:
        return run.unknown(node, x, *others)
    axes = list(x.axes)
    run.atoms.restrict(axes[dim], FIXED, "the op diff depends on its order")
    run.parted(without(x, dims(dim, len(axes))))
    axes[dim] = run.atoms.fresh(shape_of(node)[dim], FIXED, "the op diff depends on its order")
    return Value(axes)


@rule("softmax", "log_softmax")
def softmax(run: Interpreter, node: fx.Node, x: Value, dim: int, *_: Any, **__: Any) -> Value:
    run.restrict_all(x, PERMUTATION)  # reordering the entries reorders their probabilities, nothing else survives
    run.parted(without(x, dims(dim, len(x.axes))))
    return Value(x.axes)
