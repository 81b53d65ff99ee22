"""Where in a program an MLP's units can be chosen."""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass

import torch
from torch import fx

from hf_zipit.refit.program import Program
from hf_zipit.refit.rewrites import turned_linear
from hf_zipit.refit.solvable import RefitSite, setting
from hf_zipit.symmetry.ops import op_name, shape_of
from hf_zipit.symmetry.spec import MergeSpec, product_key, products


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
    """The layers whose units can be chosen, in the order they run.

    No tensor but the writers' and the reader's has an axis in their space.
    """
    writers, readers = defaultdict[str, list[RefitSite]](list), defaultdict[str, list[RefitSite]](list)
    for node in sorted(sites, key=program.position.__getitem__):
        site = sites[node]
        if site.kind == "linear":
            out, into = products(site.label(spec)), spec.axes[site.weight][site.input_axis]
            if len(set(out)) == 1:  # one map, or a fused one to gates and what they gate
                writers["*".join(product_key(out[0]))].append(site)
            readers["*".join(product_key(into))].append(site)
    for name in (name for name in writers if name in readers and name in spec.spaces):
        inside = {tensor for tensor, labels in spec.axes.items() if any(name in product_key(x) for x in labels)}
        own = {tensor for site in (*writers[name], *readers[name]) for tensor in (site.weight, site.bias)}
        inputs = {site.node.args[0] for site in writers[name]}
        if len(readers[name]) == 1 and len(inputs) == 1 and inside <= own and spec.movable(name):
            (reader,) = readers[name]
            if reader.aim.stream is not None and all(site.stream is None for site in writers[name]):
                between = _between(program, [site.node for site in writers[name]], reader.node)
                fused = {site.node: len(products(site.label(spec))) for site in writers[name]}
                if all(unit_by_unit(node) or _takes_apart(node, fused) for node in between):
                    yield Mlp(tuple(writers[name]), reader, between)


def _between(program: Program, first: Sequence[fx.Node], last: fx.Node) -> tuple[fx.Node, ...]:
    """The ops that depend on the first ones and that come before the last."""
    reached = program.behind(first)
    return tuple(node for node in program.nodes[: program.position[last]] if node in reached)


def _takes_apart(node: fx.Node, fused: Mapping[fx.Node, int]) -> bool:
    """Whether an op takes what a fused map puts out apart into its pieces, however long they are."""
    source = node.args[0]
    if node.target is operator.getitem:
        return isinstance(source, fx.Node) and _takes_apart(source, fused)
    last = op_name(node) == "chunk" and setting(node, 2, "dim", 0) in (-1, len(shape_of(source)) - 1)  # type: ignore[arg-type]
    return last and node.args[1] == fused.get(source)  # type: ignore[arg-type]


def row_by_row(node: fx.Node, made: Set[fx.Node]) -> bool:
    """Whether an op computes a row of its result, along the last axis, from the rows of some values there alone."""
    source, *others = node.all_input_nodes
    if source not in made:
        return False
    if op_name(node) == "slice":  # of all there is
        return shape_of(node) == shape_of(source)
    if op_name(node) == "linear" or node.target is turned_linear:
        return made.isdisjoint(others)
    if op_name(node) == "layer_norm":
        return len(node.args[1]) == 1 and made.isdisjoint(others)  # type: ignore[arg-type]
    return unit_by_unit(node) and all(x in made or len(shape_of(x)) <= 1 for x in others)


def unit_by_unit(node: fx.Node) -> bool:
    """Whether an op computes every number of its result from the numbers at the same place alone."""
    return torch.Tag.pointwise in getattr(node.target, "tags", ()) or op_name(node) in UNTAGGED
