"""Attention in the refit: heads are merged by what they compute, not by the units inside them.

Queries, keys and values have no units of their own: any invertible map inside a head leaves the head as it is, so that
the mean of two experts' queries means little even where their heads agree. What a pair of heads does compute is

- logits, which are bilinear in the input: x_i^T B_t x_j with B_t = W_q^T W_k of expert t, its biases included. The
  merged head's logits are the mean of its experts' (each one's queries and keys regressed on the merged model's
  input), in the best factors of rank head_dim: those that lose least over pairs of inputs;
- a weighted mean of values, under the *merged* model's weights. The experts' own values, regressed on the merged
  model's input and averaged under those weights, are regressed on what the residual stream lacks; of each head's
  solution the part of rank head_dim that loses least becomes its values and its share of the output projection.

Everything is closed-form: two regressions and two singular value decompositions a head. It is done where queries, keys
and values are plain linear maps of one input each, cut into heads (no rotary embedding, no groups of heads that share
keys); elsewhere each is regressed as any other linear map.

Ours; comparing heads by circuits is from *A Mathematical Framework for Transformer Circuits* (2021).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx

from hf_zipit.align.products import factor_indices
from hf_zipit.combine.transform import features_to_merged
from hf_zipit.refit.graph import Program, Site
from hf_zipit.refit.regression import Gram, one_thread, ridge
from hf_zipit.symmetry.ops import op_name
from hf_zipit.symmetry.spec import MergeSpec, Symmetry, product_key

if TYPE_CHECKING:
    from hf_zipit.refit.walk import Walk

MERGED = -1
"""The merged model's place beside the experts 0 ... T - 1."""

FLOOR = 1e-5
"""Directions in which the inputs vary less than this share of the largest variance count as if they varied so much:
moments are made of float32 products, and what is seen of such directions is mostly rounding."""


@dataclass(frozen=True)
class Attention:
    """One attention layer whose queries, keys and values are plain linear maps.

    Attributes:
        node: the op that weighs the values.
        query, key, value: where their weights are solved.
        output: the output projection, which the heads' means go straight into.
        heads: the number of heads.
    """

    node: fx.Node
    query: Site
    key: Site
    value: Site
    output: Site
    heads: int

    @property
    def inputs(self) -> tuple[Site, Site, Site]:
        return self.query, self.key, self.value


def find_attention(program: Program, sites: Mapping[fx.Node, Site], spec: MergeSpec) -> Iterator[Attention]:
    """The attention layers that can be solved as a whole."""
    for node in program.nodes:
        if node.op != "call_function" or op_name(node) != "scaled_dot_product_attention":
            continue
        maps = [_cut_into_heads(x, sites) for x in node.args[:3]]
        output = _joined(node, sites)
        if output is None or any(site is None for site in maps):
            continue
        heads = {x.meta["val"].shape[1] for x in node.args[:3]}  # type: ignore[union-attr]
        if len(heads) == 1 and all(_is_free_inside(site.weight, spec) for site in maps):  # type: ignore[union-attr]
            yield Attention(node, *maps, output, heads.pop())  # type: ignore[arg-type]


def _cut_into_heads(node: fx.Node, sites: Mapping[fx.Node, Site]) -> Site | None:
    """The linear map whose output is only cut into heads, `[samples, heads, positions, head_dim]`."""
    for name in ("transpose", "view"):
        if op_name(node) not in ((name,) if name == "transpose" else (name, "reshape")) or len(node.users) != 1:
            return None
        node = node.args[0]  # type: ignore[assignment]
    site = sites.get(node)
    plain = site is not None and site.kind == "linear" and site.stream is None and len(node.users) == 1
    return site if plain else None


def _joined(node: fx.Node, sites: Mapping[fx.Node, Site]) -> Site | None:
    """The linear map that reads the heads side by side, and nothing else does."""
    while len(node.users) == 1:
        node = next(iter(node.users))
        if node in sites:
            return sites[node] if sites[node].kind == "linear" else None
        if op_name(node) not in {"transpose", "reshape", "view", "contiguous", "clone", "permute"}:
            return None
    return None


def _is_free_inside(weight: str, spec: MergeSpec) -> bool:
    """Whether a weight's outputs are heads times a space in which any change of basis is allowed."""
    label = spec.axes[weight][0]
    return len(label) == 2 and spec.spaces[label[1].space].symmetry is Symmetry.LINEAR


@torch.no_grad()
def logit_factors(
    queries: list[Tensor], keys: list[Tensor], query_moment: Tensor, key_moment: Tensor, rank: int
) -> tuple[Tensor, Tensor]:
    """Queries and keys whose product is nearest to the mean of the experts' products.

    Args:
        queries: per expert `[head_dim, n]`: its queries as a map of the query's input.
        keys: per expert `[head_dim, m]`.
        query_moment: `[n, n]`, the second moment of the query's input; key_moment: `[m, m]`.
        rank: head_dim of the merged head.

    Returns:
        `[rank, n]` and `[rank, m]`, float64, of equal length in every direction.
    """
    product = sum(q.mT @ k for q, k in zip(queries, keys, strict=True)) / len(queries)
    with one_thread():
        (left, undo_left), (right, undo_right) = roots(query_moment), roots(key_moment)
        u, lengths, v = torch.linalg.svd(left @ product @ right, full_matrices=False)
    lengths = lengths[:rank].sqrt()
    query, key = (undo_left @ u[:, :rank] * lengths).mT, (undo_right @ v[:rank].mT * lengths).mT
    missing = rank - len(lengths)
    return (query, key) if missing <= 0 else (_padded(query, missing), _padded(key, missing))


@torch.no_grad()
def value_factors(slope: Tensor, moment: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The map of a given rank that is nearest to a head's solution, as output projection and mix of values.

    Args:
        slope: `[outputs, n]`, the solution for one head's n averaged values.
        moment: `[n, n]`, their covariance.
        rank: head_dim of the merged head.

    Returns:
        `[outputs, rank]` and `[rank, n]`, float64.
    """
    with one_thread():
        root, undo = roots(moment)
        u, lengths, v = torch.linalg.svd(slope @ root, full_matrices=False)
    out, mix = u[:, :rank] * lengths[:rank].sqrt(), lengths[:rank, None].sqrt() * (v[:rank] @ undo)
    missing = rank - out.shape[1]
    return (out, mix) if missing <= 0 else (_padded(out.mT, missing).mT, _padded(mix, missing))


@torch.no_grad()
def nearest_basis(one: Tensor, other: Tensor, towards: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Two factors `[rank, n]` and `[rank, m]` of a product, turned as near as can be `towards` two others.

    Every rotation of both gives the same product. Without a choice the basis would jump where two directions are of
    nearly the same length; this one changes as little as the product does.
    """
    with one_thread():
        u, _, v = torch.linalg.svd(towards[0].double() @ one.mT + towards[1].double() @ other.mT)
    return u @ v @ one, u @ v @ other


def roots(moment: Tensor) -> tuple[Tensor, Tensor]:
    """The symmetric square root of a moment and its inverse."""
    values, vectors = torch.linalg.eigh(moment)
    values = values.clamp_min(max(FLOOR * float(values[-1]), 1e-30))
    return vectors * values.sqrt() @ vectors.mT, vectors * values.rsqrt() @ vectors.mT


def _padded(rows: Tensor, missing: int) -> Tensor:
    return torch.cat([rows, rows.new_zeros(missing, rows.shape[1])])


class AttentionSolver:
    """Solves one attention layer of a walk, which has the values and the weights."""

    def __init__(self, walk: Walk, attention: Attention) -> None:
        self.walk, self.attention = walk, attention
        self.spec, self.alignment, self.tasks = walk.spec, walk.alignment, range(len(walk.tasks))
        self.regressed: dict[Site, list[tuple[Tensor, Tensor]]] = {}
        self.moments: dict[Site, Gram] = {}

    def solve(self) -> None:
        """Write queries, keys, values and the start of the output projection into the merged model."""
        projection = self.walk.tensors[MERGED][self.attention.output.weight]
        self._regress()
        self._solve_logits()
        changed = [self.attention.query.node, self.attention.key.node]
        self.walk.run_again(changed, max((s.node for s in self.attention.inputs), key=self.walk.program.position.get))
        self._solve_values(projection)

    def _regress(self) -> None:
        """Every expert's queries, keys and values as linear maps of the merged model's inputs; one pass an input."""
        by_input: dict[fx.Node, list[Site]] = {}
        for site in self.attention.inputs:
            by_input.setdefault(site.node.args[0], []).append(site)  # type: ignore[arg-type]
        for x, sites in by_input.items():
            start = torch.cat([self._own_weight(site, t) for site in sites for t in self.tasks])
            gram = Gram.empty(start.shape[1], len(start), start)
            for b in range(len(self.walk.batches)):
                value = self.walk.value(x, MERGED, b)
                y = torch.cat([self.walk.store[site.node, t, b] for site in sites for t in self.tasks], -1)
                rows, picked = self.walk.sample(self.walk.rows_weight(value, b, -1), value.shape[-1], b)
                gram.add(value.flatten(0, -2)[rows], y.flatten(0, -2)[rows], picked)
            gram = gram.reduce(self.walk.add_up)
            slope, shift = ridge(gram, start, self.walk.config.ridge)
            parts = len(sites) * len(self.tasks)
            maps = iter(zip(slope.chunk(parts), shift.chunk(parts), strict=True))
            for site in sites:
                self.regressed[site] = [next(maps) for _ in self.tasks]
                self.moments[site] = gram

    def _own_weight(self, site: Site, expert: int) -> Tensor:
        """An expert's own weight that reads the merged units: W_t U_t."""
        label = self.spec.axes[site.weight][1]
        return features_to_merged(self.walk.tensors[expert][site.weight], 1, label, self.alignment, self.spec, expert)

    def _head(self, site: Site, expert: int, head: int) -> slice:
        """Where the outputs of a weight that belong to a merged head are among an expert's own."""
        key = product_key(self.spec.axes[site.weight][0])
        merged = factor_indices(key, self.alignment, self.spec, expert)[key[0]]
        first = int((merged == head).int().argmax())
        return slice(first, first + int((merged == head).sum()))

    def _solve_logits(self) -> None:
        query, key = self.attention.query, self.attention.key
        combined = self._combined(query), self._combined(key)
        q, k = self.moments[query], self.moments[key]
        # The query's bias is one more input, which is always one; the key's adds the same to all logits of a query.
        with_bias = torch.cat([torch.cat([q.xx, q.x[:, None]], 1), torch.cat([q.x, q.n[None]])[None]]) / q.n
        if query.bias is None:
            with_bias = with_bias[:-1, :-1]
        centred = k.xx / k.n - torch.outer(k.x, k.x) / k.n.square()
        rows = []
        for head in range(self.attention.heads):
            queries, keys = [], []
            for t in self.tasks:
                (slope, shift), own = self.regressed[query][t], self._head(query, t, head)
                queries.append(slope[own] if query.bias is None else torch.cat([slope[own], shift[own, None]], 1))
                keys.append(self.regressed[key][t][0][self._head(key, t, head)])
            found = logit_factors(queries, keys, with_bias, centred, combined[0].shape[1])
            rows.append(nearest_basis(*found, (combined[0][head], combined[1][head, :, : centred.shape[1]])))
        queries, keys = (torch.cat(part) for part in zip(*rows, strict=True))
        slope, shift = (queries, queries[:, 0] * 0) if query.bias is None else (queries[:, :-1], queries[:, -1])
        self.walk.write(query, slope, shift)
        self.walk.write(key, keys, keys[:, 0] * 0)

    def _combined(self, site: Site) -> Tensor:
        """The combined weight of every merged head, with the bias as one more column if there is one."""
        weight, bias = self.walk.tensors[MERGED][site.weight], self.walk.tensors[MERGED].get(site.bias)
        rows = weight if bias is None else torch.cat([weight, bias[:, None]], 1)
        return rows.unflatten(0, (self.attention.heads, -1))

    def _solve_values(self, projection: Tensor) -> None:
        """Mix the experts' values, head by head; the combined ones and their `projection` are where it starts."""
        attention, value, output = self.attention, self.attention.value, self.attention.output
        slopes, shifts = self._by_head(value)
        width = slopes.shape[1]
        rank = projection.shape[1] // attention.heads
        start = torch.cat(
            [
                projection[:, head * rank : (head + 1) * rank].double() @ self._combined_mix(head, rank)
                for head in range(attention.heads)
            ],
            1,
        )
        gram = Gram.empty(start.shape[1], len(start), start)
        label = self.spec.output_label(output.weight, 0)
        for b in range(len(self.walk.batches)):
            x = self.walk.value(value.node.args[0], MERGED, b)
            values = torch.einsum("nsd,hwd->nhsw", x, slopes.to(x.dtype)) + shifts.to(x.dtype)[:, None]
            means = self.walk.peek(attention.node, b, {attention.node.args[2]: values})
            means = means.transpose(1, 2).flatten(2)
            y = self.walk.aim(output, -1, label, b)
            rows, picked = self.walk.sample(self.walk.rows_weight(y, b, -1), means.shape[-1], b)
            gram.add(means.flatten(0, -2)[rows], y.flatten(0, -2)[rows], picked)
        gram = gram.reduce(self.walk.add_up)
        slope, shift = ridge(gram, start, self.walk.config.ridge, output.bias is not None)
        covariance = gram.xx / gram.n - torch.outer(gram.x, gram.x) / gram.n.square()
        outs, weights, biases = [], [], []
        for head in range(attention.heads):
            own = slice(head * width, (head + 1) * width)
            out, mix = value_factors(slope[:, own], covariance[own, own], rank)
            start_here = projection[:, head * rank : (head + 1) * rank].mT, self._combined_mix(head, rank)
            out, mix = nearest_basis(out.mT, mix, start_here)
            outs.append(out.mT)
            weights.append(mix @ slopes[head])
            biases.append(mix @ shifts[head])
        self.walk.write(value, torch.cat(weights), torch.cat(biases))
        self.walk.write(output, torch.cat(outs, 1), shift)

    def _by_head(self, value: Site) -> tuple[Tensor, Tensor]:
        """All experts' values in a merged head: slopes `[heads, experts * head_dim, d]` and shifts."""
        slopes, shifts = [], []
        for head in range(self.attention.heads):
            own = [self._head(value, t, head) for t in self.tasks]
            slopes.append(torch.cat([self.regressed[value][t][0][own[t]] for t in self.tasks]))
            shifts.append(torch.cat([self.regressed[value][t][1][own[t]] for t in self.tasks]))
        # Without a bias nothing may add a constant; the shift is then part of what the regression leaves.
        known = torch.stack(shifts)
        return torch.stack(slopes), known if value.bias is not None else torch.zeros_like(known)

    def _combined_mix(self, head: int, rank: int) -> Tensor:
        """The combined model's values of a head as a mix of the experts': `[head_dim, experts * head_dim]`."""
        value, parts = self.attention.value, []
        label = self.spec.axes[value.weight][0]
        for t in self.tasks:
            eye = torch.eye(self.spec.size(product_key(label)), dtype=torch.float64)
            merge = features_to_merged(eye, 0, label, self.alignment, self.spec, t)
            parts.append(merge[head * rank : (head + 1) * rank, self._head(value, t, head)] / len(self.tasks))
        return torch.cat(parts, 1)
