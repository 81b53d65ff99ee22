"""Where in a program attention is solved as a whole.

It is where values are a linear map cut into heads, in whose units any change of basis is allowed, and the heads' means
go straight into the output projection. Several query heads may share the keys and values of one (grouped queries).

Queries and keys belong to it where their logits are bilinear in the layer's inputs: as they are, or rotated by their
positions (a rotary embedding). Where something else happens to them, a norm of the queries for instance, each of the
two maps is regressed like any other, and experts' heads may take the place of what that gives: all of them where they
can be narrower (`splitting.py`), or else some (`chosen_heads.py`). Heads that cannot take another's place are fitted
where they are.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor, fx

from hf_zipit.maps.products import merged_length
from hf_zipit.maps.space_map import Alignment
from hf_zipit.refit.program import Program, out_of_place
from hf_zipit.refit.rewrites import with_heads
from hf_zipit.refit.solvable import SAMPLES_POSITIONS_UNITS, TRANSPARENT, RefitSite, gain_at, part_of
from hf_zipit.symmetry.ops import op_name, shape_of
from hf_zipit.symmetry.spec import AxisLabel, Factor, MergeSpec, Symmetry

MOVING = TRANSPARENT | {
    *("view", "reshape", "transpose", "permute", "unsqueeze", "squeeze", "expand", "repeat_interleave", "cat"),
    *("slice", "split", "split_with_sizes", "chunk", "select", "unbind", "narrow", "getitem"),
}
"""Ops that only move numbers: to their heads, and to the queries that share them."""

SCALING = {"mul", "div"}
"""Ops that a class may scale its queries with: with a number, for a tensor would be no change of basis."""

ROTATING = MOVING | SCALING | {"neg", "add"}
"""Those of rotary embeddings, too."""

Logits = Literal["plain", "rotary"]
"""How queries and keys make logits: by their product, or after rotations of pairs of units by their positions."""


@dataclass(frozen=True)
class Heads:
    """A linear map that is cut into heads, or that part of a fused one.

    Attributes:
        site: where its weight is solved.
        label: its units, head by head.
        units: which of the map's outputs they are.
        elsewhere: other ops with the same weight, such as those that read relative positions.
    """

    site: RefitSite
    label: AxisLabel
    units: tuple[int, ...]
    elsewhere: tuple[fx.Node, ...] = ()

    @property
    def places(self) -> tuple[fx.Node, ...]:
        """All ops with the weight."""
        return self.site.node, *self.elsewhere

    @property
    def inputs(self) -> tuple[fx.Node, ...]:
        """What these read."""
        return tuple(place.args[0] for place in self.places)  # type: ignore[misc]

    @property
    def count(self) -> int:
        return len(self.units)

    @property
    def rows(self) -> slice | Tensor:
        """The units as an index: a slice where they lie side by side, which makes a view."""
        first, last = self.units[0], self.units[-1]
        side_by_side = self.units == tuple(range(first, last + 1))
        return slice(first, last + 1) if side_by_side else torch.tensor(self.units)


@dataclass(frozen=True)
class SolvedApart:
    """Queries and keys of a layer that are solved apart from it: what happens to them, head by head, is not followed.

    Attributes:
        maps: those of queries and of keys; more where positions are mapped to queries and keys by others.
        steps: the ops between them and the layer's op.
        scales: the tensors that these ops alone read, such as the gains of norms.
        gains: that of queries and that of keys; None where other scales are read.
        placed: whether scales, those gains if there are any, have a place for every head; else all heads share them.
        exchanged: whether an expert's heads can take the place of others, with their gains where these have a place
            for every head; else they are fitted where they are.
    """

    maps: tuple[Heads, ...]
    steps: frozenset[fx.Node]
    scales: tuple[str, ...] = ()
    gains: tuple[RefitSite, RefitSite] | None = None
    placed: bool = False
    exchanged: bool = True

    @property
    def places(self) -> frozenset[fx.Node]:
        """The ops that are the maps."""
        return frozenset(place for own in self.maps for place in own.places)


@dataclass(frozen=True)
class Attention:
    """One attention layer.

    Attributes:
        node: the op that weighs the values.
        query, key, value: the linear maps.
        output: the output projection, which the heads' means go straight into.
        logits: how queries and keys make logits; None where they are solved apart.
        before: the ops between the maps that are solved here and `node`; behind: those between it and the projection.
        heads, groups: how many heads ask, and how many have keys and values.
        width: the units of a head, an expert's head_dim.
        weights: what `node` weighs the values with, where that is one op and the weights are made by others.
        fused: whether other parts of the values' map are solved apart, with the map; the walk then runs what is
            between, and the values are solved anew.
        apart: queries and keys that are solved apart, where each is one linear map that nothing else reads.
    """

    node: fx.Node
    query: Heads
    key: Heads
    value: Heads
    output: RefitSite
    logits: Logits | None
    before: frozenset[fx.Node]
    behind: tuple[fx.Node, ...]
    heads: int
    groups: int
    width: int
    weights: fx.Node | None = None
    fused: bool = False
    apart: SolvedApart | None = None

    @property
    def turned(self) -> bool:
        """Whether queries and keys are rotated by their positions."""
        return self.logits == "rotary" or self.apart is not None and any(map(_is_minus, self.apart.steps))

    @property
    def asked(self) -> tuple[Heads, ...]:
        """Queries and keys."""
        return (self.query, self.key) if self.apart is None else self.apart.maps

    @property
    def steps_apart(self) -> frozenset[fx.Node]:
        """The ops of queries and keys that are solved apart, their maps included."""
        if self.apart is None:
            return frozenset()
        return self.apart.steps | self.apart.places

    @property
    def inputs(self) -> tuple[Heads, ...]:
        """The maps that are solved here."""
        return (self.value,) if self.logits is None else (self.query, self.key, self.value)

    @property
    def sites(self) -> tuple[RefitSite, ...]:
        """Of these maps, which may be one fused weight; none where other parts of it are solved apart."""
        return () if self.fused else tuple(dict.fromkeys(heads.site for heads in self.inputs))

    @property
    def ops(self) -> frozenset[fx.Node]:
        """Those whose values are the solver's business: the maps and what is between them and the means."""
        return frozenset((self.node, *(() if self.fused else self.before), *(site.node for site in self.sites)))

    @property
    def module(self) -> str | None:
        """The path of the module that holds the maps, if it is one."""
        owners = {heads.site.module.rpartition(".")[0] for heads in (self.query, self.key, self.value)}
        return owners.pop() if len(owners) == 1 else None


def find_attention(
    program: Program,
    sites: Mapping[fx.Node, RefitSite],
    spec: MergeSpec,
    alignment: Alignment,
    shared: Sequence[Sequence[RefitSite]] = (),
) -> Iterator[Attention]:
    """The attention layers that can be solved as a whole.

    Args: `sites` that have their tensors alone, and the places of those that are used at several.
    """
    starts = {node for node, site in sites.items() if site.kind != "table"}  # of which a rotation may be made
    made = program.behind(starts) | starts
    for node in program.nodes:
        name = op_name(node) if node.op == "call_function" else ""
        if name == "scaled_dot_product_attention":
            found = _attention(node, program, sites, made, spec, alignment)
        elif name in WEIGHING:
            found = _weighing(node, program, sites, made, spec, alignment, shared)
        else:
            continue
        if found is not None:
            yield found


WEIGHING = {"matmul", "bmm"}
"""Ops that weigh values, where softmax has made the weights."""

BEHIND_SOFTMAX = TRANSPARENT | {"view", "reshape", "masked_fill", "where"}
"""Ops that may come between."""


def _weighing(
    node: fx.Node,
    program: Program,
    sites: Mapping[fx.Node, RefitSite],
    made: set[fx.Node],
    spec: MergeSpec,
    alignment: Alignment,
    shared: Sequence[Sequence[RefitSite]],
) -> Attention | None:
    """The layer of an op that weighs values by what a softmax put out: what made its logits may be anything."""
    weights, values = node.args[:2]
    made_by = weights
    while isinstance(made_by, fx.Node) and op_name(made_by) in BEHIND_SOFTMAX:
        made_by = made_by.args[1 if op_name(made_by) == "where" else 0]
    if not isinstance(made_by, fx.Node) or op_name(made_by) not in ("softmax", "_softmax"):
        return None
    spread = values if len(shape_of(values)) == 4 else with_heads(values)  # type: ignore[arg-type]
    found = _values_alone(node, spread, program, sites, made, spec, alignment, weights, {values})  # type: ignore[arg-type]
    if found is None or found.apart is not None:
        return found
    return replace(found, apart=_several_places(found, program, sites, made, spec, shared))


def _values_alone(
    node: fx.Node,
    spread: fx.Node | None,
    program: Program,
    sites: Mapping[fx.Node, RefitSite],
    made: set[fx.Node],
    spec: MergeSpec,
    alignment: Alignment,
    weights: fx.Node | None = None,
    more_steps: Iterable[fx.Node] = (),
) -> Attention | None:
    """A layer whose values and output projection alone are solved as a whole; `spread` are its heads' values."""
    output, behind = _joined(node, sites)
    path = _path(spread, sites, made) if spread is not None and output is not None else None
    value = None if path is None else _cut_into_heads(spread, path, program, made, spec, alignment)  # type: ignore[arg-type]
    if value is None or _symmetry(value, spec) is not Symmetry.LINEAR:
        return None
    heads, width = shape_of(spread)[1], shape_of(spread)[3]  # type: ignore[arg-type]
    groups, more = divmod(value.count, width)
    steps = {*path.steps, *more_steps}  # type: ignore[union-attr]
    users = {user for step in (*steps, value.site.node) for user in step.users}
    if more or heads % groups or shape_of(node)[-1] != width:
        return None
    fused = not users <= {node, *steps}
    if fused and not _read_here_alone(value, path, program, made, {node, *steps}):  # type: ignore[arg-type]
        return None
    absent = Heads(value.site, (), ())
    before = frozenset(steps)
    apart = _apart(node, value, steps, program, sites, made, spec, groups, weights)
    return Attention(
        node, absent, absent, value, output, None, before, behind, heads, groups, width, weights, fused, apart,  # type: ignore[arg-type]
    )  # fmt: skip


def bias_of(node: fx.Node) -> fx.Node | None:
    """What an attention op adds to the logits; None where it adds nothing."""
    found = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
    return found if isinstance(found, fx.Node) else None


def differs_by_head(bias: fx.Node) -> bool:
    """Whether every head has a bias of its own."""
    shape = shape_of(bias)
    return len(shape) > 2 and shape[-3] != 1


def _multiplied(weights: fx.Node, made: set[fx.Node]) -> tuple[fx.Node, fx.Node] | None:
    """The queries and keys whose products are all that a softmax's weights are made from."""
    node = weights
    while True:
        computed = [used for used in node.all_input_nodes if used in made]
        if _name(node) in WEIGHING and len(computed) == 2:
            return computed[0], computed[1]
        if len(computed) != 1:
            return None
        (node,) = computed


def _apart(
    node: fx.Node,
    value: Heads,
    steps: set[fx.Node],
    program: Program,
    sites: Mapping[fx.Node, RefitSite],
    made: set[fx.Node],
    spec: MergeSpec,
    groups: int,
    weights: fx.Node | None = None,
) -> SolvedApart | None:
    """The queries and keys of an attention op, or of what makes its `weights`; None where they are not one linear map
    each, cut into as many heads as the values, or something else reads them.
    """
    bias = bias_of(node)
    if weights is None and bias is not None and differs_by_head(bias):
        return None
    asking = node.args[:2] if weights is None else _multiplied(weights, made)
    if asking is None:
        return None
    found, steps, asked, exchanged = list[Heads](), set(steps), set[fx.Node](), True
    heads, width = shape_of(node)[-3], shape_of(node)[-1]
    for x, count in zip(asking, (heads, groups), strict=True):
        path = _path(x, sites, made)  # type: ignore[arg-type]
        if path is None or len(shape_of(path.site.node)) > SAMPLES_POSITIONS_UNITS:
            return None
        label, units = path.site.label(spec), _units_read(x, path, program)  # type: ignore[arg-type]
        if len(units) != count * width:
            return None
        exchanged &= label[:1] == value.label[:1] and spec.movable(label[0].space)  # type: ignore[union-attr]
        if weights is None and (not exchanged or shape_of(x)[-1] != width):  # type: ignore[arg-type]
            return None
        found.append(Heads(path.site, label, units))
        asked |= path.steps & program.behind([path.site.node])  # the frequencies of a rotation are other layers', too
    if weights is not None:
        asked |= program.behind(asking) & program.before([weights])  # type: ignore[arg-type]
    read = {used for step in asked for used in (step, *program.made_of_weights(step))}
    inputs = {used: name for step in read for used in step.all_input_nodes if (name := program.tensor_of(used))}
    placed = any(label[:1] == value.label[:1] for name in inputs.values() for label in spec.axes.get(name, ()))
    shared = {program.tensor_of(used) for used in program.inputs if not read.issuperset(used.users)}
    scales = {n for used, n in inputs.items() if n in spec.axes and used.meta["val"].is_floating_point()} - shared
    rows = [(own.site.node, unit) for own in (*found, value) for unit in own.units]
    if len(set(rows)) < len(rows):
        return None  # one map is queries and keys
    steps |= asked
    users = {user for step in (*steps, *(own.site.node for own in (*found, value))) for user in step.users}
    if not users <= {node, *steps}:
        return None
    gains = _one_gain_each(found, [gain for step in asked if (gain := gain_at(program, step)) is not None], program)
    if gains is not None and {gain.weight for gain in gains} != scales:
        gains = None
    exchanged &= not placed or (gains is not None and weights is None)
    return SolvedApart(tuple(found), frozenset(steps), tuple(sorted(scales)), gains, placed, exchanged)


def _several_places(
    layer: Attention,
    program: Program,
    sites: Mapping[fx.Node, RefitSite],
    made: set[fx.Node],
    spec: MergeSpec,
    shared: Sequence[Sequence[RefitSite]],
) -> SolvedApart | None:
    """The maps of queries and keys of which a layer makes its weights by several products (DeBERTa: those of words
    with words, and of words with relative positions, mapped by the same weights or by others).

    None where anything else is part of it, a map does not have all heads, or is read elsewhere.
    """
    groups = [*shared, *((site,) for site in sites.values())]
    at = {site.node: places for places in groups for site in places if site.kind == "linear" and site.part is None}
    found, steps, todo = dict[tuple[RefitSite, ...], None](), set[fx.Node](), [layer.weights]
    while todo:
        node = todo.pop()
        if node in at:
            found[tuple(at[node])] = None  # type: ignore[index]
        elif node in sites:
            return None
        elif node not in steps:
            steps.add(node)  # type: ignore[arg-type]
            todo += [used for used in node.all_input_nodes if used in made]  # type: ignore[union-attr]
    maps = []
    for places in found:
        site, label = places[0], places[0].label(spec)
        if spec.length(label) != layer.heads * layer.width or len(shape_of(site.node)) > SAMPLES_POSITIONS_UNITS:
            return None
        maps.append(Heads(site, label, tuple(range(spec.length(label))), tuple(own.node for own in places[1:])))
    exchanged = all(own.label[:1] == layer.value.label[:1] for own in maps) and spec.movable(
        layer.value.label[0].space
    )  # type: ignore[union-attr]
    places = {place for own in maps for place in own.places}
    inside = {layer.node, *layer.before, *steps, *places}
    read = {used for step in steps for used in (step, *program.made_of_weights(step))} - program.before(places)
    alone = all(set(step.users) <= inside for step in (*steps, *places))
    if not maps or layer.groups != layer.heads or not alone or layer.value.site.node in places:
        return None
    if any(program.tensor_of(used) in spec.axes for step in read for used in step.all_input_nodes):
        return None  # something of each head or unit is part of it that is no map
    return SolvedApart(tuple(maps), frozenset(steps) | layer.before, exchanged=exchanged)


def _one_gain_each(
    maps: Sequence[Heads], gains: Sequence[RefitSite], program: Program
) -> tuple[RefitSite, RefitSite] | None:
    """The gain behind queries and the one behind keys; None where these are not all."""
    behind = [program.behind([own.site.node]) for own in maps]
    found = [gain for own in behind for gain in gains if gain.node in own]
    query, key, *more = [*found, None, None]
    each = query is not None and key is not None and query.node in behind[0] and key.node in behind[1]
    return (query, key) if each and len(more) == 2 and len(gains) == 2 else None


def _units_read(node: fx.Node, path: _Path, program: Program) -> tuple[int, ...]:
    """Which outputs of a map a value is made of, in their order, whatever happens to them after they were moved."""
    shape = shape_of(path.site.node)
    values: dict[fx.Node, Any] = {path.site.node: torch.arange(shape[-1]).expand(shape)}
    read = set[int]()
    for step in sorted(path.steps, key=program.position.__getitem__):
        known = [used for used in step.all_input_nodes if used in values]
        if _name(step) in MOVING and len(known) == len(step.all_input_nodes):
            values[step] = _made_of(step, values)
            continue
        for used in known:
            read |= set(values[used].unique().long().tolist())
    if node in values:
        read |= set(values[node].unique().long().tolist())
    return tuple(sorted(read))


def _read_here_alone(value: Heads, path: _Path, program: Program, made: set[fx.Node], steps: set[fx.Node]) -> bool:
    """Whether nothing but a layer's own steps reads the part of a fused map that its values are."""
    numbers = _numbers_on(path.site.node, path.steps, program, made)
    if numbers is None:
        return False
    own = set(value.units)
    for step, found in list(numbers.items()):
        for user in set(step.users) - steps:
            if _name(user) not in MOVING or isinstance(found, Tensor) and user.all_input_nodes != [step]:
                return False
            read = _made_of(user, numbers)
            if isinstance(read, Tensor) and not own.isdisjoint(read.unique().tolist()):
                return False
    return True


def _attention(
    node: fx.Node,
    program: Program,
    sites: Mapping[fx.Node, RefitSite],
    made: set[fx.Node],
    spec: MergeSpec,
    alignment: Alignment,
) -> Attention | None:
    """The layer of one attention op; None where it cannot be solved as a whole."""
    output, behind = _joined(node, sites)
    paths = [_path(x, sites, made) for x in node.args[:3]]  # type: ignore[arg-type]
    if output is None or any(path is None for path in paths):
        return _values_alone(node, node.args[2], program, sites, made, spec, alignment)  # type: ignore[arg-type]
    heads, width = (int(size) for size in (shape_of(node.args[0])[1], shape_of(node.args[0])[3]))  # type: ignore[arg-type]
    steps = [path.steps for path in paths]  # type: ignore[union-attr]
    query, key, value = (
        _cut_into_heads(x, path, program, made, spec, alignment)  # type: ignore[arg-type]
        for x, path in zip(node.args[:3], paths, strict=True)
    )
    if value is None or shape_of(node)[-1] != width or _symmetry(value, spec) is not Symmetry.LINEAR:
        return None
    groups, more = divmod(spec.length(value.label), width)
    if more or heads % groups:
        return None
    logits: Logits | None = None
    if query is not None and key is not None and spec.length(key.label) == groups * width:
        names = {_name(step) for step in steps[0] | steps[1]}
        kinds = {_symmetry(query, spec), _symmetry(key, spec)}
        if kinds == {Symmetry.LINEAR} and names <= MOVING | SCALING:
            logits = "plain"
        elif kinds == {Symmetry.ROTARY}:
            logits = "rotary"
    # What other layers read, or other parts of the same weight do, is not this layer's alone.
    mine = {node, *steps[0], *steps[1], *steps[2]}
    users = {user for path in paths for step in (*path.steps, path.site.node) for user in step.users}  # type: ignore[union-attr]
    if logits is None or not users <= mine:
        return _values_alone(node, node.args[2], program, sites, made, spec, alignment)  # type: ignore[arg-type]
    before = frozenset(mine - {node})
    return Attention(node, query, key, value, output, logits, before, behind, heads, groups, width)  # type: ignore[arg-type]


@dataclass(frozen=True)
class _Path:
    """The way from a linear map to an attention op, and the ops on it."""

    site: RefitSite
    steps: set[fx.Node]


def _path(node: fx.Node, sites: Mapping[fx.Node, RefitSite], made: set[fx.Node]) -> _Path | None:
    """From the one linear map that a value is made from; None where it is made from others, too."""
    found, steps, todo = set[fx.Node](), set[fx.Node](), [node]
    while todo:
        current = todo.pop()
        if current in sites and sites[current].kind == "linear":
            found.add(current)
        elif current not in steps:
            steps.add(current)
            todo += [used for used in current.all_input_nodes if used in made]
    site = sites[found.pop()] if len(found) == 1 else None
    if site is None or site.stream is not None:
        return None
    return _Path(site, steps)


def _symmetry(heads: Heads, spec: MergeSpec) -> Symmetry:
    """Of the units inside a head."""
    return spec.spaces[heads.label[-1].space].symmetry  # type: ignore[union-attr]


def _cut_into_heads(
    node: fx.Node, path: _Path, program: Program, made: set[fx.Node], spec: MergeSpec, alignment: Alignment
) -> Heads | None:
    """Which outputs of a map become heads, several of which may be equal in a row; None unless they lie in order.

    None also where there is not one merged unit for every unit of an expert, or positions have two axes (SAM 3).
    """
    numbers = _unit_numbers(node, path, program, made)
    if numbers is None or len(shape_of(path.site.node)) > SAMPLES_POSITIONS_UNITS:
        return None
    own = numbers.unique_consecutive(dim=0)
    units = tuple(own.flatten().tolist())
    label = None if len(numbers) % len(own) else part_of(path.site.label(spec), units, spec)
    if not label or not all(isinstance(factor, Factor) for factor in label):
        return None
    whole = spec.length(label) == len(units) == merged_length(label, alignment, spec)
    return Heads(path.site, label, units) if whole else None


def _unit_numbers(node: fx.Node, path: _Path, program: Program, made: set[fx.Node]) -> Tensor | None:
    """Which output of the map is where in every head, `[heads, width]`: what the ops between make of their numbers.

    A rotary embedding adds to every number, times a cosine, that of its partner, times a sine. None where that is not
    half a head away, or something else happens, or not the same at all positions.
    """
    values = _numbers_on(path.site.node, {*path.steps, node}, program, made)
    found = None if values is None else values[node]
    if found is None or not (found == found[:1, :, :1]).all():
        return None
    return found[0, :, 0].long()


def _numbers_on(
    start: fx.Node, steps: Iterable[fx.Node], program: Program, made: set[fx.Node]
) -> dict[fx.Node, Any] | None:
    """Which output of a map is where in the values of some ops behind it; None where ops do more than move them."""
    shape = shape_of(start)
    values: dict[fx.Node, Any] = {start: torch.arange(shape[-1], dtype=torch.int32).expand(shape)}
    partners = set[fx.Node]()  # values that are added to others
    for step in sorted(set(steps) - {start}, key=program.position.__getitem__):
        name = _name(step)
        known = [used for used in step.all_input_nodes if used in made]
        if name not in ROTATING or any(used not in values for used in known):
            return None
        if name == "neg" or not partners.isdisjoint(known):
            partners.add(step)
        if name == "add":
            partners.discard(step)
            straight = [used for used in known if used not in partners]
            if len(known) != 2 or len(straight) != 1:
                return None
            one, other = (values[straight[0]], next(values[used] for used in known if used in partners))
            if not torch.equal(one.roll(one.shape[-1] // 2, -1), other):
                return None
            values[step] = one
        elif name in TRANSPARENT or name in ("mul", "div", "neg"):
            if len(known) != 1:
                return None
            values[step] = values[known[0]]
        elif name == "cat":
            parts = [values[x] for x in step.args[0] if x in values]  # type: ignore[union-attr]
            values[step] = torch.cat(parts, step.args[1] if len(step.args) > 1 else 0)  # type: ignore[arg-type]
        else:
            values[step] = _made_of(step, values)
    return None if partners & values.keys() and not _added(partners, steps) else values


def _added(partners: set[fx.Node], steps: Iterable[fx.Node]) -> bool:
    """Whether all that is added to others is added to them by one of the steps."""
    inside = set(steps)
    return all(not inside.isdisjoint(partner.users) for partner in partners)


def _is_minus(node: fx.Node) -> bool:
    return node.op == "call_function" and op_name(node) == "neg"


def _name(node: fx.Node) -> str:
    return "getitem" if node.target is operator.getitem else op_name(node)


def _joined(node: fx.Node, sites: Mapping[fx.Node, RefitSite]) -> tuple[RefitSite | None, tuple[fx.Node, ...]]:
    """The linear map that reads the heads side by side, and nothing else does; and the ops before it."""
    passed: list[fx.Node] = []
    start = node
    while True:
        users = list(node.users)
        if len(users) != 1:
            return None, ()
        node = users[0]
        if node in sites:
            linear = sites[node].kind == "linear" and _side_by_side(start, passed)
            return (sites[node] if linear else None), tuple(passed)
        if op_name(node) not in {"transpose", "reshape", "view", "contiguous", "clone", "permute"}:
            return None, ()
        passed.append(node)


def _made_of(step: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    """What an op makes of values."""
    args, kwargs = fx.map_arg((step.args, step.kwargs), values.__getitem__)  # type: ignore[misc]
    return out_of_place(step.target)(*args, **kwargs)


def _side_by_side(start: fx.Node, steps: Sequence[fx.Node]) -> bool:
    """Whether what heads put out is in the order of samples and positions, as the weights are that it was made with.

    There are models that compute with positions first (MLCD). Not told where sizes depend on the samples (ViLT).
    """
    shape = shape_of(start)
    numbers = torch.arange(prod(shape)).view(shape)
    found, last = {start: numbers}, steps[-1] if steps else start
    for step in steps:
        if not found.keys() >= set(step.all_input_nodes):
            return False
        found[step] = _made_of(step, found)
    joined = found[last].flatten(0, -2)
    heads = numbers if len(shape) > 3 else numbers.unflatten(0, (-1, joined.shape[1] // shape[-1]))
    return torch.equal(heads.transpose(-3, -2).reshape(joined.shape), joined)
