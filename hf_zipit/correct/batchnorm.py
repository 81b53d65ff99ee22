"""BatchNorm reset: the running statistics become those of the merged model on the calibration data.

Averaging weights shrinks the variance of what they compute, while the averaged running statistics still belong to the
experts; the mismatch multiplies from layer to layer. One pass in training mode corrects it, the most important single
correction of convolutional networks (REPAIR, arXiv 2211.08403).

Every batch holds samples of all tasks, because the trunk will see them all. Batches count by their samples, over all
processes, each sample once.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_zipit.correct.correction import register
from hf_zipit.correct.sites import is_batch_norm
from hf_zipit.data.calibration import Calibration, size_of
from hf_zipit.data.processes import running
from hf_zipit.maps.space_map import Alignment
from hf_zipit.observation.moments import Moments
from hf_zipit.planning.plan import Plan
from hf_zipit.symmetry.spec import fitted


@register("batchnorm-reset")
def batchnorm_reset(
    merged: PreTrainedModel, planned: Plan, alignment: Alignment, calibration: Calibration, moments: Moments | None
) -> None:
    """Give the trunk's BatchNorm layers the cumulative average of their statistics over the calibration data."""
    norms = [m for m in merged.trunk.modules() if is_batch_norm(m) and m.running_mean is not None]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]

    def watch() -> tuple[int, int]:
        """One pass over the data; the numbers of samples and of batches."""
        seen, passes = 0, 0
        for norm in norms:
            norm.train()
            norm.reset_running_stats()
        for inputs in calibration.mixed():
            seen, passes = seen + size_of(inputs), passes + 1
            for norm in norms:
                norm.momentum = size_of(inputs) / seen
            merged(**fitted(inputs, merged), task=planned.tasks[0])
        return seen, passes

    with running([merged], calibration.device):
        try:
            counts = calibration.while_it_fits(watch)
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
        reduce_statistics(norms, *counts, calibration)


def reduce_statistics(norms: list[nn.Module], seen: int, passes: int, calibration: Calibration) -> None:
    """The mean over all processes' samples; one that had none adds nothing."""
    counts = calibration.all_reduce(torch.tensor([seen, passes], dtype=torch.float64))
    for norm in norms:
        for statistic in (norm.running_mean, norm.running_var):
            total = calibration.all_reduce(statistic.double() * seen)
            statistic.copy_(total / counts[0])
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.fill_(int(counts[1]))
