"""One-to-one assignments of every expert's units to a reference expert's, by similarity.

With more than two experts all are matched to one of them. Taking the expert that is most similar to the others, rather
than the first, makes the result independent of the order in which the experts are given.

Ties must not depend on that order either. So a tiny *symmetric* preference is added, which no measured difference
feels: first for the same index, then for one pairing of the indices that is the same from both sides.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import combinations

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from hf_zipit.maps.space_map import SpaceMap

LARGE = 1024
"""From this many units on an auction comes first,"""

BIDS = (6e-3, 1.2e-3, 2.5e-4, 6e-5)
"""with raises of these shares of the similarities' range,"""

ROUNDS = 1000
"""at most so many rounds each,"""

LEFT = 256
"""that end when no more than one of so many rows is left without a column."""

TOGETHER = 2**30
"""Assignments that run side by side take about so many bytes together at most."""

SAME_INDEX_BONUS = 1e-9
"""Far below any measured difference of correlations: it decides ties."""


def at_once(units: int) -> int:
    """How many assignments of so many units there is memory for side by side: each holds about four matrices."""
    return max(1, TOGETHER // (4 * 8 * units**2))


def match_to_reference(similarity: Tensor) -> SpaceMap:
    """Match the units of T experts one-to-one from their similarities `[T, n, T, n]`."""
    experts, units = similarity.shape[:2]
    if units < LARGE:
        similarity = similarity.cpu()
    pairs = {(a, b): assign(similarity[a, :, b]) for a, b in combinations(range(experts), 2)}

    total = np.zeros(experts)
    for (a, b), partner in pairs.items():
        columns = torch.from_numpy(partner).to(similarity.device)
        total[[a, b]] += float(similarity[a, :, b].gather(1, columns[:, None]).sum())
    reference = int(total.argmax())

    labels = np.tile(np.arange(units), (experts, 1))
    for expert in range(experts):
        if expert < reference:
            labels[expert] = pairs[expert, reference]
        elif expert > reference:
            # partner[i] is the expert's unit for the reference's unit i; labels go the other way.
            labels[expert] = pairs[reference, expert].argsort()
    return SpaceMap(units, torch.from_numpy(labels))


def assign(similarity: Tensor) -> NDArray[np.int64]:
    """The column matched to each row of a square similarity, so that the sum over the pairs is largest; from the
    transposed similarity the inverse of it.

    An auction runs where the similarity is, the exact search on the CPU.
    """
    prefer = preference if len(similarity) >= LARGE else _remembered
    values = similarity.double() + prefer(len(similarity), similarity.device)
    if len(values) >= LARGE:
        values -= prices(values)
        values -= values.amax(1, keepdim=True)
    return linear_sum_assignment(values.cpu().numpy(), maximize=True)[1]


def prices(similarity: Tensor) -> Tensor:
    """A price for every column at which nearly all rows want columns of their own: those of an auction (Bertsekas,
    1988), with ever smaller bids.

    Taken from the columns they change no best assignment, but the exact search then finds most pairs at once.
    """
    count = nobody = len(similarity)  # the place behind the last takes what goes nowhere
    spread, found = similarity.max() - similarity.min(), similarity.new_zeros(count + 1)
    numbers = torch.arange(count, device=similarity.device)
    for share in BIDS:
        raised = share * spread
        owner, owned = (torch.full((count + 1,), nobody, device=similarity.device) for _ in range(2))
        for _ in range(ROUNDS):
            free = (owned[:-1] == nobody).nonzero().squeeze(1)
            if len(free) <= count // LEFT:
                break
            worth = similarity[free] - found[:-1]
            first, best = worth.max(1)
            second = worth.scatter_(1, best[:, None], -torch.inf).amax(1)
            bid = found[best] + first - second + raised
            number = numbers[: len(free)]
            highest = torch.full_like(found, -torch.inf).scatter_reduce_(0, best, bid, "amax")
            winner = torch.full_like(owner, -1)
            winner.scatter_reduce_(0, best, torch.where(bid == highest[best], number, -1), "amax")
            won = winner[best] == number
            owned[torch.where(won, owner[best], nobody)] = nobody
            owned[torch.where(won, free, nobody)] = best
            column = torch.where(won, best, nobody)
            owner[column], found[column] = free, bid
            owned[nobody], owner[nobody] = nobody, nobody
    return found[:-1]


def preference(size: int, device: torch.device | str = "cpu") -> Tensor:
    """What decides ties: symmetric, largest for the same index, and different for all other pairs; the same on every
    device."""
    drawn = torch.from_numpy(np.random.default_rng(0).random(size)).to(device)
    noise = (drawn[:, None] * drawn).mul_(2**20).frac_()  # of sums the total would be the same for all assignments
    return noise.div_(4).fill_diagonal_(1).mul_(SAME_INDEX_BONUS)


_remembered = lru_cache(8)(preference)
