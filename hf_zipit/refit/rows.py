"""Which rows of a value enter a regression, and how much each counts.

A row is one position of one sample. Positions that the head reads count more; of the others a share is enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from hf_zipit.data.calibration import MicroBatch
from hf_zipit.refit.positions import Positions

Picked = Tensor | slice
"""Some of a value's samples times positions."""

NEARLY_ALL = 4 / 3
"""Of so many rows for every one that is wanted, all are taken: leaving a few out would cost more than using them."""


def at_rows(value: Tensor, channel_axis: int, rows: Picked) -> Tensor:
    """Some rows of a value, `[rows, units]`."""
    value = value.movedim(channel_axis, -1)
    if channel_axis == -1 or isinstance(rows, slice):
        return value.flatten(0, -2)[rows]
    return value[places(value.shape[:-1], rows)]  # without a copy of all of it


def places(shape: Sequence[int], rows: Picked) -> tuple[Tensor, ...]:
    """Where rows are, axis by axis, in a value of a shape that goes without its channels."""
    return torch.unravel_index(torch.arange(prod(shape))[rows], tuple(shape))


class Rows:
    """The rows of all micro-batches of one process."""

    def __init__(
        self, batches: Sequence[MicroBatch], positions: Positions, *, per_input: int, all_batches: int, seed: int
    ) -> None:
        """`per_input`: how many to use for every input of a regression, 0 for all; over all processes' batches."""
        self.batches, self.positions = batches, positions
        self.per_input, self.all_batches, self.seed = per_input, all_batches, seed
        self._weights: dict[tuple[object, ...], Tensor] = {}
        self._picked: dict[tuple[object, ...], tuple[Picked, Tensor]] = {}

    def weights(self, shape: Sequence[int], b: int, channel_axis: int) -> Tensor:
        """The weight of every row of a value, `[samples * positions]`; ones for a value that is no sample's."""
        key = self._key(shape, b, channel_axis)
        if key not in self._weights:
            self._weights[key] = self._weigh(*key)
        return self._weights[key]

    def _key(self, shape: Sequence[int], b: int, channel_axis: int) -> tuple[tuple[int, ...], bool, int]:
        """What a value's rows depend on: its shape but for the channels, whether these come last, and the batch."""
        axis = channel_axis % max(len(shape), 1)
        return tuple(n for i, n in enumerate(shape) if i != axis), axis == len(shape) - 1, b

    def _weigh(self, shape: tuple[int, ...], is_last: bool, b: int) -> Tensor:
        batch = self.batches[b]
        if not shape or shape[0] != batch.size:
            return torch.ones(shape).reshape(-1)
        weights = self.positions.weights(batch.inputs, shape[1]) if is_last and len(shape) == 2 else None
        weights = torch.ones(shape) if weights is None else weights.clone()
        weights[batch.real :] = 0
        return weights.reshape(-1)

    def pick(self, shape: Sequence[int], b: int, channel_axis: int, inputs: int) -> tuple[Picked, Tensor]:
        """The rows of a value that enter a regression on so many `inputs`, and their weights; the same every time."""
        key = (*self._key(shape, b, channel_axis), inputs)
        if key not in self._picked:
            self._picked[key] = self.sample(self.weights(shape, b, channel_axis), b, inputs)
        return self._picked[key]

    def sample(self, weights: Tensor, b: int, inputs: int) -> tuple[Picked, Tensor]:
        """All that the head reads, and of the others at most a seeded share, which then counts for all of them."""
        limit = -(-self.per_input * inputs // self.all_batches)
        rows = weights.nonzero().squeeze(1)
        if not limit or len(rows) <= NEARLY_ALL * limit:
            return (slice(None) if len(rows) == len(weights) else rows), weights[rows]
        read = weights[rows] > 1
        others = rows[~read]
        if len(others) > limit:
            generator = torch.Generator().manual_seed(self.seed + self.batches[b].number)
            drawn = others[torch.randperm(len(others), generator=generator)[:limit]]
            weights = weights.clone()
            weights[drawn] *= len(others) / limit
            rows = torch.cat([rows[read], drawn]).sort().values
        return rows, weights[rows]
