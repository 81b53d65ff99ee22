"""What a merged model remembers of its making: the settings, where its experts came from, and what the refit left.

It is `config.method`: plain values, from which `MergeConfig.from_pretrained` gives the settings back, and from which
the card and the recipe beside the weights are written.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_zipit.data.calibration import Calibration
from hf_zipit.experts.fingerprint import fingerprint_experts
from hf_zipit.experts.origins import origins, versions
from hf_zipit.experts.processors import processors_of
from hf_zipit.planning.plan import Plan
from hf_zipit.schema import packed


def record(
    merged: PreTrainedModel,
    planned: Plan,
    calibration: Calibration | None,
    refit_errors: Mapping[str, Any] | None,
    processor: Any = None,
    polished: Mapping[str, Any] | None = None,
    rooted: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """The model itself, with what it is to remember. It must be finished: its weights are hashed.

    The calibration data's processor, or without data the one that is given, may become the model's; `refit_errors` is
    what a refit left, `polished` and `rooted` what a training after and before the merge did, as plain values.
    """
    found = {
        **planned.config.to_dict(),
        "experts": {task: origin.to_dict() for task, origin in origins(planned.experts).items()},
        "expert_parameters": sum(model.num_parameters() for model in planned.experts.values()),
        "versions": versions(),
        "threads": torch.get_num_threads(),
    }
    if calibration is not None:
        found["batch_size"] = calibration.batch_size
        found["calibration_data"] = calibration.fingerprint()
    if refit_errors is not None:
        found["refit_errors"] = packed(refit_errors)
    if polished is not None:
        found["polished"] = polished
    if rooted is not None:
        found["rooted"] = rooted
    elif planned.bases:
        found["bases"] = {task: origin.to_dict() for task, origin in origins(planned.bases).items()}
    found["sha256"] = fingerprint_experts({"": merged})[""]
    merged.config.method = found
    processor = calibration.processor if calibration is not None else processor
    merged.known_processor_files = processors_of(planned.experts, merged.branch_names, processor)
    return merged
