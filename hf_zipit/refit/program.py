"""The exported forward pass of a model as a list of ops that can be run one at a time.

Running op by op lets all calibration micro-batches advance together: a module's weights are solved when it is reached,
and everything after it sees what the new weights give. The ops are remembered, for similar models and inputs of the
same shapes have the same.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Hashable, Iterable, Iterator, KeysView, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn

from hf_zipit.adapters.auto import forward_names
from hf_zipit.adapters.signature import grids
from hf_zipit.errors import SpecError
from hf_zipit.maps.products import merged_length
from hf_zipit.maps.space_map import Alignment
from hf_zipit.modeling.head_dims import cut_heads
from hf_zipit.modeling.trunk import resize
from hf_zipit.refit.rewrites import rewrite
from hf_zipit.steady import forget
from hf_zipit.symmetry.interpreter import tied_names
from hf_zipit.symmetry.memory import Memory, trace_key
from hf_zipit.symmetry.ops import is_in_place, is_within, module_stack, op_name
from hf_zipit.symmetry.spec import MergeSpec, product_key
from hf_zipit.symmetry.trace import export

VIEWS = {"view", "reshape", "slice", "select", "transpose", "permute", "t", "unsqueeze", "squeeze", "expand", "narrow",
         "numpy_T", "movedim"}  # fmt: skip
"""Ops whose result shares memory with their input, so that writing into it writes into the input."""


@dataclass(frozen=True)
class ForwardPass:
    """The ops of a forward pass for inputs of one shape. No value is ever written into.

    Attributes:
        nodes: in the order they run.
        tensors: by graph input the parameter or buffer that it is, by the name under which the graph reads it.
        constants: by graph input a tensor that the model's code makes.
        outputs: by output field the node that makes it.
        module: has what `get_attr` nodes name.
    """

    nodes: list[fx.Node]
    tensors: Mapping[str, str]
    constants: Mapping[str, Tensor]
    outputs: Mapping[str, fx.Node]
    module: fx.GraphModule


FORWARD_PASSES: Memory[ForwardPass] = Memory()


def forward_pass(model: nn.Module, inputs: Mapping[str, Tensor], fields: tuple[str, ...] | None) -> ForwardPass:
    """The forward pass of a model; `fields` are the outputs that count.

    Raises:
        SpecError: if the model cannot be traced, or writes into a part of a tensor that another view of it shows.
    """
    kinds = tuple((x.dtype, x.device) for x in (*model.parameters(), *model.buffers()))
    known = grids(inputs)  # a part of the graph
    shapes = tuple(sorted((n, repr(x.tolist()) if n in known else _shape(x)) for n, x in inputs.items()))
    return FORWARD_PASSES.get(trace_key(model, kinds, shapes, fields), lambda: _made(model, inputs, fields))


def _shape(x: Any) -> Hashable:
    """What a trace knows of an input: of a switch, such as `use_cache`, all."""
    return (tuple(x.shape), str(x.dtype)) if isinstance(x, Tensor) else repr(x)


def _made(model: nn.Module, inputs: Mapping[str, Tensor], fields: tuple[str, ...] | None) -> ForwardPass:
    off = {"use_cache": False} if "use_cache" in forward_names(model) else {}  # of no use here, as in a merge
    exported = export(model, {**inputs, **off}, fields)
    signature = exported.graph_signature
    named = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    constants = signature.inputs_to_lifted_tensor_constants
    output = next(node for node in exported.graph.nodes if node.op == "output")
    fixed = {name: exported.constants[constant] for name, constant in constants.items()}
    rewrite(exported.graph, fixed)
    nodes = [node for node in exported.graph.nodes if node.op in ("call_function", "get_attr")]
    if mapped := next((node for node in nodes if getattr(node.target, "__name__", "") == "_add_batch_dim"), None):
        raise SpecError(f"{module_of(mapped)} maps a function over axes (vmap), which refit cannot follow")
    nodes = known_beforehand(nodes, fixed)
    return ForwardPass(
        _read_what_was_written(nodes),
        {name: tensor.removeprefix("model.") for name, tensor in named.items()},
        fixed,
        dict(zip(list(exported.call_spec.out_spec.context), output.args[0], strict=True)),
        exported.graph_module,
    )


@dataclass(frozen=True, eq=False)
class Known:
    """An op that puts out what it always does."""

    value: Any

    def __call__(self) -> Any:
        return self.value

    def __eq__(self, other: object) -> bool:
        same = torch.equal if isinstance(self.value, Tensor) else operator.eq
        return isinstance(other, Known) and type(self.value) is type(other.value) and same(self.value, other.value)

    def __hash__(self) -> int:
        return hash(type(self.value))


@torch.no_grad()
def known_beforehand(nodes: list[fx.Node], constants: Mapping[str, Tensor]) -> list[fx.Node]:
    """The nodes but for those that neither inputs nor weights have a part in, where these write into parts of others.

    A class that makes an index of relative positions writes it piece by piece. What other nodes read of it becomes
    `Known`, as it is when the first of them does.
    """
    alone = set[fx.Node]()
    for node in nodes:
        if node.op == "call_function" and all(x in alone or x.name in constants for x in node.all_input_nodes):
            alone.add(node)
    if not any(is_in_place(node) and op_name(node.args[0]) in VIEWS for node in alone):  # type: ignore[arg-type]
        return nodes
    values: dict[fx.Node, Any] = {}
    kept = list[fx.Node]()
    for node in nodes:
        if node in alone:
            args, kwargs = fx.map_arg(
                (node.args, node.kwargs), lambda x: values[x] if x in values else constants[x.name].clone()
            )
            values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
            continue
        for used in node.all_input_nodes:
            if used in values and used not in kept:
                value = values[used]
                used.target = Known(value.clone() if isinstance(value, Tensor) else value)
                used.args, used.kwargs = (), {}
                kept.append(used)
        kept.append(node)
    return kept


def _read_what_was_written(nodes: list[fx.Node]) -> list[fx.Node]:
    """The nodes, those among them that put a part in its place: after `x.add_(y)` every later reader of x reads the
    result instead, and after `x[:, i].add_(y)` all of x with that part in it.
    """
    position = {node: i for i, node in enumerate(nodes)}
    kept, parts = list[fx.Node](), set[fx.Node]()
    for node in nodes:
        kept.append(node)
        if not is_in_place(node):
            continue

        def later(base: fx.Node, at: int = position[node]) -> list[fx.Node]:
            return [user for user in base.users if position.get(user, len(nodes)) > at]

        def stale(base: fx.Node, own: Sequence[fx.Node], at: int = position[node]) -> bool:
            part = next((view for view in own if view in base.users), None)
            views = [user for user in base.users if _is_view(user) and position.get(user, at) < at and user not in own]
            return any((later(view) or stale(view, own)) and not _apart(view, part) for view in views)

        bases, written = list(written_through(node)), node
        if any(stale(base, bases) for base in bases) or not parts.isdisjoint(bases):
            raise _cannot_follow(node)
        while len(bases) > 1 and not later(bases[-1]):
            bases.pop()
        parts.update([node] if len(bases) > 1 else [])
        for part, base in zip((None, *bases), bases, strict=False):
            if part is not None:
                written = _with_part(base, part, written)
                position[written] = position[node]
                kept.append(written)
            for user in later(base):
                user.replace_input_with(base, written)
    return kept


def _with_part(base: fx.Node, view: fx.Node, part: fx.Node) -> fx.Node:
    """A node after `part` that puts out a value with what a view shows of it replaced.

    Raises:
        SpecError: it is a kind of view that is not known.
    """
    aten, name, settings = torch.ops.aten, op_name(view), view.args[1:]
    with part.graph.inserting_after(part):
        if name == "slice":
            made = part.graph.call_function(aten.slice_scatter.default, (base, part, *settings))
        elif name == "select":
            made = part.graph.call_function(aten.select_scatter.default, (base, part, *settings))
        elif name == "transpose":
            made = part.graph.call_function(aten.transpose.int, (part, *settings))
        elif name == "unsqueeze":
            made = part.graph.call_function(aten.squeeze.dim, (part, *settings))
        else:
            raise _cannot_follow(part)
    made.meta = {**part.meta, "val": base.meta["val"]}
    return made


def _apart(one: fx.Node, other: fx.Node | None) -> bool:
    """Whether two views of a value are known to show different parts of it."""
    if other is None or op_name(one) != op_name(other) or op_name(one) not in ("select", "slice"):
        return False
    (axis, *place), (other_axis, *other_place) = one.args[1:], other.args[1:]
    if axis != other_axis or not all(isinstance(x, int) and x >= 0 for x in (*place, *other_place)):
        return False
    if op_name(one) == "select":
        return place != other_place
    return len(place) == len(other_place) == 2 and (place[1] <= other_place[0] or other_place[1] <= place[0])


def _cannot_follow(node: fx.Node) -> SpecError:
    return SpecError(f"{node.target} in {module_of(node)} writes into a part of a tensor, which refit cannot follow")


def _is_view(node: fx.Node) -> bool:
    return node.op == "call_function" and op_name(node) in VIEWS


def module_of(node: fx.Node) -> str:
    """The path of the innermost module that an op runs in."""
    return (module_stack(node) or ("",))[-1] or "the model itself"


def written_through(node: fx.Node) -> Iterator[fx.Node]:
    """What an in-place op writes into: its argument, and what that is a view of."""
    base = node.args[0]
    while isinstance(base, fx.Node):
        yield base
        base = base.args[0] if _is_view(base) else None


@dataclass(frozen=True)
class Arguments:
    """What an op is given: nodes stand for their values, numbers are sizes and settings."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


class Program:
    """A model's forward pass for inputs of one shape.

    Attributes:
        nodes: the ops in the order they run; `position` is each one's place in it.
        tensors: by graph input the name of the parameter or buffer that it is.
        tied: by name of a tied tensor the one that it goes by here.
        last_use: by node the position of the last op that reads it.
        outputs: by output field the node that makes it.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Mapping[str, Tensor],
        fields: tuple[str, ...] | None,
        trunk: frozenset[str] = frozenset(),
        device: torch.device | str = "cpu",
    ) -> None:
        """`fields` are the outputs that count; a tensor tied to one of the `trunk` goes by its name there.

        The forward pass is traced on the CPU, and runs on `device`, whatever device it names.
        """
        self._forward = forward_pass(model, inputs, fields)
        self.device = torch.device(device)
        self._constants = {name: tensor.to(device) for name, tensor in self._forward.constants.items()}
        # The graph reads tied tensors under one of their names, which may be that of a head's own copy.
        self.tied = {
            other: next((name for name in group if name in trunk), other)
            for group in tied_names(model)
            for other in group
        }
        self.tensors = {name: self.tied.get(tensor, tensor) for name, tensor in self._forward.tensors.items()}
        self.nodes = self._forward.nodes
        self.position = {node: i for i, node in enumerate(self.nodes)}
        self.last_use = {
            used: i for i, node in enumerate(self.nodes) for used in node.all_input_nodes
        }  # later uses overwrite earlier ones
        self.outputs = self._forward.outputs
        self._merged: dict[fx.Node, Arguments] = {}
        self._made_of_weights = set[fx.Node]()
        for node in self.nodes:
            used = node.all_input_nodes
            if used and all(x in self._made_of_weights or x.name in self.tensors for x in used):
                self._made_of_weights.add(node)

    @property
    def inputs(self) -> set[fx.Node]:
        """What the ops read that none of them makes: parameters, buffers and the model's inputs."""
        return {used for node in self.nodes for used in node.all_input_nodes if used.op == "placeholder"}

    def tensor_of(self, node: Any) -> str | None:
        """The name of the parameter or buffer that a graph input is."""
        return self.tensors.get(node.name) if isinstance(node, fx.Node) and node.op == "placeholder" else None

    def arguments_in(self, other: Program) -> dict[fx.Node, Arguments]:
        """For every op what the same op has in the program of a model with other sizes.

        Raises:
            SpecError: if that model does not run the same ops.
        """
        if [node.target for node in self.nodes] != [node.target for node in other.nodes]:
            raise SpecError("the wider merged model runs other ops than its experts, which refit cannot follow")
        return {node: other.arguments(twin) for node, twin in zip(self.nodes, other.nodes, strict=True)}

    def adopt(self, arguments: Mapping[fx.Node, Arguments]) -> None:
        """Know the sizes that are written down in the ops of the merged model (`view(x, [8, 17, 96])`)."""
        self._merged |= arguments

    def arguments(self, node: fx.Node) -> Arguments:
        """What an op has in the merged model."""
        return self._merged.get(node) or Arguments(node.args, node.kwargs)

    def run(
        self,
        node: fx.Node,
        lookup: Callable[[fx.Node], Any],
        tensors: Mapping[str, Tensor],
        inputs: Mapping[str, Any],
        merged: bool = False,
    ) -> Any:
        """The value of one node. `lookup` gives the values of earlier nodes; `merged`: with the sizes adopted."""
        if node.op == "placeholder":
            return self.value_of(node, tensors, inputs)
        if node.op == "get_attr":
            found = getattr(self._forward.module, str(node.target))
            return found.to(self.device) if isinstance(found, Tensor) else found
        sizes = self.arguments(node) if merged else node

        def value(x: Any, size: Any) -> Any:
            if isinstance(x, fx.Node):
                if x.op != "placeholder":
                    return lookup(x)
                if x.name in self.tensors:
                    return tensors[self.tensors[x.name]]
                return self._constants[x.name] if x.name in self._constants else inputs.get(x.name)
            if isinstance(x, (list, tuple)):
                return type(x)(value(*pair) for pair in zip(x, size, strict=True))
            return self.device if isinstance(x, torch.device) else size

        arguments = value(tuple(node.args), tuple(sizes.args))
        keywords = {key: value(x, sizes.kwargs[key]) for key, x in node.kwargs.items()}
        if op_name(node) == "_assert_scalar" and not arguments[0]:
            raise SpecError(
                f"which way is taken through {module_of(node)} depends on the samples, which refit cannot follow"
            )
        found = out_of_place(node.target)(*arguments, **keywords)
        return found.to(self.device) if isinstance(node.target, Known) and isinstance(found, Tensor) else found

    def behind(self, start: Iterable[fx.Node]) -> set[fx.Node]:
        """The ops that depend on some nodes, without these."""
        first = set(start)
        reached = set(first)
        for node in self.nodes:
            if not reached.isdisjoint(node.all_input_nodes):
                reached.add(node)
        return reached - first

    @staticmethod
    def before(end: Iterable[fx.Node]) -> KeysView[fx.Node]:
        """Some nodes, and all that they are made from, the last one first."""
        found, todo = dict[fx.Node, None](), list(end)
        while todo:
            node = todo.pop()
            if node not in found:
                found[node] = None
                todo += node.all_input_nodes
        return found.keys()

    def made_of_weights(self, node: fx.Node) -> list[fx.Node]:
        """The ops before a node that no input has a part in: they make its weights, in the order they run."""
        found, todo = set[fx.Node](), list(node.all_input_nodes)
        while todo:
            current = todo.pop()
            if current in self._made_of_weights and current not in found:
                found.add(current)
                todo += current.all_input_nodes
        return sorted(found, key=self.position.__getitem__)

    def value_of(self, node: fx.Node, tensors: Mapping[str, Tensor], inputs: Mapping[str, Any]) -> Any:
        """What a node gives, computed from the model's inputs alone."""
        if node.op == "placeholder":
            if node.name in self.tensors:
                return tensors[self.tensors[node.name]]
            return self._constants[node.name] if node.name in self._constants else inputs.get(node.name)
        return self.run(node, lambda used: self.value_of(used, tensors, inputs), tensors, inputs)

    def value_read_by(self, module: str, rank: int) -> fx.Node | None:
        """The first tensor of at least `rank` axes that enters a module from outside."""
        for node in self.nodes:
            if any(is_within(path, module) for path in module_stack(node)):
                for used in node.all_input_nodes:
                    inside = any(is_within(path, module) for path in module_stack(used))
                    if not inside and used.op != "placeholder" and used.meta["val"].dim() >= rank:
                        return used
        return None


def out_of_place(target: Any) -> Callable[..., Any]:
    """The op without its writing into its argument: values are kept, and read again later."""
    if target is torch.ops.aten.view.default:  # of a value that may lie otherwise in memory than in the trace
        return torch.ops.aten.reshape.default
    if target is torch.ops.aten.copy_.default:  # whose plain form has no derivative
        return _copied
    packet = getattr(target, "overloadpacket", None)
    name = str(packet).removeprefix("aten.") if packet is not None else ""
    if name.endswith("_") and not name.startswith("_"):
        plain = getattr(torch.ops.aten, name[:-1], None)
        if plain is not None:
            return plain
    return target if callable(target) else operator.itemgetter(0)


def _copied(into: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """What `into` is after `source` was copied into it."""
    return source.to(into).expand_as(into)


Model = TypeVar("Model", bound=nn.Module)


def resized_copy(
    model: Model,
    shapes: Mapping[str, list[int]],
    head_dims: Mapping[str, int],
    rotary_pairs: Mapping[str, Sequence[int]] | None = None,
) -> Model:
    """A copy with other shapes and heads; the tensors whose shapes stay are the model's own."""
    tensors = [*model.parameters(), *model.buffers()]
    forget(model)  # what it keeps is of its own weights
    other = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    resize(other, dict(shapes))
    cut_heads(other, head_dims, rotary_pairs)
    return other


def merged_shapes(spec: MergeSpec, alignment: Alignment) -> dict[str, list[int]]:
    """The shapes of all tensors that have a space of another size in the merged model, those of the branches too."""
    resized = {name for name, space_map in alignment.items() if space_map.size != spec.spaces[name].size}
    return {
        name: [merged_length(label, alignment, spec) for label in labels]
        for name, labels in spec.axes.items()
        if any(name in resized for label in labels for name in product_key(label))
    }
