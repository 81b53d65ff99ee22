"""Tensors that are used at several places, such as ALBERT's one layer: one regression over all of them.

What the merged model feeds into the later places depends on the solution. So the experts run ahead, once, and of each
place's input the merged units' share of theirs is taken, which is what the merged model would feed into it if it were
right so far; the targets are the share of what the experts put out there. Then the walk goes on with the solution.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor, fx

from hf_zipit.refit.fit import Fit
from hf_zipit.refit.positions import at_rows
from hf_zipit.refit.regression import ChannelSums, Gram, ridge, scale_and_shift
from hf_zipit.refit.solvable import RefitSite
from hf_zipit.refit.solvers import normed
from hf_zipit.refit.stream_basis import values_of
from hf_zipit.symmetry.spec import all_held

KINDS = {"linear", "norm", "embedding"}
"""What can be solved for several places."""


@torch.no_grad()
def solve_shared(fit: Fit, groups: Sequence[tuple[RefitSite, ...]]) -> None:
    """Write the solution of every tensor, given the places where it is used, into the merged model."""
    if not groups:
        return
    sums = [_Sums(fit, group[0]) for group in groups]
    at = defaultdict[fx.Node, list[tuple[_Sums, RefitSite]]](list)
    wanted = set[fx.Node]()
    for own, group in zip(sums, groups, strict=True):
        for site in group:
            at[site.output].append((own, site))
            wanted.add(site.output)
            if site.kind != "embedding":
                wanted.add(site.node.args[0])  # type: ignore[arg-type]
    values = fit.values
    for b, inputs in enumerate(values.inputs):
        held: dict[fx.Node, tuple[Tensor, ...]] = {}
        left = {node: sum(site.node.args[0] is node for found in at.values() for _, site in found) for node in wanted}
        for node, *found in values_of(wanted, values.program, values.tensors[:-1], inputs):
            held[node] = tuple(found)
            for own, site in at.get(node, ()):
                source = site.node.args[0]
                own.add(site, held.get(source, ()), held[node], b)  # type: ignore[arg-type]
                if source in left:
                    left[source] -= 1  # type: ignore[index]
                    if not left[source]:  # type: ignore[index]
                        del held[source]  # type: ignore[arg-type]
            if not left[node]:
                held.pop(node, None)
    for own in sums:
        own.write()


class _Sums:
    """What is summed up for one weight and its bias."""

    def __init__(self, fit: Fit, site: RefitSite) -> None:
        self.fit, self.site = fit, site
        self.sums: Gram | ChannelSums | list[Tensor]
        if site.kind == "linear":
            self.sums = fit.gram(fit.matrix(site))
        elif site.kind == "norm":
            self.sums = ChannelSums.empty(len(fit.values.merged[site.weight]), fit.home)
        else:
            table = fit.values.merged[site.weight]
            self.sums = [fit.zeros(*table.shape), fit.zeros(len(table))]

    def add(self, site: RefitSite, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...], b: int) -> None:
        """Add the rows of one place, given every expert's values there."""
        fit, targets = self.fit, self.fit.targets
        if site.kind == "embedding":
            y = targets.share_of(outputs, -1, targets.label(site), b)
            looked_up = fit.values.program.value_of(site.node.args[1], fit.values.merged, fit.values.inputs[b])
            indices = looked_up.expand(y.shape[:-1]).reshape(-1).to(fit.home)
            weight = fit.rows.weights(y.shape, b, -1)
            self.sums[0].index_add_(0, indices, (y.flatten(0, -2) * weight[:, None]).to(self.sums[0]))  # type: ignore[index]
            self.sums[1].index_add_(0, indices, weight.to(self.sums[1]))  # type: ignore[index]
            return
        picked, weight = fit.rows.pick(outputs[0].shape, b, -1, inputs[0].shape[-1])
        label = all_held(fit.input_label(site)) if site.kind == "linear" else targets.label(site)
        x = targets.share_of(inputs, -1, label, b, picked)
        y = targets.share_of(outputs, -1, targets.label(site), b, picked)
        self.sums.add(x if site.kind == "linear" else normed(x, site), y, weight)  # type: ignore[union-attr]

    def write(self) -> None:
        fit, site = self.fit, self.site
        prior, strength = fit.values.merged[site.weight], fit.config.ridge
        if isinstance(self.sums, Gram):
            prior = fit.matrix(site)
            fit.write(site, *ridge(self.sums.reduce(fit.all_reduce), prior, strength, site.bias is not None))
        elif isinstance(self.sums, ChannelSums):
            self.sums.sums = fit.all_reduce(self.sums.sums)
            fit.write(site, *scale_and_shift(self.sums, prior, strength, site.bias is not None))
        else:
            total, count = map(fit.all_reduce, self.sums)
            penalty = strength * count.mean().clamp_min(1e-12)
            fit.write(site, (total + penalty * prior.to(total)) / (count + penalty)[:, None])
