"""Attention in the refit: heads are merged by what they compute, not by the units inside them.

What a head computes is

- logits, which are bilinear in the input: x_i^T B_t x_j with B_t = W_q^T W_k of expert t, its biases included, each
  expert's queries and keys regressed on the merged model's input. With a rotary embedding there is such a B_t for
  every pair of units that turns together, complex and of rank one;
- a weighted mean of values, under the *merged* model's weights. The experts' own values, regressed on the merged
  model's input and averaged under those weights, are regressed on what the residual stream lacks; of each head's
  solution the part of the head's rank that loses least becomes its values and its share of the output projection,
  which is then solved once more for all heads together. Heads that share their keys share their values, too.

Two ways to make the merged heads, of which each layer gets the one whose logits are nearer to the experts':

- paired: one head for each of an expert's, as they were aligned, with the best factors of the mean of its experts'
  B_t. Right for heads that agree;
- split: every expert's head stays a head of its own, with 1/T of the width: the best factors of that rank, or of its
  rotary pairs those that say most. Heads of different experts rarely agree, but each is of low rank. The layer has as
  many weights and operations as before.

Where queries and keys are normed before they are rotated, logits are not bilinear. Heads can be split all the same,
under narrower norms, where the layer then leaves less of what the stream lacks.

All of this is closed-form: two passes over the inputs a layer and two singular value decompositions a head. What it
leaves is fitted in steps (`attention_refinement.py`).

Ours; comparing heads by circuits is from *A Mathematical Framework for Transformer Circuits* (2021).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx
from torch.nn import functional

from hf_zipit.factorise import side_by_side
from hf_zipit.maps.products import factor_indices, merged_sizes
from hf_zipit.maps.transform import features_to_merged
from hf_zipit.modeling.head_dims import HeadCut, pair_units
from hf_zipit.refit.attention import Attention, Heads, SolvedApart
from hf_zipit.refit.attention_refinement import SolvedHeads, refine_attention
from hf_zipit.refit.chosen_heads import ExpertHeads, choose_heads
from hf_zipit.refit.fit import Fit
from hf_zipit.refit.head_factors import (
    LogitFactors,
    Metric,
    logit_factors,
    nearest_basis,
    nearest_phases,
    padded,
    pair_energies,
    rotary_factors,
    value_factors,
)
from hf_zipit.refit.merged_attention import Block, MergedAttention
from hf_zipit.refit.mlp_solver import WORTH
from hf_zipit.refit.positions import at_rows
from hf_zipit.refit.regression import SecondMoments, ridge
from hf_zipit.refit.solvers import regress_inputs, written
from hf_zipit.refit.splitting import SplitHeads
from hf_zipit.symmetry.spec import product_key

AGREED = 1e-3
"""Heads that lose no more than this share of their logits' energy by being paired are not split."""


@dataclass(frozen=True)
class Member:
    """An expert's head in a merged one: whose, and which of the expert's own outputs."""

    expert: int
    units: slice


@dataclass(frozen=True)
class MergedHeads:
    """How a layer's merged heads are made.

    Attributes:
        queries: per merged head the experts' heads in it.
        keys, values: the same of the heads that have keys and values; a number of query heads in a row share one.
        width: of the merged heads.
        count, groups: how many query heads, and heads with keys, there are; those beyond the given ones stay empty.
    """

    queries: list[list[Member]]
    keys: list[list[Member]]
    values: list[list[Member]]
    width: int
    count: int
    groups: int

    @property
    def shared_by(self) -> int:
        """How many query heads share one's keys."""
        return self.count // self.groups

    def asking(self, group: int) -> list[list[Member]]:
        """The query heads of a group."""
        return self.queries[group * self.shared_by : (group + 1) * self.shared_by]


@dataclass(frozen=True)
class MergedLogits:
    """Queries and keys of a layer's merged heads.

    Attributes:
        found: by group.
        pairs: of an expert's rotary pairs, those that split heads keep.
    """

    found: list[LogitFactors]
    pairs: list[int] | None = None

    def lost_share(self, more_lost: float = 0.0, more_energy: float = 0.0) -> float:
        """What the layer's heads miss of the experts' logits, as a share of those; `more` is lost of what is added to
        them, and how much that is."""
        lost, energy = (sum(getattr(group, name) for group in self.found) for name in ("lost", "energy"))
        return (lost + more_lost) / max(energy + more_energy, 1e-30)


@dataclass(frozen=True)
class Start:
    """Where the regression of the heads that share their values starts, and which of their bases is taken.

    Attributes:
        slope: `[heads, outputs, values]`, what the values are mapped to before anything is regressed.
        out, mix: `[heads, outputs, width]` and `[width, values]`, the output projection and the values to be nearest
            to.
    """

    slope: Tensor
    out: Tensor
    mix: Tensor


class AttentionSolver:
    """Solves one attention layer of a refit."""

    def __init__(
        self, fit: Fit, attention: Attention, cut: SplitHeads | None, like_others: bool | None = None
    ) -> None:
        """`cut`: the layer with narrower heads, if it can have them; `like_others`: whether a layer was cut that
        shares its biases, None where there is none yet.
        """
        self.fit, self.attention, self.cut, self.like_others = fit, attention, cut, like_others
        self.spec, self.alignment, self.tasks = fit.spec, fit.alignment, fit.values.experts
        self.regressed: dict[Heads, list[tuple[Tensor, Tensor]]] = {}
        self.moments: dict[Heads, SecondMoments] = {}
        self.forward = MergedAttention(fit, attention)
        self.blocks: list[Block] = []
        self.asked_anew = False  # whether queries and keys that were solved apart are others now,
        self.scaled_anew = False  # and what stands between them and the logits

    def solve(self) -> HeadCut | None:
        """Write queries, keys, values and the start of the output projection into the merged model.

        Returns:
            The merged heads' width and pairs if they were split; the program then has their sizes.
        """
        attention, fit = self.attention, self.fit
        projection = fit.matrix(attention.output)
        chosen_from = attention.apart if fit.config.split_heads else None
        moved = () if chosen_from is None or not chosen_from.exchanged else chosen_from.maps
        self._regress((*attention.inputs, *moved))
        heads, split = self._paired(), self._split()
        if attention.logits is None:
            starts = self._paired_starts(heads, projection)
            self._solve_values(heads, starts)
            return None if chosen_from is None else self._keep_apart(chosen_from, heads, split, starts)
        metrics = self._metrics()
        logits = self._paired_logits(heads, *metrics)
        others = self._split_instead(split, logits, *metrics)
        if split is not None and others is not None:
            biases = self.cut.biases  # type: ignore[union-attr]
            if biases is not None and self.like_others is None:
                biases.split(fit)
            self._write_split(split, others)
            self._solve_values(split, self._split_starts(split))
            self._refine(split, self._kept(split, others), self.cut.asked)  # type: ignore[union-attr]
            fit.values.program.adopt(self.cut.arguments)  # type: ignore[union-attr]
            return HeadCut(split.width, others.pairs)
        self._write_paired(heads, logits)
        self._solve_values(heads, self._paired_starts(heads, projection))
        self._refine(heads, slice(heads.width))
        return None

    def _refine(
        self, heads: MergedHeads, units: slice | list[int], asked: tuple[float, float] | None = None
    ) -> float | None:
        """Fit all of the layer to what the stream lacks, from where it is; what `refine_attention` returns."""
        groups, shared_by = len(heads.values), heads.shared_by
        return refine_attention(self.fit, self.forward, SolvedHeads(self.blocks, units, groups, shared_by, asked))

    # Which heads -----------------------------------------------------------------------------------------------------

    def _paired(self) -> MergedHeads:
        attention = self.attention

        def members(own: Heads, count: int) -> list[list[Member]]:
            return [[Member(t, self._units(own, t, head)) for t in self.tasks] for head in range(count)]

        queries = members(attention.query, attention.heads) if attention.logits else []
        keys = members(attention.key, attention.groups) if attention.logits else []
        values = members(attention.value, attention.groups)
        return MergedHeads(queries, keys, values, attention.width, attention.heads, attention.groups)

    def _units(self, own: Heads, expert: int, head: int) -> slice:
        """Where the outputs of a map that belong to a merged head are among an expert's own."""
        key = product_key(own.label)
        indices = factor_indices(key, self.alignment, self.spec, expert)
        merged = torch.zeros(self.spec.size(key), dtype=torch.int64)
        for name, size in zip(key[:-1], merged_sizes(key[:-1], self.alignment, self.spec), strict=True):
            merged = merged * size + indices[name]
        first = int((merged == head).int().argmax())
        return slice(first, first + self.attention.width)

    def _split(self) -> MergedHeads | None:
        attention, cut = self.attention, self.cut
        if cut is None:
            return None

        def members(count: int) -> list[list[Member]]:
            starts = range(0, count * attention.width, attention.width)
            return [[Member(t, slice(first, first + attention.width))] for t in self.tasks for first in starts]

        own = members(attention.groups)
        return MergedHeads(members(attention.heads), own, own, cut.width, cut.count, cut.groups)

    # What the experts' maps are, seen from the merged model's inputs -------------------------------------------------

    def _regress(self, maps: Sequence[Heads]) -> None:
        """Every expert's queries, keys and values as linear maps of the merged model's inputs; one pass an input.

        They are linear maps W_t of the expert's own input. So it is that input which is regressed, towards U_t: what
        W_t makes of the solution is the solution for W_t's outputs, towards W_t U_t.
        """
        by_input: dict[tuple[fx.Node, ...], list[Heads]] = {}
        for own in maps:
            by_input.setdefault(own.inputs, []).append(own)
        for found, alike in by_input.items():
            intercept = any(own.site.bias for own in alike)  # without one nothing could add it
            moments, inputs = regress_inputs(self.fit, found, self.fit.input_label(alike[0].site), intercept)
            for own in alike:
                self.regressed[own] = [written(self.fit, own.site, t, *inputs[t], own.rows) for t in self.tasks]
                self.moments[own] = moments

    # Queries and keys ------------------------------------------------------------------------------------------------

    def _metrics(self) -> tuple[Metric, Metric]:
        """Of the query's input and of the key's, each with one more that is always one if it has a bias.

        What a key's bias adds to the logits is the same for all positions, and cancels, unless it is rotated by its
        position; so does what the mean key adds.
        """
        query, key = self.attention.asked
        if self.attention.logits != "plain":
            return self._metric(query), self._metric(key)
        k = self.moments[key]
        centred = k.xx / k.n - torch.outer(k.x, k.x) / k.n.square()
        return self._metric(query), Metric.of(centred, self.fit.config.ridge)

    def _metric(self, own: Heads) -> Metric:
        return Metric.of(self._moment(own), self.fit.config.ridge)

    def _moment(self, own: Heads) -> Tensor:
        """Of a map's input, with one more that is always one if it has a bias."""
        found = self.moments[own]
        moment = found.xx / found.n
        if own.site.bias is not None:
            mean = found.x / found.n
            moment = torch.cat([torch.cat([moment, mean[:, None]], 1), torch.cat([mean, mean.new_ones(1)])[None]])
        return moment

    def _factors(self, heads: MergedHeads, group: int) -> tuple[list[Tensor], list[Tensor]]:
        """Per expert in a group its queries `[heads, head_dim, n]` and keys `[head_dim, m]`."""
        query, key = self.attention.asked
        asked = [self._rows(key, member) for member in heads.keys[group]]
        asking = [
            torch.stack([self._rows(query, member) for member in members])
            for members in zip(*heads.asking(group), strict=True)
        ]
        return asking, asked

    def _rows(self, own: Heads, member: Member) -> Tensor:
        return self._own(own, member.expert)[member.units]

    def _paired_logits(self, heads: MergedHeads, *metrics: Metric) -> MergedLogits:
        def factors(group: int) -> LogitFactors:
            parts = self._factors(heads, group)
            if self.attention.logits == "rotary":
                return rotary_factors(*parts, *metrics)
            return logit_factors(*parts, *metrics, heads.width)

        return MergedLogits(side_by_side(factors, range(len(heads.keys))))

    def _split_logits(self, heads: MergedHeads, *metrics: Metric) -> MergedLogits:
        """Every head's best factors; of rotary pairs those that say most, the same ones for the whole layer."""
        parts = [self._factors(heads, group) for group in range(len(heads.keys))]
        if self.attention.logits == "plain":

            def factors(part: tuple[list[Tensor], list[Tensor]]) -> LogitFactors:
                (asking,), (asked,) = part
                own = logit_factors([asking], [asked], *metrics, heads.width)
                query, key = nearest_basis(own.query, own.key, (asking[:, : heads.width], asked[: heads.width]))
                return replace(own, query=query, key=key)

            return MergedLogits(side_by_side(factors, parts))
        energies = torch.stack([pair_energies(asking, asked, *metrics) for (asking,), (asked,) in parts])
        pairs = self._largest(energies, heads.width)
        units = pair_units(pairs, self.attention.width)
        found = [
            LogitFactors(asking[:, units], asked[units], float(own.sum() - own[pairs].sum()), float(own.sum()))
            for ((asking,), (asked,)), own in zip(parts, energies, strict=True)
        ]
        return MergedLogits(found, pairs)

    @staticmethod
    def _largest(energies: Tensor, width: int) -> list[int]:
        """The rotary pairs with the largest shares of energies `[heads, pairs]`, as many as a head of a width has."""
        shares = energies / energies.sum(1, keepdim=True).clamp_min(1e-30)
        return shares.sum(0).topk(width // 2).indices.sort().values.tolist()

    def _split_instead(self, split: MergedHeads | None, paired: MergedLogits, *metrics: Metric) -> MergedLogits | None:
        """The logits of split heads where these are nearer to the experts', or other layers' were; else None."""
        if split is None or self.like_others is False:
            return None
        if self.like_others:
            return self._split_logits(split, *metrics)
        biases, scale = self.cut.biases, self._scale()  # type: ignore[union-attr]
        lost, energy = (x / scale**2 for x in ((0.0, 0.0) if biases is None else biases.disagreement(self.fit)))
        off = paired.lost_share(lost, energy)
        if off <= AGREED:
            return None
        found = self._split_logits(split, *metrics)
        every = energy * len(self.tasks)  # those of split heads are sums over the experts, not means
        return found if found.lost_share(more_energy=every) < off else None

    def _scale(self) -> float:
        """What products of queries and keys are multiplied by."""
        scale = self.attention.node.kwargs.get("scale")
        return self.attention.width**-0.5 if scale is None else float(scale)  # type: ignore[arg-type]

    def _write_paired(self, heads: MergedHeads, logits: MergedLogits) -> None:
        query, key = self.attention.query, self.attention.key
        before = self._combined(query).unflatten(0, (heads.groups, heads.shared_by, heads.width))
        asked = self._combined(key).unflatten(0, (heads.groups, heads.width))
        near = nearest_phases if self.attention.logits == "rotary" else nearest_basis
        turned = [near(own.query, own.key, towards) for own, *towards in zip(logits.found, before, asked, strict=True)]
        queries, keys = (torch.cat([part.flatten(0, -2) for part in parts]) for parts in zip(*turned, strict=True))
        self.forward.write(query, queries)
        self.forward.write(key, keys)
        self.blocks = [(queries, keys)]

    def _write_split(self, heads: MergedHeads, logits: MergedLogits) -> None:
        """Heads of `heads.width`, and for what follows the same as wider heads with zeros, an expert at a time."""
        attention, cut = self.attention, self.cut
        assert cut is not None
        queries = torch.cat([own.query for own in logits.found])
        keys = torch.stack([own.key for own in logits.found])
        self.forward.write(attention.query, padded(queries.flatten(0, 1) * cut.scale, heads.count * heads.width))
        self.forward.write(attention.key, padded(keys.flatten(0, 1), heads.groups * heads.width))
        self.blocks = self._by_expert(queries, keys, self._kept(heads, logits))

    def _by_expert(self, queries: Tensor, keys: Tensor, kept: slice | list[int]) -> list[Block]:
        """Narrower heads `[heads, width, n]` as whole ones with zeros, an expert at a time."""
        whole = [part.new_zeros(len(part), self.attention.width, part.shape[-1]) for part in (queries, keys)]
        for all_units, part in zip(whole, (queries, keys), strict=True):
            all_units[:, kept] = part
        by_expert = [part.flatten(0, 1).chunk(len(self.tasks)) for part in whole]
        return list(zip(*by_expert, strict=True))

    def _kept(self, heads: MergedHeads, logits: MergedLogits) -> slice | list[int]:
        """Which units of an expert's head split heads have."""
        return slice(heads.width) if logits.pairs is None else pair_units(logits.pairs, self.attention.width)

    def _combined(self, own: Heads) -> Tensor:
        """The combined weight, with the bias as one more column if it makes a difference."""
        weight = self.fit.matrix(own.site)[own.rows]
        if not self.forward.has_shift(own):
            return weight
        return torch.cat([weight, self.fit.bias(own.site)[own.rows, None]], 1)  # type: ignore[index]

    # Heads whose logits are not followed -----------------------------------------------------------------------------

    def _keep_apart(
        self, apart: SolvedApart, paired: MergedHeads, split: MergedHeads | None, starts: Sequence[Start]
    ) -> HeadCut | None:
        """Put experts' own heads in the place of paired ones where that is nearer to the experts; then fit them.

        All of them, if they can be narrower, or some.
        """
        fit, attention, left = self.fit, self.attention, self._left()
        if left <= AGREED:
            return None
        combined, experts, chosen, pairs = self._tensors(apart), None, None, None
        if apart.exchanged:
            if split is not None:
                pairs = self._split_normed(split)
                self._solve_values(split, self._split_starts(split))
                if (narrower := self._left()) <= WORTH * left:
                    left = narrower
                else:
                    pairs, self.blocks = None, []
            experts = self._expert_heads(apart)
            chosen = choose_heads(fit, self.forward, experts, left)
            if chosen is None and split is not None and pairs is not None:
                return self._write_normed(apart, split, pairs)
        # Under one norm over all of them heads are not quite those that were chosen, and before a norm of the branch
        # they are chosen without it: what is better the steps show.
        in_place = None
        if experts is None or chosen is None or apart.placed or attention.output.behind is not None:
            if split is not None and apart.exchanged:  # what narrower heads would have is in the model
                self.blocks = []
                self._solve_values(paired, starts)
            found = self._refine_paired(apart, paired)
            if chosen is not None:
                left, in_place = self._left() if found is None else found, self._tensors(apart)
        if experts is not None and chosen is not None:
            fit.values.merged.update(combined)
            heads = self._choose(apart, experts, chosen)
            found = self._refine(heads, slice(heads.width))
            if in_place is not None and (self._left() if found is None else found) > left:
                fit.values.merged.update(in_place)
                self._put_again(apart)
        new = {name for name, tensor in self._tensors(apart).items() if not torch.equal(tensor, combined[name])}
        self.asked_anew = not new.isdisjoint(own.site.weight for own in apart.maps)
        self.scaled_anew = not new.isdisjoint(apart.scales)
        return None

    def _tensors(self, apart: SolvedApart) -> dict[str, Tensor]:
        """The merged model's own of this layer, by name."""
        sites = [*(own.site for own in (*apart.maps, self.attention.value)), self.attention.output]
        names = {*apart.scales, *(name for site in sites for name in (site.weight, site.bias, site.length) if name)}
        return {name: self.fit.values.merged[name] for name in names}

    def _put_again(self, apart: SolvedApart) -> None:
        """Keep what attention gives with the merged model's own tensors."""
        attention = self.attention
        value, groups, shared = attention.value, attention.groups, attention.heads // attention.groups
        blocks = [tuple(map(self._combined, apart.maps))]
        slope, shift = (part if part is None else part[value.rows] for part in self.fit.affine(value.site))
        for b in range(len(self.fit.values.batches)):
            values = self.forward.values(slope, shift, groups, shared, b)  # type: ignore[arg-type]
            self.forward.put(self.forward.means(values, b, blocks), b)

    def _every(self) -> MergedHeads:
        """All experts' heads that have values."""
        attention = self.attention
        members = [[Member(t, self._nth(head))] for t in self.tasks for head in range(attention.groups)]
        return MergedHeads([], [], members, attention.width, attention.heads, attention.groups)

    def _expert_heads(self, apart: SolvedApart) -> ExpertHeads:
        """All experts' heads; those under one norm as long as each other's, which makes no difference to them."""
        values = self._values(self._every())
        blocks = [tuple(self._own(own, t) for own in apart.maps) for t in self.tasks]
        if not apart.placed:
            return ExpertHeads(blocks, *values)
        moments = [self._moment(own) for own in apart.maps]
        blocks = [
            tuple(
                rows / ((rows @ m) * rows).sum(1).mean().clamp_min(1e-30).sqrt()
                for rows, m in zip(block, moments, strict=True)
            )
            for block in blocks
        ]
        tensors, merged = self.fit.values.tensors, self.fit.values.merged
        scales = [{name: tensors[t][name].to(merged[name]) for name in apart.scales} for t in self.tasks]
        return ExpertHeads(blocks, *values, scales)

    def _refine_paired(self, apart: SolvedApart, paired: MergedHeads) -> float | None:
        self.blocks = [tuple(map(self._combined, apart.maps))]
        return self._refine(paired, slice(self.attention.width))

    def _choose(self, apart: SolvedApart, experts: ExpertHeads, chosen: Sequence[int]) -> MergedHeads:
        """Write some of all experts' heads."""
        attention, every = self.attention, self._every()
        shared = attention.heads // attention.groups
        self.blocks = [experts.of(chosen)]
        if apart.placed:
            self._write_gains(apart, experts, chosen)
        for own, rows in zip(apart.maps, self.blocks[0], strict=True):
            self.forward.write(own, rows)
        values = [every.values[group] for group in chosen]
        asking = [
            [Member(member.expert, self._nth(member.units.start // attention.width * shared + n))]
            for (member,) in values
            for n in range(shared)
        ]
        heads = replace(every, queries=asking, keys=values, values=values)
        self._solve_values(heads, self._split_starts(heads))
        return heads

    def _write_gains(self, apart: SolvedApart, experts: ExpertHeads, chosen: Sequence[int]) -> None:
        """Give heads their own gains, times what makes them as long as they are under their experts' norms."""
        merged, groups = self.fit.values.merged, self.attention.groups
        own = {
            gain.weight: torch.stack(
                [scales[gain.weight].flatten().unflatten(0, (groups, -1)) for scales in experts.scales]
            )
            .flatten(0, 1)[list(chosen)]
            .view_as(merged[gain.weight])
            for gain in apart.gains  # type: ignore[union-attr]
        }
        wanted, found = self._lengths(experts.blocks, experts.scales), self._lengths(self.blocks, [own])
        for gain, whole, now in zip(apart.gains, wanted, found, strict=True):  # type: ignore[arg-type]
            wanted_now = whole.unflatten(0, (len(experts.blocks) * groups, -1))[list(chosen)].flatten()
            longer = wanted_now / now.clamp_min(1e-30)
            heads = (own[gain.weight] + gain.constant).flatten().unflatten(0, (len(longer), -1))
            merged[gain.weight] = (heads * longer[:, None].to(heads)).view_as(own[gain.weight]) - gain.constant

    def _lengths(self, blocks: Sequence[Block], scales: Sequence[Mapping[str, Tensor]]) -> list[Tensor]:
        """The root mean squares of queries and of keys behind their norms, by head."""
        fit, sums = self.fit, list[Tensor]()
        for b in range(len(fit.values.batches)):
            for n, part in enumerate(self.forward.asked(b, blocks, scales)):
                heads = part.square().mean(-1).mT  # [samples, positions, heads]
                rows, weight = fit.rows.pick(heads.shape, b, -1, heads.shape[-1])
                total = (weight @ at_rows(heads, -1, rows)).to(fit.zeros())
                sums[n:] = [sums[n] + total] if len(sums) > n else [total]
        return [fit.all_reduce(total).sqrt() for total in sums]

    def _split_normed(self, heads: MergedHeads) -> list[int]:
        """The rotary pairs of all experts' heads that say most once they are normed; `blocks` are these heads."""
        metrics, energies, parts = self._metrics(), [], []
        for group, (member,) in enumerate(heads.keys):
            (asking,), (asked,) = self._factors(heads, group)
            query_gain, key_gain = self._gains(member.expert)
            energies.append(pair_energies(asking * query_gain, asked * key_gain, *metrics))
            parts.append((asking, asked))
        pairs = self._largest(torch.stack(energies), heads.width)
        units = pair_units(pairs, self.attention.width)
        queries = torch.cat([asking[:, units] for asking, _ in parts])
        keys = torch.stack([asked[units] for _, asked in parts])
        self.blocks = self._by_expert(queries, keys, units)
        return pairs

    def _gains(self, expert: int) -> list[Tensor]:
        """Of an expert's queries and keys, `[head_dim, 1]`."""
        gains = self.attention.apart.gains  # type: ignore[union-attr]
        own = self.fit.values.tensors[expert]
        return [(own[site.weight] + site.constant).to(self.fit.home, torch.float64)[:, None] for site in gains]  # type: ignore[union-attr]

    def _write_normed(self, apart: SolvedApart, heads: MergedHeads, pairs: list[int]) -> HeadCut:
        """Write narrower heads whose values are solved, and fit them; then the norms become narrower."""
        cut, width = self.cut, self.attention.width
        assert cut is not None
        units = pair_units(pairs, width)
        for own, rows, scale in zip(
            apart.maps, map(torch.cat, zip(*self.blocks, strict=True)), cut.asked, strict=True
        ):
            narrow = rows.unflatten(0, (-1, width))[:, units].flatten(0, 1)
            self.forward.write(own, padded(narrow * scale, own.count))
        self.asked_anew = self.scaled_anew = True
        self._refine(heads, units, cut.asked)
        for name, gain in cut.gains(self.attention, self.fit.values.merged, pairs).items():
            self.fit.values.merged[name] = gain
        self.fit.values.program.adopt(cut.arguments)
        return HeadCut(heads.width, pairs)

    def _nth(self, head: int) -> slice:
        """The units of an expert's own head."""
        return slice(head * self.attention.width, (head + 1) * self.attention.width)

    def _own(self, own: Heads, expert: int) -> Tensor:
        """An expert's queries or keys as maps of the merged model's input."""
        slope, shift = self.regressed[own][expert]
        return torch.cat([slope, shift[:, None]], 1) if self.forward.has_shift(own) else slope

    def _left(self) -> float:
        """The share of what the stream lacks that the layer leaves, as it was solved."""
        fit, site = self.fit, self.attention.output
        weight, bias = fit.affine(site)
        off, square, total, count = fit.zeros(), fit.zeros(), fit.zeros(fit.outputs(site)), fit.zeros()
        for b in range(len(fit.values.batches)):
            means = self.forward.kept(b)
            rows, picked = fit.rows.pick(means.shape, b, -1, means.shape[-1] * len(self.tasks))  # as heads are chosen
            y = fit.targets.of(site, b, rows)
            left = functional.linear(at_rows(means, -1, rows), weight, bias) - y
            off += picked.to(off) @ left.to(off).square().sum(1)
            square += picked.to(off) @ y.to(off).square().sum(1)
            total += (picked @ y).to(off)
            count += picked.to(off).sum()
        off, square, total, count = map(fit.all_reduce, (off, square, total, count))
        spread = square - total.square().sum() / count.clamp_min(1e-12) if site.bias else square
        return float(off / spread.clamp_min(1e-30))

    # Values and the output projection --------------------------------------------------------------------------------

    def _solve_values(self, heads: MergedHeads, starts: Sequence[Start]) -> None:
        """Mix the experts' values, for the heads that share them; then the output projection, for all heads together.

        What it reads is the mix of what was averaged, so that the moments of that say all that is needed.
        """
        value, output, penalty = self.attention.value, self.attention.output, self.fit.config.ridge
        slopes, shifts = self._values(heads)
        shared, width = heads.shared_by, slopes.shape[1]
        before = torch.cat([slope for start in starts for slope in start.slope], 1)
        moments = self._moments_of_means(heads, slopes, shifts, before)
        slope, _ = ridge(moments, before, penalty, output.bias is not None)
        covariance = moments.xx / moments.n - torch.outer(moments.x, moments.x) / moments.n.square()

        def factors(group: int) -> tuple[Tensor, Tensor]:
            own = [slice(head * width, (head + 1) * width) for head in range(group * shared, (group + 1) * shared)]
            spread = torch.stack([covariance[head, head] for head in own]).mean(0)
            solution = torch.cat([slope[:, head] for head in own])
            out, mix = value_factors(solution, Metric.of(spread, penalty), heads.width)
            return nearest_basis(out.mT, mix, (starts[group].out.flatten(0, 1).mT, starts[group].mix))

        found = side_by_side(factors, range(len(starts)))
        outs, mixes = [part for out, _ in found for part in out.mT.chunk(shared)], [mix for _, mix in found]
        weights, biases = (
            torch.cat([mix @ part[group] for group, mix in enumerate(mixes)]) for part in (slopes, shifts[..., None])
        )
        values = heads.groups * heads.width
        self.fit.write(value.site, padded(weights, values), padded(biases, values)[:, 0], value.rows)
        first = torch.cat(outs, 1)
        every = [mix for mix in mixes for _ in range(shared)]
        solved, shift = ridge(moments.mixed(torch.block_diag(*every), first), first, penalty, output.bias is not None)
        self.fit.write(output, padded(solved.mT, heads.count * heads.width).mT, shift)
        self._put_means(every)

    def _values(self, heads: MergedHeads) -> tuple[Tensor, Tensor]:
        """What the merged heads of each group mix: slopes `[groups, values, d]`, shifts `[groups, values]`."""
        maps = self.regressed[self.attention.value]
        slopes, shifts = (
            torch.stack([torch.cat([maps[m.expert][part][m.units] for m in members]) for members in heads.values])
            for part in (0, 1)
        )
        # Without a bias nothing may add a constant; the shift is then part of what the regression leaves.
        return slopes, shifts if self.attention.value.site.bias is not None else torch.zeros_like(shifts)

    def _moments_of_means(self, heads: MergedHeads, slopes: Tensor, shifts: Tensor, start: Tensor) -> SecondMoments:
        """Of the values' means under the merged model's weights, and of what the output projection aims at."""
        attention, fit = self.attention, self.fit
        slope, shift = (part.flatten(0, 1).to(fit.values.device, torch.float32) for part in (slopes, shifts))
        gram = fit.gram(start)
        for b in range(len(fit.values.batches)):
            values = self.forward.values(slope, shift, len(slopes), heads.shared_by, b)
            means = self.forward.means(values, b, self.blocks)
            fit.values.store[attention.node, "means", b] = means
            means = means.transpose(1, 2).flatten(2)
            rows, picked = fit.rows.pick(means.shape, b, -1, means.shape[-1])
            gram.add(at_rows(means, -1, rows), fit.targets.of(attention.output, b, rows), picked)
        return gram.reduce(fit.all_reduce)

    def _put_means(self, mixes: Sequence[Tensor]) -> None:
        """What the merged layer's attention gives: the mix of what was averaged is the average of the mix."""
        values, node = self.fit.values, self.attention.node
        for b in range(len(values.batches)):
            means = values.store[node, "means", b]
            values.store.pop((node, "means", b))
            self.forward.put(means @ torch.stack(list(mixes)).mT.to(means), b)

    def _paired_starts(self, heads: MergedHeads, projection: Tensor) -> list[Start]:
        """The combined model's: its projection, and its values of a head as a mix of the experts'."""
        label = self.attention.value.label
        eye = torch.eye(self.spec.size(product_key(label)), dtype=torch.float64, device=self.fit.home)
        merges = [
            features_to_merged(eye, 0, label, self.alignment, self.spec, t) / len(self.tasks) for t in self.tasks
        ]
        outs = projection.to(eye).unflatten(1, (heads.groups, heads.shared_by, heads.width)).permute(1, 2, 0, 3)
        starts = []
        for group, members in enumerate(heads.values):
            rows = slice(group * heads.width, (group + 1) * heads.width)
            mix = torch.cat([merges[m.expert][rows, m.units] for m in members], 1)
            starts.append(Start(outs[group] @ mix, outs[group], mix))
        return starts

    def _split_starts(self, heads: MergedHeads) -> list[Start]:
        """The experts' own: the mean of what their heads write."""
        output = self.attention.output
        label = self.fit.targets.label(output)
        starts = []
        for group in range(len(heads.values)):
            parts = []
            for (member,) in heads.asking(group):
                own = self.fit.matrix(output, member.expert)[:, member.units] / len(self.tasks)
                parts.append(features_to_merged(own, 0, label, self.alignment, self.spec, member.expert))
            written = torch.stack(parts).to(self.fit.home, torch.float64)
            first = torch.eye(heads.width, written.shape[-1]).to(written)
            starts.append(Start(written, written[..., : heads.width], first))
        return starts
