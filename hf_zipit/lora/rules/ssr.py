"""SSR: the experts' updates regressed on what they do to unlabelled data, in the space of all A (arXiv 2606.10617).

With Z_t = A_all X_t, X_t what the layer reads in expert t on its task's data, M minimises
sum_t |B_t A_t X_t - M A_all X_t|^2: M = B_all R with R = [A_t X_t Z_t^T]_t (sum_t Z_t Z_t^T)^+, where A_t X_t are
rows of Z_t. R is folded into B. Every task's products are means over its rows, so that a task with more data counts
no more.
"""

from __future__ import annotations

import torch

from hf_zipit.combine.matrices import solve_right
from hf_zipit.lora.factors import Factors, side_by_side
from hf_zipit.lora.rule import Given, Updates, register


@register("ssr", needs_data=True)
def ssr(updates: Updates, given: Given) -> dict[str, Factors]:
    """The solution."""
    merged = {}
    for name, layer in updates.items():
        together, moments = side_by_side(layer), given.moments[name]
        ranks = [own.rank for own in layer]
        blocks = [moment.split(ranks)[t] for t, moment in enumerate(moments)]
        merged[name] = Factors(together.b @ solve_right(torch.cat(blocks), sum(moments)), together.a)
    return merged
