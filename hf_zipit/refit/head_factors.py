"""Attention heads as what they compute: pure functions of the experts' queries, keys and values.

Queries, keys and values have no units of their own: any invertible map inside a head leaves the head as it is. What a
head does compute is logits, bilinear in its inputs, and a linear map of the inputs' mean under its weights. Both are
matrices of rank head_dim, so the merged head's are found by singular value decompositions in the metric of the inputs'
moments. Where factors are thin, so are the decompositions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from hf_zipit.factorise import eigh, qr, svd


@dataclass(frozen=True)
class Metric:
    """A symmetric square root `[n, n]` of a moment, and its inverse, float64.

    Moments are made of float32 products: in directions in which the inputs hardly vary, most of what is seen is
    rounding. So all directions count a little more, by the same penalty as in the regressions.
    """

    root: Tensor
    inverse: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, moment: Tensor, penalty: float) -> Metric:
        """`penalty` is relative to the mean of the moment's diagonal."""
        values, vectors = eigh(moment)
        values = (values.clamp_min(0) + penalty * values.mean()).clamp_min(1e-30)
        return cls(vectors * values.sqrt() @ vectors.mT, vectors * values.rsqrt() @ vectors.mT)


@dataclass(frozen=True)
class LogitFactors:
    """Queries and keys of the merged heads that share one head's keys.

    Attributes:
        query: `[heads, rank, n]`; key: `[rank, m]`: maps of the inputs, float64.
        lost: the mean square of what the logits miss of each expert's, over independent pairs of inputs.
        energy: the mean square of the experts' logits.
    """

    query: Tensor
    key: Tensor
    lost: float
    energy: float


@torch.no_grad()
def logit_factors(
    queries: Sequence[Tensor], keys: Sequence[Tensor], query_metric: Metric, key_metric: Metric, rank: int
) -> LogitFactors:
    """Queries and keys whose products are nearest to the mean of the experts' products.

    Args:
        queries: per expert `[heads, head_dim, n]`: of the heads that share the keys, as maps of their input.
        keys: per expert `[head_dim, m]`.
        query_metric: of the query's input; key_metric: of the key's.
        rank: the merged head's width.
    """
    heads, _, n = queries[0].shape
    asking = torch.cat([(query_metric.root @ own.mT).flatten(0, 1) for own in queries], 1)
    left, rows = qr(asking)
    right, columns = qr(key_metric.root @ torch.cat(list(keys)).mT)
    widths = [len(key) for key in keys]
    products = [a @ b.mT for a, b in zip(rows.split(widths, 1), columns.split(widths, 1), strict=True)]
    u, lengths, v = svd(torch.stack(products).mean(0))
    u, lengths, v = u[:, :rank], lengths[:rank], v[:rank]
    kept = u * lengths @ v
    query = (query_metric.inverse @ (left @ u * lengths.sqrt()).unflatten(0, (heads, n))).mT
    key = (key_metric.inverse @ right @ v.mT * lengths.sqrt()).mT
    return LogitFactors(
        padded(query, rank),
        padded(key, rank),
        lost=sum(float((product - kept).square().sum()) for product in products) / len(products),
        energy=sum(float(product.square().sum()) for product in products) / len(products),
    )


@torch.no_grad()
def rotary_factors(
    queries: Sequence[Tensor], keys: Sequence[Tensor], query_metric: Metric, key_metric: Metric
) -> LogitFactors:
    """The same where pairs of units are rotated by their positions: a pair is a complex number.

    A pair's share of the logits is Re(conj(q) k e^(i angle)) with an angle of its own, so a pair can only be merged
    with the same pair, and what counts of it is the complex product conj(q) k of two maps, of rank one. The merged
    pair is the best product of rank one of the experts' mean.

    Args and return value as for `logit_factors`; unit i turns with unit i + head_dim / 2.
    """
    asking, asked = _complex_pairs(queries, query_metric), _complex_pairs([key[None] for key in keys], key_metric)
    heads, n = queries[0].shape[0], queries[0].shape[2]
    left, rows = qr(asking.conj())  # [pairs, heads * n, experts]
    right, columns = qr(asked)
    u, lengths, v = svd(rows @ columns.mT / len(keys))
    root = lengths[:, :1].sqrt()
    one = (left @ u[..., :1]).squeeze(-1).conj() * root
    other = (right @ v[:, :1].mT).squeeze(-1) * root
    query = _real_units(one.unflatten(1, (heads, n)).movedim(1, 0)) @ query_metric.inverse
    key = _real_units(other) @ key_metric.inverse
    energy = float((asking.abs().square().sum(1) * asked.abs().square().sum(1)).sum()) / len(keys)
    return LogitFactors(query, key, lost=max(energy - float(lengths[:, 0].square().sum()), 0.0), energy=energy)


@torch.no_grad()
def pair_energies(query: Tensor, key: Tensor, query_metric: Metric, key_metric: Metric) -> Tensor:
    """The mean square of every rotary pair's share of the logits, `[pairs]`, over the heads that share a key.

    Args: of one expert, as for `logit_factors`.
    """
    asking, asked = _complex_pairs([query], query_metric), _complex_pairs([key[None]], key_metric)
    return (asking.abs().square().sum(1) * asked.abs().square().sum(1)).squeeze(-1)


def _complex_pairs(parts: Sequence[Tensor], metric: Metric) -> Tensor:
    """Maps `[heads, head_dim, n]`, one an expert, in the units of a metric: complex `[pairs, heads * n, experts]`."""
    scaled = torch.stack([part @ metric.root for part in parts], -1)
    one, other = scaled.chunk(2, 1)
    return torch.complex(one, other).movedim(1, 0).flatten(1, 2)


def _real_units(pairs: Tensor) -> Tensor:
    """Complex `[..., pairs, n]` as maps `[..., head_dim, n]`."""
    return torch.cat([pairs.real, pairs.imag], -2)


@torch.no_grad()
def value_factors(slope: Tensor, metric: Metric, rank: int) -> tuple[Tensor, Tensor]:
    """The map of a given rank that is nearest to a head's solution, as output projection and mix of values.

    Args:
        slope: `[outputs, n]`, the solution for one head's n averaged values.
        metric: of those values.
        rank: the merged head's width.

    Returns:
        `[outputs, rank]` and `[rank, n]`, float64.
    """
    u, lengths, v = svd(slope @ metric.root)
    out, mix = u[:, :rank] * lengths[:rank].sqrt(), lengths[:rank, None].sqrt() * (v[:rank] @ metric.inverse)
    return padded(out.mT, rank).mT, padded(mix, rank)


@torch.no_grad()
def nearest_basis(one: Tensor, other: Tensor, towards: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Two factors `[..., rank, n]` and `[rank, m]` of products, rotated to be nearest to two others, `towards`.

    Every rotation of both gives the same products. Without a choice the basis would jump where two directions are of
    nearly the same length; this one changes as little as the products do.
    """
    near = (towards[0].to(one) @ one.mT).flatten(0, -3).sum(0) if one.dim() > 2 else towards[0].to(one) @ one.mT
    u, _, v = svd(near + towards[1].to(other) @ other.mT)
    return u @ v @ one, u @ v @ other


@torch.no_grad()
def nearest_phases(query: Tensor, key: Tensor, towards: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The same for rotary pairs `[heads, head_dim, n]` and `[head_dim, m]`, each of which may be turned."""
    own, other, first, second = (torch.complex(*part.to(query).chunk(2, -2)) for part in (query, key, *towards))
    turn = torch.sgn((own.conj() * first).sum((0, 2)) + (other.conj() * second).sum(1))
    turn = torch.where(turn == 0, torch.ones_like(turn), turn)[:, None]
    return _real_units(own * turn), _real_units(other * turn)


def padded(rows: Tensor, count: int) -> Tensor:
    """Rows `[..., rows, n]` with rows of zeros behind them, so that there are `count`."""
    return functional.pad(rows, (0, 0, 0, count - rows.shape[-2]))
