"""The exported forward pass of a model as a list of ops that can be run one at a time.

Running op by op lets all calibration micro-batches advance together: a module's weights are solved when it is reached,
and everything after it sees what the new weights give. The ops are remembered, for similar models and inputs of the
same shapes have the same.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn

from hf_zipit.errors import SpecError
from hf_zipit.maps.products import merged_length
from hf_zipit.maps.space_map import Alignment
from hf_zipit.modeling.head_dims import cut_heads
from hf_zipit.modeling.trunk import resize
from hf_zipit.symmetry.interpreter import tied_names
from hf_zipit.symmetry.memory import Memory, trace_key
from hf_zipit.symmetry.ops import is_in_place, is_within, module_stack, op_name
from hf_zipit.symmetry.spec import MergeSpec, product_key
from hf_zipit.symmetry.trace import export

VIEWS = {"view", "reshape", "slice", "select", "transpose", "permute", "t", "unsqueeze", "squeeze", "expand", "narrow"}
"""Ops whose result shares memory with their input, so that writing into it writes into the input."""


FLAT = {"view", "reshape"}
"""Ops that make rows of positions, and positions of rows."""


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
        SpecError: if the model cannot be traced, or writes into a part of a tensor that is read as a whole later.
    """
    kinds = tuple((x.dtype, x.device) for x in (*model.parameters(), *model.buffers()))
    shapes = tuple(sorted((name, _shape(x)) for name, x in inputs.items()))
    return FORWARD_PASSES.get(trace_key(model, kinds, shapes, fields), lambda: _made(model, inputs, fields))


def _shape(x: Any) -> Hashable:
    """What a trace knows of an input: of a switch, such as `use_cache`, all."""
    return (tuple(x.shape), str(x.dtype)) if isinstance(x, Tensor) else repr(x)


def _made(model: nn.Module, inputs: Mapping[str, Tensor], fields: tuple[str, ...] | None) -> ForwardPass:
    exported = export(model, inputs, fields)
    signature = exported.graph_signature
    named = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    constants = signature.inputs_to_lifted_tensor_constants
    output = next(node for node in exported.graph.nodes if node.op == "output")
    linear_maps_of_rows(exported.graph)
    nodes = [node for node in exported.graph.nodes if node.op in ("call_function", "get_attr")]
    _read_what_was_written(nodes)
    return ForwardPass(
        nodes,
        {name: tensor.removeprefix("model.") for name, tensor in named.items()},
        {name: exported.constants[constant] for name, constant in constants.items()},
        dict(zip(list(exported.call_spec.out_spec.context), output.args[0], strict=True)),
        exported.graph_module,
    )


def turned_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A linear map whose weight is `[inputs, outputs]`."""
    return torch.addmm(bias, x.flatten(0, -2), weight).unflatten(0, x.shape[:-1])


def linear_maps_of_rows(graph: fx.Graph) -> None:
    """`view(addmm(bias, view(x, [-1, d]), weight), [..., k])`, transformers' Conv1D, is one op: `turned_linear`."""
    for node in list(graph.nodes):
        rows = node.args[1] if node.op == "call_function" and op_name(node) == "addmm" and not node.kwargs else None
        whole = next(iter(node.users), None)
        if not isinstance(rows, fx.Node) or op_name(rows) not in FLAT or whole is None or len(node.users) != 1:
            continue
        bias, _, weight = node.args
        x = rows.args[0]
        before, flat, made, after = (list(value.meta["val"].shape) for value in (x, rows, node, whole))
        if op_name(whole) not in FLAT or after != [*before[:-1], made[-1]] or before[-1:] != flat[1:]:
            continue
        with graph.inserting_before(node):
            linear = graph.call_function(turned_linear, (x, weight, bias))
        linear.meta = {**node.meta, "val": whole.meta["val"]}
        whole.replace_all_uses_with(linear)
        for old in (whole, node, rows):
            if not old.users:
                graph.erase_node(old)


def _read_what_was_written(nodes: list[fx.Node]) -> None:
    """After `x.add_(y)` every later reader of x reads the result instead."""
    position = {node: i for i, node in enumerate(nodes)}
    for node in filter(is_in_place, nodes):
        for base in written_through(node):
            later = [user for user in base.users if position.get(user, len(nodes)) > position[node]]
            if later and base is not node.args[0]:
                raise SpecError(
                    f"{node.target} in {module_of(node)} writes into a part of a tensor, which refit cannot follow"
                )
            for user in later:
                user.replace_input_with(base, node)


def module_of(node: fx.Node) -> str:
    """The path of the innermost module that an op runs in."""
    return (module_stack(node) or ("",))[-1] or "the model itself"


def written_through(node: fx.Node) -> Iterator[fx.Node]:
    """What an in-place op writes into: its argument, and what that is a view of."""
    base = node.args[0]
    while isinstance(base, fx.Node):
        yield base
        base = base.args[0] if base.op == "call_function" and op_name(base) in VIEWS else None


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
        self._device = torch.device(device)
        self._constants = {name: tensor.to(device) for name, tensor in self._forward.constants.items()}
        # The graph reads tied tensors under one of their names, which may be that of a head's own copy.
        names = {
            other: next((name for name in group if name in trunk), other)
            for group in tied_names(model)
            for other in group
        }
        self.tensors = {name: names.get(tensor, tensor) for name, tensor in self._forward.tensors.items()}
        self.nodes = self._forward.nodes
        self.position = {node: i for i, node in enumerate(self.nodes)}
        self.last_use = {
            used: i for i, node in enumerate(self.nodes) for used in node.all_input_nodes
        }  # later uses overwrite earlier ones
        self.outputs = self._forward.outputs
        self._merged: dict[fx.Node, Arguments] = {}

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
        if node.op == "get_attr":
            found = getattr(self._forward.module, str(node.target))
            return found.to(self._device) if isinstance(found, Tensor) else found
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
            return self._device if isinstance(x, torch.device) else size

        arguments = value(tuple(node.args), tuple(sizes.args))
        keywords = {key: value(x, sizes.kwargs[key]) for key, x in node.kwargs.items()}
        return out_of_place(node.target)(*arguments, **keywords)

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
    packet = getattr(target, "overloadpacket", None)
    name = str(packet).removeprefix("aten.") if packet is not None else ""
    if name.endswith("_") and not name.startswith("_"):
        plain = getattr(torch.ops.aten, name[:-1], None)
        if plain is not None:
            return plain
    return target if callable(target) else operator.itemgetter(0)


Model = TypeVar("Model", bound=nn.Module)


def resized_copy(
    model: Model,
    shapes: Mapping[str, list[int]],
    head_dims: Mapping[str, int],
    rotary_pairs: Mapping[str, Sequence[int]] | None = None,
) -> Model:
    """A copy with other shapes and heads; the tensors whose shapes stay are the model's own."""
    tensors = [*model.parameters(), *model.buffers()]
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
