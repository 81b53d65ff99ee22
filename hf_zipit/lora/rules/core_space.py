"""Core Space: updates merged in the small space that all of them lie in (arXiv 2509.17786).

With U an orthonormal basis of all experts' B next to each other, and V of all A^T, every update is U M_t V^T with the
core M_t = (U^T B_t) (A_t V): nothing is lost, whatever the ranks. The cores, at most `[sum r, sum r]`, are merged by
any combining rule, and the merged update is U M V^T.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_zipit.lora.factors import Factors, span
from hf_zipit.lora.rule import Given, Updates, register
from hf_zipit.lora.spaces import Represented, merged_in


@register("core-space")
def core_space(
    updates: Updates, given: Given, *, combine: str = "tsv-m", options: Mapping[str, Any] | None = None
) -> dict[str, Factors]:
    """The cores, merged.

    Args:
        combine: the rule for the cores.
        options: its own options.

    Raises:
        RecipeError: as `merged_in` does.
    """
    return merged_in(cores, updates, given, "core-space", combine, options)


def cores(layer: Sequence[Factors]) -> Represented:
    """Every expert's core, `[k, l]`."""
    left = span(torch.cat([own.b for own in layer], 1))
    right = span(torch.cat([own.a for own in layer]).T)

    def back(core: Tensor) -> Factors:
        # The smaller side is the rank.
        wide = core.shape[1] > core.shape[0]
        return Factors(left, core @ right.T) if wide else Factors(left @ core, right.T)

    return Represented([(left.T @ own.b) @ (own.a @ right) for own in layer], back)
