"""Normalisation layers: which maps their statistics allow, and which their affine parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from hf_zipit.symmetry.interpreter import Interpreter
from hf_zipit.symmetry.ops import (
    LINEAR,
    ONES,
    ORTHOGONAL,
    PERMUTATION,
    Value,
    op_name,
    rule,
    without,
)

UNEVEN = "a norm's affine part does not fit its axis"


@rule("layer_norm", "rms_norm")
def layer_norm(
    run: Interpreter, node: fx.Node, x: Value, shape: Sequence[int], weight: Any = None, bias: Any = None, *_: Any
) -> Value:
    """`bias` is the epsilon in RMSNorm's signature, and then no value."""
    split = len(x.axes) - len(shape)
    lead, normed = x.axes[:split], x.axes[split:]
    for axis in lead:
        run.atoms.restrict(axis, PERMUTATION)
    for axis in normed:
        run.atoms.restrict(axis, ORTHOGONAL if op_name(node) == "rms_norm" else ONES)
    for affine, symmetry in ((weight, PERMUTATION), (bias, LINEAR)):
        if isinstance(affine, Value):
            for axis, other in zip(normed, affine.axes, strict=True):
                run.atoms.restrict(axis, symmetry)
                run.atoms.tie(axis, other, UNEVEN)
    run.parted(lead)
    return Value(x.axes)


@rule("_weight_norm")
def weight_norm(run: Interpreter, node: fx.Node, direction: Value, length: Value, dim: int = 0) -> Value:
    """A weight as directions of length one and their lengths, one for every unit of axis `dim`."""
    for i, axis in enumerate(direction.axes):
        run.atoms.restrict(axis, PERMUTATION if i == dim % len(direction.axes) else ORTHOGONAL)
    run.atoms.tie(direction.axes[dim], length.axes[dim], "the lengths of a normed weight do not fit its axis")
    return Value(direction.axes)


@rule("batch_norm", "instance_norm")
def batch_norm(run: Interpreter, node: fx.Node, x: Value, *args: Any, **__: Any) -> Value:
    run.atoms.restrict(x.axes[1], PERMUTATION)
    # Weight, bias, running mean and variance; then whether the input's own statistics are used instead.
    *statistics, from_input = args[:5]
    for statistic in statistics:
        if isinstance(statistic, Value):
            run.atoms.tie(x.axes[1], statistic.axes[0], UNEVEN)
    others = without(x, [1])
    for axis in others:  # one shift for all samples and positions
        run.atoms.restrict(axis, PERMUTATION if from_input else ONES)
    if from_input:
        run.parted([x.axes[1]])
    return Value(x.axes)


@rule("group_norm")
def group_norm(
    run: Interpreter, node: fx.Node, x: Value, groups: int, weight: Any = None, bias: Any = None, *_: Any
) -> Value:
    run.restrict_all(x, PERMUTATION)
    channels = run.atoms.size(x.axes[1])
    grouped = run.atoms.fresh(groups) + run.atoms.fresh(channels // groups)
    run.atoms.tie(x.axes[1], grouped, "a group norm's groups do not fit its axis")
    for affine in (weight, bias):
        if isinstance(affine, Value):
            run.atoms.tie(x.axes[1], affine.axes[0], UNEVEN)
    run.parted([x.axes[1]], [x.axes[0]])
    return Value(x.axes)
