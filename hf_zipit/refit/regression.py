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

    What is kept of the targets is what a first solution leaves of them. Where that is right already, as it is for
    experts that compute the same, nothing but rounding is left: with the whole targets, rounding in directions that
    the rows hardly show would be blown up by the inverse of the ridge. For the same reason the inputs of every block
    of rows are centred before they are multiplied.

    Attributes:
        xx: `[d, d]`; xy: `[d, k]`; x: `[d]`; y: `[k]`; n: the sum of the weights. All float64; y: of what is left.
        start: the first solution, a slope `[k, d]`; None for zero.
    """

    xx: Tensor
    xy: Tensor
    x: Tensor
    y: Tensor
    n: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    start: Tensor | None = None

    @classmethod
    def empty(cls, inputs: int, outputs: int, start: Tensor | None = None) -> Gram:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64)

        return cls(zeros(inputs, inputs), zeros(inputs, outputs), zeros(inputs), zeros(outputs), start=start)

    def add(self, x: Tensor, y: Tensor, weight: Tensor) -> None:
        """Add rows: x `[rows, d]`, y `[rows, k]`, weight `[rows]`; multiplied in float32, summed in float64."""
        for block, target, w in zip(x.split(8192), y.split(8192), weight[:, None].split(8192), strict=True):
            if self.start is not None:
                target = target - block @ self.start.to(block.dtype).T
            centre = block.mean(0)
            block = block - centre
            weighted = block * w
            n = w.sum(dtype=torch.float64)
            x0, x1, y1 = centre.double(), weighted.sum(0, dtype=torch.float64), (w.T @ target)[0].double()
            mixed = torch.outer(x0, x1)
            self.xx += (block.T @ weighted).double() + mixed + mixed.T + n * torch.outer(x0, x0)
            self.xy += (weighted.T @ target).double() + torch.outer(x0, y1)
            self.x += x1 + n * x0
            self.y += y1
            self.n += n

    def reduce(self, add_up: Callable[[Tensor], Tensor]) -> Gram:
        """The moments of all processes; `add_up` sums a tensor over them."""
        return Gram(*(add_up(t) for t in (self.xx, self.xy, self.x, self.y, self.n)), start=self.start)


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
    start = torch.zeros_like(cross.T) if gram.start is None else gram.start.double()
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
