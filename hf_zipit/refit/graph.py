"""The exported forward pass as a list of nodes that can be run one at a time, and the places where weights are solved.

Running node by node lets all calibration micro-batches advance together: a module's weights are solved when it is reached,
and everything after it sees what the new weights give.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from hf_zipit.symmetry.ops import op_name
from hf_zipit.symmetry.trace import export, is_within, module_stack

TRANSPARENT = {"dropout", "to", "_to_copy", "contiguous", "clone", "alias", "detach", "feature_dropout"}
"""Ops that pass their input on: a linear map followed by them still writes into the addition behind them."""


@dataclass(frozen=True)
class Site:
    """A place where weights are solved.

    Attributes:
        kind: `linear`, `conv`, `embedding`, `norm` (affine part of a norm) or `offset` (a parameter that is added).
        node: the op that has the weights.
        weight: the weight's name; bias: the bias's, if there is one.
        norm: the batch norm right behind a convolution, which is folded into it.
        output: the node whose value the weights make: the op itself or its norm.
        stream: for a writer into a residual stream the addition, and `other`, what the output is added to.
    """

    kind: str
    node: fx.Node
    weight: str
    bias: str | None
    norm: fx.Node | None
    output: fx.Node
    stream: fx.Node | None = None
    other: fx.Node | None = None

    @property
    def module(self) -> str:
        return self.weight.rpartition(".")[0] or self.weight


class Program:
    """A model's forward pass for inputs of one shape."""

    def __init__(self, model: nn.Module, inputs: Mapping[str, Tensor], fields: tuple[str, ...] | None) -> None:
        self._exported = export(model, inputs, fields)
        signature = self._exported.graph_signature
        named = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        self.tensors = {name: tensor.removeprefix("model.") for name, tensor in named.items()}
        self._constants = {
            name: self._exported.constants[constant]
            for name, constant in signature.inputs_to_lifted_tensor_constants.items()
        }
        self.nodes = [node for node in self._exported.graph.nodes if node.op in ("call_function", "get_attr")]
        self.position = {node: i for i, node in enumerate(self.nodes)}
        self.last_use = {
            used: i for i, node in enumerate(self.nodes) for used in node.all_input_nodes
        }  # later uses overwrite earlier ones
        fields_made = list(self._exported.call_spec.out_spec.context)
        output = next(node for node in self._exported.graph.nodes if node.op == "output")
        self.outputs = dict(zip(fields_made, output.args[0], strict=True))

    def tensor_of(self, node: Any) -> str | None:
        """The name of the parameter or buffer that a graph input is."""
        return self.tensors.get(node.name) if isinstance(node, fx.Node) and node.op == "placeholder" else None

    def run(
        self, node: fx.Node, lookup: Callable[[fx.Node], Any], tensors: Mapping[str, Tensor], inputs: Mapping[str, Any]
    ) -> Any:
        """The value of one node. `lookup` gives the values of earlier nodes."""
        if node.op == "get_attr":
            return getattr(self._exported.graph_module, str(node.target))

        def value(x: Any) -> Any:
            if isinstance(x, fx.Node):
                if x.op != "placeholder":
                    return lookup(x)
                if x.name in self.tensors:
                    return tensors[self.tensors[x.name]]
                return self._constants[x.name] if x.name in self._constants else inputs.get(x.name)
            if isinstance(x, (list, tuple)):
                return type(x)(value(item) for item in x)
            return x

        arguments = value(tuple(node.args))
        keywords = {key: value(x) for key, x in node.kwargs.items()}
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
    """The op without its writing into its argument: values are kept, and looked at later."""
    packet = getattr(target, "overloadpacket", None)
    name = str(packet).removeprefix("aten.") if packet is not None else ""
    if name.endswith("_") and not name.startswith("_"):
        plain = getattr(torch.ops.aten, name[:-1], None)
        if plain is not None:
            return plain
    return target if callable(target) else operator.itemgetter(0)


def find_sites(program: Program, trunk: frozenset[str]) -> dict[fx.Node, Site]:
    """The places in the trunk where weights are solved, by their node."""
    sites = {}
    for node in program.nodes:
        if node.op != "call_function":
            continue
        site = _site(program, node)
        if site is not None and site.weight in trunk:
            sites[node] = site
    return sites


def _site(program: Program, node: fx.Node) -> Site | None:
    name = op_name(node)
    args = node.args
    if name == "linear":
        return _writer(program, "linear", node, args[1], args[2] if len(args) > 2 else None, None)
    if name in {"conv1d", "conv2d", "conv3d"}:
        groups = args[6] if len(args) > 6 else node.kwargs.get("groups", 1)
        if name != "conv2d" or groups != 1:
            return None
        norm = _only_user(node)
        norm = norm if norm is not None and op_name(norm) == "batch_norm" else None
        return _writer(program, "conv", node, args[1], args[2] if len(args) > 2 else None, norm)
    if name == "embedding":
        return _writer(program, "embedding", node, args[0], None, None)
    if name == "layer_norm" and len(args) > 3 and args[2] is not None and args[3] is not None:
        weight, bias = program.tensor_of(args[2]), program.tensor_of(args[3])
        return Site("norm", node, weight, bias, None, node) if weight and len(args[1]) == 1 else None  # type: ignore[arg-type]
    if name == "add" and len(args) == 2:
        for own, other in (args, args[::-1]):
            offset = program.tensor_of(own)
            if offset and isinstance(other, fx.Node) and other.op != "placeholder":
                return Site("offset", node, offset, None, None, node, node, other)
    return None


def _writer(program: Program, kind: str, node: fx.Node, weight: Any, bias: Any, norm: fx.Node | None) -> Site | None:
    name = program.tensor_of(weight)
    if name is None:
        return None
    output = norm or node
    stream, other = _addition_behind(program, output)
    return Site(kind, node, name, program.tensor_of(bias), norm, output, stream, other)


def _only_user(node: fx.Node) -> fx.Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 else None


def _addition_behind(program: Program, node: fx.Node) -> tuple[fx.Node | None, fx.Node | None]:
    """The addition that a value goes straight into, and the other summand, if that is computed earlier."""
    current = node
    while (user := _only_user(current)) is not None:
        if op_name(user) in TRANSPARENT:
            current = user
            continue
        if op_name(user) != "add" or len(user.args) != 2:
            break
        other = next((x for x in user.args if x is not current), None)
        computed = isinstance(other, fx.Node) and program.position.get(other, 1 << 60) < program.position[node]
        return (user, other) if computed else (None, None)  # type: ignore[return-value]
    return None, None
