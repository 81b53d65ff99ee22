"""From a model to its `MergeSpec`: export the forward pass, walk the graph, name what was found.

`torch.export` gives a flat ATen graph on fake tensors: no weight is copied and no arithmetic is done. Every axis of
every parameter starts as one atom (`atoms.py`); the rule of every op (`ops.py`) ties and restricts atoms; what is left
at the end are the spaces, their symmetries, and the axis labels (`naming.py`).
"""

from __future__ import annotations

import logging
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from transformers.pytorch_utils import Conv1D

from hf_zipit.errors import SpecError
from hf_zipit.symmetry import ops, rules
from hf_zipit.symmetry.atoms import Atoms, Axis
from hf_zipit.symmetry.folding import find_folds
from hf_zipit.symmetry.naming import Naming
from hf_zipit.symmetry.ops import Value, op_name, shape_of
from hf_zipit.symmetry.rotary import Rotation, find_rotations, rotate
from hf_zipit.symmetry.spaces import Fold, Place, Symmetry, Trace

LEAVES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding, Conv1D)
"""Modules whose input and output are exactly those of the one op they call, so that a hook sees what the rule saw."""


class _Fields(nn.Module):
    """Returns the wanted output tensors of a model as a dict, whatever type the model returns."""

    def __init__(self, model: nn.Module, fields: Sequence[str] | None) -> None:
        super().__init__()
        self.model = model
        self.fields = fields

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        return select_outputs(self.model(**inputs), self.fields)


def select_outputs(out: Any, fields: Sequence[str] | None) -> dict[str, Tensor]:
    """The output tensors that count: the named fields, else `logits` where there are any, else every tensor."""
    if isinstance(out, Tensor):
        return {"output": out}
    named = dict(out.items()) if isinstance(out, Mapping) else {str(i): x for i, x in enumerate(out)}
    if fields is None:
        fields = ["logits"] if "logits" in named else [k for k, v in named.items() if isinstance(v, Tensor)]
    return {name: named[name] for name in fields if isinstance(named.get(name), Tensor)}


@dataclass
class Use:
    """One op that consumes a tensor: in which module, and where."""

    module: str
    place: Place


class Interpreter:
    """Walks an exported graph with the rules of `ops.py`. One instance, one graph."""

    def __init__(
        self,
        model: nn.Module,
        towers: Sequence[Sequence[str]],
        head: Sequence[str],
        rotations: Mapping[fx.Node, Rotation],
    ) -> None:
        self.atoms = Atoms()
        self.rotations = rotations
        self.steps = {step for rotation in rotations.values() for step in rotation.steps}
        self.squares: set[fx.Node] = set()
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.ties = {name: group for group in tied_names(model) for name in group}
        self.towers = towers
        self.head = head
        self.start = Place((-1,) * len(towers))
        self.reached = list(self.start.blocks)
        self.tensors: dict[str, Value] = {}
        self.uses: dict[str, list[Use]] = defaultdict(list)
        self.seen: list[tuple[Axis, ...]] = []
        self.readers: list[tuple[str, int, Axis, fx.Node]] = []
        self.writers: list[tuple[str, int, Axis]] = []
        self.held: list[Axis] = []
        self.order: dict[str, None] = {}
        self.macs: Counter[str] = Counter()
        self.unknown_ops: dict[str, dict[str, None]] = defaultdict(dict)
        self.crossings: list[tuple[str, Value, Place, Place, tuple[str, ...]]] = []
        self._place: dict[fx.Node, Place] = {}
        self._tensor_of: dict[fx.Node, str] = {}

    # What the rules call back ---------------------------------------------------------------------------------------

    def stack_of(self, node: fx.Node) -> tuple[str, ...]:
        return module_stack(node)

    def module_of(self, node: fx.Node) -> str:
        return (self.stack_of(node) or ("",))[-1]

    def count_macs(self, node: fx.Node, macs: int) -> None:
        self.macs[self.module_of(node)] += int(macs)

    def parted(self, *groups: Sequence[Axis]) -> None:
        """Axes of different groups met here under numbers of their own.

        A unit of one can no longer have a basis for each unit of another, even where the same space shows up again
        later: a sum over heads forgets which head a number came from.
        """
        self.seen += [tuple(axes) for axes in groups]

    def reads(self, node: fx.Node, axis: Axis, position: int, argument: int = 0) -> None:
        module = self.module_of(node)
        if isinstance(self.modules.get(module), LEAVES):
            self.readers.append((module, position, axis, node.args[argument]))  # type: ignore[arg-type]

    def writes(self, node: fx.Node, axis: Axis, position: int) -> None:
        self.held.append(axis)
        module = self.module_of(node)
        if isinstance(self.modules.get(module), LEAVES):
            self.writers.append((module, position, axis))

    def unknown(self, node: fx.Node, name: str) -> None:
        self.unknown_ops[name][self.module_of(node)] = None

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
            value = Value(self.atoms.fresh(n, allowed) for n in shape)
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
                if node in self.steps:  # its rotation, which comes last, is seen as a whole
                    values[node] = None
                elif rotation := self.rotations.get(node):
                    values[node] = rotate(self, node, *map(lookup, (rotation.x, rotation.cos, rotation.sin)))
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
            return node.meta.get("val")  # arithmetic on sizes
        function = rules.RULES.get(op_name(node), ops.unknown)
        try:
            return function(self, node, *args, **kwargs)
        except (IndexError, TypeError, KeyError, ValueError, AttributeError) as error:
            # A rule that meets arguments it was not written for must not be trusted with them.
            logging.getLogger(__name__).debug("rule for %s failed: %s", node.target, error)
            return ops.unknown(self, node, *args, **kwargs)

    def _note_place(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> None:
        """Where this op stands, which tensors it uses there, and which values it takes over from another place."""
        stack = self.stack_of(node)
        module = self.module_of(node)
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
        for source, made in zip(sources, parents, strict=True):
            if made != place and source not in self._tensor_of and isinstance(values[source], Value):
                self.crossings.append((source.name, values[source], made, place, stack))

    def _alias(self, tensor: str, module: str) -> str:
        """Under which of its names a tied tensor is used here; export keeps only one name for all its uses."""
        return next((name for name in self.ties.get(tensor, ()) if name.rpartition(".")[0] == module), tensor)


def module_stack(node: fx.Node) -> tuple[str, ...]:
    """Paths of the modules an op runs in, outermost first; the model itself is the empty path."""
    stack = (node.meta.get("nn_module_stack") or {}).values()
    return tuple(re.sub(r"@\d+", "", path).removeprefix("model").removeprefix(".") for path, _ in stack)


def is_within(path: str, prefix: str) -> bool:
    return path == prefix or path.startswith(f"{prefix}.")


def _touches_tensor(args: Iterable[Any], kwargs: Mapping[str, Any]) -> bool:
    def has(x: Any) -> bool:
        return isinstance(x, Value) or (isinstance(x, (list, tuple)) and any(map(has, x)))

    return has(tuple(args)) or has(tuple(kwargs.values()))


def export(model: nn.Module, inputs: Mapping[str, Tensor], fields: Sequence[str] | None) -> Any:
    """The exported program of one forward pass in eval mode, on fake tensors.

    Raises:
        SpecError: if `torch.export` cannot trace the model with these inputs.
    """
    training = {name: module.training for name, module in model.named_modules()}
    model.eval()
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.export(_Fields(model, fields).eval(), (), kwargs=dict(inputs), strict=False)
    except Exception as error:  # torch.export raises many kinds
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise SpecError(
            f"{type(model).__name__} could not be traced with inputs {sorted(inputs)} ({first}); "
            "pass example inputs that its forward accepts: MergeSpec.from_model(model, inputs={...})"
        ) from error
    finally:
        for name, module in model.named_modules():
            module.training = training[name]


def tied_names(model: nn.Module) -> list[list[str]]:
    """Groups of names of parameters and buffers that are one tensor."""
    groups: dict[int, list[str]] = defaultdict(list)
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in named:
        groups[id(tensor)].append(name)
    return [names for names in groups.values() if len(names) > 1]


def trace(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    *,
    towers: Sequence[Sequence[str]] = (),
    head: Sequence[str] = (),
    fields: Sequence[str] | None = None,
    features: Sequence[str] = (),
    folding: bool = False,
) -> Trace:
    """Infer a model's `MergeSpec`.

    Args:
        model: any module; its weights are not read.
        inputs: example keyword inputs. Sizes do not matter, but the batch should be larger than one.
        towers: chains of block paths, each in execution order.
        head: path prefixes of the task head.
        fields: output fields that count; see `select_outputs`.
        features: output fields that may change basis, because the merged model reads them through U_t.
        folding: whether to infer what holds once the norms are folded (`Trace.folds`). Norms whose space gains nothing
            by it are left as they are.

    Raises:
        SpecError: if the model cannot be traced.
    """
    program = export(model, inputs, fields)
    signature = program.graph_signature
    named = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    nodes = program.graph.nodes
    tensor_of = {n: named[n.name].removeprefix("model.") for n in nodes if n.op == "placeholder" and n.name in named}
    module_of = {node: (module_stack(node) or ("",))[-1] for node in nodes}
    folds = tuple(find_folds(program.graph, tensor_of, module_of, model)) if folding else ()
    rotations = find_rotations(program.graph)
    while True:
        found = _walk(program, tensor_of, model, inputs, towers, head, features, folds, rotations)
        useful = tuple(norm for norm in folds if _rotates(norm, found))
        if useful == folds:
            return replace(found, folds=folds)
        folds = useful


def _rotates(norm: Fold, found: Trace) -> bool:
    """Whether the space that a norm runs over allows more than permutations."""
    labels = (found.axes[reader.weight][reader.axis] for reader in norm.readers)
    return all(label and found.spaces[label[-1].space].symmetry > Symmetry.PERMUTATION for label in labels)


def _walk(
    program: Any,
    tensor_of: Mapping[fx.Node, str],
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    towers: Sequence[Sequence[str]],
    head: Sequence[str],
    features: Sequence[str],
    folds: Sequence[Fold],
    rotations: Mapping[fx.Node, Rotation],
) -> Trace:
    """What the graph says, the scales of `folds` being ones."""
    run = Interpreter(model, towers, head, rotations)
    constants = program.graph_signature.inputs_to_lifted_tensor_constants
    ones = {norm.weight for norm in folds}
    values: list[Any] = []
    for node in program.graph.nodes:
        if node.op != "placeholder":
            continue
        tensor = tensor_of.get(node)
        reason = f"the model's input {node.name}" if tensor is None and node.name not in constants else "a constant"
        values.append(run.bind_ones(node, tensor) if tensor in ones else run.bind(node, tensor, reason))
    results = run.run(program.graph, values, program.graph_module)
    names = list(program.call_spec.out_spec.context)
    outputs = dict(zip(names, [r for r in results if isinstance(r, Value)], strict=True))
    for name, value in outputs.items():
        for i, axis in enumerate(value.axes):
            if name not in features or i == 0:
                run.atoms.restrict(axis, Symmetry.FIXED, f"the model's output {name}")
    batch = next(iter(inputs.values())).shape[0]
    return Naming(run, model).spec(towers, head, outputs, samples=batch)
