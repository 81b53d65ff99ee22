"""The average of the aligned experts: W = sum_t M_t W_t U_t (ZipIt, arXiv 2305.03053).

Under identity maps this is plain averaging.

BatchNorm's running variance is averaged like everything else, as in the published code; reset the statistics
afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from hf_zipit.combine.rule import register
from hf_zipit.planning.plan import Plan
from hf_zipit.symmetry.spec import AxisLabel


@register("average", elementwise=True)
def average(tensors: Sequence[Tensor], labels: Sequence[AxisLabel], plan: Plan) -> Tensor:
    """The mean of the experts' tensors."""
    return sum(tensors) / len(tensors)
