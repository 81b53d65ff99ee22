"""Where in a program weights are solved: at single ops, and MLPs by their units. Attention has a file of its own."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from hf_zipit.refit.program import Program, turned_linear
from hf_zipit.symmetry.ops import is_within, module_stack, op_name, overload, shape_of
from hf_zipit.symmetry.spec import MergeSpec, product_key

TRANSPARENT = {"dropout", "to", "_to_copy", "contiguous", "clone", "alias", "detach", "feature_dropout"}
"""Ops that pass their input on: a linear map followed by them still writes into the addition behind them."""


@dataclass(frozen=True)
class RefitSite:
    """A place where weights are solved.

    Attributes:
        kind: `linear`, `conv`, `embedding`, `norm` (affine part of a norm) or `offset` (a parameter that is added).
        node: the op that has the weights.
        weight: the weight's name; bias: the bias's, if there is one.
        norm: the batch norm right behind a convolution, which is folded into it.
        output: the node whose value the weights make: the op itself or its norm.
        stream: for a writer into a residual stream the addition, and `other`, what the output is added to.
        scale: what the output is multiplied by before, a number or a parameter with one for every unit (layer scale).
        turned: whether a linear map's weight is `[inputs, outputs]`.
    """

    kind: str
    node: fx.Node
    weight: str
    bias: str | None
    norm: fx.Node | None
    output: fx.Node
    stream: fx.Node | None = None
    other: fx.Node | None = None
    scale: fx.Node | float | None = None
    turned: bool = False

    @property
    def unit_axis(self) -> int:
        """The weight's axis that holds the units of the output."""
        return {"embedding": 1, "offset": -1}.get(self.kind, int(self.turned))

    @property
    def input_axis(self) -> int:
        """The axis of a linear map's weight that holds the units of its input."""
        return 1 - self.unit_axis

    @property
    def channel_axis(self) -> int:
        """The output's axis that holds its units."""
        return 1 if self.kind == "conv" else -1

    @property
    def module(self) -> str:
        """The module that holds the weight; the weight itself where that is the whole model or an added parameter."""
        return self.weight if self.kind == "offset" else self.weight.rpartition(".")[0] or self.weight


def find_sites(program: Program, trunk: frozenset[str], head: tuple[str, ...] = ()) -> dict[fx.Node, RefitSite]:
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


def _site(program: Program, node: fx.Node) -> RefitSite | None:
    name = op_name(node)
    args = node.args
    if name == "linear" or node.target is turned_linear:
        return _writer(program, "linear", node, args[1], _bias(args), None, turned=node.target is turned_linear)
    if name in {"conv1d", "conv2d", "conv3d"}:
        groups = args[6] if len(args) > 6 else node.kwargs.get("groups", 1)
        if name != "conv2d" or groups != 1:
            return None  # these keep the combined weights
        norm = _only_user(node)
        norm = norm if norm is not None and op_name(norm) == "batch_norm" else None
        return _writer(program, "conv", node, args[1], _bias(args), norm)
    if name == "embedding":
        return _writer(program, "embedding", node, args[0], None, None)
    if name == "layer_norm" and len(args) > 3 and args[2] is not None and args[3] is not None:
        weight, bias = program.tensor_of(args[2]), program.tensor_of(args[3])
        return RefitSite("norm", node, weight, bias, None, node) if weight and bias and len(args[1]) == 1 else None
    if name == "add" and len(args) == 2 and not node.kwargs and overload(node) == "Tensor":
        for own, other in (args, args[::-1]):
            offset = program.tensor_of(own)
            floating = offset and own.meta["val"].is_floating_point()
            if floating and isinstance(other, fx.Node) and other.op != "placeholder":
                return RefitSite("offset", node, offset, None, None, node, node, other)
    return None


def _bias(args: Sequence[Any]) -> Any:
    """The bias of an op that may have one as its third argument."""
    return args[2] if len(args) > 2 else None


def _writer(
    program: Program, kind: str, node: fx.Node, weight: Any, bias: Any, norm: fx.Node | None, turned: bool = False
) -> RefitSite | None:
    name = program.tensor_of(weight)
    if name is None:
        return None
    output = norm or node
    stream, other, scale = _addition_behind(program, output, kind == "linear")
    if kind != "embedding" and stream is not None and shape_of(stream) != shape_of(output):
        stream = other = scale = None  # one row of the output is added to many of the stream
    return RefitSite(kind, node, name, program.tensor_of(bias), norm, output, stream, other, scale, turned)


def _only_user(node: fx.Node) -> fx.Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 else None


def _addition_behind(
    program: Program, node: fx.Node, scales: bool
) -> tuple[fx.Node | None, fx.Node | None, fx.Node | float | None]:
    """The addition that a value goes straight into, the other summand if that is computed earlier, and the scale.

    `scales`: whether the value may be multiplied by one on its way.
    """
    current, scale = node, None
    while (user := _only_user(current)) is not None:
        if op_name(user) in TRANSPARENT:
            current = user
            continue
        if scales and scale is None and (scale := _scale(program, user, current)) is not None:
            current = user
            continue
        if op_name(user) != "add" or len(user.args) != 2:
            break
        other = next((x for x in user.args if x is not current), None)
        computed = isinstance(other, fx.Node) and program.position.get(other, 1 << 60) < program.position[node]
        return (user, other, scale) if computed else (None, None, None)  # type: ignore[return-value]
    return None, None, None


def _scale(program: Program, product: fx.Node, factor: fx.Node) -> fx.Node | float | None:
    """What a product multiplies a factor by, if that is a number or a parameter with one for every unit."""
    if op_name(product) != "mul" or len(product.args) != 2:
        return None
    other = next((x for x in product.args if x is not factor), None)
    if isinstance(other, (int, float)) and other:
        return float(other)
    known = isinstance(other, fx.Node) and program.tensor_of(other) is not None
    return other if known and shape_of(other) == shape_of(factor)[-1:] else None  # type: ignore[arg-type, return-value]


@dataclass(frozen=True)
class Mlp:
    """Linear maps of one input whose outputs one linear map reads, unit by unit, and writes into a residual stream.

    Attributes:
        writers: where the units' weights are solved, in the order they run (one map, or a gate and what it gates).
        reader: the output projection.
        between: the ops from the writers to the reader, in the order they run.
    """

    writers: tuple[RefitSite, ...]
    reader: RefitSite
    between: tuple[fx.Node, ...]

    @property
    def input(self) -> fx.Node:
        return self.writers[0].node.args[0]  # type: ignore[return-value]

    @property
    def at(self) -> fx.Node:
        """The last of the writers, where the units can be chosen."""
        return self.writers[-1].node


UNTAGGED = {"dropout", "clone", "contiguous", "alias", "detach", "to", "_to_copy", "hardswish", "hardsigmoid"}
"""Ops that compute number by number as well, though torch has no such tag on them."""


def find_mlps(program: Program, sites: Mapping[fx.Node, RefitSite], spec: MergeSpec) -> Iterator[Mlp]:
    """The layers whose units can be chosen: no tensor but the writers' and the reader's has an axis in their space."""
    writers, readers = defaultdict[str, list[RefitSite]](list), defaultdict[str, list[RefitSite]](list)
    for node in sorted(sites, key=program.position.__getitem__):
        site = sites[node]
        if site.kind == "linear":
            out, into = (spec.axes[site.weight][axis] for axis in (site.unit_axis, site.input_axis))
            writers["*".join(product_key(out))].append(site)
            readers["*".join(product_key(into))].append(site)
    for name in writers.keys() & readers.keys() & spec.spaces.keys():
        inside = {tensor for tensor, labels in spec.axes.items() if any(name in product_key(x) for x in labels)}
        own = {tensor for site in (*writers[name], *readers[name]) for tensor in (site.weight, site.bias)}
        inputs = {site.node.args[0] for site in writers[name]}
        if len(readers[name]) == 1 and len(inputs) == 1 and inside <= own and spec.movable(name):
            (reader,) = readers[name]
            if reader.stream is not None and all(site.stream is None for site in writers[name]):
                between = _between(program, [site.node for site in writers[name]], reader.node)
                if all(map(_unit_by_unit, between)):
                    yield Mlp(tuple(writers[name]), reader, between)


def _between(program: Program, first: Sequence[fx.Node], last: fx.Node) -> tuple[fx.Node, ...]:
    """The ops that depend on the first ones and that come before the last."""
    reached = set(first)
    for node in program.nodes[: program.position[last]]:
        if not reached.isdisjoint(node.all_input_nodes):
            reached.add(node)
    return tuple(node for node in program.nodes[: program.position[last]] if node in reached.difference(first))


def _unit_by_unit(node: fx.Node) -> bool:
    """Whether an op computes every number of its result from the numbers at the same place alone."""
    return torch.Tag.pointwise in getattr(node.target, "tags", ()) or op_name(node) in UNTAGGED
