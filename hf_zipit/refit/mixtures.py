"""Mixtures of experts in the refit: every expert of a mixture is solved on the tokens that the merged router gives it.

The models that are merged route the same token elsewhere. So what an expert of the merged mixture should put out is
told by those that were joined in it, each on its own model's token: the share of what they put out. What all of a
token's experts together then lack of what the residual stream should get is spread over them by their gates, in the
way that changes least: with gates g_k and outputs s_k, each gets g_k (L - sum_j g_j s_j) / sum_j g_j^2 more.

The models' experts are called *the models*' here, for `expert` is who is merged, elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from hf_zipit.maps.transform import to_merged
from hf_zipit.refit.fit import Fit
from hf_zipit.refit.positions import at_rows
from hf_zipit.refit.program import Program
from hf_zipit.refit.regression import Gram, ridge
from hf_zipit.refit.rewrites import routed_linear
from hf_zipit.refit.solvable import TRANSPARENT, RefitSite
from hf_zipit.refit.values import MERGED
from hf_zipit.symmetry.ops import op_name, shape_of

PLACING = TRANSPARENT | {"view", "reshape", "_unsafe_view"}
"""Ops on the way from the sum of what a token's experts put out to the stream."""


@dataclass(frozen=True)
class Mixture:
    """The experts of one layer.

    Attributes:
        writer: where the hidden units' weights are solved; reader: the output projections.
        between: the ops from one to the other, in the order they run.
        repeated: of how many rows each token has one, side by side: one for every expert that it gets.
        gates: what each row's output is multiplied by before a token's rows are summed up; None if that is not known.
        stream: the addition behind that sum, and `other` the other summand.
    """

    writer: RefitSite
    reader: RefitSite
    between: tuple[fx.Node, ...]
    repeated: int
    gates: fx.Node | None = None
    stream: fx.Node | None = None
    other: fx.Node | None = None


def find_mixtures(program: Program, sites: Mapping[fx.Node, RefitSite]) -> Iterator[Mixture]:
    """The mixtures of two linear maps each, with something unit by unit between them."""
    routed = [sites[node] for node in program.nodes if node in sites and sites[node].kind == "routed"]
    for writer in routed:
        behind, between = {writer.node}, []
        for node in program.nodes[program.position[writer.node] + 1 :]:
            if behind.isdisjoint(node.all_input_nodes):
                continue
            if node in sites:
                reader = sites[node]
                same = reader.kind == "routed" and reader.node.args[2] is writer.node.args[2]
                inside = all(set(own.all_input_nodes) <= behind for own in between)
                if same and inside and reader.node.args[0] in behind:
                    yield _mixture(program, writer, reader, tuple(between))
                break
            behind.add(node)
            between.append(node)


def _mixture(program: Program, writer: RefitSite, reader: RefitSite, between: tuple[fx.Node, ...]) -> Mixture:
    rows = shape_of(reader.node)[0]
    product = next(iter(reader.node.users))
    gates = next((x for x in product.args if x is not reader.node), None)
    known = op_name(product) == "mul" and isinstance(gates, fx.Node) and shape_of(gates) == [rows, 1]
    if not known or len(reader.node.users) != 1:
        return Mixture(writer, reader, between, 1)
    current, repeated = product, 0
    while len(current.users) == 1:
        (user,) = current.users
        name = op_name(user)
        if name == "sum" and list(user.args[1]) == [1] and not repeated and len(shape_of(current)) == 3:  # type: ignore[call-overload]
            repeated = shape_of(current)[1]
        elif name == "add" and repeated and len(user.args) == 2:
            other = next(x for x in user.args if x is not current)
            if isinstance(other, fx.Node) and program.position.get(other, 1 << 60) < program.position[writer.node]:
                return Mixture(writer, reader, between, repeated, gates, user, other)  # type: ignore[arg-type]
            break
        elif name not in PLACING:
            break
        current = user
    return Mixture(writer, reader, between, repeated or 1)


@torch.no_grad()
def solve_hidden(fit: Fit, mixture: Mixture) -> None:
    """Write the weights of the hidden units, and remember what the output projections should put out."""
    values, site = fit.values, mixture.writer
    first = [_in_merged_units(fit, site, t, of_its_own=True) for t in values.experts]
    second = [_in_merged_units(fit, mixture.reader, t) for t in values.experts]
    sums = _sums(fit, site)
    for b, batch in enumerate(values.batches):
        chosen = values.of(site.node.args[2], MERGED, b)
        weights = fit.targets.weights(batch.task)
        hidden, out = 0.0, 0.0
        for t, share in enumerate(weights):
            x = values.of(site.node.args[0], t, b)
            made = routed_linear(x, first[t], chosen)
            known = {site.node: made}
            for node in mixture.between:
                known[node] = values.program.run(node, known.__getitem__, values.merged, values.inputs[b], True)
            hidden = hidden + share * made
            out = out + share * routed_linear(known[mixture.reader.node.args[0]], second[t], chosen)  # type: ignore[index]
        values.store[mixture.reader, "share", b] = out
        _add(fit, sums, site, b, chosen, hidden, _weights(fit, mixture, b, len(chosen)))  # type: ignore[arg-type]
    _write(fit, site, sums)


@torch.no_grad()
def solve_outputs(fit: Fit, mixture: Mixture) -> None:
    """Write the output projections' weights."""
    values, site = fit.values, mixture.reader
    sums = _sums(fit, site)
    for b in range(len(values.batches)):
        y = values.store[site, "share", b]
        values.store.pop((site, "share", b))
        chosen = values.of(site.node.args[2], MERGED, b)
        weights = _weights(fit, mixture, b, len(y))
        if mixture.stream is not None:
            label = fit.targets.label(site)
            lacking = fit.targets.share(mixture.stream, -1, label, b) - values.of(mixture.other, MERGED, b)
            gates = values.peek(mixture.gates, b, {})  # type: ignore[arg-type]
            by_token = gates.view(-1, mixture.repeated, 1)
            left = lacking.reshape(len(by_token), -1) - (by_token * y.view(len(by_token), mixture.repeated, -1)).sum(1)
            spread = by_token * left[:, None] / by_token.square().sum(1, keepdim=True).clamp_min(1e-12)
            y = y + spread.flatten(0, 1)
            weights = weights * gates[:, 0].square()
        _add(fit, sums, site, b, chosen, y, weights)
    _write(fit, site, sums)


def _in_merged_units(fit: Fit, site: RefitSite, t: int, of_its_own: bool = False) -> Tensor:
    """A model's maps `[experts, outputs, inputs]` between merged units, or into them `of_its_own` units."""
    labels = list(fit.spec.axes[site.weight])
    if of_its_own:
        labels[site.input_axis] = ()
    return to_merged(fit.values.tensors[t][site.weight], labels, fit.alignment, fit.spec, t)


def _weights(fit: Fit, mixture: Mixture, b: int, rows: int) -> Tensor:
    """How much each row counts: as its token does."""
    samples, tokens = fit.values.batches[b].size, rows // mixture.repeated
    if tokens % samples:
        return torch.ones(rows, device=fit.values.device)
    return fit.rows.weights((samples, tokens // samples, 1), b, -1).repeat_interleave(mixture.repeated)


def _sums(fit: Fit, site: RefitSite) -> list[Gram]:
    return [fit.gram(own) for own in fit.values.merged[site.weight]]


def _add(fit: Fit, sums: list[Gram], site: RefitSite, b: int, chosen: Tensor, y: Tensor, weights: Tensor) -> None:
    """Add the rows that each expert of the mixture gets, and remember them as targets for the report."""
    x = fit.values.of(site.node.args[0], MERGED, b)
    for number, gram in enumerate(sums):
        rows = (chosen == number).nonzero().squeeze(1)
        found, weight = fit.rows.sample(weights[rows].cpu(), b, x.shape[1], None)
        picked = rows[found if isinstance(found, slice) else found.to(rows.device)]
        if len(picked):
            gram.add(x[picked], y[picked], weight.to(x.device))
    known, _ = fit.pick(site, b)
    fit.targets.know(site, b, known, at_rows(y, -1, known))


def _write(fit: Fit, site: RefitSite, sums: list[Gram]) -> None:
    prior = fit.values.merged[site.weight]
    found = [
        ridge(gram.reduce(fit.all_reduce), own, fit.config.ridge, False)[0]
        for gram, own in zip(sums, prior, strict=True)
    ]
    fit.write(site, torch.stack(found))
