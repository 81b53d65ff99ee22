"""What has no closed form is fitted by a few steps, which stop where they no longer help samples that are held out.

Steps of Adam (Kingma and Ba, arXiv 1412.6980) on some of the samples at a time, in coordinates in which the inputs of
linear maps are white. Their length follows the error that is left. Now and then the samples that are held out are
looked at: the best weights on them are kept, which may be the first ones, and where the last steps made them worse
they are undone and the next ones are shorter.

No model is run or differentiated but the layer that is fitted.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from hf_zipit.factorise import square_root
from hf_zipit.refit.fit import Fit

HELD_OUT = 8
"""One sample in so many is held out; of fewer than that none is, and nothing is fitted."""

RATE = 0.15
"""The longest step of Adam, in units of what is typical of the weights, and of the square root of the error: a change
of all weights by a share of themselves is worth about the square of it."""

SHORTER = 0.3
"""Steps become shorter by this where they did not help,"""

SHORTEST = 0.05
"""and end where they would be shorter than this."""

SAMPLES = 64
"""So many of a task are in a window."""

LOOKED_AT = 8
"""About so many micro-batches are enough to see how far samples that are held out are off."""

Weights = TypeVar("Weights")


class WhiteLayer(ABC, Generic[Weights]):
    """A layer as a function of parameters whose inputs are white: of one variance, and uncorrelated."""

    def set_parameters(self, parameters: Sequence[Tensor], typical: Sequence[float]) -> None:
        """Fit these tensors; `typical`: how large a number of each is, as `typical_size` tells."""
        self.parameters, self.typical = list(parameters), list(typical)
        for parameter in self.parameters:
            parameter.requires_grad_()
        self.keep()
        self.start = self.kept

    @abstractmethod
    def weights(self) -> Weights:
        """A copy of the layer's weights as the model has them."""

    def groups(self, length: float) -> list[dict[str, Any]]:
        """The parameters, each with the length of its steps."""
        pairs = zip(self.parameters, self.typical, strict=True)
        return [{"params": [parameter], "lr": RATE * length * typical} for parameter, typical in pairs]

    def keep(self) -> None:
        """Remember the parameters for `restore`."""
        self.kept = [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def restore(self) -> None:
        """Go back to where the parameters were kept."""
        for parameter, kept in zip(self.parameters, self.kept, strict=True):
            parameter.copy_(kept)

    def clear(self) -> None:
        """Forget the gradients; a process may have no samples of a step, of which there are none."""
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)

    def penalty(self) -> Tensor:
        """The squared distance to the weights that were the first, as a share of their own square, summed up."""
        off = [
            (parameter - start).square().sum() / start.square().sum().clamp_min(1e-12)
            for parameter, start in zip(self.parameters, self.start, strict=True)
            if parameter.dim() > 1
        ]
        return torch.stack(off).sum()


class Errors(Protocol[Weights]):
    """How far a layer is from what it should do, in shares of what a constant is off by."""

    def held_out(self, layer: WhiteLayer[Weights]) -> Tensor:
        """On samples that are held out, by task or all in one `[n]`, float64, of all processes."""

    def backward(self, layer: WhiteLayer[Weights], step: int) -> None:
        """Add up the gradients of this process's samples in a step."""


@torch.enable_grad()
def take_steps(
    fit: Fit,
    layer: WhiteLayer[Weights],
    errors: Errors[Weights],
    *,
    first: Tensor,
    steps: int,
    every: int,
    right: float,
) -> tuple[Weights, Tensor] | None:
    """The best weights and their errors on what is held out; None where none are better than the first.

    Args:
        first: the errors on what is held out of the weights as they are.
        steps: how many, at most; every: after how many what is held out is looked at.
        right: no more are made where the mean error is no larger than this.
    """
    best, found, left = first, None, float(first.mean())
    shorter, optimizer, step = 1.0, None, 0
    while step < steps and left > right and shorter > SHORTEST:
        if optimizer is None:
            optimizer = torch.optim.Adam(layer.groups(left**0.5 * shorter), betas=(0.9, 0.99))
            lengths = [group["lr"] for group in optimizer.param_groups]
        for group, length in zip(optimizer.param_groups, lengths, strict=True):
            group["lr"] = length * (1 + math.cos(math.pi * step / steps)) / 2
        layer.clear()
        errors.backward(layer, step)
        for parameter in layer.parameters:
            parameter.grad = fit.all_reduce(parameter.grad)
        (fit.config.ridge * layer.penalty()).backward()
        optimizer.step()
        step += 1
        if step % every == 0 or step == steps:
            now = errors.held_out(layer)
            if float(now.mean()) < left:  # it is a number, too
                best, found, left = now, layer.weights(), float(now.mean())
                layer.keep()
            else:  # the steps were too long
                layer.restore()
                shorter, optimizer = shorter * SHORTER, None
    return None if found is None else (found, best)


class Windows:
    """The samples that steps see: so many of one task at a time, the tasks taking turns.

    Whatever the size of micro-batches, and whichever process has them.
    """

    def __init__(self, fit: Fit) -> None:
        self.fit = fit
        counts = torch.zeros(len(fit.tasks) + 1, device=fit.values.device)
        for batch in fit.values.batches:
            counts[self._kind(batch.task)] += batch.real
        counted = enumerate(fit.all_reduce(counts).tolist())
        found = ((kind, first) for kind, count in counted for first in range(0, int(count), SAMPLES))
        self._windows = sorted(found, key=lambda window: window[::-1])

    def __len__(self) -> int:
        return len(self._windows)

    def share(self, step: int) -> float:
        """What a step sees of its task's samples."""
        kind, _ = self._windows[step % len(self)]
        return 1 / sum(window[0] == kind for window in self._windows)

    def seen(self, step: int) -> Iterator[tuple[int, Tensor]]:
        """The micro-batches of this process that have some of a step's samples, and which `[samples]` of theirs."""
        kind, first = self._windows[step % len(self)]
        for b, batch in enumerate(self.fit.values.batches):
            if self._kind(batch.task) == kind and batch.first < first + SAMPLES and first < batch.first + batch.real:
                number = self._numbers(b)
                yield b, (number >= first) & (number < first + SAMPLES) & ~is_held_out(number)

    def held(self, b: int) -> Tensor:
        """Which samples `[samples]` of a micro-batch are held out."""
        return is_held_out(self._numbers(b))

    def _numbers(self, b: int) -> Tensor:
        """The samples' numbers among those of their task."""
        batch = self.fit.values.batches[b]
        return batch.first + torch.arange(batch.size, device=self.fit.values.device)

    def _kind(self, task: int | None) -> int:
        """The number of a task; the last one for samples of unknown tasks."""
        return len(self.fit.tasks) if task is None else task


def looked_at(fit: Fit) -> list[int]:
    """The micro-batches of this process in which samples that are held out are looked at."""
    every = max(1, fit.rows.all_batches // LOOKED_AT)
    return [b for b, batch in enumerate(fit.values.batches) if batch.number % every == 0]


def is_held_out(samples: Tensor) -> Tensor:
    """Which samples are held out, by their numbers among those of their task."""
    return samples % HELD_OUT == HELD_OUT - 1


def by_row(samples: Tensor, rows: int) -> Tensor:
    """What is known of samples `[n]`, of the rows that they have one after the other `[rows]`."""
    return samples[torch.arange(rows, device=samples.device) * len(samples) // rows]


def whitening(fit: Fit, parts: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """C `[d, d]` for which C x is white, as far as the ridge allows, and its inverse.

    Args:
        parts: rows x `[rows, d]` and their weights `[rows]`, part by part, at least one.
    """
    return whitening_of(fit, *mean_squares(fit, parts))


def mean_squares(fit: Fit, parts: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The mean of x x^T `[d, d]`, float64, over the parts that `whitening` is given, and one of these."""
    squares, like = Squares(fit), None
    for x, weight in parts:
        squares.add(x, weight)
        like = x
    return squares.mean(), like


class Squares:
    """The mean of x x^T over weighted rows x `[rows, d]` of all processes."""

    def __init__(self, fit: Fit) -> None:
        self.fit, self.sums, self.count = fit, fit.zeros(1), fit.zeros(1)

    def add(self, x: Tensor, weight: Tensor) -> None:
        self.sums = self.sums + ((x * weight[:, None]).T @ x).to(self.sums)
        self.count = self.count + weight.sum()

    def mean(self) -> Tensor:
        """`[d, d]`, float64."""
        return self.fit.all_reduce(self.sums) / self.fit.all_reduce(self.count).clamp_min(1e-12)


def whitening_of(fit: Fit, squares: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """What `whitening` gives, of the mean of x x^T `[d, d]`, float64, in the number format and place of `like`."""
    squares = squares.clone()
    squares.diagonal().add_(fit.config.ridge * squares.diagonal().mean().clamp_min(1e-12))
    root, inverse = square_root(squares, squares.diagonal().mean() * 1e-12)
    return inverse.to(like), root.to(like)


class Spread:
    """How far rows `[rows, units]` are from their mean: the weighted sum of squares, over all processes."""

    def __init__(self, fit: Fit, units: int) -> None:
        self.fit, self.sums = fit, fit.zeros(2 + units)

    def add(self, x: Tensor, weight: Tensor) -> None:
        self.sums += torch.cat([torch.stack([weight @ x.square().sum(1), weight.sum()]), weight @ x]).to(self.sums)

    def total(self) -> float:
        square, weight, *_ = sums = self.fit.all_reduce(self.sums)
        return float(square - sums[2:] @ sums[2:] / weight.clamp_min(1e-30))


def typical_size(weight: Tensor) -> float:
    """Of the numbers of a weight whose inputs are white; what is added to its outputs is as large."""
    return float(weight.detach().square().mean().sqrt().clamp_min(1e-6))
