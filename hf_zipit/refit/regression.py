"""Least squares from second moments: pure functions of tensors.

    [W, b] = argmin sum_i w_i ||W x_i + b - y_i||^2 + ridge * mean(diag(G)) * ||W - W_0||^2

G is the (centred) Gram matrix of x. Only moments are needed, so rows can be streamed and added across processes; they
are accumulated in float64. The intercept is not pulled: it makes up for whatever the slope gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor


@contextmanager
def one_thread() -> Iterator[None]:
    """LAPACK with several threads on a busy machine can be a hundred times slower than with one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


TRIANGLE = 128
"""So many rows of a Gram matrix are made at once, each from its own column on: what is below follows by symmetry."""

LOOK = 256
"""So many of the first rows tell whether a first solution helps,"""

LITTLE = 0.1
"""by leaving no more than this share of the targets' variance."""


@dataclass(frozen=True)
class Moments:
    """Weighted second moments of inputs `[d]` and of what a first solution leaves of targets `[k]`, about the origin.

    Attributes:
        xx: `[d, d]`; xy: `[d, k]`; x: `[d]`; y: `[k]`; n: the sum of the weights. All float64.
        start: the first solution, a slope `[k, d]`; None for zero.
    """

    xx: Tensor
    xy: Tensor
    x: Tensor
    y: Tensor
    n: Tensor
    start: Tensor | None = None

    def mapped(self, mix: Tensor, start: Tensor) -> Moments:
        """Those of `mix` `[m, d]` times the inputs, with another first solution `[k, m]`."""
        more = start.double() @ mix
        more = -more if self.start is None else self.start.double() - more
        return Moments(
            mix @ self.xx @ mix.T,
            mix @ (self.xy + self.xx @ more.T),
            mix @ self.x,
            self.y + more @ self.x,
            self.n,
            start,
        )


@dataclass
class Gram:
    """Sums up the moments of inputs `[rows, d]` and targets `[rows, k]`.

    What is summed up of the targets is what a first solution leaves of them. Where that is right already, as it is for
    experts that compute the same, nothing but rounding is left: with the whole targets, rounding in directions that
    the rows hardly show would be blown up by the inverse of the ridge. (A first solution that leaves most of the
    targets is no help there, and is subtracted from the moments at the end: that is as exact, and costs less.) For the
    same reason moments are taken about the centre of the first rows, and moved to the origin at the end.

    Attributes:
        xx: `[d, d]`, of which only the upper triangle is kept; xy: `[d, k]`; x: `[d]`; y: `[k]`; n: the sum of the
            weights. All float64; y: of what is left.
        start: the first solution, a slope `[k, d]`; None for zero.
        centre: what the moments are about, `[d]`; None before there are rows.
        helps: whether the first solution is subtracted from the targets.
    """

    xx: Tensor
    xy: Tensor
    x: Tensor
    y: Tensor
    n: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    start: Tensor | None = None
    centre: Tensor | None = None
    helps: bool = False

    @classmethod
    def empty(cls, inputs: int, outputs: int, start: Tensor | None = None) -> Gram:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64)

        return cls(zeros(inputs, inputs), zeros(inputs, outputs), zeros(inputs), zeros(outputs), start=start)

    def add(self, x: Tensor, y: Tensor, weight: Tensor) -> None:
        """Add rows: x `[rows, d]`, y `[rows, k]`, weight `[rows]`; multiplied in float32, summed in float64."""
        if self.centre is None:
            self._look(x, y)
        for block, target, w in zip(x.split(8192), y.split(8192), weight.split(8192), strict=True):
            if self.start is not None and self.helps:
                target = torch.addmm(target, block, self.start.to(block).T, alpha=-1)
            block = block - self.centre
            weighted = block * w[:, None]
            for first in range(0, block.shape[1], TRIANGLE):
                own = slice(first, first + TRIANGLE)
                self.xx[own, first:] += block[:, own].T @ weighted[:, first:]
            self.xy += weighted.T @ target
            self.x += w @ block
            self.y += w @ target
            self.n += w.sum(dtype=torch.float64)

    def _look(self, x: Tensor, y: Tensor) -> None:
        """At the first rows: where they are, and how much of the targets the first solution leaves."""
        self.centre = x.mean(0)
        if self.start is not None:
            some = slice(None, None, -(-len(x) // LOOK))
            left = y[some] - x[some] @ self.start.to(x).T
            self.helps = bool(left.var(0, correction=0).sum() < LITTLE * y[some].var(0, correction=0).sum())

    def reduce(self, add_up: Callable[[Tensor], Tensor] = lambda x: x) -> Moments:
        """The moments of all processes; `add_up` sums a tensor over them."""
        xx, xy, x, y = self.xx.triu() + self.xx.triu(1).T, self.xy, self.x, self.y
        if self.centre is not None:
            centre = self.centre.double()
            mixed = torch.outer(centre, x + self.n / 2 * centre)
            xx, xy, x = xx + mixed + mixed.T, xy + torch.outer(centre, y), x + self.n * centre
        if self.start is not None and not self.helps:
            start = self.start.double()
            xy, y = xy - xx @ start.T, y - start @ x
        return Moments(*(add_up(t) for t in (xx, xy, x, y, self.n)), start=self.start)


@torch.no_grad()
def ridge(moments: Moments, prior: Tensor, strength: float, intercept: bool = True) -> tuple[Tensor, Tensor]:
    """The slope `[k, d]` and the intercept `[k]` (zeros where there is none), float64.

    Args:
        moments: of inputs and targets.
        prior: W_0 `[k, d]`.
        strength: the ridge, relative to the mean of the Gram matrix's diagonal.
        intercept: whether there is one.
    """
    total = moments.n.clamp_min(1e-12)
    mean_x, mean_y = moments.x / total, moments.y / total
    centred, cross = moments.xx, moments.xy
    if intercept:
        centred = centred - torch.outer(moments.x, mean_x)
        cross = cross - torch.outer(moments.x, mean_y)
    pull = strength * centred.diagonal().mean().clamp_min(1e-12)
    left = centred.clone()
    left.diagonal().add_(pull)
    start = torch.zeros_like(cross.T) if moments.start is None else moments.start.double()
    right = cross + pull * (prior.double() - start).T
    with one_thread():
        factor, failed = torch.linalg.cholesky_ex(left)
        slope = torch.linalg.lstsq(left, right).solution if failed else torch.cholesky_solve(right, factor)
    change = slope.T
    return start + change, (mean_y - change @ mean_x) if intercept else torch.zeros_like(mean_y)


@dataclass
class ChannelSums:
    """Weighted first and second moments of inputs and targets channel by channel, `[d]` each, float64."""

    sums: Tensor  # rows: weight, x, y, x*x, x*y

    @classmethod
    def empty(cls, channels: int) -> ChannelSums:
        return cls(torch.zeros(5, channels, dtype=torch.float64))

    def add(self, x: Tensor, y: Tensor, weight: Tensor) -> None:
        """Add rows: x and y `[rows, d]`, weight `[rows]`."""
        w = weight[:, None].expand_as(x)
        parts = (torch.ones_like(x), x, y, x * x, x * y)
        self.sums += torch.stack([(w * part).sum(0, dtype=torch.float64) for part in parts])


def scale_and_shift(channels: ChannelSums, prior: Tensor, strength: float) -> tuple[Tensor, Tensor]:
    """Per channel the scale and shift `[d]` that best turn x into y, pulled towards the scale `prior`."""
    n, x, y, xx, xy = channels.sums
    n = n.clamp_min(1e-12)
    variance = (xx / n - (x / n).square()).clamp_min(0)
    covariance = xy / n - x * y / n.square()
    pull = strength * variance.mean().clamp_min(1e-12)
    scale = (covariance + pull * prior.double()) / (variance + pull)
    return scale, y / n - scale * x / n
