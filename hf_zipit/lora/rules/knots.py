"""KnOTS: updates in a common basis of their outputs, and their coefficients merged (arXiv 2410.19735).

The updates next to each other are decomposed, [d_1, ..., d_T] = U S [V_1, ..., V_T]; the V_t, `[k, in]` with k the
rank of all together, are merged by a rule such as TIES or task arithmetic, and the merged update is U S V. Rules on
spectra find little there: the V_t's own are flat. The decomposition is one of the factors: B_all = Q R, and the
A_t^T = Q_t R_t leave a core of `[k, sum r]`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from hf_zipit import factorise
from hf_zipit.combine.matrices import svd
from hf_zipit.lora.factors import Factors
from hf_zipit.lora.rule import Given, Updates, register
from hf_zipit.lora.spaces import Represented, merged_in


@register("knots")
def knots(
    updates: Updates, given: Given, *, combine: str = "ties", options: Mapping[str, Any] | None = None
) -> dict[str, Factors]:
    """The coefficients, merged.

    Args:
        combine: the rule for the V_t.
        options: its own options.

    Raises:
        RecipeError: as `merged_in` does.
    """
    return merged_in(aligned, updates, given, "knots", combine, options)


def aligned(layer: Sequence[Factors]) -> Represented:
    """Every expert's V_t, `[k, in]`."""
    left, core = factorise.qr(torch.cat([own.b for own in layer], 1))
    ranks = [own.rank for own in layer]
    rights, others = zip(*(factorise.qr(own.a.T) for own in layer), strict=True)
    parts = [part @ other.T for part, other in zip(core.split(ranks, 1), others, strict=True)]
    u, s, v = svd(torch.cat(parts, 1))
    pieces = v.split([right.shape[1] for right in rights], 1)
    return Represented(
        [piece @ right.T for piece, right in zip(pieces, rights, strict=True)],
        lambda merged: Factors((left @ u) * s, merged),
    )
