"""Linear maps whose outputs are normed before they go into a residual stream (Gemma 2 and 3, OLMo 2, GLM 4).

Of what such a map puts out only the direction matters: the norm gives every row one length, and a gain its units. So
the map aims at what the stream lacks behind the norm, the gain taken out, with the length that the experts' own have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, fx
from torch.nn.functional import normalize

from hf_zipit.refit.program import Program
from hf_zipit.refit.solvable import TRANSPARENT, BranchNorm, RefitSite
from hf_zipit.symmetry.ops import op_name, shape_of

NORMING = TRANSPARENT | {"pow", "square", "mul", "mean", "add", "rsqrt", "sqrt", "div", "reciprocal"}
"""The ops of a norm by the root of the mean square."""

SAME = 1e-3
"""What a norm makes of values is theirs but for the lengths of rows, up to this share."""


def with_branch_norms(program: Program, sites: Mapping[fx.Node, RefitSite]) -> dict[fx.Node, RefitSite]:
    """The sites; those of linear maps know the norm that alone reads them, where that writes into a stream."""
    found = dict(sites)
    for gain in sites.values():
        if gain.kind != "gain" or gain.stream is None or gain.other is None:
            continue
        ops, source = _ops_between(program, gain, found)
        site = found.get(source) if source is not None else None
        if site is None or site.kind != "linear" or site.stream is not None or not site.plain:
            continue
        if program.position[gain.other] > program.position[site.node]:
            continue  # what the stream lacks is not known yet
        users = {user for node in (site.node, *ops[:-1]) for user in node.users if not _reads_format(user, node)}
        if site.output is site.node and users <= set(ops) and _is_norm(program, site.node, ops[:-1]):
            found[site.node] = replace(site, behind=BranchNorm(ops, gain))
    return found


def _ops_between(
    program: Program, gain: RefitSite, sites: Mapping[fx.Node, RefitSite]
) -> tuple[tuple[fx.Node, ...], fx.Node | None]:
    """The ops from the one site that a gain's value is made from, in the order they run, and that site's op."""
    ops, sources, todo = {gain.node}, set[fx.Node](), [x for x in gain.node.args if isinstance(x, fx.Node)]
    weights = set(program.made_of_weights(gain.node))
    while todo:
        node = todo.pop()
        if node in weights or node.op == "placeholder" or node in ops:
            continue
        if node in sites:
            sources.add(node)
        elif op_name(node) not in NORMING:
            return (), None
        else:
            ops.add(node)
            todo += node.all_input_nodes
    ordered = tuple(sorted(ops, key=program.position.__getitem__))
    return ordered, sources.pop() if len(sources) == 1 else None


def _reads_format(node: fx.Node, source: fx.Node) -> bool:
    """Whether an op reads nothing of a value but its number format."""
    return op_name(node) == "type_as" and node.args[0] is not source


def _is_norm(program: Program, source: fx.Node, ops: Sequence[fx.Node]) -> bool:
    """Whether some ops give every row of a value one length and leave its direction, whatever axes are before."""
    if not ops:
        return False
    draw, shape = torch.Generator().manual_seed(0), shape_of(source)
    device = "cpu" if program.device.type == "meta" else program.device
    x = torch.randn(3, shape[-1], generator=draw).to(device)
    try:
        one, double = (_made(program, source, ops, value) for value in (x, 2 * x))
        shaped = _made(program, source, ops, x.view(*[1] * (len(shape) - 2), *x.shape))
        alike = torch.allclose(one, double, rtol=SAME) and torch.allclose(one, shaped.view_as(one), rtol=SAME)
        return alike and torch.allclose(normalize(one), normalize(x), atol=SAME)
    except (KeyError, RuntimeError, IndexError):  # they read something else, or count axes from the first
        return False


def _made(program: Program, source: fx.Node, ops: Sequence[fx.Node], x: Tensor) -> Tensor:
    values = {source: x}
    for node in ops:
        values[node] = program.run(node, values.__getitem__, {}, {})
    return values[ops[-1]]
