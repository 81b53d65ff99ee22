"""Consensus merging: only entries that several tasks use (TALL masks, arXiv 2405.07813).

An entry is used by task t where |d_t| >= threshold |sum_s d_s - d_t|. Entries that fewer than `least` tasks use are
selfish, or of no use to anybody, and are left out of task arithmetic. (The masks themselves, one for each task, would
be a rule with a model for every task.)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_zipit.combine.options import above
from hf_zipit.combine.rule import register, task_vectors
from hf_zipit.planning.plan import Plan
from hf_zipit.symmetry.spec import AxisLabel


@register("consensus", elementwise=True)
def consensus(
    tensors: Sequence[Tensor],
    labels: Sequence[AxisLabel],
    plan: Plan | None,
    *,
    base: Tensor,
    threshold: float = 0.4,
    least: int = 2,
    scale: float = 0.4,
) -> Tensor:
    """The base and the sum of the task vectors where it is of use to several tasks.

    Args:
        threshold: lambda of the masks; the paper chooses it from .2 to .6 for each task.
        least: k, so many tasks must use an entry.
        scale: of the sum.

    Raises:
        RecipeError: an option that is not above 0.
    """
    for name, value in (("threshold", threshold), ("least", least), ("scale", scale)):
        above("consensus", name, value)
    vectors = torch.stack(task_vectors(tensors, base))
    total = vectors.sum(0)
    used = (vectors.abs() >= threshold * (total - vectors).abs()).sum(0)
    return base + scale * total * (used >= least)
