"""The refit as a stage of `merge`: calibration data and combined tensors in, refitted tensors and readout maps out."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_zipit.adapters import adapter_for
from hf_zipit.config import RefitConfig
from hf_zipit.data.calibration import Calibration
from hf_zipit.errors import DataError
from hf_zipit.maps.space_map import Alignment
from hf_zipit.planning.plan import Plan
from hf_zipit.refit.positions import Positions
from hf_zipit.refit.program import resized_copy
from hf_zipit.refit.walk import Refitted, Walk
from hf_zipit.symmetry.proof import model_tensors


def refit_trunk(
    planned: Plan, trunk: Mapping[str, Tensor], maps: Alignment, calibration: Calibration | None = None
) -> Refitted:
    """The trunk with every module regressed on the experts' features, see `walk.py`; as it is where nothing is
    refitted.

    Args:
        planned: the plan of the merge; its config holds the settings.
        trunk: the combined tensors, where the regressions start from.
        maps: the maps of the movable spaces.
        calibration: unlabelled data, by task (then each sample's own expert can weigh more) or for all tasks. Its
            batches are spread over the processes, and moments are summed over them.

    Raises:
        DataError: without calibration data, or with less of it than there are processes.
    """
    config = planned.config.refit
    if config is None or not planned.cut.trunk:
        return Refitted(dict(trunk))
    if calibration is None:
        raise DataError("refit regresses on what the experts compute: pass a little unlabelled data as calibration=")
    model = planned.model
    batches = calibration.micro_batches(config.micro_batch)
    if len(batches) < calibration.processes:
        raise DataError(
            f"{len(batches)} micro-batches of calibration data cannot be spread over {calibration.processes} "
            "processes; give more data or a smaller micro_batch"
        )
    walk = Walk(
        with_fused_attention(in_float32(model)),
        [model_tensors(in_float32(expert)) for expert in planned.folded.values()],
        trunk,
        batches[calibration.process :: calibration.processes],
        tasks=planned.tasks,
        spec=planned.spec,
        cut=planned.cut,
        alignment=maps,
        config=config,
        positions=readout_positions(model, calibration.processor, config),
        fields=adapter_for(model).outputs(model),
        all_reduce=calibration.all_reduce,
        seed=planned.config.seed,
        progress=calibration.process == 0,
    )
    return walk.run()


def with_fused_attention(model: PreTrainedModel) -> PreTrainedModel:
    """The model, or one with the same tensors whose attention is one op, by which its layers are found."""
    if getattr(model.config, "_attn_implementation", None) in (None, "sdpa"):
        return model
    other = resized_copy(model, {}, {})
    try:
        other.set_attn_implementation("sdpa")
    except (ValueError, NotImplementedError, ImportError):  # its class has none
        return model
    return other


def in_float32(model: PreTrainedModel) -> PreTrainedModel:
    """The model itself where it is in float32 on the CPU, else a copy: its forward pass is traced with its dtypes."""
    ready = all(t.dtype == torch.float32 or not t.is_floating_point() for t in model_tensors(model).values())
    return model if ready and model.device.type == "cpu" else copy.deepcopy(model).to("cpu", torch.float32)


def readout_positions(model: PreTrainedModel, processor: Any, config: RefitConfig) -> Positions:
    """Which positions the head reads: the adapter's word, with the ids of the special tokens."""
    read = adapter_for(model).readout_positions(model)
    text_config = getattr(model.config, "text_config", None) or model.config
    mask = getattr(getattr(processor, "tokenizer", processor), "mask_token_id", None)
    return Positions(
        text=read.get("text", "all"),
        image=read.get("image", "all"),
        mask_token=getattr(model.config, "mask_token_id", None) if mask is None else mask,
        end_token=getattr(text_config, "eos_token_id", None),
        weight=config.readout_weight,
    )
