"""All weights, by distillation from the experts (arXiv 1503.02531)."""

from __future__ import annotations

from hf_zipit.polish.distance import Distance
from hf_zipit.polish.kind import Finished, Learnt, register


@register("weights", about="its weights, to put out what its experts put out")
def weights(done: Finished) -> Learnt:
    """The model's own parameters; without `heads` the trunk's alone."""
    merged, config = done.merged, done.config
    owner = merged if config.heads else merged.trunk
    parameters = {name: p for name, p in owner.named_parameters() if p.is_floating_point()}
    return Learnt(parameters, Distance(merged, done.planned, done.positions, config.feature_weight))
