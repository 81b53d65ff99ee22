"""Linear maps and contractions: the axes that are summed over stand in duality, the others pass through.

Every rule names the groups of axes that keep company (`parted`): what is contracted, what is free on either side. A
unit that both operands number by themselves is not the same unit after they met.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from math import prod
from string import ascii_letters
from typing import Any

from torch import fx

from hf_zipit.symmetry.atoms import Axis, dual
from hf_zipit.symmetry.interpreter import Interpreter
from hf_zipit.symmetry.ops import (
    FIXED,
    ONES,
    PERMUTATION,
    Value,
    common,
    count_of,
    input_shape,
    rule,
    shape_of,
)


@rule("linear")
def linear(run: Interpreter, node: fx.Node, x: Value, weight: Value, bias: Any = None) -> Value:
    out, inner = weight.axes
    lead = x.axes[:-1]
    run.atoms.tie(x.axes[-1], dual(inner), "a linear layer's input does not fit its weight")
    if isinstance(bias, Value):
        run.atoms.tie(out, bias.axes[0], "a linear layer's bias does not fit its weight")
        for axis in lead:  # one bias for all of them
            run.atoms.restrict(axis, ONES)
    run.parted([inner], [out], lead)
    run.count_macs(node, count_of(node) * input_shape(node, 1)[1])
    run.reads(node, x, -1)
    run.writes(node, out, -1, lead)
    return Value([*lead, out])


@rule("addmm")
def addmm(run: Interpreter, node: fx.Node, bias: Value, x: Value, weight: Value, **__: Any) -> Value:
    inner, out = weight.axes
    run.atoms.tie(x.axes[1], dual(inner), "a product's inner axes do not fit")
    run.parted([inner], [out], [x.axes[0]])
    run.count_macs(node, count_of(node) * input_shape(node, 2)[0])
    run.reads(node, x, -1, argument=1)
    run.writes(node, out, -1, x.axes[:1])
    return run.broadcast(node, [Value([x.axes[0], out]), bias], ONES)


@rule("conv1d", "conv2d", "conv3d")
def conv(run: Interpreter, node: fx.Node, x: Value, weight: Value, bias: Any = None, *args: Any) -> Any:
    if len(x.axes) != len(weight.axes):  # an input without a batch axis
        return run.unknown(node, x, weight, bias)
    groups = args[3] if len(args) > 3 else 1
    samples, channels = x.axes[:2]
    out, inner = weight.axes[:2]
    group = run.atoms.fresh(groups, PERMUTATION)  # none, for an ordinary convolution
    width = run.atoms.size(out) // groups
    run.atoms.tie(channels, group + dual(inner), "a convolution's input does not fit its weight")
    run.atoms.tie(out, group + run.atoms.fresh(width), "a convolution's groups do not fit its output")
    if isinstance(bias, Value):
        run.atoms.tie(out, bias.axes[0], "a convolution's bias does not fit its weight")
        run.atoms.restrict(samples, ONES)
    for axis in weight.axes[2:]:
        run.atoms.restrict(axis, FIXED, "a kernel's place")
    for axis in x.axes[2:]:
        run.atoms.restrict(axis, FIXED, "a convolution slides over it")
    run.parted([group, inner], [out], [samples])
    run.count_macs(node, count_of(node) * prod(input_shape(node, 1)[1:]))
    run.reads(node, x, 1)
    run.writes(node, out, 1, [samples])
    return Value([samples, out, *(run.atoms.fresh(n, FIXED, "positions") for n in shape_of(node)[2:])])


@rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def conv_transpose(run: Interpreter, node: fx.Node, x: Value, weight: Value, bias: Any = None, *args: Any) -> Any:
    if len(x.axes) != len(weight.axes) or (len(args) > 3 and args[3] != 1):
        return run.unknown(node, x, weight, bias)
    samples, channels = x.axes[:2]
    inner, out = weight.axes[:2]
    run.atoms.tie(channels, dual(inner), "a convolution's input does not fit its weight")
    if isinstance(bias, Value):
        run.atoms.tie(out, bias.axes[0], "a convolution's bias does not fit its weight")
        run.atoms.restrict(samples, ONES)
    for axis in weight.axes[2:]:
        run.atoms.restrict(axis, FIXED, "a kernel's place")
    for axis in x.axes[2:]:
        run.atoms.restrict(axis, FIXED, "a convolution slides over it")
    run.parted([inner], [out], [samples])
    run.count_macs(node, prod(input_shape(node)) * prod(input_shape(node, 1)[1:]))
    return Value([samples, out, *(run.atoms.fresh(n, FIXED, "positions") for n in shape_of(node)[2:])])


@rule("embedding")
def embedding(run: Interpreter, node: fx.Node, weight: Value, indices: Value, *_: Any, **__: Any) -> Value:
    rows, out = weight.axes
    run.atoms.restrict(rows, FIXED, "rows are looked up by index")
    run.parted([out])
    run.writes(node, out, -1, indices.axes)
    return Value([*indices.axes, out])


@rule("matmul", "bmm", "mm")
def matmul(run: Interpreter, node: fx.Node, x: Value, y: Value) -> Any:
    if len(x.axes) < 2 or len(y.axes) < 2:
        return run.unknown(node, x, y)
    (*left_lead, left, inner), (*right_lead, other, right) = x.axes, y.axes
    run.atoms.tie(inner, dual(other), "a product's inner axes do not fit")
    lead = run.broadcast(node, [Value(left_lead), Value(right_lead)], PERMUTATION)
    run.restrict_all(lead, PERMUTATION)
    both = common(Value(left_lead), Value(right_lead))
    run.parted([*both, inner], [*both, left], [*both, right])
    run.count_macs(node, count_of(node) * input_shape(node)[-1])
    return Value([*lead.axes, left, right])


@rule("baddbmm")
def baddbmm(run: Interpreter, node: fx.Node, bias: Value, x: Value, y: Value, **__: Any) -> Value:
    lead = [x.axes[0]]
    run.restrict_all(Value(lead), PERMUTATION)
    run.atoms.tie(x.axes[0], y.axes[0], "a product's batch axes do not fit")
    run.atoms.tie(x.axes[2], dual(y.axes[1]), "a product's inner axes do not fit")
    run.parted([*lead, x.axes[2]], [*lead, x.axes[1]], [*lead, y.axes[2]])
    run.count_macs(node, count_of(node) * input_shape(node, 1)[-1])
    return run.broadcast(node, [Value([*lead, x.axes[1], y.axes[2]]), bias], ONES)


@rule("einsum")
def einsum(run: Interpreter, node: fx.Node, equation: str, operands: Sequence[Value], *_: Any, **__: Any) -> Any:
    match = re.fullmatch(r"([A-Za-z]+(?:,[A-Za-z]+)?)->([A-Za-z]*)", _spelled_out(equation, operands))
    terms = match[1].split(",") if match else []
    repeated = any(len(set(term)) < len(term) for term in terms)
    found: dict[str, list[Axis]] = {}
    for term, operand in zip(terms, operands, strict=False):
        for letter, axis in zip(term, operand.axes, strict=True):
            found.setdefault(letter, []).append(axis)
    stretched = any(len(axes) == 2 and bool(axes[0]) != bool(axes[1]) for axes in found.values())
    if match is None or repeated or stretched:
        return run.unknown(node, *operands)
    result = match[2]
    for letter, axes in found.items():
        if len(axes) == 1:
            if letter not in result:
                run.atoms.restrict(axes[0], ONES)
        elif letter in result:
            run.atoms.tie(axes[0], axes[1], "einsum's axes do not fit")
            run.atoms.restrict(axes[0], PERMUTATION)
        else:
            run.atoms.tie(axes[0], dual(axes[1]), "einsum's axes do not fit")
    shared = [letter for letter, axes in found.items() if len(axes) == 2]
    kept = [letter for letter in shared if letter in result]
    for group in (shared, *([*kept, *(free for free in term if free not in shared)] for term in terms)):
        run.parted([found[letter][0] for letter in group])
    return Value(found[letter][0] for letter in result)


def _spelled_out(equation: str, operands: Sequence[Value]) -> str:
    """An equation with letters for the leading axes that `...` stands for, as many in every operand; else as it is."""
    equation = equation.replace(" ", "")
    terms = equation.partition("->")[0].split(",")
    named = [len(term) - 3 if term.startswith("...") else -1 for term in terms]
    counts = {len(operand.axes) - n for n, operand in zip(named, operands, strict=False)}
    if min(named) < 0 or len(counts) > 1:
        return equation
    unused = [letter for letter in ascii_letters if letter not in equation]
    return equation.replace("...", "".join(unused[: counts.pop()]))


@rule("scaled_dot_product_attention")
def attention(
    run: Interpreter, node: fx.Node, q: Value, k: Value, v: Value, mask: Any = None, *args: Any, **kwargs: Any
) -> Value:
    (*query_lead, queries, query), (*key_lead, keys, key) = q.axes, k.axes
    *value_lead, positions, value = v.axes
    shared = common(Value(query_lead), Value(key_lead), Value(value_lead))
    if kwargs.get("enable_gqa"):
        heads, groups = query_lead[-1], key_lead[-1]
        repeats = run.atoms.size(heads) // run.atoms.size(groups)
        copies = run.atoms.fresh(repeats, PERMUTATION)
        run.atoms.tie(heads, groups + copies, "grouped-query heads do not fit")
        run.atoms.tie(groups, value_lead[-1], "key and value heads do not fit")
        shared = [*common(*(Value(lead[:-1]) for lead in (query_lead, key_lead, value_lead))), groups]
        # The keys and values of a group are read by every copy, as if they had the axis of the copies.
        key_lead, value_lead = [*key_lead[:-1], heads], [*value_lead[:-1], heads]
    lead = run.broadcast(node, [Value(query_lead), Value(key_lead), Value(value_lead)], PERMUTATION)
    run.restrict_all(lead, PERMUTATION)
    run.atoms.tie(query, dual(key), "query and key do not fit")
    run.atoms.tie(keys, positions, "key and value positions do not fit")
    causal = kwargs.get("is_causal", args[1] if len(args) > 1 else False)
    for axis in (queries, keys):
        run.atoms.restrict(axis, FIXED if causal else PERMUTATION, "causal attention")
    if isinstance(mask, Value):
        run.restrict_all(mask, PERMUTATION)
        run.broadcast(node, [Value([*lead.axes, queries, keys]), mask], PERMUTATION)
    for inner in (query, keys, queries, value):
        run.parted([*shared, inner])
    scores = count_of(node) // shape_of(node)[-1] * input_shape(node, 1)[-2]
    run.count_macs(node, scores * (input_shape(node)[-1] + shape_of(node)[-1]))
    return Value([*lead.axes, queries, value])
