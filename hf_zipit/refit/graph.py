"""The exported forward pass as a list of nodes that can be run one at a time, and the places where weights are solved.

Running node by node lets all calibration micro-batches advance together: a module's weights are solved when it is
reached, and everything after it sees what the new weights give.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from hf_zipit.errors import SpecError
from hf_zipit.refit.forward_pass import forward_pass
from hf_zipit.symmetry.interpreter import tied_names
from hf_zipit.symmetry.ops import is_within, module_stack, op_name, overload, shape_of

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
    def unit_axis(self) -> int:
        """The weight's axis that holds the units of the output."""
        return {"embedding": 1, "offset": -1}.get(self.kind, 0)

    @property
    def channel_axis(self) -> int:
        """The output's axis that holds its units."""
        return 1 if self.kind == "conv" else -1

    @property
    def module(self) -> str:
        """The module that holds the weight; the weight itself where that is the whole model or an added parameter."""
        return self.weight if self.kind == "offset" else self.weight.rpartition(".")[0] or self.weight


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
    ) -> None:
        """`fields` are the outputs that count; a tensor tied to one of the `trunk` goes by its name there."""
        self._forward = forward_pass(model, inputs, fields)
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
            return getattr(self._forward.module, str(node.target))
        sizes = self.arguments(node) if merged else node

        def value(x: Any, size: Any) -> Any:
            if isinstance(x, fx.Node):
                if x.op != "placeholder":
                    return lookup(x)
                if x.name in self.tensors:
                    return tensors[self.tensors[x.name]]
                constants = self._forward.constants
                return constants[x.name] if x.name in constants else inputs.get(x.name)
            if isinstance(x, (list, tuple)):
                return type(x)(value(*pair) for pair in zip(x, size, strict=True))
            return size

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
    """The op without its writing into its argument: values are kept, and looked at later."""
    packet = getattr(target, "overloadpacket", None)
    name = str(packet).removeprefix("aten.") if packet is not None else ""
    if name.endswith("_") and not name.startswith("_"):
        plain = getattr(torch.ops.aten, name[:-1], None)
        if plain is not None:
            return plain
    return target if callable(target) else operator.itemgetter(0)


def find_sites(program: Program, trunk: frozenset[str], head: tuple[str, ...] = ()) -> dict[fx.Node, Site]:
    """The places in the trunk where weights are solved, by their node.

    A tensor that is used at several places has none: what is best at one would be wrong at the others. The use of a
    tied tensor in the `head` does not count, for each task keeps a copy there.
    """
    sites = {}
    for node in program.nodes:
        if node.op != "call_function" or any(is_within(path, own) for path in module_stack(node) for own in head):
            continue
        site = _site(program, node)
        if site is not None and site.weight in trunk:
            sites[node] = site
    uses = Counter(name for site in sites.values() for name in (site.weight, site.bias) if name)
    return {node: site for node, site in sites.items() if uses[site.weight] == 1 and uses.get(site.bias, 1) == 1}


def _site(program: Program, node: fx.Node) -> Site | None:
    name = op_name(node)
    args = node.args
    if name == "linear":
        return _writer(program, "linear", node, args[1], args[2] if len(args) > 2 else None, None)
    if name in {"conv1d", "conv2d", "conv3d"}:
        groups = args[6] if len(args) > 6 else node.kwargs.get("groups", 1)
        if name != "conv2d" or groups != 1:
            return None  # these keep the combined weights
        norm = _only_user(node)
        norm = norm if norm is not None and op_name(norm) == "batch_norm" else None
        return _writer(program, "conv", node, args[1], args[2] if len(args) > 2 else None, norm)
    if name == "embedding":
        return _writer(program, "embedding", node, args[0], None, None)
    if name == "layer_norm" and len(args) > 3 and args[2] is not None and args[3] is not None:
        weight, bias = program.tensor_of(args[2]), program.tensor_of(args[3])
        return Site("norm", node, weight, bias, None, node) if weight and bias and len(args[1]) == 1 else None
    if name == "add" and len(args) == 2 and not node.kwargs and overload(node) == "Tensor":
        for own, other in (args, args[::-1]):
            offset = program.tensor_of(own)
            floating = offset and own.meta["val"].is_floating_point()
            if floating and isinstance(other, fx.Node) and other.op != "placeholder":
                return Site("offset", node, offset, None, None, node, node, other)
    return None


def _writer(program: Program, kind: str, node: fx.Node, weight: Any, bias: Any, norm: fx.Node | None) -> Site | None:
    name = program.tensor_of(weight)
    if name is None:
        return None
    output = norm or node
    stream, other = _addition_behind(program, output)
    if kind != "embedding" and stream is not None and shape_of(stream) != shape_of(output):
        stream = other = None  # one row of the output is added to many of the stream
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
