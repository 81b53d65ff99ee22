"""Identity: unit i of every expert is merged with unit i of the others, which is plain averaging."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_zipit.align.method import register
from hf_zipit.maps.space_map import SpaceMap


@register("identity", needs=set())
def identity(correlation: Tensor, experts: int) -> SpaceMap:
    """Merge units of the same index.

    Args:
        correlation: `[T * d, T * d]`; only its shape is read.
        experts: T.

    Returns:
        k = d merged units, labels `[T, d]`.
    """
    units = correlation.shape[-1] // experts
    return SpaceMap(units, torch.arange(units).repeat(experts, 1))
