"""Where in a program attention is solved as a whole.

It is where values are a linear map cut into heads, in whose units any change of basis is allowed, and the heads' means
go straight into the output projection. Several query heads may share the keys and values of one (grouped queries).

Queries and keys belong to it where their logits are bilinear in the layer's inputs: as they are, or rotated by their
positions (a rotary embedding). Where something else happens to them, a norm of the queries for instance, each of the
two maps is regressed like any other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import fx

from hf_zipit.maps.products import merged_length
from hf_zipit.maps.space_map import Alignment
from hf_zipit.refit.program import Program
from hf_zipit.refit.solvable import RefitSite
from hf_zipit.symmetry.ops import op_name, shape_of
from hf_zipit.symmetry.spec import Factor, MergeSpec, Symmetry

MOVING = {
    *("view", "reshape", "transpose", "permute", "contiguous", "clone", "unsqueeze", "squeeze", "expand"),
    *("to", "_to_copy", "alias", "detach", "dropout", "repeat_interleave", "cat"),
}
"""Ops that only move numbers: to their heads, and to the queries that share them."""

ROTATING = MOVING | {"slice", "mul", "neg", "add"}
"""Those of rotary embeddings, too."""

CHECKS = {"_assert_tensor_metadata"}
"""Ops that read a value and make none."""

Logits = Literal["plain", "rotary"]
"""How queries and keys make logits: by their product, or after rotations of pairs of units by their positions."""


@dataclass(frozen=True)
class Attention:
    """One attention layer.

    Attributes:
        node: the op that weighs the values.
        query, key, value: where their weights are solved.
        output: the output projection, which the heads' means go straight into.
        logits: how queries and keys make logits; None where they are solved apart.
        before: the ops between the maps that are solved here and `node`; behind: those between it and the projection.
        heads, groups: how many heads ask, and how many have keys and values.
        width: the units of a head, an expert's head_dim.
    """

    node: fx.Node
    query: RefitSite
    key: RefitSite
    value: RefitSite
    output: RefitSite
    logits: Logits | None
    before: frozenset[fx.Node]
    behind: tuple[fx.Node, ...]
    heads: int
    groups: int
    width: int

    @property
    def inputs(self) -> tuple[RefitSite, ...]:
        """The maps that are solved here."""
        return (self.value,) if self.logits is None else (self.query, self.key, self.value)

    @property
    def ops(self) -> frozenset[fx.Node]:
        """Those whose values are the solver's business: the maps and what is between them and the means."""
        return self.before | {site.node for site in self.inputs} | {self.node}

    @property
    def module(self) -> str | None:
        """The path of the module that holds the three maps, if it is one."""
        owners = {site.module.rpartition(".")[0] for site in (self.query, self.key, self.value)}
        return owners.pop() if len(owners) == 1 else None


def find_attention(
    program: Program, sites: Mapping[fx.Node, RefitSite], spec: MergeSpec, alignment: Alignment
) -> Iterator[Attention]:
    """The attention layers that can be solved as a whole."""
    made = set(sites)  # and what depends on them
    for node in program.nodes:
        if not made.isdisjoint(node.all_input_nodes):
            made.add(node)

    def symmetry(site: RefitSite) -> Symmetry | None:
        """Of the units inside a head; None where there is not one merged unit for every unit of an expert."""
        label = spec.axes[site.weight][0]
        whole = all(isinstance(factor, Factor) for factor in label)
        if not label or not whole or merged_length(label, alignment, spec) != spec.length(label):
            return None
        return spec.spaces[label[-1].space].symmetry  # type: ignore[union-attr]

    for node in program.nodes:
        if node.op != "call_function" or op_name(node) != "scaled_dot_product_attention":
            continue
        output, behind = _joined(node, sites)
        steps: tuple[set[fx.Node], ...] = set(), set(), set()
        query, key, value = (_map_before(x, sites, made, own) for x, own in zip(node.args[:3], steps, strict=True))  # type: ignore[arg-type]
        if output is None or query is None or key is None or value is None or symmetry(value) is not Symmetry.LINEAR:
            continue
        if not _only_moves(node, value, steps[2], MOVING):
            continue
        heads, width = _heads_and_width(node)
        groups, odd = divmod(spec.length(spec.axes[value.weight][0]), width)
        if odd or heads % groups or shape_of(node)[-1] != width:
            continue
        same = spec.length(spec.axes[key.weight][0]) == groups * width
        kinds = {symmetry(site) for site in (query, key)}
        logits: Logits | None = None
        if kinds == {Symmetry.LINEAR}:
            logits = "plain"
        elif kinds == {Symmetry.ROTARY}:
            logits = "rotary"
        moves = ROTATING if logits == "rotary" else MOVING
        paths = zip((query, key), steps, strict=False)
        if not same or not all(_only_moves(node, site, own, moves) for site, own in paths):
            logits = None
        before = frozenset(steps[2].union(*steps[:2]) if logits else steps[2])
        yield Attention(node, query, key, value, output, logits, before, behind, heads, groups, width)


def _map_before(
    node: fx.Node, sites: Mapping[fx.Node, RefitSite], made: set[fx.Node], steps: set[fx.Node]
) -> RefitSite | None:
    """The one linear map that a value is made from; `steps` are filled with the ops between."""
    found, todo = set(), [node]
    while todo:
        current = todo.pop()
        if current in sites:
            found.add(current)
        elif current not in steps:
            steps.add(current)
            todo += [used for used in current.all_input_nodes if used in made]
    site = sites[found.pop()] if len(found) == 1 else None
    if site is None or site.kind != "linear" or site.stream is not None:
        return None
    steps |= {user for step in (*steps, site.node) for user in step.users if op_name(user) in CHECKS}
    return site


def _only_moves(node: fx.Node, site: RefitSite, steps: set[fx.Node], allowed: set[str]) -> bool:
    """Whether all that happens to a map's output on its way to an attention op are some ops, and nobody else reads."""
    names = {op_name(step) for step in steps} - CHECKS
    users = {user for step in (*steps, site.node) for user in step.users}
    return names <= allowed and users <= steps | {node}


def _heads_and_width(node: fx.Node) -> tuple[int, int]:
    """How many heads an attention op has, and how wide its queries are."""
    query = shape_of(node.args[0])  # type: ignore[arg-type]
    return int(query[1]), int(query[3])


def _joined(node: fx.Node, sites: Mapping[fx.Node, RefitSite]) -> tuple[RefitSite | None, tuple[fx.Node, ...]]:
    """The linear map that reads the heads side by side, and nothing else does; and the ops before it."""
    passed: list[fx.Node] = []
    while True:
        users = [user for user in node.users if op_name(user) not in CHECKS]
        if len(users) != 1:
            return None, ()
        node = users[0]
        if node in sites:
            return (sites[node] if sites[node].kind == "linear" else None), tuple(passed)
        if op_name(node) not in {"transpose", "reshape", "view", "contiguous", "clone", "permute"}:
            return None, ()
        passed.append(node)
