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
    """Queries and keys of one merged head.

    Attributes:
        query: `[rank, n]`; key: `[rank, m]`: maps of the inputs, float64, of equal length in every direction.
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
    """Queries and keys whose product is nearest to the mean of the experts' products.

    Args:
        queries: per expert `[head_dim, n]`: its queries as a map of the query's input.
        keys: per expert `[head_dim, m]`.
        query_metric: of the query's input; key_metric: of the key's.
        rank: the merged head's width.
    """
    left, rows = qr(query_metric.root @ torch.cat(list(queries)).mT)
    right, columns = qr(key_metric.root @ torch.cat(list(keys)).mT)
    widths = [len(query) for query in queries]
    products = [a @ b.mT for a, b in zip(rows.split(widths, 1), columns.split(widths, 1), strict=True)]
    u, lengths, v = svd(torch.stack(products).mean(0))
    u, lengths, v = u[:, :rank], lengths[:rank], v[:rank]
    kept = u * lengths @ v
    query = (query_metric.inverse @ left @ u * lengths.sqrt()).mT
    key = (key_metric.inverse @ right @ v.mT * lengths.sqrt()).mT
    return LogitFactors(
        padded(query, rank),
        padded(key, rank),
        lost=sum(float((product - kept).square().sum()) for product in products) / len(products),
        energy=sum(float(product.square().sum()) for product in products) / len(products),
    )


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
def nearest_basis(one: Tensor, other: Tensor, towards: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Two factors `[rank, n]` and `[rank, m]` of a product, rotated together to be nearest to two others, `towards`.

    Every rotation of both gives the same product. Without a choice the basis would jump where two directions are of
    nearly the same length; this one changes as little as the product does.
    """
    u, _, v = svd(towards[0].to(one) @ one.mT + towards[1].to(other) @ other.mT)
    return u @ v @ one, u @ v @ other


def padded(rows: Tensor, count: int) -> Tensor:
    """Rows of zeros behind the others, so that there are `count`."""
    return torch.cat([rows, rows.new_zeros(count - len(rows), rows.shape[1])])
