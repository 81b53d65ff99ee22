"""One-to-one assignments of every expert's units to a reference expert's, by similarity.

With more than two experts all are matched to one of them. Taking the expert that is most similar to the others, rather
than the first, makes the result independent of the order in which the experts are given.

Ties must not depend on that order either. So a tiny *symmetric* preference is added, which no measured difference
feels: first for the same index, then for one pairing of the indices that is the same from both sides.
"""

from __future__ import annotations

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

ROUNDS = 400
"""and at most so many rounds each."""

SAME_INDEX_BONUS = 1e-9
"""Far below any measured difference of correlations: it decides ties."""


def match_to_reference(similarity: Tensor) -> SpaceMap:
    """Match the units of T experts one-to-one from their similarities `[T, n, T, n]`."""
    values = similarity.detach().cpu().numpy()
    experts, units = values.shape[:2]
    pairs = {(a, b): assign(values[a, :, b]) for a, b in combinations(range(experts), 2)}

    total = np.zeros(experts)
    for (a, b), partner in pairs.items():
        total[[a, b]] += values[a, np.arange(units), b, partner].sum()
    reference = int(total.argmax())

    labels = np.tile(np.arange(units), (experts, 1))
    for expert in range(experts):
        if expert < reference:
            labels[expert] = pairs[expert, reference]
        elif expert > reference:
            # partner[i] is the expert's unit for the reference's unit i; labels go the other way.
            labels[expert] = pairs[reference, expert].argsort()
    return SpaceMap(units, torch.from_numpy(labels))


def assign(similarity: NDArray[np.float64]) -> NDArray[np.int64]:
    """The column matched to each row of a square similarity, so that the sum over the pairs is largest; from the
    transposed similarity the inverse of it."""
    values = similarity + preference(len(similarity))
    if len(values) >= LARGE:
        values -= prices(values)
        values -= values.max(1, keepdims=True)
    return linear_sum_assignment(values, maximize=True)[1]


def prices(similarity: NDArray[np.float64]) -> NDArray[np.float64]:
    """A price for every column at which nearly all rows want columns of their own: those of an auction (Bertsekas,
    1988), with ever smaller bids.

    Taken from the columns they change no best assignment, but the exact search then finds most pairs at once.
    """
    count = len(similarity)
    spread, found = float(np.ptp(similarity)), np.zeros(count)
    for share in BIDS:
        owner, owned = np.full(count, -1), np.full(count, -1)
        for _ in range(ROUNDS):
            free = np.flatnonzero(owned < 0)
            if len(free) <= count // 64:
                break
            worth = similarity[free] - found
            rows = np.arange(len(free))
            best = worth.argmax(1)
            first = worth[rows, best]
            worth[rows, best] = -np.inf
            bid = found[best] + first - worth.max(1) + share * spread
            highest = np.full(count, -1)
            order = np.argsort(bid, kind="stable")
            highest[best[order]] = order  # later ones overwrite earlier ones
            columns = np.flatnonzero(highest >= 0)
            winners = highest[columns]
            owned[owner[columns][owner[columns] >= 0]] = -1
            owner[columns], owned[free[winners]] = free[winners], columns
            found[columns] = bid[winners]
    return found


def preference(size: int) -> NDArray[np.float64]:
    """What decides ties: symmetric, largest for the same index, and different for all other pairs."""
    noise = np.random.default_rng(0).random((size, size))
    return SAME_INDEX_BONUS * (np.eye(size) + (noise + noise.T) / 8)
