"""Corrections as a stage of `merge`: an assembled model in, the same model corrected out."""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from hf_zipit.data.calibration import Calibration
from hf_zipit.errors import DataError, ExpertError
from hf_zipit.experts.fingerprint import fingerprint_experts
from hf_zipit.maps.space_map import Alignment
from hf_zipit.observation.moments import Moments
from hf_zipit.planning.plan import Plan
from hf_zipit.registry import CORRECTIONS
from hf_zipit.symmetry.proof import model_tensors

logger = logging.getLogger(__name__)


def correct(
    merged: PreTrainedModel,
    planned: Plan,
    maps: Alignment,
    calibration: Calibration | None,
    *,
    moments: Moments | None = None,
    reparametrised: Collection[str] = (),
) -> None:
    """Apply the config's corrections to a merged model, in their order, in place.

    A model whose trunk is empty (depth 0) is left as it is: there is nothing to correct. So are weights that a refit
    reparametrised: their outputs are no expert's units, and have nobody's mean and deviation.

    Raises:
        DataError: without calibration data, or if it cannot be used.
        ExpertError: a corrected tensor is not finite.
    """
    wanted = planned.config.corrections
    if not wanted or not planned.cut.trunk:
        return
    if calibration is None:
        raise DataError(f"{next(iter(wanted))} runs models on data: pass a little unlabelled data as calibration=")
    planned = replace(planned, cut=replace(planned.cut, trunk=planned.cut.trunk.difference(reparametrised)))
    before = fingerprint_experts({"": merged})
    for name, options in wanted.items():
        CORRECTIONS.get(name).function(merged, planned, maps, calibration, moments, **options)
        after = fingerprint_experts({"": merged})
        if after == before:
            logger.warning("%s changed nothing: it found nothing of its kind in %s.", name, planned.architecture)
        for tensor_name, tensor in model_tensors(merged).items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise ExpertError(
                    f"{name} leaves numbers that are not finite in {tensor_name}; check the calibration data and the "
                    "experts' weights"
                )
        before = after
