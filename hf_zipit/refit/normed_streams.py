"""Residual streams that are what a norm puts out, as in post-LN models, and that nearly allow rotations.

In a post-LN model (BERT) a norm's output is the stream itself: linear layers read it, and the next addition does. Its
scale, one number a unit, belongs to the units, so that only reordering them leaves the function exactly as it is. But
scales hardly differ within a layer. Were they all alike, every rotation that keeps the vector of ones would do. How
much they differ is measured where a basis is chosen (`stream_basis.py`); here is told which streams nothing else keeps
from being rotated.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import fx

from hf_zipit.planning.cut import Cut
from hf_zipit.refit.program import Program
from hf_zipit.symmetry.folding import passes
from hf_zipit.symmetry.ops import is_within, module_stack, op_name, overload, shape_of
from hf_zipit.symmetry.spaces import Reader
from hf_zipit.symmetry.spec import AxisLabel, Factor, MergeSpec, product_key


def normed_streams(
    program: Program, spec: MergeSpec, cut: Cut, names: Iterable[str]
) -> Iterator[tuple[str, tuple[Reader, ...]]]:
    """Of some spaces those of a stream that norms put out, each with the linear layers that read it."""
    layer_norms = [node for node in program.nodes if op_name(node) == "layer_norm" and len(node.args) > 2]
    scales = {spec.axes.get(program.tensor_of(node.args[2]) or "") for node in layer_norms}
    for name in names:
        if ((Factor(name),),) not in scales:
            continue
        labels = [label for tensor in cut.trunk for label in spec.axes.get(tensor, ()) if name in product_key(label)]
        if all(len(label) == 1 for label in labels):
            readers = _NormedStream(program, spec, name).readers()
            if readers:
                yield name, readers


class _NormedStream:
    """A walk over the values that hold one space's units on their last axis."""

    def __init__(self, program: Program, spec: MergeSpec, name: str) -> None:
        self.program, self.spec, self.size = program, spec, spec.spaces[name].size
        self.units: AxisLabel = (Factor(name),)
        self.read: AxisLabel = (Factor(name, dual=True),)
        self.normed: dict[fx.Node, bool] = {}  # of every value that holds the units: whether it comes from a norm
        self.found: dict[str, Reader] = {}

    def readers(self) -> tuple[Reader, ...]:
        """The linear layers behind the norms; none if anything else but norms and additions sees the units."""
        for node in self.program.nodes:
            in_head = any(is_within(path, own) for path in module_stack(node) for own in self.spec.head)
            if node.op == "call_function" and not in_head and not self._follow(node):
                return ()
        return tuple(self.found.values())

    def _follow(self, node: fx.Node) -> bool:
        """Note what an op does with the units; False if it would stop them from being rotated."""
        name, args = op_name(node), node.args
        source = args[0] if args and isinstance(args[0], fx.Node) else None
        if name in ("linear", "embedding"):
            weight = self.program.tensor_of(args[1 if name == "linear" else 0])
            labels = self.spec.axes.get(weight or "", ())
            if source in self.normed:
                if not self.normed[source] or len(labels) != 2 or labels[1] != self.read:
                    return False
                self.found[weight] = Reader("", weight, None, 1)  # type: ignore[index,arg-type]
            if len(labels) == 2 and labels[0 if name == "linear" else 1] == self.units:
                self.normed[node] = False
            return True
        if self.normed.keys().isdisjoint(node.all_input_nodes):
            return True
        if name == "layer_norm" and source in self.normed:
            self.normed[node] = self._holds_units(args[2] if len(args) > 2 else None)
            return self.normed[node] and len(args[1]) == 1  # type: ignore[arg-type]
        if name == "add" and len(args) == 2 and not node.kwargs and overload(node) == "Tensor":
            self.normed[node] = False
            return all(x in self.normed or self._holds_units(x) for x in args)
        scaled = name == "mul" and source in self.normed and _is_one_number_a_row(args[1])
        if scaled or passes(node, self.normed, self.size):
            self.normed[node] = self.normed[source]  # type: ignore[index]
            return True
        return False

    def _holds_units(self, x: Any) -> bool:
        """Whether an argument is a tensor of the model whose last axis holds the units."""
        labels = self.spec.axes.get(self.program.tensor_of(x) or "", ())
        return bool(labels) and labels[-1] == self.units


def _is_one_number_a_row(x: Any) -> bool:
    return isinstance(x, (int, float)) or (isinstance(x, fx.Node) and shape_of(x)[-1:] == [1])
