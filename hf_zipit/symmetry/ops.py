"""What the rules of `rules/` share: values, the registry of ops, broadcasting, and ops without a rule.

A rule takes the interpreter, the node and the values of its arguments (a `Value` for every tensor) and returns the
value(s) of its result. It ties axes that must move together and restricts the symmetry of what it touches:

- an elementwise nonlinearity, or a product of two vectors unit by unit, allows permutations only;
- a linear map or a contraction allows any invertible map, and puts its two sides in duality;
- a norm without its affine part allows orthogonal maps (LayerNorm: those that keep the vector of ones);
- a rotary embedding, which is several ops (`rotary.py`), allows turns of its pairs of units;
- an index, a slice, a concatenation, an input or an output fixes the axis it works along;
- an op that has no rule fixes everything it touches. Unknown is always safe.

A rule whose op mixes or renumbers an axis must also say so (`Interpreter.parted`): units of other axes can no longer
have a basis of their own for each of its units.

Source: ours; the rules are checked by `proof.prove`, which runs a randomly transformed model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from torch import fx

from hf_zipit.symmetry.atoms import Axis
from hf_zipit.symmetry.spaces import Symmetry

if TYPE_CHECKING:
    from hf_zipit.symmetry.trace import Interpreter

FIXED, PERMUTATION, LINEAR = Symmetry.FIXED, Symmetry.PERMUTATION, Symmetry.LINEAR
ONES, ORTHOGONAL, ROTARY = Symmetry.ORTHOGONAL_ONES, Symmetry.ORTHOGONAL, Symmetry.ROTARY


class Value:
    """The axes of one tensor."""

    __slots__ = ("axes",)

    def __init__(self, axes: Iterable[Axis]) -> None:
        self.axes = list(axes)


Rule = Callable[..., Any]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a function as the rule of ops, by their names without overload and in-place mark."""

    def register(function: Rule) -> Rule:
        for name in names:
            if name in RULES:
                raise ValueError(f"two rules for the op {name}")
            RULES[name] = function
        return function

    return register


def op_name(node: fx.Node) -> str:
    """`aten.add_.Tensor` -> `add`."""
    name = _packet(node)
    return name if name.startswith("_") else name.rstrip("_")


def overload(node: fx.Node) -> str:
    """`aten.add_.Tensor` -> `Tensor`."""
    return str(node.target).rpartition(".")[2]


def is_in_place(node: fx.Node) -> bool:
    return _packet(node).endswith("_") and not _packet(node).endswith("__")


def _packet(node: fx.Node) -> str:
    return str(node.target).removeprefix("aten.").split(".")[0]


def shape_of(node: fx.Node) -> list[int]:
    return list(node.meta["val"].shape)


def input_shape(node: fx.Node, argument: int = 0) -> list[int]:
    """The shape of a tensor argument."""
    return shape_of(node.args[argument])  # type: ignore[arg-type]


def restrict_all(run: Interpreter, value: Value, symmetry: Symmetry, reason: str | None = None) -> None:
    for axis in value.axes:
        run.atoms.restrict(axis, symmetry, reason)


def fresh_like(run: Interpreter, node: fx.Node, symmetry: Symmetry, reason: str | None = None) -> Value:
    return Value(run.atoms.fresh(n, symmetry, reason) for n in shape_of(node))


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


def broadcast(run: Interpreter, node: fx.Node, values: Sequence[Value], stretched: Symmetry) -> Value:
    """Tie the axes of operands that are broadcast against each other.

    `stretched` is what an axis is allowed along which another operand is only repeated: adding one number to every
    unit keeps fewer symmetries than adding a vector, multiplying by one number keeps all.
    """
    rank = max((len(v.axes) for v in values), default=0)
    padded = [[()] * (rank - len(v.axes)) + v.axes for v in values]
    out: list[Axis] = []
    for present in zip(*padded, strict=True):
        full = [axis for axis in present if axis]
        for other in full[1:]:
            run.atoms.tie(full[0], other, f"the op {op_name(node)} combines axes that do not fit")
        if full and len(full) < len(present):
            run.atoms.restrict(full[0], stretched)
        out.append(full[0] if full else ())
    return Value(out)


def unknown(run: Interpreter, node: fx.Node, *args: Any, **kwargs: Any) -> Any:
    """Fix everything that an op without a rule touches, and remember its name for the report."""
    name = str(node.target)
    reason = f"the op {name} is not known"
    run.unknown(node, name)

    def freeze(x: Any) -> None:
        if isinstance(x, Value):
            restrict_all(run, x, FIXED, reason)
        elif isinstance(x, (list, tuple)):
            for item in x:
                freeze(item)

    def result(meta: Any) -> Any:
        if isinstance(meta, (list, tuple)):
            return tuple(result(item) for item in meta)
        if hasattr(meta, "shape"):
            return Value(run.atoms.fresh(n, FIXED, reason) for n in meta.shape)
        return meta

    freeze(args)
    freeze(tuple(kwargs.values()))
    return result(node.meta.get("val"))
