"""Elementwise ops: what they do to every unit alone, and how they pair the units of their operands."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from hf_zipit.symmetry.interpreter import Interpreter
from hf_zipit.symmetry.ops import (
    FIXED,
    LINEAR,
    ONES,
    PERMUTATION,
    Value,
    dims,
    input_shape,
    is_in_place,
    known_size,
    op_name,
    overload,
    rule,
    shape_of,
)


@rule("clone", "contiguous", "detach", "alias", numbered=True)
def keep(run: Interpreter, node: fx.Node, x: Value, *_: Any, **__: Any) -> Value:
    return Value(x.axes, x.names)


rule("dropout", "feature_dropout", "lift_fresh_copy", "lift_fresh", "neg")(keep)


@rule("to", "_to_copy", "type_as", numbered=True)
def cast(run: Interpreter, node: fx.Node, x: Value, *others: Any, **__: Any) -> Value:
    if node.meta["val"].dtype not in (torch.int32, torch.int64):
        run.fix_numbers(x, "the numbers of its units are read")
    if not node.meta["val"].is_floating_point():  # rounding to integers is a nonlinearity
        run.restrict_all(x, PERMUTATION)
    return Value(x.axes, x.names)


@rule("fill", "zero")
def overwrite(run: Interpreter, node: fx.Node, x: Value, *_: Any) -> Value:
    run.restrict_all(x, ONES)  # now the same number everywhere
    return Value(x.axes)


@rule("copy")
def copy(run: Interpreter, node: fx.Node, x: Value, source: Value, *_: Any) -> Value:
    if not node.meta["val"].is_floating_point():
        run.restrict_all(source, PERMUTATION)
    return run.broadcast(node, [x, source], ONES)


@rule("relu", "gelu", "silu", "sigmoid", "tanh", "exp", "log", "sqrt", "rsqrt", "abs", "hardswish", "hardtanh",
      "leaky_relu", "elu", "selu", "mish", "softplus", "erf", "sin", "cos", "reciprocal", "relu6", "hardsigmoid",
      "logical_not", "bitwise_not", "isnan", "isinf", "celu", "floor", "ceil", "round", "sign", "log1p", "expm1",
      "log_sigmoid", "logit", "threshold", "nan_to_num", "isfinite", "softshrink", "hardshrink", "acos", "asin",
      "atan", "tan", "sinh", "cosh", "erfc", "exp2", "log2", "log10", "softsign", "trunc", "sgn", "angle")  # fmt: skip
def nonlinear(run: Interpreter, node: fx.Node, x: Value, *_: Any, **__: Any) -> Value:
    run.restrict_all(x, PERMUTATION)
    return Value(x.axes)


@rule("where", "eq", "ne", "ge", "gt", "le", "lt", "logical_and", "logical_or", "logical_xor", "__and__", "__or__",
      "__xor__", "bitwise_and", "bitwise_or", "bitwise_xor", "masked_fill", "clamp", "clamp_min", "clamp_max",
      "maximum", "minimum", "floor_divide", "remainder", "fmod", "atan2", "addcmul", "addcdiv", "lerp", "copysign",
      "xlogy", "polar")  # fmt: skip
def pointwise(run: Interpreter, node: fx.Node, *args: Any, **kwargs: Any) -> Value:
    values = [a for a in (*args, *kwargs.values()) if isinstance(a, Value)]
    for value in values:
        run.restrict_all(value, PERMUTATION)
    return run.broadcast(node, values, PERMUTATION)


@rule("add", "sub", "rsub")
def plus(run: Interpreter, node: fx.Node, x: Any, y: Any, *_: Any, **__: Any) -> Value:
    if isinstance(x, Value) and isinstance(y, Value):
        return run.broadcast(node, [x, y], ONES)
    value = x if isinstance(x, Value) else y
    run.restrict_all(value, ONES)  # a number is added to every unit
    return Value(value.axes)


@rule("mul", "multiply", "div", "true_divide", "divide")
def times(run: Interpreter, node: fx.Node, x: Any, y: Any, *_: Any, **kwargs: Any) -> Value:
    if kwargs.get("rounding_mode"):
        return pointwise(run, node, x, y)
    dividing = op_name(node) not in ("mul", "multiply")
    if not isinstance(y, Value):
        return Value(x.axes)
    if dividing:
        run.restrict_all(y, PERMUTATION)
    if not isinstance(x, Value):
        return Value(y.axes)
    if not dividing and node.args[0] is node.args[1] and feeds_only_a_sum(node):
        return squared(run, node, x)
    for left, right in zip(reversed(x.axes), reversed(y.axes), strict=False):
        if left and right:
            run.atoms.restrict(left, PERMUTATION)
            run.atoms.restrict(right, PERMUTATION)
    return run.broadcast(node, [x, y], LINEAR)


@rule("pow")
def power(run: Interpreter, node: fx.Node, x: Any, exponent: Any) -> Value:
    if isinstance(x, Value) and not isinstance(exponent, Value) and exponent == 2:
        return square(run, node, x)
    return pointwise(run, node, x, exponent)


@rule("square")
def square(run: Interpreter, node: fx.Node, x: Value) -> Value:
    return squared(run, node, x) if feeds_only_a_sum(node) else nonlinear(run, node, x)


def squared(run: Interpreter, node: fx.Node, x: Value) -> Value:
    """x * x that is only added up along its last axis: a squared length, which any rotation of that axis keeps."""
    for axis in x.axes[:-1]:
        run.atoms.restrict(axis, PERMUTATION)
    run.squares.add(node)
    return Value(x.axes)


def feeds_only_a_sum(node: fx.Node) -> bool:
    sums = bool(node.users) and all(
        op_name(user) in {"sum", "mean"} and summed_axes(user) == {len(input_shape(user)) - 1} for user in node.users
    )
    return sums and not is_in_place(node)  # squared in place, other views of the tensor would see the squares


def summed_axes(node: fx.Node) -> set[int]:
    return set(dims(node.args[1] if len(node.args) > 1 else None, len(input_shape(node))))  # type: ignore[arg-type]


@rule("glu")
def glu(run: Interpreter, node: fx.Node, x: Value, dim: int = -1) -> Value:
    """The first half of an axis, times the sigmoid of the second."""
    half = shape_of(node)[dim]
    run.restrict_all(x, PERMUTATION)
    first, second = run.atoms.take(x.axes[dim], [half, half], [0, 1], "a gate does not fit what it gates")
    run.atoms.tie(first, second, "a gate does not fit what it gates")
    axes = list(x.axes)
    axes[dim] = first
    return Value(axes)


@rule("prelu")
def prelu(run: Interpreter, node: fx.Node, x: Value, weight: Value) -> Value:
    run.restrict_all(x, PERMUTATION)
    if weight.axes[0]:
        run.atoms.tie(x.axes[1], weight.axes[0], "the slopes of a PReLU do not fit its axis")
    return Value(x.axes)


@rule("ones", "full", "new_ones", "new_full", "ones_like", "full_like", "scalar_tensor")
def constant(run: Interpreter, node: fx.Node, *_: Any, **__: Any) -> Value:
    return run.fresh_like(node, PERMUTATION)


@rule("zeros", "new_zeros", "zeros_like", "empty", "new_empty", "empty_like")
def nothing_yet(run: Interpreter, node: fx.Node, *_: Any, **__: Any) -> Value:
    """Zeros are zeros in every basis; what is empty is written before it is read."""
    return run.fresh_like(node, LINEAR)


@rule("arange", "linspace", "eye", "rand", "randn", "randint", "randperm", "tril_indices", "triu_indices")
def ramp(run: Interpreter, node: fx.Node, *_: Any, **__: Any) -> Value:
    return run.fresh_like(node, FIXED, "a constant")


@rule(
    "_assert_tensor_metadata", "_assert_async", "_assert_scalar", "sym_constrain_range", "sym_constrain_range_for_size"
)
def nothing(run: Interpreter, node: fx.Node, *_: Any, **__: Any) -> None:
    return None


@rule("sym_size", "sym_numel", "item", "_local_scalar_dense")
def number(run: Interpreter, node: fx.Node, x: Value, *_: Any) -> Any:
    """A size, or what is in a tensor, as a number."""
    if "sym" not in op_name(node):
        run.restrict_all(x, FIXED, "it is read as a number")
    return known_size(node.meta["val"])


@rule("max", "min")
def extremum(run: Interpreter, node: fx.Node, x: Value, other: Any = None, *_: Any) -> Any:
    """Three ops of one name: of two tensors, of a whole tensor, and along an axis with the place where it stands."""
    if isinstance(other, Value):
        return pointwise(run, node, x, other)
    run.restrict_all(x, PERMUTATION)
    if overload(node) == "default":
        return Value([])
    values, _ = node.meta["val"]
    dim = other % len(x.axes)
    if any(user.args[1] == 1 and user.users for user in node.users):
        run.atoms.restrict(x.axes[dim], FIXED, "the place of its largest unit is used")
    axes = [() if i == dim else axis for i, axis in enumerate(x.axes)]
    if values.ndim < len(axes):
        axes.pop(dim)
    return Value(axes), Value(axes)
