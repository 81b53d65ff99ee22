"""Where a program has attention that can be solved as a whole.

That is where queries, keys and values are plain linear maps of one input each, cut into heads (no rotary embedding, no
groups of heads that share keys), and the heads go straight into the output projection. Elsewhere each of the maps is
regressed like any other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

from torch import fx

from hf_zipit.maps.products import merged_sizes
from hf_zipit.maps.space_map import Alignment
from hf_zipit.refit.graph import Program, Site
from hf_zipit.symmetry.ops import op_name, shape_of
from hf_zipit.symmetry.spec import MergeSpec, Symmetry, product_key


@dataclass(frozen=True)
class Attention:
    """One attention layer whose queries, keys and values are plain linear maps.

    Attributes:
        node: the op that weighs the values.
        query, key, value: where their weights are solved.
        output: the output projection, which the heads' means go straight into.
        at: the last of the three maps, where the layer can be solved.
        between: the ops between the three maps and the output projection, in the order they run.
    """

    node: fx.Node
    query: Site
    key: Site
    value: Site
    output: Site
    at: fx.Node
    between: tuple[fx.Node, ...]

    @property
    def inputs(self) -> tuple[Site, Site, Site]:
        return self.query, self.key, self.value

    @property
    def ops(self) -> tuple[fx.Node, ...]:
        """The three maps and what is between them and the output projection."""
        return (*(site.node for site in self.inputs), *self.between)

    @property
    def heads(self) -> int:
        return heads_and_width(self.node)[0]

    @property
    def width(self) -> int:
        """Of one head, an expert's head_dim."""
        return heads_and_width(self.node)[1]

    @property
    def module(self) -> str | None:
        """The path of the module that holds the three maps, if it is one."""
        owners = {site.module.rpartition(".")[0] for site in self.inputs}
        return owners.pop() if len(owners) == 1 else None


def find_attention(
    program: Program, sites: Mapping[fx.Node, Site], spec: MergeSpec, alignment: Alignment
) -> Iterator[Attention]:
    """The attention layers that can be solved as a whole."""

    def suits(site: Site | None) -> bool:
        return site is not None and _is_free_inside(site.weight, spec) and _keeps_width(site.weight, spec, alignment)

    for node in program.nodes:
        if node.op != "call_function" or op_name(node) != "scaled_dot_product_attention":
            continue
        maps = [_cut_into_heads(x, sites) for x in node.args[:3]]
        output, behind = _joined(node, sites)
        heads = {x.meta["val"].shape[1] for x in node.args[:3]}  # type: ignore[union-attr]
        if output is not None and len(heads) == 1 and all(map(suits, maps)):
            at = max((site.node for site in maps if site), key=program.position.__getitem__)
            before = [step for x in node.args[:3] for step in (x.args[0], x)]  # type: ignore[union-attr]
            between = sorted([*before, node, *behind], key=program.position.__getitem__)
            yield Attention(node, *maps, output, at, tuple(between))  # type: ignore[arg-type]


def heads_and_width(node: fx.Node) -> tuple[int, int]:
    """How many heads an attention op has, and how wide its queries are."""
    query = shape_of(node.args[0])
    return int(query[1]), int(query[3])


def _cut_into_heads(node: fx.Node, sites: Mapping[fx.Node, Site]) -> Site | None:
    """The linear map whose output is only cut into heads, `[samples, heads, positions, head_dim]`."""
    for name in ("transpose", "view"):
        if op_name(node) not in ((name,) if name == "transpose" else (name, "reshape")) or len(node.users) != 1:
            return None
        node = node.args[0]  # type: ignore[assignment]
    site = sites.get(node)
    plain = site is not None and site.kind == "linear" and site.stream is None and len(node.users) == 1
    return site if plain else None


def _joined(node: fx.Node, sites: Mapping[fx.Node, Site]) -> tuple[Site | None, list[fx.Node]]:
    """The linear map that reads the heads side by side, and nothing else does; and the ops before it."""
    passed: list[fx.Node] = []
    while len(node.users) == 1:
        node = next(iter(node.users))
        if node in sites:
            return (sites[node] if sites[node].kind == "linear" else None), passed
        if op_name(node) not in {"transpose", "reshape", "view", "contiguous", "clone", "permute"}:
            break
        passed.append(node)
    return None, passed


def _is_free_inside(weight: str, spec: MergeSpec) -> bool:
    """Whether a weight's outputs are heads times a space in which any change of basis is allowed."""
    label = spec.axes[weight][0]
    return len(label) == 2 and spec.spaces[label[1].space].symmetry is Symmetry.LINEAR


def _keeps_width(weight: str, spec: MergeSpec, alignment: Alignment) -> bool:
    """Whether there is one merged unit for every unit of an expert: no head was kept apart."""
    label = product_key(spec.axes[weight][0])
    return prod(merged_sizes(label, alignment, spec)) == spec.size(label)
