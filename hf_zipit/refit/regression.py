"""Least squares from second moments: pure functions of tensors.

    [W, b] = argmin sum_i w_i ||W x_i + b - y_i||^2 + ridge * mean(diag(G)) * ||W - W_0||^2

G is the (centred) Gram matrix of x. Only moments are needed, so rows can be streamed and added across processes; they
are accumulated in float64. The intercept has no penalty: it makes up for whatever the slope gives.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from hf_zipit.data.processes import solving_device
from hf_zipit.factorise import solve_positive

TRIANGLE, WIDE_TRIANGLE = 128, 1024
"""This many rows of a Gram matrix are made at once, on the CPU and elsewhere, each from its own column on: what is
below follows by symmetry."""

PROBED = 64
"""This many rows of a block tell where its middle is, and whether a first solution helps,"""

SMALL = 0.1
"""by leaving no more than this share of the targets' variance."""


@dataclass(frozen=True)
class SecondMoments:
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

    @property
    def sums(self) -> tuple[Tensor, ...]:
        return self.xx, self.xy, self.x, self.y, self.n

    def without(self, start: Tensor) -> SecondMoments:
        """The same inputs, and what another first solution leaves."""
        more = start.double() if self.start is None else start.double() - self.start.double()
        return SecondMoments(self.xx, self.xy - self.xx @ more.T, self.x, self.y - more @ self.x, self.n, start)

    def joined(self, other: SecondMoments) -> SecondMoments:
        """With those of other rows, and the same first solution: all of them count as much as these."""
        share = self.n / other.n.clamp_min(1e-30)
        sums = (own + share * more for own, more in zip(self.sums, other.sums, strict=True))
        return SecondMoments(*sums, self.start)

    def mixed(self, mix: Tensor, start: Tensor) -> SecondMoments:
        """Those of `mix` `[m, d]` times the inputs, with a first solution `[k, m]`."""
        left = self.without(start.double() @ mix)
        return SecondMoments(mix @ self.xx @ mix.T, mix @ left.xy, mix @ self.x, left.y, self.n, start)


GOLDEN = 0.6180339887498949
"""Multiples of it, modulo one, are spread evenly and in step with nothing: every 50th row may be a class token."""


def some_rows(rows: Tensor) -> Tensor:
    """The numbers of the rows that are probed, at most `PROBED`."""
    numbers = torch.arange(min(PROBED, len(rows)), dtype=torch.float64, device=solving_device(rows.device))
    return (numbers * GOLDEN % 1 * len(rows)).long().to(rows.device)


def add_upper(sums: Tensor, x: Tensor) -> None:
    """Add X^T X of rows `[rows, d]` to sums `[d, d]`, of which only the upper triangle is made."""
    rows = TRIANGLE if x.device.type == "cpu" else WIDE_TRIANGLE
    for first in range(0, x.shape[1], rows):
        part = x[:, first : first + rows].T @ x[:, first:]
        sums[first : first + rows, first:] += part.to(sums.device)


def mirrored(upper: Tensor) -> Tensor:
    """The symmetric matrix `[d, d]` that an upper triangle is of; in its own memory, for it may be large."""
    for first in range(0, len(upper), TRIANGLE):
        after = first + TRIANGLE
        square = upper[first:after, first:after]
        square.copy_(square.triu() + square.triu(1).T)
        upper[after:, first:after] = upper[first:after, after:].T
    return upper


class BlockSums:
    """Moments about the middle of every block of rows, which are moved to the origin at the end.

    So no rounding is that of a distance from the origin, and a block counts the same whatever it is added to.
    """

    def __init__(self, inputs: int, outputs: int, device: torch.device) -> None:
        zeros = partial(torch.zeros, dtype=torch.float64, device=device)
        self.xx = zeros(inputs, inputs)  # of which only the upper triangle is made
        self.xy = zeros(inputs, outputs)
        self.blocks: list[tuple[Tensor, ...]] = []  # of each the middle of inputs and targets, the sums, the weight

    def add(self, x: Tensor, y: Tensor, weight: Tensor) -> None:
        some = some_rows(x)
        means = x[some].mean(0), y[some].mean(0)
        root = weight.sqrt()
        x, y = ((part - mean).mul_(root[:, None]) for part, mean in zip((x, y), means, strict=True))
        add_upper(self.xx, x)
        self.xy += (x.T @ y).to(self.xy.device)
        self.blocks.append((*(part.to(self.xx) for part in (*means, root @ x, root @ y)), weight.to(self.xx).sum()))

    def moments(self) -> SecondMoments:
        """The moments, with the sums' own memory: nothing can be added any more."""
        xx, xy = mirrored(self.xx), self.xy
        if not self.blocks:
            return SecondMoments(xx, xy, xx[0] * 0, xy[0] * 0, xx.new_zeros(()))
        centre, level, x, y, n = map(torch.stack, zip(*self.blocks, strict=True))
        n = n[:, None]
        mixed = centre.T @ (x + n / 2 * centre)
        x = x + n * centre
        xx.add_(mixed).add_(mixed.T)
        return SecondMoments(xx, xy + centre.T @ y + x.T @ level, x.sum(0), (y + n * level).sum(0), n.sum())


class Gram:
    """BlockSums up the moments of inputs `[rows, d]` and targets `[rows, k]`.

    What is summed up of the targets is what a first solution leaves of them. Where that is right already, as it is for
    experts that compute the same, nothing but rounding is left: with the whole targets, rounding in directions that
    the rows hardly show would be blown up by the inverse of the ridge. Where it leaves most of a block's targets it is
    no help, and is subtracted from the moments at the end: that is as exact, and costs less.
    """

    def __init__(
        self, inputs: int, outputs: int, start: Tensor | None = None, device: torch.device | str = "cpu"
    ) -> None:
        """`start`: the first solution, a slope `[k, d]`; None for zero. `device`: where float64 sums are kept."""
        self.start = start
        self.whole, self.left = (BlockSums(inputs, outputs, torch.device(device)) for _ in range(2))

    def add(self, x: Tensor, y: Tensor, weight: Tensor) -> None:
        """Add rows: x `[rows, d]`, y `[rows, k]`, weight `[rows]`; multiplied in float32, summed in float64."""
        for block, target, w in zip(x.split(8192), y.split(8192), weight.split(8192), strict=True):
            if self.start is not None and self._helps(block, target):
                left = torch.addmm(target, block, self.start.to(block).T, alpha=-1)
                self.left.add(block, left, w)
            else:
                self.whole.add(block, target, w)

    def _helps(self, x: Tensor, y: Tensor) -> bool:
        """Whether the first solution leaves little of some targets."""
        assert self.start is not None
        some = some_rows(x)
        left = y[some] - x[some] @ self.start.to(x).T
        spread, off = (part.var(0, correction=0).sum() for part in (y[some], left))
        return bool(off < SMALL * spread)

    def reduce(self, all_reduce: Callable[[Tensor], Tensor] = lambda x: x) -> SecondMoments:
        """The moments of all processes; `all_reduce` sums a tensor over them."""
        if not self.whole.blocks:
            found = self.left.moments()
        else:
            found = self.whole.moments()
            found = found if self.start is None else found.without(self.start.to(found.xx))
            if self.left.blocks:
                found = SecondMoments(*map(torch.add, found.sums, self.left.moments().sums))
        start = None if self.start is None else self.start.to(found.xx)
        return SecondMoments(*map(all_reduce, found.sums), start=start)


ROUNDING = 1e-12
"""Inputs that vary by less than this share of their energy do so by float32's rounding, and explain nothing."""


@torch.no_grad()
def ridge(moments: SecondMoments, prior: Tensor, strength: float, intercept: bool = True) -> tuple[Tensor, Tensor]:
    """The slope `[k, d]` and the intercept `[k]` (zeros where there is none), float64.

    Args:
        moments: of inputs and targets.
        prior: W_0 `[k, d]`.
        strength: the ridge, relative to the mean of the Gram matrix's diagonal.
        intercept: whether there is one.
    """
    total = moments.n.clamp_min(1e-12)
    mean_x, mean_y = moments.x / total, moments.y / total
    left, cross = moments.xx, moments.xy
    if intercept:
        left, cross = (torch.addr(of, moments.x, mean, alpha=-1) for of, mean in ((left, mean_x), (cross, mean_y)))
    least = ROUNDING * moments.xx.diagonal().mean()
    penalty = torch.maximum(strength * left.diagonal().mean(), least).clamp_min(strength * 1e-12)
    left = torch.diagonal_scatter(left, left.diagonal() + penalty)
    start = torch.zeros_like(cross.T) if moments.start is None else moments.start.double()
    right = cross + penalty * (prior.to(start) - start).T
    # Where float32's rounding is larger than the penalty, the penalty decides.
    change = solve_positive(left, right, penalty).T
    return start + change, (mean_y - change @ mean_x) if intercept else torch.zeros_like(mean_y)


class GroupedGram:
    """Sums for many small regressions side by side, each of its own inputs; all in float64, of what a start leaves."""

    def __init__(self, start: Tensor, device: torch.device) -> None:
        """`start`: the first solutions, slopes `[groups, k, d]`."""
        self.start = start.to(device, torch.float64)
        groups, k, d = start.shape
        sizes = ((groups, d, d), (groups, d, k), (groups, d), (groups, k), ())
        self.sums = [torch.zeros(size, dtype=torch.float64, device=device) for size in sizes]

    def add(self, x: Tensor, y: Tensor, weight: Tensor) -> None:
        """Add rows: x `[rows, groups, d]`, y `[rows, groups, k]`, weight `[rows]`."""
        x, y = x.to(self.start).movedim(1, 0), y.to(self.start).movedim(1, 0)
        y = y - x @ self.start.mT
        scaled = x * weight.to(x)[:, None]
        parts = (scaled.mT @ x, scaled.mT @ y, scaled.sum(1), (y * weight.to(y)[:, None]).sum(1), weight.to(x).sum())
        for total, part in zip(self.sums, parts, strict=True):
            total += part

    def reduce(self, all_reduce: Callable[[Tensor], Tensor] = lambda x: x) -> list[SecondMoments]:
        """The moments of every group."""
        *sums, n = map(all_reduce, self.sums)
        return [SecondMoments(*own, n, start) for *own, start in zip(*sums, self.start, strict=True)]


@dataclass
class ChannelSums:
    """Weighted first and second moments of inputs and targets channel by channel, `[d]` each, float64."""

    sums: Tensor  # rows: weight, x, y, x*x, x*y

    @classmethod
    def empty(cls, channels: int, device: torch.device | str = "cpu") -> ChannelSums:
        return cls(torch.zeros(5, channels, dtype=torch.float64, device=device))

    def add(self, x: Tensor, y: Tensor, weight: Tensor) -> None:
        """Add rows: x and y `[rows, d]`, weight `[rows]`."""
        w = weight[:, None].expand_as(x)
        parts = (torch.ones_like(x), x, y, x * x, x * y)
        self.sums += torch.stack([(w * part).to(self.sums).sum(0) for part in parts])


def scale_and_shift(
    channels: ChannelSums, prior: Tensor, strength: float, intercept: bool = True
) -> tuple[Tensor, Tensor]:
    """Per channel the scale and shift `[d]` that best map x to y, with a penalty on the distance from `prior`.

    The shift is zero where there is no `intercept`.
    """
    n, x, y, xx, xy = channels.sums
    n = n.clamp_min(1e-12)
    if not intercept:
        x, y = torch.zeros_like(x), torch.zeros_like(y)
    variance = (xx / n - (x / n).square()).clamp_min(0)
    covariance = xy / n - x * y / n.square()
    penalty = torch.maximum(strength * variance.mean(), ROUNDING * (xx / n).mean()).clamp_min(strength * 1e-12)
    scale = (covariance + penalty * prior.to(variance)) / (variance + penalty)
    return scale, y / n - scale * x / n
