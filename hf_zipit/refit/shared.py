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

from hf_zipit.factorise import eigh
from hf_zipit.refit.fit import Fit
from hf_zipit.refit.regression import ChannelSums, Gram, ridge, scale_and_shift
from hf_zipit.refit.solvable import RefitSite
from hf_zipit.refit.solvers import normed
from hf_zipit.refit.stream_basis import values_of
from hf_zipit.symmetry.spec import all_held

KINDS = ({"linear"}, {"norm"}, {"embedding"}, {"embedding", "linear"})
"""What can be solved for several places: a table of words may be a linear map at the end."""


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
    """What is summed up for one weight and its bias, from the places where it is used."""

    def __init__(self, fit: Fit, site: RefitSite) -> None:
        self.fit, self.weight, self.prior = fit, site, fit.values.merged[site.weight]
        self.maps: tuple[RefitSite, Gram] | None = None
        self.scales = ChannelSums.empty(len(self.prior), fit.home) if site.kind == "norm" else None
        self.rows: tuple[Tensor, Tensor] | None = None
        self.energies = fit.zeros(2)  # of what rows are looked up for, and of what maps put out

    def add(self, site: RefitSite, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...], b: int) -> None:
        """Add the rows of one place, given every expert's values there."""
        fit, targets = self.fit, self.fit.targets
        if site.kind == "embedding":
            y = targets.share_of(outputs, -1, targets.label(site), b)
            looked_up = fit.values.program.value_of(site.looked_up, fit.values.merged, fit.values.inputs[b])
            indices = looked_up.expand(y.shape[:-1]).reshape(-1).to(fit.home)
            weight = fit.rows.weights(y.shape, b, -1)
            if self.rows is None:
                self.rows = fit.zeros(*self.prior.shape), fit.zeros(len(self.prior))
            wanted = (y.flatten(0, -2) * weight[:, None]).to(self.rows[0])
            self.rows[0].index_add_(0, indices, wanted)
            self.rows[1].index_add_(0, indices, weight.to(self.rows[1]))
            self.energies[0] += (wanted * y.flatten(0, -2).to(wanted)).sum()
            return
        picked, weight = fit.rows.pick(outputs[0].shape, b, -1, inputs[0].shape[-1])
        label = all_held(fit.input_label(site)) if site.kind == "linear" else targets.label(site)
        x = targets.share_of(inputs, -1, label, b, picked)
        y = targets.share_of(outputs, -1, targets.label(site), b, picked)
        if self.scales is not None:
            self.scales.add(normed(x, site), y, weight)
            return
        if self.maps is None:
            self.maps = site, fit.gram(fit.matrix(site))
        self.maps[1].add(x, y, weight)
        self.energies[1] += weight.to(fit.home, torch.float64) @ y.to(fit.home, torch.float64).square().sum(1)

    def write(self) -> None:
        """Put the solution into the merged model."""
        fit, strength = self.fit, self.fit.config.ridge
        if self.scales is not None:
            self.scales.sums = fit.all_reduce(self.scales.sums)
            fit.write(self.weight, *scale_and_shift(self.scales, self.prior, strength, self.weight.bias is not None))
        elif self.rows is None:
            site, gram = self.maps  # type: ignore[misc]
            fit.write(site, *ridge(gram.reduce(fit.all_reduce), fit.matrix(site), strength, site.bias is not None))
        elif self.maps is None:
            total, count = map(fit.all_reduce, self.rows)
            penalty = strength * count.mean().clamp_min(1e-12)
            fit.write(self.weight, (total + penalty * self.prior.to(total)) / (count + penalty)[:, None])
        else:
            fit.write(self.weight, self._tied())

    def _tied(self) -> Tensor:
        """The table `[rows, d]` whose rows are looked up at some places and are a linear map at others.

        Both errors count as shares of their targets' energy. For row v, looked up n_v times, the normal equations are
        (n_v + G) e_v = s_v + c_v; in the eigenvectors of G they are one division each.
        """
        fit = self.fit
        total, count = map(fit.all_reduce, self.rows)  # type: ignore[arg-type]
        moments = self.maps[1].reduce(fit.all_reduce)  # type: ignore[index]
        looked_up, mapped = fit.all_reduce(self.energies).clamp_min(1e-30)
        prior = self.prior.to(total)
        count, left = count / looked_up, (total - count[:, None] * prior) / looked_up
        values, vectors = eigh(moments.xx / mapped)
        penalty = fit.config.ridge * (values.mean() + count.mean()).clamp_min(1e-30)
        change = (left + moments.xy.mT / mapped) @ vectors / (count[:, None] + values.clamp_min(0) + penalty)
        return prior + change @ vectors.mT
