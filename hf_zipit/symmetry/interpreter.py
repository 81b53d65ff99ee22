"""The interpreter: walks an exported graph, with one rule per op, and keeps what the rules found.

Every axis of every parameter starts as one atom (`atoms.py`). The rules (`rules/`) tie and restrict atoms through the
methods of the first part; what is left at the end are the spaces, which `naming.py` names.
"""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn
from transformers.pytorch_utils import Conv1D

from hf_zipit.errors import SpecError
from hf_zipit.symmetry.atoms import Atoms, Axis
from hf_zipit.symmetry.ops import (
    NUMBERED,
    Pattern,
    Rule,
    Value,
    is_within,
    known_size,
    module_of,
    module_stack,
    op_name,
    shape_of,
)
from hf_zipit.symmetry.spaces import Place, Symmetry

LEAVES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding, Conv1D)
"""Modules whose input and output are those of the one op they call, so that a hook sees what the rule saw.

But for a class of theirs that turns the axes before it and after it (Parakeet's head).
"""


@dataclass
class Use:
    """One op that consumes a tensor: in which module, and where."""

    module: str
    place: Place


@dataclass(frozen=True)
class Read:
    """An axis that a module reads.

    Attributes:
        module, position: which of its input's axes it is.
        axis: the axis.
        others: the input's other axes, whose units are rows of what is observed there.
        source: what the module reads.
    """

    module: str
    position: int
    axis: Axis
    others: tuple[Axis, ...]
    source: fx.Node


class Interpreter:
    """Walks an exported graph. One instance, one graph.

    Args:
        model: whose forward pass it is.
        towers: chains of block paths, each in execution order.
        head: path prefixes of the task head.
        rules: by the name of the op.
        patterns: what finds ops that are one thing.
    """

    def __init__(
        self,
        model: nn.Module,
        towers: Sequence[Sequence[str]],
        head: Sequence[str],
        rules: Mapping[str, Rule],
        patterns: Sequence[Pattern],
    ) -> None:
        self.atoms = Atoms()
        self.rules = rules
        self.patterns = patterns
        self.squares: set[fx.Node] = set()
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.ties = {name: group for group in tied_names(model) for name in group}
        self.configured = {
            f"{path}.{name}".removeprefix(".")
            for path, module in self.modules.items()
            for name in module._non_persistent_buffers_set
        }
        self.towers = towers
        self.head = head
        self.start = Place((-1,) * len(towers))
        self.reached = list(self.start.blocks)
        self.tensors: dict[str, Value] = {}
        self.uses: dict[str, list[Use]] = defaultdict(list)
        self.seen: list[tuple[Axis, ...]] = []
        self.chosen: list[tuple[tuple[Axis, ...], Axis]] = []
        self.loose: list[tuple[Axis, Axis]] = []
        self.readers: list[Read] = []
        self.writers: list[tuple[str, int, Axis, tuple[Axis, ...]]] = []
        self.held: list[Axis] = []
        self.order: dict[str, None] = {}
        self.macs: Counter[str] = Counter()
        self.unknown_ops: dict[str, dict[str, None]] = defaultdict(dict)
        self.crossings: list[tuple[fx.Node, Value, Place, Place, tuple[str, ...]]] = []
        self.given: dict[str, dict[fx.Node, None]] = defaultdict(dict)
        self._place: dict[fx.Node, Place] = {}
        self._tensor_of: dict[fx.Node, str] = {}

    # What the rules call --------------------------------------------------------------------------------------------

    def restrict_all(self, value: Value, symmetry: Symmetry, reason: str | None = None) -> None:
        """Allow every axis of a value at most `symmetry`."""
        for axis in value.axes:
            self.atoms.restrict(axis, symmetry, reason)

    def fix_numbers(self, x: Any, reason: str) -> None:
        """Fix the units whose numbers a value, or one in a list of values, holds."""
        if isinstance(x, Value) and x.names:
            self.atoms.restrict(x.names, Symmetry.FIXED, reason)
        elif isinstance(x, (list, tuple)):
            for item in x:
                self.fix_numbers(item, reason)

    def choose(self, axes: Sequence[Axis], names: Axis, ordered: bool) -> Value:
        """The numbers of units that were chosen for every place on some axes.

        What has all these axes knows of every row which unit it was chosen for, and may have a basis for each of
        them. Unless they are `ordered`, the places on the last axis stand in no order that can be relied on.
        """
        self.chosen.append((tuple(axes), names))
        if not ordered:
            self.loose.append((axes[-1], names))
        return Value(axes, names)

    def close(self) -> None:
        """Fix what was chosen in no order, where an order matters after all."""
        for places, units in self.loose:
            if any(self.atoms.symmetry(ref) < Symmetry.PERMUTATION for ref in self.atoms.resolve(places)):
                self.atoms.restrict(units, Symmetry.FIXED, "its units are chosen in no certain order")
        self.atoms.close()

    def fresh_like(self, node: fx.Node, symmetry: Symmetry, reason: str | None = None) -> Value:
        """New axes of the sizes that an op puts out."""
        return Value(self.atoms.fresh(n, symmetry, reason) for n in shape_of(node))

    def broadcast(self, node: fx.Node, values: Sequence[Value], stretched: Symmetry) -> Value:
        """The result of an op on operands that are broadcast against each other; their axes are tied.

        `stretched` is what an axis is allowed along which another operand is only repeated: adding one number to every
        unit keeps fewer symmetries than adding a vector, multiplying by one number keeps all.
        """
        rank = max((len(v.axes) for v in values), default=0)
        padded = [[()] * (rank - len(v.axes)) + v.axes for v in values]
        out: list[Axis] = []
        for present in zip(*padded, strict=True):
            full = [axis for axis in present if axis]
            for other in full[1:]:
                self.atoms.tie(full[0], other, f"the op {op_name(node)} combines axes that do not fit")
            if full and len(full) < len(present):
                self.atoms.restrict(full[0], stretched)
            out.append(full[0] if full else ())
        return Value(out)

    def unknown(self, node: fx.Node, *args: Any, **kwargs: Any) -> Any:
        """The result of an op without a rule: fixed, as is everything that it touches. Its name is kept to report."""
        name = str(node.target)
        reason = f"the op {name} is not known"
        self.unknown_ops[name][module_of(node)] = None

        def freeze(x: Any) -> None:
            if isinstance(x, Value):
                self.restrict_all(x, Symmetry.FIXED, reason)
            elif isinstance(x, (list, tuple)):
                for item in x:
                    freeze(item)

        def result(meta: Any) -> Any:
            if isinstance(meta, (list, tuple)):
                return tuple(result(item) for item in meta)
            if hasattr(meta, "shape"):
                return Value(self.atoms.fresh(known_size(n), Symmetry.FIXED, reason) for n in meta.shape)
            return meta

        freeze([*args, *kwargs.values()])
        self.fix_numbers([*args, *kwargs.values()], reason)
        return result(node.meta.get("val"))

    def count_macs(self, node: fx.Node, macs: int) -> None:
        """Add to the multiply-accumulates of the module that an op runs in."""
        self.macs[module_of(node)] += int(macs)

    def parted(self, *groups: Sequence[Axis]) -> None:
        """Axes of different groups met here under numbers of their own.

        A unit of one can no longer have a basis for each unit of another, even where the same space shows up again
        later: a sum over heads forgets which head a number came from.
        """
        self.seen += [tuple(axes) for axes in groups]

    def reads(self, node: fx.Node, x: Value, position: int, argument: int = 0) -> None:
        """Note that an op reads an axis of x, which is its `argument`, where it can be observed."""
        module, source = module_of(node), node.args[argument]
        if isinstance(self.modules.get(module), LEAVES) and not _turned_in(module, source):
            axes = list(x.axes)
            axis = axes.pop(position)
            self.readers.append(Read(module, position, axis, tuple(axes), source))  # type: ignore[arg-type]

    def writes(self, node: fx.Node, axis: Axis, position: int, others: Sequence[Axis]) -> None:
        """Note that an op puts out an axis, at a position, where it can be observed; other axes are its rows."""
        self.held.append(axis)
        module = module_of(node)
        if isinstance(self.modules.get(module), LEAVES) and not any(_turned_in(module, user) for user in node.users):
            self.writers.append((module, position, axis, tuple(others)))

    # The walk -------------------------------------------------------------------------------------------------------

    def bind(self, node: fx.Node, tensor: str | None, reason: str = "") -> Value:
        """The axes of a graph input: those of a named parameter or buffer, or fixed ones of the model's own inputs."""
        fake = node.meta.get("val")
        shape = list(getattr(fake, "shape", []))
        if tensor is None:
            return Value(self.atoms.fresh(n, Symmetry.FIXED, reason) for n in shape)
        if tensor not in self.tensors:
            # Integers and masks can be reordered at most.
            allowed = Symmetry.LINEAR if fake.is_floating_point() else Symmetry.PERMUTATION
            why = None
            if tensor in self.configured:  # all experts have the same, and a merged model makes it again
                allowed, why = Symmetry.FIXED, "a buffer that follows from the configuration"
            value = Value(self.atoms.fresh(n, allowed, why) for n in shape)
            self.tensors |= dict.fromkeys(self.ties.get(tensor, [tensor]), value)
        self._tensor_of[node] = tensor
        return self.tensors[tensor]

    def bind_ones(self, node: fx.Node, tensor: str) -> float:
        """A folded norm's scale. To the walk it is the number one; merged, it stays as it is."""
        value = Value(self.atoms.fresh(n, Symmetry.FIXED, "a folded norm has ones") for n in shape_of(node))
        self.tensors |= dict.fromkeys(self.ties.get(tensor, [tensor]), value)
        self._tensor_of[node] = tensor
        return 1.0

    def run(self, graph: fx.Graph, inputs: Sequence[Any], owner: nn.Module) -> Any:
        """Interpret a graph whose placeholders hold `inputs`; returns the values of its output."""
        values: dict[fx.Node, Any] = {}
        placeholders = iter(inputs)
        matches = {match.node: match for find in self.patterns for match in find(graph)}
        steps = {step for match in matches.values() for step in match.steps}

        def lookup(x: Any) -> Any:
            if isinstance(x, fx.Node):
                return values[x]
            if isinstance(x, (list, tuple)):
                return [lookup(item) for item in x]
            return x

        for node in graph.nodes:
            if node.op == "placeholder":
                values[node] = next(placeholders)
                self._place.setdefault(node, self.start)
            elif node.op == "get_attr":
                values[node] = getattr(owner, str(node.target))
                self._place[node] = self.start
                if isinstance(values[node], Tensor):
                    values[node] = self.bind(node, None, "a constant")
            elif node.op == "output":
                self.output_places = [self._place.get(n, self.start) for n in node.args[0]]  # type: ignore[union-attr]
                return lookup(node.args[0])
            else:
                self._note_place(node, values)
                if node in steps:  # the match, whose node comes last, is seen as a whole
                    values[node] = None
                elif match := matches.get(node):
                    values[node] = match.rule(self, node, *map(lookup, match.arguments))
                else:
                    kwargs = {name: lookup(value) for name, value in node.kwargs.items()}
                    values[node] = self._apply(node, lookup(node.args), kwargs)
                for value in values[node] if isinstance(values[node], tuple) else (values[node],):
                    if isinstance(value, Value):
                        self.seen.append(tuple(value.axes))
        raise SpecError("the exported graph has no output; please report this model")

    def _apply(self, node: fx.Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        target = str(node.target)
        if "getitem" in target and isinstance(args[0], (list, tuple)):
            return args[0][args[1]]
        if "wrap_with" in target:  # a subgraph under no_grad or autocast
            at = next(i for i, arg in enumerate(args) if isinstance(arg, nn.Module))
            inner = args[at].graph
            for placeholder, outer in zip(
                (n for n in inner.nodes if n.op == "placeholder"), node.args[at + 1 :], strict=True
            ):
                if isinstance(outer, fx.Node):
                    self._place[placeholder] = self._place[outer]
                    if outer in self._tensor_of:
                        self._tensor_of[placeholder] = self._tensor_of[outer]
            return tuple(self.run(inner, args[at + 1 :], args[at]))
        if not _touches_tensor(args, kwargs) and not hasattr(node.meta.get("val"), "shape"):
            return known_size(node.meta.get("val"))  # arithmetic on sizes
        rule = self.rules.get(op_name(node), Interpreter.unknown)
        if op_name(node) not in NUMBERED:
            self.fix_numbers([*args, *kwargs.values()], f"the op {op_name(node)} reads the numbers of its units")
        try:
            return rule(self, node, *args, **kwargs)
        except (IndexError, TypeError, KeyError, ValueError, AttributeError) as error:
            # A rule that meets arguments it was not written for must not be trusted with them.
            logging.getLogger(__name__).debug("rule for %s failed: %s", node.target, error)
            return self.unknown(node, *args, **kwargs)

    def _note_place(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> None:
        """Where this op stands, which tensors it uses there, and which values it takes over from another place."""
        stack = module_stack(node)
        module = module_of(node)
        sources = [n for n in node.all_input_nodes if n in self._place]
        parents = [self._place[n] for n in sources]
        # Where there is one tower, what runs after a block belongs after it, even if it does not depend on it.
        earliest = self.reached if len(self.towers) == 1 else self.start.blocks
        blocks = [max(column) for column in zip(earliest, *(p.blocks for p in parents), strict=True)]
        for tower, paths in enumerate(self.towers):
            for i, path in enumerate(paths):
                if is_within(module, path):
                    blocks[tower] = max(blocks[tower], i)
        self.reached = blocks
        in_head = any(is_within(module, prefix) for prefix in self.head)
        used = [self._alias(self._tensor_of[n], module) for n in node.all_input_nodes if n in self._tensor_of]
        direct = any(tensor in self.head for tensor in used)  # a bare parameter of the head, such as logit_scale
        place = Place(tuple(blocks), in_head or direct or any(p.head for p in parents))
        self._place[node] = place
        if used:
            self.order[module] = None
        for tensor in used:
            self.uses[tensor].append(Use(module, place))
        for source in sources:
            if source in self._tensor_of or not isinstance(values[source], Value):
                continue
            origin, reading = handed_on(source, stack)
            if self._place[origin] != place:
                self.crossings.append((origin, values[source], self._place[origin], place, reading))
            for path in {*reading} - {*module_stack(origin)}:
                self.given[path][origin] = None

    def _alias(self, tensor: str, module: str) -> str:
        """Under which of its names a tied tensor is used here; export keeps only one name for all its uses."""
        return next((name for name in self.ties.get(tensor, ()) if name.rpartition(".")[0] == module), tensor)


def _turned_in(module: str, node: Any) -> bool:
    """Whether a module turns axes by an op."""
    return isinstance(node, fx.Node) and op_name(node) in ("transpose", "permute") and module_of(node) == module


def handed_on(source: fx.Node, stack: tuple[str, ...]) -> tuple[fx.Node, tuple[str, ...]]:
    """The value that an op reads, and those of the modules around it that surely are given it.

    A cast to the type that a tensor has hands on that tensor. In an exported graph all that read the tensor later read
    the cast, wherever that was made: a block whose norm casts its input adds the cast to its stream.
    """
    while op_name(source) in ("to", "type_as") and isinstance(given := source.args[0], fx.Node):
        cast = module_stack(source)
        if source.meta["val"].dtype != given.meta["val"].dtype or module_stack(given)[: len(cast)] == cast:
            break  # what a module made itself it can only have returned
        if stack[: len(cast)] != cast:  # cast within another module: only what contains both is surely given it
            stack = tuple(own for own, other in zip(stack, cast, strict=False) if own == other)
        source = given
    return source, stack


def _touches_tensor(args: Iterable[Any], kwargs: Mapping[str, Any]) -> bool:
    def has(x: Any) -> bool:
        return isinstance(x, Value) or (isinstance(x, (list, tuple)) and any(map(has, x)))

    return has(tuple(args)) or has(tuple(kwargs.values()))


def tied_names(model: nn.Module) -> list[list[str]]:
    """Groups of names of parameters and buffers that are one tensor."""
    groups: dict[int, list[str]] = defaultdict(list)
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in named:
        groups[id(tensor)].append(name)
    return [names for names in groups.values() if len(names) > 1]
