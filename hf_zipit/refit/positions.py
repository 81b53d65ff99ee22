"""Which positions of which samples enter a regression, and how much each counts.

A row of a regression is one position (token, patch) of one sample. Padding counts nothing, and the positions that the
head reads count more than the others: an error there reaches the output undiluted. The adapter says which positions
those are. Of the others a fraction is enough.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, prod

import torch
from torch import Tensor

from hf_zipit.data.calibration import MicroBatch


@dataclass(frozen=True)
class Positions:
    """The rule for one family.

    Attributes:
        text: which text positions the head reads: `first`, `masked`, `end`, `highest` (the one with the highest id) or
            `all`.
        image: the same for image patches: `first` or `all`.
        mask_token: the id of the mask token, for `masked`.
        end_token: the id of the end-of-text token, for `end`.
        weight: how often those positions count.
    """

    text: str = "all"
    image: str = "all"
    mask_token: int | None = None
    end_token: int | None = None
    weight: float = 1.0

    def weights(self, inputs: Mapping[str, Tensor], length: int) -> Tensor | None:
        """Weights `[samples, length]` for a value with `length` positions; None where all count the same."""
        ids = inputs.get("input_ids")
        if ids is not None and ids.shape[1] == length:
            mask = inputs.get("attention_mask")
            weights = torch.ones(ids.shape) if mask is None else (mask > 0).float()
            read = self._read_text(ids)
            return weights if read is None else torch.where(read & (weights > 0), self.weight, weights)
        if self.image == "first" and "pixel_values" in inputs:
            weights = torch.ones(len(inputs["pixel_values"]), length)
            weights[:, 0] = self.weight
            return weights
        return None

    def _read_text(self, ids: Tensor) -> Tensor | None:
        read = torch.zeros(ids.shape, dtype=torch.bool)
        if self.text == "first":
            read[:, 0] = True
        elif self.text == "masked" and self.mask_token is not None:
            read = ids == self.mask_token
        elif self.text == "highest":
            read[torch.arange(len(ids)), ids.argmax(1)] = True
        elif self.text == "end" and self.end_token is not None:
            read[torch.arange(len(ids)), (ids == self.end_token).int().argmax(1)] = True
        else:
            return None
        return read


Picked = Tensor | slice
"""Some of a value's samples times positions."""

NEARLY_ALL = 4 / 3
"""Up to this multiple of the rows that are wanted, all are taken: leaving a few out costs more than using them."""


def at_rows(value: Tensor, channel_axis: int, rows: Picked) -> Tensor:
    """Some rows of a value, `[rows, units]`."""
    value = value.movedim(channel_axis, -1) if value.dim() > 1 else value[None]
    if channel_axis == -1 or isinstance(rows, slice):
        return value.flatten(0, -2)[rows]
    return value[places(value.shape[:-1], rows, value.device)]  # without a copy of all of it


def places(shape: Sequence[int], rows: Picked, device: torch.device) -> tuple[Tensor, ...]:
    """Where rows are, axis by axis, in a value of a shape that goes without its channels."""
    numbers = torch.arange(prod(shape), device=device)[rows] if isinstance(rows, slice) else rows
    return torch.unravel_index(numbers, tuple(shape))


Key = tuple[tuple[int, ...], bool, int]
"""What a value's rows depend on: its shape but for the channels, whether these come last, and the batch."""


class Rows:
    """The rows of all micro-batches of one process."""

    def __init__(
        self,
        batches: Sequence[MicroBatch],
        positions: Positions,
        *,
        per_input: int,
        all_batches: int,
        seed: int,
        device: torch.device | str = "cpu",
    ) -> None:
        """`per_input`: how many to use for every input of a regression, 0 for all; over all processes' batches.

        Rows are chosen on the CPU, where the batches are, so that every device uses the same, and moved to `device`.
        """
        self.batches, self.positions, self.device = batches, positions, torch.device(device)
        self.per_input, self.all_batches, self.seed = per_input, all_batches, seed
        self._weights: dict[Key, Tensor] = {}
        self._picked: dict[tuple[object, ...], tuple[Picked, Tensor]] = {}

    def weights(self, shape: Sequence[int], b: int, channel_axis: int) -> Tensor:
        """The weight of every row of a value, `[samples * positions]`; ones for a value that is no sample's."""
        return self._weights_of(self._key(shape, b, channel_axis)).to(self.device)

    def _weights_of(self, key: Key) -> Tensor:
        if key not in self._weights:
            self._weights[key] = self._weigh(*key)
        return self._weights[key]

    def _key(self, shape: Sequence[int], b: int, channel_axis: int) -> Key:
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

    def pick(
        self, shape: Sequence[int], b: int, channel_axis: int, inputs: int, most: float | None = None
    ) -> tuple[Picked, Tensor]:
        """The rows of a value that enter a regression on `inputs` units, and their weights; the same every time.

        `most`: the most rows per input, where fewer are enough.
        """
        key = (*self._key(shape, b, channel_axis), inputs, most)
        if key not in self._picked:
            rows, weights = self.sample(self._weights_of(key[:3]), b, inputs, most)
            rows = rows if isinstance(rows, slice) else rows.to(self.device)
            self._picked[key] = rows, weights.to(self.device)
        return self._picked[key]

    def counts(self, shape: Sequence[int], b: int, channel_axis: int, inputs: int) -> tuple[int, int]:
        """How many rows of a value enter a regression on `inputs` units, and how many could."""
        return len(self.pick(shape, b, channel_axis, inputs)[1]), int(
            (self._weights_of(self._key(shape, b, channel_axis)) > 0).sum()
        )

    def sample(self, weights: Tensor, b: int, inputs: int, most: float | None = None) -> tuple[Picked, Tensor]:
        """All that the head reads, and of the others at most a seeded share, which then counts for all of them."""
        per_input = self.per_input if most is None else min(self.per_input, most)
        limit = ceil(per_input * inputs / self.all_batches)
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
