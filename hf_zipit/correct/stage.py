"""Corrections as a stage of `merge`: an assembled model in, the same model corrected out."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from accelerate import Accelerator
from transformers import PreTrainedModel

from hf_zipit.correct.correction import check_corrections
from hf_zipit.data.batches import Batches
from hf_zipit.errors import DataError
from hf_zipit.maps.space_map import Alignment
from hf_zipit.observe import Moments
from hf_zipit.planning.plan import Plan
from hf_zipit.registry import CORRECTIONS


def correct(
    merged: PreTrainedModel,
    experts: Mapping[str, PreTrainedModel],
    planned: Plan,
    alignment: Alignment,
    calibration: Any,
    corrections: Sequence[str] | Mapping[str, Mapping[str, Any] | None],
    *,
    processor: Any = None,
    batch_size: int = 32,
    accelerator: Accelerator | None = None,
    moments: Moments | None = None,
    reparametrised: Collection[str] = (),
) -> None:
    """Apply corrections to a merged model, in the order given, in place.

    A model whose trunk is empty (depth 0) is left as it is: there is nothing to correct. So are weights that a refit
    `reparametrised` in a basis of their own: their outputs are no expert's units and have no expert's statistics.

    Raises:
        RecipeError: as `check_corrections`.
        DataError: without calibration data, or if it cannot be used.
    """
    wanted = check_corrections(corrections)
    if not wanted:
        return
    if calibration is None:
        name = next(iter(wanted))
        raise DataError(f"{name} runs models on data: pass a little unlabelled data as calibration=")
    if not planned.cut.trunk:
        return
    batches = Batches.of(
        calibration, experts, processor=processor, batch_size=batch_size, accelerator=accelerator, moments=moments
    )
    planned = replace(planned, cut=replace(planned.cut, trunk=planned.cut.trunk.difference(reparametrised)))
    for name, options in wanted.items():
        CORRECTIONS.get(name).function(merged, experts, planned, alignment, batches, **options)
