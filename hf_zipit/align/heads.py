"""Heads: spaces whose units are blocks of other units, such as attention heads, their key/value groups, GroupNorm's
groups.

One head order per layer is shared by Q, K, V and O. It comes from ONE outer assignment, on scores that are summed
over all products that the heads occur in: the score of a pair (head h of expert a, head h' of expert b) is the best
assignment of the units inside the two heads (Merging Text Transformers, arXiv 2403.00986, for one product). Ordering
Q/K and V/O independently, as MuDSC's code does, cuts the connection between attention pattern and values inside a
head: a permuted copy of a model is then no longer merged into that model. What is inside the paired heads is matched
afterwards.

Heads are permuted one-to-one under every method and never zipped: units that act as one can be summed, attention
*patterns* that differ cannot, whatever the correlation of their values.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations

import numpy as np
import torch
from torch import Tensor

from hf_zipit.align.assignment import assign
from hf_zipit.symmetry.spec import MergeSpec, ProductKey


def holds_blocks(name: str, spec: MergeSpec, observed: Iterable[ProductKey]) -> bool:
    """Whether a space's units are blocks of units: others live within it, or it is never observed as last factor."""
    if any(name in space.within for space in spec.spaces.values()):
        return True
    keys = [key for key in observed if name in key]
    return bool(keys) and all(key[-1] != name for key in keys)


def block_scores(similarity: Tensor, units: int) -> Tensor:
    """How similar blocks are, `[T, n, T, n]`, from the similarity `[T, n * units, T, n * units]` of what is in them.

    The sum over the best pairs of two blocks' units; zero inside an expert.
    """
    experts, size = similarity.shape[0], similarity.shape[1] // units
    values = similarity.reshape(experts, size, units, experts, size, units).detach().cpu()
    scores = torch.zeros(experts, size, experts, size, dtype=torch.float64)
    inside = np.arange(units)
    for a, b in combinations(range(experts), 2):
        for i in range(size):
            for j in range(size):
                block = values[a, i, :, b, j]
                scores[a, i, b, j] = scores[b, j, a, i] = block[inside, assign(block)].sum()
    return scores
