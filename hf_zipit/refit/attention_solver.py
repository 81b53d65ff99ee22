"""Attention in the refit: heads are merged by what they compute, not by the units inside them.

What a head computes is

- logits, which are bilinear in the input: x_i^T B_t x_j with B_t = W_q^T W_k of expert t, its biases included, each
  expert's queries and keys regressed on the merged model's input;
- a weighted mean of values, under the *merged* model's weights. The experts' own values, regressed on the merged
  model's input and averaged under those weights, are regressed on what the residual stream lacks; of each head's
  solution the part of the head's rank that loses least becomes its values and its share of the output projection,
  which is then solved once more for all heads together.

Two ways to make the merged heads, of which each layer gets the one whose logits are nearer to the experts':

- paired: one head for each of an expert's, as they were aligned, with the best factors of the mean of its experts'
  B_t. Right for heads that agree;
- split: every expert's head stays a head of its own, with 1/T of the width: the best factors of that rank. Heads
  of different experts rarely agree, but each is of low rank. The layer has as many weights and operations as before.

Everything is closed-form: two passes over the inputs a layer and two singular value decompositions a head.

Ours; comparing heads by circuits is from *A Mathematical Framework for Transformer Circuits* (2021).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.nn import functional

from hf_zipit.maps.products import factor_indices
from hf_zipit.maps.transform import features_to_merged
from hf_zipit.refit.fit import Fit
from hf_zipit.refit.head_factors import LogitFactors, Metric, logit_factors, nearest_basis, padded, value_factors
from hf_zipit.refit.positions import at_rows
from hf_zipit.refit.regression import SecondMoments, ridge
from hf_zipit.refit.solvable import Attention, RefitSite
from hf_zipit.refit.solvers import regress_inputs, written
from hf_zipit.refit.splitting import SplitHeads
from hf_zipit.refit.values import MERGED
from hf_zipit.symmetry.spec import product_key

AGREED = 1e-3
"""MergedHeads that lose no more than this share of their logits' energy by being paired are not split."""


@dataclass(frozen=True)
class Member:
    """An expert's head in a merged one: whose, and which of the expert's own outputs."""

    expert: int
    units: slice


@dataclass(frozen=True)
class MergedHeads:
    """How a layer's merged heads are made.

    Attributes:
        queries, keys, values: per merged head the experts' heads in it.
        count, width: of the merged heads; those beyond the given ones stay empty.
        scale: what the experts' products of queries and keys are multiplied by, in units of the merged layer's.
    """

    queries: list[list[Member]]
    keys: list[list[Member]]
    values: list[list[Member]]
    count: int
    width: int
    scale: float = 1.0


@dataclass(frozen=True)
class Start:
    """Where the regression of a head starts, and which of its bases is taken.

    Attributes:
        slope: `[outputs, values]`, what the head's values are mapped to before anything is regressed.
        out, mix: `[outputs, width]` and `[width, values]`, the output projection and the values to be nearest to.
    """

    slope: Tensor
    out: Tensor
    mix: Tensor


class AttentionSolver:
    """Solves one attention layer of a refit."""

    def __init__(self, fit: Fit, attention: Attention, cut: SplitHeads | None) -> None:
        """`cut`: the layer with narrower heads, if it can have them."""
        self.fit, self.attention, self.cut = fit, attention, cut
        self.spec, self.alignment, self.tasks = fit.spec, fit.alignment, fit.values.experts
        self.regressed: dict[RefitSite, list[tuple[Tensor, Tensor]]] = {}
        self.moments: dict[RefitSite, SecondMoments] = {}

    def solve(self) -> int | None:
        """Write queries, keys, values and the start of the output projection into the merged model.

        Returns:
            The width of the merged heads if they were split; the program then has their sizes.
        """
        attention, fit = self.attention, self.fit
        projection = fit.values.merged[attention.output.weight]
        self._regress()
        heads, metrics = self._paired(), self._metrics()
        logits = self._logits(heads, *metrics)
        split = self._split()
        if split is not None and lost_share(logits) > AGREED:
            others = self._logits(split, *metrics)
            if lost_share(others) < lost_share(logits):
                heads, logits = split, others
        is_split = heads is split
        starts = self._split_starts(heads) if is_split else self._paired_starts(heads, projection)
        self._write_logits(heads, logits, is_split)
        if is_split and self.cut is not None:
            fit.values.program.adopt(self.cut.arguments)
        fit.values.run_again([attention.query.node, attention.key.node], attention.at)
        self._solve_values(heads, starts)
        return heads.width if is_split else None

    # Which heads -----------------------------------------------------------------------------------------------------

    def _paired(self) -> MergedHeads:
        def members(site: RefitSite) -> list[list[Member]]:
            return [[Member(t, self._units(site, t, head)) for t in self.tasks] for head in range(attention.heads)]

        attention = self.attention
        parts = [members(site) for site in attention.inputs]
        return MergedHeads(*parts, attention.heads, attention.width)

    def _units(self, site: RefitSite, expert: int, head: int) -> slice:
        """Where the outputs of a weight that belong to a merged head are among an expert's own."""
        key = product_key(self.spec.axes[site.weight][0])
        merged = factor_indices(key, self.alignment, self.spec, expert)[key[0]]
        first = int((merged == head).int().argmax())
        return slice(first, first + int((merged == head).sum()))

    def _split(self) -> MergedHeads | None:
        attention, cut = self.attention, self.cut
        if cut is None:
            return None
        own = [
            [Member(t, slice(first, first + attention.width))]
            for t in self.tasks
            for first in range(0, attention.heads * attention.width, attention.width)
        ]
        return MergedHeads(own, own, own, cut.count, cut.width, cut.scale)

    # What the experts' maps are, seen from the merged model's inputs -------------------------------------------------

    def _regress(self) -> None:
        """Every expert's queries, keys and values as linear maps of the merged model's inputs; one pass an input.

        They are linear maps W_t of the expert's own input. So it is that input which is regressed, towards U_t: what
        W_t makes of the solution is the solution for W_t's outputs, towards W_t U_t.
        """
        by_input: dict[fx.Node, list[RefitSite]] = {}
        for site in self.attention.inputs:
            by_input.setdefault(site.node.args[0], []).append(site)  # type: ignore[arg-type]
        for x, sites in by_input.items():
            moments, inputs = regress_inputs(self.fit, x, self.spec.axes[sites[0].weight][1])
            for site in sites:
                self.regressed[site] = [written(self.fit, site, t, *inputs[t]) for t in self.tasks]
                self.moments[site] = moments

    # Queries and keys ------------------------------------------------------------------------------------------------

    def _logits(self, heads: MergedHeads, *metrics: Metric) -> list[LogitFactors]:
        return [
            logit_factors(
                [self._query(member) * heads.scale for member in queries],
                [self._key(member) for member in keys],
                *metrics,
                heads.width,
            )
            for queries, keys in zip(heads.queries, heads.keys, strict=True)
        ]

    def _metrics(self) -> tuple[Metric, Metric]:
        """Of the query's input, with one more that is always one if it has a bias; and of the key's, centred.

        What a key's bias adds to the logits is the same for all positions, and cancels.
        """
        q, k = self.moments[self.attention.query], self.moments[self.attention.key]
        moment = q.xx / q.n
        if self.attention.query.bias is not None:
            mean = q.x / q.n
            moment = torch.cat([torch.cat([moment, mean[:, None]], 1), torch.cat([mean, mean.new_ones(1)])[None]])
        penalty = self.fit.config.ridge
        return Metric.of(moment, penalty), Metric.of(k.xx / k.n - torch.outer(k.x, k.x) / k.n.square(), penalty)

    def _query(self, member: Member) -> Tensor:
        slope, shift = (part[member.units] for part in self.regressed[self.attention.query][member.expert])
        return slope if self.attention.query.bias is None else torch.cat([slope, shift[:, None]], 1)

    def _key(self, member: Member) -> Tensor:
        return self.regressed[self.attention.key][member.expert][0][member.units]

    def _write_logits(self, heads: MergedHeads, logits: Sequence[LogitFactors], is_split: bool) -> None:
        query, key = self.attention.query, self.attention.key
        queries, keys = [], []
        for number, found in enumerate(logits):
            if is_split:
                (asker,), (asked,) = heads.queries[number], heads.keys[number]
                towards = self._query(asker)[: heads.width], self._key(asked)[: heads.width]
            else:
                rows = slice(number * heads.width, (number + 1) * heads.width)
                towards = self._combined(query)[rows], self._combined(key)[rows, : found.key.shape[1]]
            one, other = nearest_basis(found.query, found.key, towards)
            queries.append(one)
            keys.append(other)
        rows, columns = (padded(torch.cat(part), heads.count * heads.width) for part in (queries, keys))
        slope, shift = (rows, rows[:, 0] * 0) if query.bias is None else (rows[:, :-1], rows[:, -1])
        self.fit.write(query, slope, shift)
        self.fit.write(key, columns, columns[:, 0] * 0)

    def _combined(self, site: RefitSite) -> Tensor:
        """The combined weight, with the bias as one more column if there is one."""
        weight, bias = self.fit.values.merged[site.weight], self.fit.values.merged.get(site.bias)
        return weight if bias is None else torch.cat([weight, bias[:, None]], 1)

    # Values and the output projection --------------------------------------------------------------------------------

    def _solve_values(self, heads: MergedHeads, starts: Sequence[Start]) -> None:
        """Mix the experts' values, head by head; then the output projection, for all heads together.

        What it reads is the mix of what was averaged, so that the moments of that say all that is needed.
        """
        value, output, penalty = self.attention.value, self.attention.output, self.fit.config.ridge
        slopes, shifts = self._values(heads)
        before = torch.cat([start.slope for start in starts], 1)
        moments = self._moments_of_means(heads, slopes, shifts, before)
        slope, _ = ridge(moments, before, penalty, output.bias is not None)
        covariance = moments.xx / moments.n - torch.outer(moments.x, moments.x) / moments.n.square()
        outs, mixes = [], []
        for head, start in enumerate(starts):
            own = slice(head * slopes.shape[1], (head + 1) * slopes.shape[1])
            out, mix = value_factors(slope[:, own], Metric.of(covariance[own, own], penalty), heads.width)
            out, mix = nearest_basis(out.mT, mix, (start.out.mT, start.mix))
            outs.append(out)
            mixes.append(mix)
        full = heads.count * heads.width
        weights, biases = (
            torch.cat([mix @ part[head] for head, mix in enumerate(mixes)]) for part in (slopes, shifts[..., None])
        )
        self.fit.write(value, padded(weights, full), padded(biases, full)[:, 0])
        first = torch.cat(outs).mT
        found, shift = ridge(moments.mixed(torch.block_diag(*mixes), first), first, penalty, output.bias is not None)
        self.fit.write(output, padded(found.mT, full).mT, shift)
        self._put_means(mixes, heads.count)

    def _values(self, heads: MergedHeads) -> tuple[Tensor, Tensor]:
        """The values that enter each merged head: slopes `[heads, values, d]` and shifts `[heads, values]`."""
        maps = self.regressed[self.attention.value]
        slopes, shifts = (
            torch.stack([torch.cat([maps[m.expert][part][m.units] for m in members]) for members in heads.values])
            for part in (0, 1)
        )
        # Without a bias nothing may add a constant; the shift is then part of what the regression leaves.
        return slopes, shifts if self.attention.value.bias is not None else torch.zeros_like(shifts)

    def _moments_of_means(self, heads: MergedHeads, slopes: Tensor, shifts: Tensor, start: Tensor) -> SecondMoments:
        """Of the values' means under the merged model's weights, and of what the output projection aims at."""
        attention, fit = self.attention, self.fit
        empty = heads.count - len(slopes)
        slope, shift = (part.flatten(0, 1).to(fit.values.device, torch.float32) for part in (slopes, shifts))
        gram = fit.gram(start)
        for b in range(len(fit.values.batches)):
            x = fit.values.of(attention.value.node.args[0], MERGED, b)  # type: ignore[arg-type]
            values = functional.linear(x, slope, shift).unflatten(-1, (len(slopes), -1)).transpose(1, 2)
            means = self._means(_with_empty_heads(values, empty), b)[:, : len(slopes)]
            fit.values.store[attention.node, "means", b] = means
            means = means.transpose(1, 2).flatten(2)
            rows, picked = fit.rows.pick(means.shape, b, -1, means.shape[-1])
            gram.add(at_rows(means, -1, rows), fit.targets.of(attention.output, b, rows), picked)
        return gram.reduce(fit.all_reduce)

    def _put_means(self, mixes: Sequence[Tensor], count: int) -> None:
        """What the merged layer's attention gives: the mix of what was averaged is the average of the mix."""
        values, node = self.fit.values, self.attention.node
        for b in range(len(values.batches)):
            means = values.store[node, "means", b]
            values.store.pop((node, "means", b))
            mixed = means @ torch.stack(list(mixes)).mT.to(means)
            values.store[node, MERGED, b] = _with_empty_heads(mixed, count - len(mixes))

    def _means(self, values: Tensor, b: int) -> Tensor:
        """Values `[samples, heads, positions, any]` averaged by the merged model's attention weights."""
        node = self.attention.node
        query, key = (self.fit.values.peek(node.args[i], b, {}) for i in (0, 1))  # type: ignore[arg-type]
        # Of one width all three are computed several times faster. More zeros change no product of queries and keys.
        more = max(0, values.shape[-1] - query.shape[-1])
        query, key = functional.pad(query, (0, more)), functional.pad(key, (0, more))
        if node.kwargs.get("scale") is None:
            query = query * (query.shape[-1] / (query.shape[-1] - more)) ** 0.5
        return self.fit.values.peek(node, b, dict(zip(node.args[:3], (query, key, values), strict=True)))

    def _paired_starts(self, heads: MergedHeads, projection: Tensor) -> list[Start]:
        """The combined model's: its projection, and its values of a head as a mix of the experts'."""
        value = self.attention.value
        label = self.spec.axes[value.weight][0]
        eye = torch.eye(self.spec.size(product_key(label)), dtype=torch.float64, device=self.fit.home)
        merges = [
            features_to_merged(eye, 0, label, self.alignment, self.spec, t) / len(self.tasks) for t in self.tasks
        ]
        starts = []
        for head, members in enumerate(heads.values):
            rows = slice(head * heads.width, (head + 1) * heads.width)
            out = projection[:, rows].to(eye)
            mix = torch.cat([merges[m.expert][rows, m.units] for m in members], 1)
            starts.append(Start(out @ mix, out, mix))
        return starts

    def _split_starts(self, heads: MergedHeads) -> list[Start]:
        """The experts' own: the mean of what their heads write."""
        output = self.attention.output
        label = self.spec.output_label(output.weight, 0)
        starts = []
        for (member,) in heads.values:
            own = self.fit.values.tensors[member.expert][output.weight][:, member.units] / len(self.tasks)
            written = features_to_merged(own, 0, label, self.alignment, self.spec, member.expert)
            written = written.to(self.fit.home, torch.float64)
            first = torch.eye(heads.width, written.shape[1]).to(written)
            starts.append(Start(written, written[:, : heads.width], first))
        return starts


def _with_empty_heads(values: Tensor, more: int) -> Tensor:
    """Values `[samples, heads, positions, any]` with `more` heads of zeros behind the others."""
    return functional.pad(values, (0, 0, 0, 0, 0, more)) if more else values


def lost_share(logits: Sequence[LogitFactors]) -> float:
    """The mean of what a layer's heads miss of the experts' logits, as a share of those."""
    lost, energy = (sum(getattr(head, name) for head in logits) for name in ("lost", "energy"))
    return lost / max(energy, 1e-30)
