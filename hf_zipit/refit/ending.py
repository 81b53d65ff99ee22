"""What comes last in a forward pass, behind which only heads come: the last MLP, and the norms behind it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from torch import fx, nn

from hf_zipit.planning.cut import ReadPoint
from hf_zipit.refit.answers import kind_of
from hf_zipit.refit.mlps import Mlp, row_by_row
from hf_zipit.refit.program import Program
from hf_zipit.refit.solvable import RefitSite
from hf_zipit.symmetry.ops import shape_of

BETWEEN_SAMPLES = "logits_per_"
"""How the classes of `transformers` name similarities of samples to each other, which are no sample's answer."""


@dataclass(frozen=True)
class Ending:
    """What comes last in a forward pass.

    Attributes:
        nodes: the ops of the trunk from the last MLPs on, in the order they run.
        sites: those of them whose weights are fitted.
        readouts: by entry the node that branches read.
        heads: the ops of the branches, in the order they run.
        answers: by output field the node that makes it, and what it holds.
        by_rows: whether branches make of every row of the one value that they read a row of their answers.
    """

    nodes: tuple[fx.Node, ...]
    sites: tuple[RefitSite, ...]
    readouts: Mapping[ReadPoint, fx.Node]
    heads: tuple[fx.Node, ...]
    answers: Mapping[str, tuple[fx.Node, str]]
    by_rows: bool

    @property
    def numbers(self) -> int:
        """How many numbers the answers to a micro-batch are."""
        return sum(prod(shape_of(node)) for node, _ in self.answers.values())

    @property
    def read(self) -> set[fx.Node]:
        """The values from before that are needed, and those of the experts that branches read."""
        used = {x for node in (*self.nodes, *self.heads) for x in node.all_input_nodes}
        return used.difference(self.nodes, self.heads).union(self.readouts.values())


def find_ending(
    program: Program,
    sites: Mapping[fx.Node, RefitSite],
    mlps: Sequence[Mlp],
    readouts: Mapping[ReadPoint, fx.Node],
    model: nn.Module,
) -> Ending | None:
    """Where answers can be fitted; None where there are no choices among classes.

    Of the MLPs those are last behind which norms and nothing else with weights of the trunk come.
    """
    behind = program.behind(readouts.values())
    fields = {name: node for name, node in program.outputs.items() if not name.startswith(BETWEEN_SAMPLES)}
    made = {name: node for name, node in fields.items() if node in behind}
    made = {name: node for name, node in made.items() if node.meta["val"].is_floating_point()}
    answers = {name: (node, kind_of(name, node.meta["val"], model)) for name, node in made.items()}
    if {kind for _, kind in answers.values()} <= {"values"}:
        return None
    needed, reached = program.before(made.values()), program.before(readouts.values())
    end = max(program.position[node] for node in readouts.values())
    nodes = set[fx.Node]()
    for mlp in mlps:
        own = {site.node for site in mlp.writers}
        found = (own | program.behind(own)) & reached
        others = {sites[node].kind for node in found & sites.keys() - own - {mlp.reader.node}}
        if others <= {"norm", "gain"} and found.isdisjoint(behind):
            nodes |= found
    fitted = [sites[node] for node in program.nodes if node in nodes and node in sites]
    heads = [node for node in program.nodes if node in needed and (node in behind or program.position[node] > end)]
    return Ending(
        tuple(node for node in program.nodes if node in nodes),
        tuple(site for site in fitted if site.length is None),
        readouts,
        tuple(heads),
        answers,
        _by_rows(heads, readouts, made.values()),
    )


def _by_rows(heads: Sequence[fx.Node], readouts: Mapping[ReadPoint, fx.Node], answers: Collection[fx.Node]) -> bool:
    """See `Ending`."""
    made = {*readouts.values(), *heads}
    rows = {tuple(shape_of(node)[:-1]) for node in (*readouts.values(), *answers)}
    one = len(readouts) == 1 and len(rows) == 1 and all(entry.axis in (-1, len(*rows)) for entry in readouts)
    return one and all(row_by_row(node, made) for node in heads)
