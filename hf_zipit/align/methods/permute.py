"""Activation matching: one-to-one assignments of every expert's units to a reference expert's, by correlation.

The best pairs of two experts are a linear assignment problem on their *signed* correlations (Li et al., Convergent
Learning, arXiv 1511.07543; Ainsworth et al., arXiv 2209.04836, section 3.1); see `assignment.py`.
"""

from __future__ import annotations

from torch import Tensor

from hf_zipit.align.assignment import match_to_reference
from hf_zipit.align.method import register
from hf_zipit.maps.space_map import SpaceMap


@register("permute", needs={"moments"})
def permute(correlation: Tensor, experts: int) -> SpaceMap:
    """The units are matched one-to-one: k = d, in the order of the reference expert's units."""
    units = correlation.shape[-1] // experts
    return match_to_reference(correlation.reshape(experts, units, experts, units))
