"""What rules are made with: values, the registries of rules and patterns, and what a node of a graph says.

A rule takes the interpreter, the node and the values of its arguments (a `Value` for every tensor) and returns the
value(s) of its result. It ties axes that must move together and restricts the symmetry of what it touches:

- an elementwise nonlinearity, or a product of two vectors unit by unit, allows permutations only;
- a linear map or a contraction allows any invertible map, and puts its two sides in duality;
- a norm without its affine part allows orthogonal maps (LayerNorm: those that keep the vector of ones);
- a slice or a concatenation makes its axis a direct sum, whose terms move apart;
- an index, an input or an output fixes the axis it works along;
- an op that has no rule fixes everything it touches. Unknown is always safe.

A rule whose op mixes or renumbers an axis must also say so (`Interpreter.parted`): units of other axes can no longer
have a basis of their own for each of its units.

A *pattern* finds several ops that are one thing, such as a rotary embedding, and names the rule of the whole.

Source: ours; the rules are checked by `proof.prove`, which runs a randomly transformed model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import fx

from hf_zipit.symmetry.atoms import Axis
from hf_zipit.symmetry.spaces import Symmetry

FIXED, PERMUTATION, LINEAR = Symmetry.FIXED, Symmetry.PERMUTATION, Symmetry.LINEAR
ONES, ORTHOGONAL = Symmetry.ORTHOGONAL_ONES, Symmetry.ORTHOGONAL
HALF_TURNS, ROTARY, NEIGHBOURS = Symmetry.HALF_TURNS, Symmetry.ROTARY, Symmetry.ROTARY_NEIGHBOURS


class Value:
    """The axes of one tensor; of one that holds numbers of units, what a router chose, also the axis of those units.

    Such numbers change with the order of the units. Only the rules of `NUMBERED` know that: what any other op makes
    of them fixes the units.
    """

    __slots__ = ("axes", "names")

    def __init__(self, axes: Iterable[Axis], names: Axis | None = None) -> None:
        self.axes = list(axes)
        self.names = names


Rule = Callable[..., Any]


@dataclass(frozen=True)
class Match:
    """Several ops that are one thing.

    Attributes:
        node: the op that puts out the result.
        rule: the rule of the whole; it gets `node`.
        arguments: what it is made of.
        steps: the ops in between, which nothing else reads.
    """

    node: fx.Node
    rule: Rule
    arguments: tuple[fx.Node, ...]
    steps: tuple[fx.Node, ...]


Pattern = Callable[[fx.Graph], Iterator[Match]]

RULES: dict[str, Rule] = {}
"""By the names of ops, without overload and in-place mark."""

NUMBERED: set[str] = set()
"""The names of ops whose rules know numbers of units (`Value.names`)."""

PATTERNS: list[Pattern] = []


def rule(*names: str, numbered: bool = False) -> Callable[[Rule], Rule]:
    """Register a function as the rule of ops, which knows numbers of units or does not.

    Raises ValueError if one of the ops has a rule.
    """

    def register(function: Rule) -> Rule:
        NUMBERED.update(names if numbered else ())
        for name in names:
            if name in RULES:
                raise ValueError(f"two rules for the op {name}")
            RULES[name] = function
        return function

    return register


def pattern(function: Pattern) -> Pattern:
    """Register a function that finds ops that are one thing."""
    PATTERNS.append(function)
    return function


def op_name(node: fx.Node) -> str:
    """`aten.add_.Tensor` -> `add`."""
    name = _packet(node)
    return name if name.startswith("_") else name.rstrip("_")


def overload(node: fx.Node) -> str:
    """`aten.add_.Tensor` -> `Tensor`."""
    return str(node.target).rpartition(".")[2]


INTEGERS = "integers"
"""Under this name a node of a constant holds what that is, a list of integers."""

MOST_INTEGERS = 64
"""A longer list is no choice of parts."""


def neighbours(index: fx.Node) -> range | None:
    """The units that an index reads, where it is a constant list of neighbours in their order, `x[:, [-2]]`.

    They are counted from the end if they are negative.
    """
    while op_name(index) in ("lift_fresh_copy", "lift_fresh", "to", "clone", "detach"):
        if any(map(is_in_place, index.users)):
            return None
        index = index.args[0]  # type: ignore[assignment]
    found = index.meta.get(INTEGERS) or [0]
    units = range(found[0], found[0] + len(found))
    known = INTEGERS in index.meta and found == [*units] and (units.start >= 0 or units.stop <= 0)
    return units if known else None


def is_in_place(node: fx.Node) -> bool:
    return _packet(node).endswith("_") and not _packet(node).endswith("__")


def _packet(node: fx.Node) -> str:
    return str(node.target).removeprefix("aten.").split(".")[0]


DATA_DEPENDENT = 840
"""Stands for every size that depends on what is in a tensor (the number of true elements of a mask): it is divided by
what such sizes are divided by, and no parameter has such an axis."""


def known_size(size: Any) -> Any:
    """An integer, where a size is one or depends on data; else the same."""
    if not isinstance(size, torch.SymInt):
        return size
    expression = size.node.expr
    return int(expression.subs(dict.fromkeys(expression.free_symbols, DATA_DEPENDENT)))


def shape_of(node: fx.Node) -> list[int]:
    return [known_size(size) for size in node.meta["val"].shape]


def count_of(node: fx.Node) -> int:
    """How many numbers a node puts out."""
    return prod(shape_of(node))


def input_shape(node: fx.Node, argument: int = 0) -> list[int]:
    """The shape of a tensor argument."""
    return shape_of(node.args[argument])  # type: ignore[arg-type]


def dims(dim: int | Sequence[int] | None, rank: int) -> list[int]:
    """The axes that a `dim` argument means, counted from the front; all of them for None and for an empty list."""
    if dim is None or (isinstance(dim, Sequence) and not dim):
        return list(range(rank))
    return sorted({d % rank for d in ([dim] if isinstance(dim, int) else dim)}) if rank else []


def without(x: Value, positions: Iterable[int]) -> list[Axis]:
    """The axes of a value but those at `positions`, counted from the front."""
    left_out = set(positions)
    return [axis for i, axis in enumerate(x.axes) if i not in left_out]


def common(*values: Value) -> list[Axis]:
    """The axes that all values have, at the same place counted from the back: those an op pairs unit by unit."""
    columns = zip(*(reversed(value.axes) for value in values), strict=False)
    return [column[0] for column in columns if all(column)]


def module_stack(node: fx.Node) -> tuple[str, ...]:
    """Paths of the modules an op runs in, outermost first; the model itself is the empty path."""
    stack = (node.meta.get("nn_module_stack") or {}).values()
    return tuple(re.sub(r"@\d+", "", path).removeprefix("model").removeprefix(".") for path, _ in stack)


def module_of(node: fx.Node) -> str:
    """Path of the innermost module an op runs in."""
    return (module_stack(node) or ("",))[-1]


def is_within(path: str, prefix: str) -> bool:
    return path == prefix or path.startswith(f"{prefix}.")
