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


@dataclass
class Gram:
    """Weighted second moments of inputs `[rows, d]` and targets `[rows, k]`.

    Attributes:
        xx: `[d, d]`; xy: `[d, k]`; x: `[d]`; y: `[k]`; n: the sum of the weights. All float64.
    """

    xx: Tensor
    xy: Tensor
    x: Tensor
    y: Tensor
    n: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))

    @classmethod
    def empty(cls, inputs: int, outputs: int) -> Gram:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64)

        return cls(zeros(inputs, inputs), zeros(inputs, outputs), zeros(inputs), zeros(outputs))

    def add(self, x: Tensor, y: Tensor, weight: Tensor) -> None:
        """Add rows: x `[rows, d]`, y `[rows, k]`, weight `[rows]`; multiplied in float32, summed in float64."""
        for block, target, w in zip(x.split(8192), y.split(8192), weight[:, None].split(8192), strict=True):
            weighted = block * w
            self.xx += (block.T @ weighted).double()
            self.xy += (weighted.T @ target).double()
            self.x += weighted.sum(0).double()
            self.y += (target * w).sum(0).double()
            self.n += w.sum().double()

    def reduce(self, add_up: Callable[[Tensor], Tensor]) -> Gram:
        """The moments of all processes; `add_up` sums a tensor over them."""
        return Gram(*(add_up(t) for t in (self.xx, self.xy, self.x, self.y, self.n)))


@torch.no_grad()
def ridge(gram: Gram, prior: Tensor, strength: float, intercept: bool = True) -> tuple[Tensor, Tensor]:
    """The slope `[k, d]` and the intercept `[k]` (zeros where there is none), float64.

    Args:
        gram: the moments.
        prior: W_0 `[k, d]`.
        strength: the ridge, relative to the mean of the Gram matrix's diagonal.
        intercept: whether there is one.
    """
    total = gram.n.clamp_min(1e-12)
    mean_x, mean_y = gram.x / total, gram.y / total
    centred, cross = gram.xx, gram.xy
    if intercept:
        centred = centred - torch.outer(gram.x, mean_x)
        cross = cross - torch.outer(gram.x, mean_y)
    pull = strength * centred.diagonal().mean().clamp_min(1e-12)
    left = centred + pull * torch.eye(len(centred), dtype=centred.dtype)
    right = cross + pull * prior.double().T
    with one_thread():
        factor, failed = torch.linalg.cholesky_ex(left)
        slope = torch.linalg.lstsq(left, right).solution if failed else torch.cholesky_solve(right, factor)
    slope = slope.T
    return slope, (mean_y - slope @ mean_x) if intercept else torch.zeros_like(mean_y)


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
        self.sums += torch.stack([(w * part).sum(0).double() for part in (torch.ones_like(x), x, y, x * x, x * y)])


def scale_and_shift(channels: ChannelSums, prior: Tensor, strength: float) -> tuple[Tensor, Tensor]:
    """Per channel the scale and shift `[d]` that best turn x into y, pulled towards the scale `prior`."""
    n, x, y, xx, xy = channels.sums
    n = n.clamp_min(1e-12)
    variance = (xx / n - (x / n).square()).clamp_min(0)
    covariance = xy / n - x * y / n.square()
    pull = strength * variance.mean().clamp_min(1e-12)
    scale = (covariance + pull * prior.double()) / (variance + pull)
    return scale, y / n - scale * x / n
