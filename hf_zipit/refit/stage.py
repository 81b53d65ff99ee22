"""The refit as a stage of `merge`: calibration data and combined tensors in, refitted tensors and readout maps out."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_zipit.adapters import adapter_for
from hf_zipit.adapters.signature import grids
from hf_zipit.combine.combine import combine_trunk
from hf_zipit.config import RefitConfig
from hf_zipit.data.calibration import Calibration, MicroBatch
from hf_zipit.data.written import with_more
from hf_zipit.errors import DataError, ExpertError, SpecError
from hf_zipit.hub.reasons import first_line
from hf_zipit.maps.space_map import Alignment, LinearMap
from hf_zipit.observation.observe import gather_moments
from hf_zipit.planning.plan import Plan
from hf_zipit.refit.asked import asked_token
from hf_zipit.refit.positions import Positions, Rows
from hf_zipit.refit.program import Program, resized_copy
from hf_zipit.refit.solvable import find_sites
from hf_zipit.refit.stream_basis import rotatable, stream_bases, stream_values
from hf_zipit.refit.values import OnDevice
from hf_zipit.refit.walk import Refitted, Walk
from hf_zipit.symmetry.ops import shape_of
from hf_zipit.symmetry.proof import model_tensors

BASIS_ROWS = 8
"""About this many rows per direction, in each of a stream's values on average, are enough for its basis."""


def refit_trunk(
    planned: Plan,
    trunk: Mapping[str, Tensor],
    maps: Alignment,
    calibration: Calibration | None = None,
    combine: Callable[[Alignment], Mapping[str, Tensor]] | None = None,
) -> Refitted:
    """The trunk with every module regressed on the experts' features, see `walk.py`; as it is where nothing is
    refitted.

    Args:
        planned: the plan of the merge; its config holds the settings.
        trunk: the combined tensors, where the regressions start from.
        maps: the maps of the movable spaces.
        calibration: unlabelled data, by task (then each sample's own expert can weigh more) or for all tasks. Its
            batches are spread over the processes, and moments are summed over them.
        combine: combines the trunk in other maps' units; `combine_trunk` by default.

    Raises:
        DataError: without calibration data, or with less of it than there are processes.
        ExpertError: what an expert computes, or a solution, is not finite.
    """
    config = planned.config.refit
    if config is None or not planned.cut.trunk:
        return Refitted(dict(trunk))
    if calibration is None:
        raise DataError("refit regresses on what the experts compute: pass a little unlabelled data as calibration=")
    config = config.for_samples(sum(calibration.counts.values()) / len(planned.tasks))
    calibration, written, spliced = with_more(
        calibration, planned.experts, config.written_samples, planned.config.seed
    )
    remedy = "check the experts' weights and the calibration data"
    try:
        work = partial(_refit, planned, config, trunk, maps, calibration, combine or partial(combine_trunk, planned))
        refitted = calibration.while_it_fits(work)
    except torch.linalg.LinAlgError as error:
        gather_moments(planned.spec, planned.folded, calibration)  # raises what names the expert and the module
        raise ExpertError(f"a regression of the refit has no solution ({first_line(error)}); {remedy}") from error
    for name, tensor in refitted.tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ExpertError(f"the refit leaves numbers that are not finite in {name}; {remedy}")
    return replace(refitted, report=replace(refitted.report, written=written, spliced=spliced))


def _refit(
    planned: Plan,
    config: RefitConfig,
    trunk: Mapping[str, Tensor],
    maps: Alignment,
    calibration: Calibration,
    combine: Callable[[Alignment], Mapping[str, Tensor]],
) -> Refitted:
    model = planned.model
    batches = calibration.micro_batches(config.micro_batch)
    if len(batches) < calibration.processes:
        raise DataError(
            f"{len(batches)} micro-batches of calibration data cannot be spread over {calibration.processes} "
            "processes; give more data or a smaller micro_batch"
        )
    check_grids(model, batches)
    traced = with_fused_attention(in_float32(model))
    experts = [model_tensors(expert) for expert in planned.folded.values()]
    positions = readout_positions(
        model,
        calibration.processor,
        config.readout_weight,
        partial(asked_token, list(planned.folded.values()), batches),
    )
    bases = _stream_bases(planned, traced, experts, maps, calibration, batches, positions)
    if bases:
        maps = {**maps, **bases}
        moved = combine(maps)
        # A norm's scale is no vector of the stream; it keeps the alignment's, and its readers make up for that.
        trunk = {name: moved[name] if tensor.dim() > 1 else tensor for name, tensor in trunk.items()}
    walk = Walk(
        traced,
        experts,
        trunk,
        batches[calibration.process :: calibration.processes],
        tasks=planned.tasks,
        spec=planned.spec,
        cut=planned.cut,
        alignment=maps,
        config=config,
        positions=positions,
        fields=adapter_for(model).outputs(model),
        all_reduce=calibration.all_reduce,
        seed=planned.config.seed,
        progress=calibration.process == 0,
        device=calibration.device,
        budget=kept_bytes(config, calibration),
    )
    return replace(walk.run(), maps=bases)


def check_grids(model: PreTrainedModel, batches: Sequence[MicroBatch]) -> None:
    """Raises SpecError where images are cut in several ways: the traced forward pass is that of one."""
    first = grids(batches[0].inputs)
    for name, grid in first.items():
        if any(not torch.equal(batch.inputs.get(name, grid[:0]), grid) for batch in batches):
            raise SpecError(
                f"{type(model).__name__} is told by {name} where its images are cut, and that differs between "
                "samples; give images of one size, in texts with one beginning, or merge it with refit=None"
            )


def kept_bytes(config: RefitConfig, calibration: Calibration) -> float:
    """What activations may take of the CPU's memory: as the refit's own setting says, or what the data's leaves."""
    return calibration.memory_left if config.memory_gb is None else config.memory_gb * 2**30


def _stream_bases(
    planned: Plan,
    traced: PreTrainedModel,
    experts: list[dict[str, Tensor]],
    maps: Alignment,
    calibration: Calibration,
    batches: Sequence[MicroBatch],
    positions: Positions,
) -> dict[str, LinearMap]:
    """The bases of the residual streams, from as many batches of every task as are enough for it."""
    spec, cut, config = planned.spec, planned.cut, planned.config.refit
    if not config.stream_bases:
        return {}
    fields = adapter_for(planned.model).outputs(planned.model)
    program = Program(traced, batches[0].inputs, fields, cut.trunk, calibration.device)
    streams = rotatable(spec, cut, planned.model, program, maps)
    if not streams:
        return {}
    sites = find_sites(program, cut.trunk, spec.head)
    some = batches
    if config.rows_per_input:
        units = len(experts) * max(spec.spaces[name].size for name in streams)
        values = stream_values(streams, program, sites, spec, cut)
        rows = [value.node.meta["val"][0].numel() // shape_of(value.node)[value.axis] for value in values]
        per_sample = max(sum(rows) // max(len(rows), 1), 1)  # their energies are averaged
        some = enough(batches, units * min(config.rows_per_input, BASIS_ROWS) // per_sample)
    own = some[calibration.process :: calibration.processes]
    with torch.no_grad():
        return stream_bases(
            streams,
            program,
            sites,
            [OnDevice(own, calibration.device, len(experts)) for own in experts],
            Rows(own, positions, per_input=0, all_batches=len(some), seed=0, device=calibration.device),
            spec=spec,
            cut=cut,
            maps=maps,
            all_reduce=calibration.all_reduce,
        )


def enough(batches: Sequence[MicroBatch], samples: int) -> list[MicroBatch]:
    """Batches of every task, evenly spread, that hold about this many samples."""
    stride = max(1, sum(batch.real for batch in batches) // max(samples, 1))
    tasks = dict.fromkeys(batch.task for batch in batches)
    return [batch for task in tasks for batch in [one for one in batches if one.task == task][::stride]]


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


def readout_positions(
    model: PreTrainedModel, processor: Any, weight: float, asked: Callable[[], int | None] = lambda: None
) -> Positions:
    """Which positions the head reads, to count `weight` times: the adapter's word, with the ids of special tokens.

    `asked` finds the mask where neither the processor nor the configuration knows it.
    """
    read = adapter_for(model).readout_positions(model)
    text_config = getattr(model.config, "text_config", None) or model.config
    mask = getattr(getattr(processor, "tokenizer", processor), "mask_token_id", None)
    mask = getattr(model.config, "mask_token_id", None) if mask is None else mask
    return Positions(
        text=read.get("text", "all"),
        image=read.get("image", "all"),
        mask_token=asked() if mask is None and read.get("text") == "masked" else mask,
        end_token=getattr(text_config, "eos_token_id", None),
        weight=weight,
    )
