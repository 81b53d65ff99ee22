"""Where in a program weights are solved at single ops. MLPs, mixtures and attention have files of their own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from hf_zipit.refit.program import Program
from hf_zipit.refit.rewrites import routed_linear, turned_linear
from hf_zipit.symmetry.ops import is_within, module_stack, op_name, overload, shape_of
from hf_zipit.symmetry.spec import AxisLabel, MergeSpec, Sum, product_key, products

TRANSPARENT = {"dropout", "to", "_to_copy", "type_as", "contiguous", "clone", "alias", "detach", "feature_dropout"}
"""Ops that pass their input on: a linear map followed by them still writes into the addition behind them."""

REORDERING = {"permute", "transpose"}
"""Ops that move whole axes."""

REPEATING = {"cat", "dropout", "expand", "expand_as", "repeat", "unsqueeze", "slice", "layer_norm"}
"""Ops that read a parameter as the value of something that no input has a part in, such as a class token."""


@dataclass(frozen=True)
class RefitSite:
    """A place where weights are solved.

    Attributes:
        kind: `linear`, `routed` (one linear map for each expert of a mixture), `conv`, `embedding`, `norm` or
            `group_norm` (the affine part), `gain` (a parameter that is multiplied by, unit by unit), `offset` (one
            that is added) or `table` (one that is read as it is).
        node: the op that has the weights.
        weight: the weight's name; bias: the bias's, if there is one.
        norm: the batch norm right behind a convolution, which is folded into it.
        output: the node whose value the weights make: the op itself or its norm.
        stream: for a writer into a residual stream the addition, and `other`, what the output is added to.
        more: what is added behind `other` to make the stream: of parallel branches the last one aims at all of it.
        scale: what the output is multiplied by before, a number or a parameter with one for every unit (layer scale).
        turned: whether a linear map's weight is `[inputs, outputs]`.
        part: which of the weight's outputs the op has, where it is a piece of a fused one.
        length: the name of a weight norm's lengths, where the weight's directions are `weight`.
        constant: what is added to a gain before anything is multiplied by it.
        stream_axis: the stream's axis that has the units.
        behind: the norm that alone reads what the site puts out, where that writes into a residual stream.
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
    part: tuple[int, int] | None = None
    length: str | None = None
    constant: float = field(default=0.0, compare=False)
    stream_axis: int | None = None
    more: tuple[fx.Node, ...] = ()
    behind: BranchNorm | None = None

    @property
    def aim(self) -> RefitSite:
        """What writes into a residual stream, if anything does: the site, or the gain of the norm behind it."""
        return self if self.behind is None else self.behind.gain

    @property
    def unit_axis(self) -> int:
        """The weight's axis that holds the units of the output."""
        return {"embedding": 1, "offset": -1, "table": -1, "routed": 1}.get(self.kind, int(self.turned))

    @property
    def input_axis(self) -> int:
        """The axis of a linear map's weight that holds the units of its input."""
        return 2 if self.kind == "routed" else 1 - self.unit_axis

    @property
    def channel_axis(self) -> int:
        """The output's axis that holds its units."""
        return 1 if self.kind in ("conv", "group_norm") else -1

    @property
    def target_axis(self) -> int:
        """The axis that holds the units of what the site aims at, its output or the stream."""
        return self.channel_axis if self.stream_axis is None else self.stream_axis

    @property
    def groups(self) -> int:
        """Of a convolution."""
        return int(setting(self.node, 6, "groups", 1)) if self.kind == "conv" else 1

    @property
    def looked_up(self) -> fx.Node:
        """What says which rows of a table an embedding takes."""
        numbers = self.node.args[1]
        return numbers[0] if isinstance(numbers, (list, tuple)) else numbers  # type: ignore[return-value]

    @property
    def rows(self) -> slice:
        """Which of the weight's outputs are solved here."""
        return slice(None) if self.part is None else slice(self.part[0], sum(self.part))

    @property
    def plain(self) -> bool:
        """Whether all of a weight is used as it is."""
        return self.part is None and self.length is None and self.groups == 1

    @property
    def module(self) -> str:
        """The module that holds the weight; the weight itself where that is the whole model or a lone parameter."""
        alone = self.kind in ("offset", "table", "routed")
        return self.weight if alone else self.weight.rpartition(".")[0] or self.weight

    def label(self, spec: MergeSpec) -> AxisLabel:
        """The units of what the site puts out."""
        label = spec.output_label(self.weight, self.unit_axis)
        return label if self.part is None else part_of(label, range(*self.rows.indices(1 << 60)), spec) or ()


@dataclass(frozen=True)
class BranchNorm:
    """A norm between a linear map and a residual stream, see `normed_writers.py`.

    Attributes:
        ops: in the order they run; the last one multiplies by the gain.
        gain: where that is solved; it writes into the stream.
    """

    ops: tuple[fx.Node, ...]
    gain: RefitSite


def part_of(label: AxisLabel, units: Sequence[int], spec: MergeSpec) -> AxisLabel | None:
    """The label of some of an axis's units, in their order; None unless they are the axis or terms of its direct sum.

    The queries of heads x (queries + keys + values) are heads x queries.
    """
    numbers = torch.arange(spec.length(label))
    place = next((i for i, factor in enumerate(label) if isinstance(factor, Sum)), None)
    if place is None or len(units) == len(numbers):
        return label if list(units) == numbers.tolist() else None
    before, terms, after = label[:place], label[place].terms, label[place + 1 :]  # type: ignore[union-attr]
    spread = numbers.unflatten(0, (spec.length(before), -1, spec.length(after)))
    parts = zip(terms, spread.split([spec.length(term) for term in terms], 1), strict=True)
    wanted = set(units)
    chosen = [(term, own) for term, own in parts if wanted.issuperset(own.flatten().tolist())]
    if not chosen or torch.cat([own for _, own in chosen], 1).flatten().tolist() != list(units):
        return None
    inner = chosen[0][0] if len(chosen) == 1 else (Sum(tuple(term for term, _ in chosen)),)
    return before + inner + after


def setting(node: fx.Node, place: int, name: str, default: Any) -> Any:
    """An argument of an op that may be given by place or by name."""
    return node.args[place] if len(node.args) > place else node.kwargs.get(name, default)


Sites = dict[fx.Node, RefitSite]


def find_sites(program: Program, trunk: frozenset[str], head: tuple[str, ...] = ()) -> Sites:
    """The places in the trunk where weights are solved, by their node.

    A tensor that is used at several places is solved for all of them at once, see `find_shared`. The use of a tied
    tensor in the `head` does not count, for each task keeps a copy there.
    """
    sites = _all_sites(program, trunk, head)
    uses = _uses(sites)
    alone = {node: site for node, site in sites.items() if all(uses[key] == 1 for key in _keys(site))}
    return {**alone, **_tables(program, trunk, head, sites)}


def find_shared(program: Program, trunk: frozenset[str], head: tuple[str, ...] = ()) -> list[tuple[RefitSite, ...]]:
    """The places of every tensor that is used at several, in the order they run; those of one weight and bias."""
    sites = _all_sites(program, trunk, head)
    uses = _uses(sites)
    groups: dict[Any, list[RefitSite]] = {}
    for node in sorted(sites, key=program.position.__getitem__):
        site = sites[node]
        if any(uses[key] > 1 for key in _keys(site)) and site.part is None and site.length is None:
            groups.setdefault((site.weight, site.bias), []).append(site)
    return [tuple(own) for own in groups.values() if all(uses[key] == len(own) for key in _keys(own[0]))]


def _keys(site: RefitSite) -> list[Any]:
    """What a site solves."""
    return [(name, site.part) for name in (site.weight, site.bias, site.length) if name]


def _uses(sites: Sites) -> Counter[Any]:
    return Counter(key for site in sites.values() for key in _keys(site))


def _all_sites(program: Program, trunk: frozenset[str], head: tuple[str, ...]) -> Sites:
    sites = {}
    for node in program.nodes:
        if node.op != "call_function" or _in_head(node, head):
            continue
        site = _site(program, node)
        if site is not None and site.weight in trunk:
            sites[node] = site
    scales = {site.scale for site in sites.values() if isinstance(site.scale, fx.Node)}
    return {node: site for node, site in sites.items() if site.kind != "gain" or scales.isdisjoint(node.args)}


def _in_head(node: fx.Node, head: tuple[str, ...]) -> bool:
    return any(is_within(path, own) for path in module_stack(node) for own in head)


def _site(program: Program, node: fx.Node) -> RefitSite | None:
    name = op_name(node)
    args = node.args
    if name == "linear" or node.target is turned_linear:
        turned = node.target is turned_linear
        return _writer(program, "linear", node, args[1], setting(node, 2, "bias", None), None, turned=turned)
    if node.target is routed_linear:
        weight = program.tensor_of(args[1])
        return RefitSite("routed", node, weight, None, None, node) if weight else None
    if name in {"conv1d", "conv2d", "conv3d"}:
        norm = _only_user(node)
        norm = norm if norm is not None and op_name(norm) == "batch_norm" else None
        return _writer(program, "conv", node, args[1], setting(node, 2, "bias", None), norm)
    if name == "embedding":
        return _writer(program, "embedding", node, args[0], None, None)
    if name == "index" and len(args[1]) == 1 and args[1][0] is not None and len(shape_of(args[0])) == 2:
        return _writer(program, "embedding", node, args[0], None, None)
    if name == "layer_norm" and len(args) > 2 and args[2] is not None:
        weight, bias = program.tensor_of(args[2]), program.tensor_of(setting(node, 3, "bias", None))
        return RefitSite("norm", node, weight, bias, None, node) if weight and len(args[1]) == 1 else None
    if name == "group_norm" and len(args) > 3 and args[2] is not None and args[3] is not None:
        weight, bias = program.tensor_of(args[2]), program.tensor_of(args[3])
        return RefitSite("group_norm", node, weight, bias, None, node) if weight and bias else None
    if len(args) == 2 and not node.kwargs and overload(node) == "Tensor" and name in ("add", "mul"):
        for own, other in (args, args[::-1]):
            if isinstance(other, fx.Node) and other.op != "placeholder":
                found = _offset(program, node, own, other) if name == "add" else _gain(program, node, own, other)
                if found is not None:
                    return found
    return None


def _offset(program: Program, node: fx.Node, own: Any, other: fx.Node) -> RefitSite | None:
    offset = program.tensor_of(own)
    if offset is None or not own.meta["val"].is_floating_point() or shape_of(own)[-1:] != shape_of(node)[-1:]:
        return None
    return RefitSite("offset", node, offset, None, None, node, node, other)


def _gain(program: Program, node: fx.Node, own: Any, other: fx.Node) -> RefitSite | None:
    """A parameter, to which a number may be added, times a value with one unit for each of its own."""
    constant, gain = 0.0, own
    while isinstance(gain, fx.Node) and gain.op == "call_function":
        name = op_name(gain)
        numbers = [x for x in gain.args if isinstance(x, (int, float)) and not isinstance(x, bool)]
        if name == "add" and len(gain.args) == 2 and len(numbers) == 1:
            constant += float(numbers[0])
            gain = next(x for x in gain.args if isinstance(x, fx.Node))
        elif name in TRANSPARENT and len(gain.all_input_nodes) == 1:
            gain = gain.args[0]
        else:
            return None
    name = program.tensor_of(gain)
    if name is None or not gain.meta["val"].is_floating_point() or shape_of(gain) != shape_of(other)[-1:]:
        return None
    stream, before, _, _ = _addition_behind(program, node, False)
    return RefitSite("gain", node, name, None, None, node, stream, before, constant=constant)


def gain_at(program: Program, node: fx.Node) -> RefitSite | None:
    """The gain that an op multiplies by, if it does."""
    site = _site(program, node) if node.op == "call_function" else None
    return site if site is not None and site.kind == "gain" else None


def _tables(program: Program, trunk: frozenset[str], head: tuple[str, ...], sites: Sites) -> Sites:
    """Parameters that are read as they are."""
    solved = {name for site in sites.values() for name in (site.weight, site.bias)}
    reading: dict[str, list[fx.Node]] = {}
    for node in program.nodes:
        for used in node.all_input_nodes:
            name = program.tensor_of(used)
            if name in trunk and name not in solved and used.meta["val"].is_floating_point():
                reading.setdefault(name, []).append(node)
    found = {}
    for name, nodes in reading.items():
        node = nodes[0]
        if all(op_name(user) in REPEATING for user in nodes) and node not in sites | found:
            own = next(used for used in node.all_input_nodes if program.tensor_of(used) == name)
            if not _in_head(node, head) and (op_name(node) != "layer_norm" or node.args[0] is own):
                found[node] = RefitSite("table", node, name, None, None, own)
    return found


def _writer(
    program: Program, kind: str, node: fx.Node, weight: Any, bias: Any, norm: fx.Node | None, turned: bool = False
) -> RefitSite | None:
    name, part, length = _weight(program, weight)
    shift, same, _ = _weight(program, bias)
    if name is None or same != (part if shift else None) or (part is not None and (turned or kind != "linear")):
        return None
    output = norm or node
    stream, other, scale, order = _addition_behind(program, output, kind == "linear")
    axis = None
    if stream is not None and kind != "embedding":
        shape = shape_of(output)
        axis = _only_units_moved(order, 1 if kind == "conv" else len(shape) - 1)
        if axis is None or shape_of(stream) != [shape[i] for i in order]:
            stream = other = scale = axis = None  # one row of the output is added to many of the stream
        elif order == list(range(len(shape))):
            axis = None
    more: list[fx.Node] = []
    while kind == "linear" and stream is not None and (last := _only_user(stream)) is not None:
        summand = next((x for x in last.args if x is not stream), None)
        computed = isinstance(summand, fx.Node) and program.position.get(summand, 1 << 60) < program.position[node]
        if op_name(last) != "add" or len(last.args) != 2 or not computed or shape_of(summand) != shape_of(stream):  # type: ignore[arg-type]
            break
        more.append(summand)  # type: ignore[arg-type]
        stream = last
    return RefitSite(
        kind, node, name, shift, norm, output, stream, other, scale, turned, part, length,
        stream_axis=axis, more=tuple(more),
    )  # fmt: skip


def _weight(program: Program, node: Any) -> tuple[str | None, tuple[int, int] | None, str | None]:
    """The parameter that an op has: its name, which rows of it, and the name of its lengths if it is normed."""
    name = program.tensor_of(node)
    if name is not None or not isinstance(node, fx.Node) or node.op != "call_function":
        return name, None, None
    if op_name(node) == "_weight_norm":
        return program.tensor_of(node.args[0]), None, program.tensor_of(node.args[1])
    if node.target.__name__ == "getitem" and op_name(node.args[0]) in ("split", "split_with_sizes", "chunk"):  # type: ignore[union-attr]
        pieces, number = node.args
        axis = setting(pieces, 2, "dim", 0)  # type: ignore[arg-type]
        name = program.tensor_of(pieces.args[0])  # type: ignore[union-attr]
        if axis == 0 and name is not None:
            sizes = [value.shape[0] for value in pieces.meta["val"]]  # type: ignore[union-attr]
            return name, (sum(sizes[:number]), sizes[number]), None  # type: ignore[index,arg-type,misc]
    if op_name(node) == "slice" and setting(node, 4, "step", 1) == 1 and setting(node, 1, "dim", 0) == 0:
        name, first = program.tensor_of(node.args[0]), setting(node, 2, "start", 0) or 0
        if name is not None and first >= 0:
            return name, (first, shape_of(node)[0]), None
    return None, None, None


def _only_user(node: fx.Node) -> fx.Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 else None


def _addition_behind(
    program: Program, node: fx.Node, scales: bool
) -> tuple[fx.Node | None, fx.Node | None, fx.Node | float | None, list[int]]:
    """The addition that a value goes straight into, the other summand if that is computed earlier, and the scale.

    And the order that its axes have there. `scales`: whether the value may be multiplied by one on its way.
    """
    current, scale = node, None
    order = list(range(len(shape_of(node))))
    nothing = (None, None, None, order)
    while (user := _only_user(current)) is not None:
        name = op_name(user)
        if name in TRANSPARENT and user.args[0] is current:
            current = user
            continue
        if name in REORDERING:
            order = _reordered(user, order)
            current = user
            continue
        if scales and scale is None and (scale := _scale(program, user, current)) is not None:
            current = user
            continue
        if name != "add" or len(user.args) != 2:
            break
        other = next((x for x in user.args if x is not current), None)
        computed = isinstance(other, fx.Node) and program.position.get(other, 1 << 60) < program.position[node]
        return (user, other, scale, order) if computed else nothing  # type: ignore[return-value]
    return nothing


def _reordered(node: fx.Node, order: Sequence[int]) -> list[int]:
    """Which of the first value's axes is where behind an op that moves axes."""
    if op_name(node) == "permute":
        return [order[axis] for axis in node.args[1]]  # type: ignore[union-attr,index]
    moved = list(order)
    one, other = node.args[1:3]
    moved[one], moved[other] = moved[other], moved[one]  # type: ignore[index]
    return moved


def _only_units_moved(order: Sequence[int], axis: int) -> int | None:
    """Where an axis is now, if all others are in their old order."""
    others = [i for i in order if i != axis]
    return order.index(axis) if others == sorted(others) else None


def _scale(program: Program, product: fx.Node, factor: fx.Node) -> fx.Node | float | None:
    """What a product multiplies a factor by, if that is a number or a parameter with one for every unit."""
    if op_name(product) != "mul" or len(product.args) != 2:
        return None
    other = next((x for x in product.args if x is not factor), None)
    if isinstance(other, (int, float)) and other:
        return float(other)
    known = isinstance(other, fx.Node) and program.tensor_of(other) is not None
    return other if known and shape_of(other) == shape_of(factor)[-1:] else None  # type: ignore[arg-type, return-value]


SAMPLES_POSITIONS_UNITS = 3
"""The axes of what a layer puts out."""


def knows_its_units(site: RefitSite, spec: MergeSpec) -> bool:
    """Whether what a site puts out can be brought into merged units along its last axis alone.

    The scale of a norm of each head cannot: which head is whose, its own units do not tell. Nor can a table both of
    whose axes move, or one whose rows do: the biases of a mixture's experts.
    """
    label = site.label(spec)
    keys = [product_key(product) for product in products(label)] if label and site.kind != "routed" else []
    if not all(set(spec.spaces[name].within) <= set(key) for key in keys for name in key):
        return False  # which unit is whose depends on what another axis counts (XLNet's heads)
    if site.part is not None:
        return bool(label)
    if site.kind == "table":
        others = [
            axis for i, axis in enumerate(spec.axes.get(site.weight, ())) if i != len(spec.axes[site.weight]) - 1
        ]
        return bool(label) and not any(spec.movable(name) for axis in others for name in product_key(axis))
    if site.kind == "embedding":
        return not any(spec.movable(name) for name in product_key(spec.axes[site.weight][0]))
    if site.kind not in ("norm", "group_norm", "gain"):
        return True
    own = {name for name in product_key(label) if spec.movable(name)}
    if not own:
        return len(shape_of(site.node)) <= SAMPLES_POSITIONS_UNITS  # more, and heads have an axis of their own
    read = (product for labels in spec.axes.values() for axis in labels for product in products(axis))
    keys = (set(product_key(product)) for product in read)
    return all(key <= set(product_key(label)) for key in keys if not own.isdisjoint(key))
