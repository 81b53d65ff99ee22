"""The refit as a stage of `merge`: calibration data and combined tensors in, refitted tensors and readouts out."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel

from hf_zipit.adapters import adapter_for
from hf_zipit.config import RefitConfig
from hf_zipit.data.micro_batches import MicroBatch, micro_batches
from hf_zipit.data.processes import all_reduce_sum
from hf_zipit.data.sources import calibration_batches
from hf_zipit.errors import DataError
from hf_zipit.maps.space_map import Alignment
from hf_zipit.planning.plan import Plan
from hf_zipit.refit.positions import Positions
from hf_zipit.refit.program import resized_copy
from hf_zipit.refit.walk import Refitted, Walk
from hf_zipit.symmetry.proof import model_tensors


def refit(
    experts: Mapping[str, PreTrainedModel],
    planned: Plan,
    trunk: Mapping[str, Tensor],
    alignment: Alignment,
    calibration: Any,
    config: RefitConfig | None = None,
    *,
    processor: Any = None,
    accelerator: Accelerator | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Refitted:
    """Regress every module of the trunk on the experts' features; see `walk.py`.

    Args:
        experts: the models by task.
        planned: the plan of the merge.
        trunk: the combined tensors, where the regressions start from.
        alignment: the maps of the movable spaces.
        calibration: unlabelled data, by task (then each sample's own expert can weigh more) or for all tasks.
        config: the settings.
        processor: image processor or tokenizer for raw data.
        accelerator: spreads the batches over its processes; moments are added up.
        seed: of the rows that are drawn where not all are used.
        progress: show a progress bar.

    Raises:
        DataError: without calibration data.
    """
    config = config or RefitConfig()
    model = next(iter(experts.values()))
    accelerator = accelerator or Accelerator()
    batches = prepared(calibration, model, list(experts), config, processor)
    own = batches[accelerator.process_index :: accelerator.num_processes]
    if len(batches) < accelerator.num_processes:
        raise DataError(
            f"{len(batches)} micro-batches of calibration data cannot be spread over {accelerator.num_processes} "
            "processes; give more data or a smaller micro_batch"
        )

    walk = Walk(
        with_fused_attention(in_float32(model)),
        [model_tensors(in_float32(expert)) for expert in experts.values()],
        trunk,
        own,
        tasks=planned.tasks,
        spec=planned.spec,
        cut=planned.cut,
        alignment=alignment,
        config=config,
        positions=readout_positions(model, processor, config),
        fields=adapter_for(model).outputs(model),
        all_reduce=partial(all_reduce_sum, accelerator=accelerator),
        seed=seed,
        progress=progress and accelerator.is_main_process,
    )
    return walk.run()


def prepared(
    calibration: Any, model: PreTrainedModel, tasks: list[str], config: RefitConfig, processor: Any
) -> list[MicroBatch]:
    """The calibration data as micro-batches of one shape."""

    def numbered() -> Iterable[tuple[int | None, Mapping[str, Tensor]]]:
        stream = calibration_batches(calibration, model, tasks, processor=processor, batch_size=config.micro_batch)
        for batch in stream:
            yield (tasks.index(batch.task) if batch.task is not None else None), batch.inputs

    text_config = getattr(model.config, "text_config", None) or model.config
    pad = getattr(text_config, "pad_token_id", None) or 0
    return micro_batches(numbered(), config.micro_batch, {"input_ids": pad})


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
