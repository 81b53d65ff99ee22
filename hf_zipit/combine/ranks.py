"""Order statistics of vectors that are too long to be held: exact, in two readings, without sorting.

Floats of one sign are ordered as their bits are. The first reading counts the leading 16 bits; the second one keeps
the few entries that share them with an entry that is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LEADING = 16
"""Bits that are counted: sign, exponent and the first four of the mantissa."""


@dataclass(frozen=True)
class Mapped:
    """Parts as a function makes them of others, whenever they are read."""

    parts: Iterable[Sequence[Tensor]]
    function: Callable[[Sequence[Tensor]], list[Tensor]]

    def __iter__(self) -> Iterator[list[Tensor]]:
        return map(self.function, self.parts)


def magnitudes(parts: Iterable[Sequence[Tensor]]) -> Mapped:
    """The magnitudes of all entries."""
    return Mapped(parts, lambda part: [tensor.abs() for tensor in part])


def order_statistics(
    parts: Iterable[Sequence[Tensor]], positions: Callable[[int], Sequence[int]]
) -> list[list[float]]:
    """For every one of T vectors its entries at some positions of the sorted vector.

    Args:
        parts: the vectors piece by piece, float64: T tensors each. Read twice.
        positions: from a vector's length to the wanted positions, counted from 0 for the smallest.

    Returns:
        By vector, one number for every position.
    """
    counts: list[Tensor] = []
    for part in parts:
        found = [torch.bincount(leading_bits(tensor), minlength=1 << LEADING) for tensor in part]
        counts = [old + new for old, new in zip(counts, found, strict=True)] if counts else found
    ends = [count.cumsum(0) for count in counts]
    wanted = [torch.tensor(list(positions(int(end[-1])))) for end in ends]
    bins = [torch.searchsorted(end, asked, right=True) for end, asked in zip(ends, wanted, strict=True)]
    kept = [
        {int(number): Kept(int(count[number])) for number in numbers}
        for count, numbers in zip(counts, bins, strict=True)
    ]
    for part in parts:
        for tensor, own in zip(part, kept, strict=True):
            leading = leading_bits(tensor)
            for number, entries in own.items():
                entries.add(tensor.flatten()[leading == number])
    return [
        [
            float(own[int(number)].entries.kthvalue(int(asked - end[number] + count[number]) + 1).values)
            for asked, number in zip(asks, numbers, strict=True)
        ]
        for own, asks, numbers, end, count in zip(kept, wanted, bins, ends, counts, strict=True)
    ]


class Kept:
    """So many entries, put one behind the other: thousands of small pieces, each kept, would keep memory in pieces."""

    def __init__(self, count: int) -> None:
        self.entries = torch.empty(count, dtype=torch.float64)
        self.end = 0

    def add(self, piece: Tensor) -> None:
        self.entries[self.end : self.end + len(piece)] = piece
        self.end += len(piece)


def leading_bits(tensor: Tensor) -> Tensor:
    """The leading bits of every entry as a number that grows with it, from 0 to 2^16 - 1."""
    bits = tensor.double().flatten().contiguous().view(torch.int64)
    bits = torch.where(bits < 0, bits ^ torch.iinfo(torch.int64).max, bits)  # the larger the magnitude, the less
    return (bits >> (64 - LEADING)) + (1 << (LEADING - 1))
