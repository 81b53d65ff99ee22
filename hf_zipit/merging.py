"""`merge()`: the stages in order, and nothing else.

    plan -> observe -> align -> combine -> refit -> assemble -> correct

Each stage can be called alone: it takes the frozen result of the one before and returns its own.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from transformers import PreTrainedModel

from hf_zipit.align.align import check_settings, residual_spaces, wants_folding
from hf_zipit.align.procrustes import rotating
from hf_zipit.align.stage import align_trunk
from hf_zipit.assembly.assemble import assemble
from hf_zipit.assembly.widening import widenable_spaces
from hf_zipit.combine.combine import combine_trunk
from hf_zipit.correct.correction import check_corrections
from hf_zipit.correct.stage import correct
from hf_zipit.data.sources import Renamed
from hf_zipit.errors import DataError
from hf_zipit.experts.fingerprint import fingerprint_experts
from hf_zipit.experts.loading import Experts, load_experts
from hf_zipit.experts.origins import origins, versions
from hf_zipit.experts.processors import processors_of
from hf_zipit.files import check_writable
from hf_zipit.observe import Moments
from hf_zipit.observe.observed import moments_for
from hf_zipit.planning.plan import Plan, fold_experts, make_plan, with_readouts
from hf_zipit.refit import RefitConfig
from hf_zipit.refit.joint import calibrate_joint
from hf_zipit.refit.stage import prepared
from hf_zipit.refit.stage import refit as refit_trunk
from hf_zipit.registry import METHODS, RULES, check_options
from hf_zipit.schema import build as build_section

logger = logging.getLogger(__name__)


def plan(
    experts: Experts,
    *,
    method: str = "zip",
    options: Mapping[str, Any] | None = None,
    depth: float | str = 1.0,
    residual: str = "match",
    overrides: Mapping[str, Any] | None = None,
    combine: str = "average",
    refit: bool | RefitConfig | Mapping[str, Any] = False,
) -> Plan:
    """What `merge` with these arguments would do; touches no data.

    Its sizes are those of maps that group units; a method may choose others, or make layers wider.

    Raises:
        ExpertError, SpecError, RecipeError: as `merge` does before it starts.
    """
    entry = METHODS.get(method)
    check_options(method, entry.function, options or {})
    RULES.get(combine)
    loaded = load_experts(experts)
    planned = make_plan(loaded, depth, folding=wants_folding(method, residual, overrides))
    if residual == "orthogonal" and not set(rotating(planned.spec)) & set(residual_spaces(planned.spec)):
        logger.info(
            "residual='orthogonal': %s has no norm that could be folded out of its residual stream, which is matched "
            "unit by unit instead.",
            planned.architecture,
        )
    wide = cache(lambda: widenable_spaces(next(iter(loaded.values())), planned.spec))
    needs = check_settings(
        planned.spec,
        len(loaded),
        method,
        options=options,
        residual=residual,
        overrides=overrides,
        widenable=wide,
    )
    if refit_settings(refit) is not None:
        planned = with_readouts(planned)
    return replace(planned, passes=int("moments" in needs), widenable=wide() if "widths" in needs else frozenset())


def merge(
    experts: Experts,
    calibration: Any = None,
    *,
    method: str = "zip",
    options: Mapping[str, Any] | None = None,
    depth: float | str = 1.0,
    residual: str = "match",
    overrides: Mapping[str, Any] | None = None,
    combine: str = "average",
    refit: bool | RefitConfig | Mapping[str, Any] = False,
    corrections: Sequence[str] | Mapping[str, Mapping[str, Any]] = (),
    processor: Any = None,
    columns: Mapping[str, str] | None = None,
    batch_size: int = 32,
    moments: Moments | str | Path | None = None,
    save_moments: str | Path | None = None,
    accelerator: Accelerator | None = None,
    share: float | str = "auto",
    seed: int = 0,
    progress: bool = True,
) -> PreTrainedModel:
    """Merge models of one architecture into one multi-task model, without training.

    Args:
        experts: the models by task name: loaded ones, repo ids or folders. They may come from different
            initialisations and may have different numbers of labels. A LoRA adapter is the model it makes of its base;
            a merged model is its tasks, named `NAME/TASK`.
        calibration: a little unlabelled data, by task or for all tasks: a `datasets.Dataset` (with an image processor
            or a tokenizer as `processor`), a `DataLoader`, a tensor, or an iterable of batches. Not needed by methods
            that look at the weights only.
        method: how units are matched; see `hf_zipit.align`. `"identity"` is plain averaging.
        options: the method's own options, such as `{"alpha": 0.3}`.
        depth: the share of blocks that is merged, or the path of the block before which the trunk ends.
        residual: what happens to the residual stream: `"match"` it like the rest, leave it at `"identity"`, or rotate
            it by the best `"orthogonal"` map, for which the norms are folded into their readers; where a model's norms
            cannot be folded (BERT, ResNet) it is matched.
        overrides: another method for spaces whose name fits a pattern, `{"*.mlp.*": "permute"}`.
        combine: how aligned weights become one.
        refit: True, a `RefitConfig` or its settings: regress every merged module on what the experts compute on the
            calibration data. Slower than combining alone, and much closer to the experts.
        corrections: what is mended afterwards, in this order, by name or as `{name: options}`: `"batchnorm-reset"`,
            `"repair"`, `"rescale-shift"`; see `hf_zipit.correct`.
        processor: image processor or tokenizer for raw calibration data.
        columns: names in the calibration data -> names of the model's inputs, `image` or `text`.
        batch_size: samples per forward pass.
        moments: moments of an earlier merge of the same experts, or their file; no data is read then.
        save_moments: where to save the moments that were gathered; those of a deep merge serve shallower ones, too.
        accelerator: where to run; one with default settings is made if none is given.
        share: share of the positions that enter the moments, or `"auto"`: as many as cost less than the forward
            passes.
        seed: of everything that is drawn.
        progress: show progress bars on stderr.

    Returns:
        A `ZipItForImageClassification`, `ZipItForSequenceClassification`, ... in eval mode, on the CPU, in float32.
        Called as it is, it answers for all tasks; with `task="name"` for one.

    Raises:
        ExpertError: if the experts do not fit each other, or one holds NaN.
        DataError: if the calibration data cannot be used.
        RecipeError: if a setting is wrong.
        SpecError: if the architecture cannot be traced or cut.
    """
    settings = {"options": options, "residual": residual, "overrides": overrides}
    refitting = refit_settings(refit)
    if refitting is not None and calibration is None:
        raise DataError("refit regresses on what the experts compute: pass a little unlabelled data as calibration=")
    wanted = check_corrections(corrections)
    if wanted and calibration is None:
        name = next(iter(wanted))
        raise DataError(f"{name} runs models on data: pass a little unlabelled data as calibration=")
    if save_moments is not None:
        check_writable(Path(save_moments).parent)
    loaded = load_experts(experts)
    calibration = for_tasks(calibration, list(loaded))
    calibration = Renamed(calibration, columns) if columns and calibration is not None else calibration
    planned = plan(loaded, method=method, depth=depth, combine=combine, **settings)
    folded = fold_experts(loaded, planned)
    found = moments_for(
        folded,
        planned,
        calibration,
        moments,
        save_moments,
        processor=processor,
        batch_size=batch_size,
        accelerator=accelerator,
        row_fraction=share,
        seed=seed,
        progress=progress,
    )
    alignment = align_trunk(folded, planned, found, method, **settings)
    trunk = combine_trunk(folded, planned, alignment, combine)
    readouts = head_dims = report = None
    turned: frozenset[str] = frozenset()
    if refitting is not None and planned.cut.trunk:
        refitted = refit_trunk(
            folded,
            planned,
            trunk,
            alignment,
            calibration,
            refitting,
            processor=processor,
            accelerator=accelerator,
            seed=seed,
            progress=progress,
        )
        trunk, readouts, report = refitted.tensors, refitted.readouts, refitted.report
        head_dims, turned = refitted.head_dims, refitted.turned
    recipe = {
        "method": method,
        "options": dict(options or {}),
        "residual": residual,
        "overrides": dict(overrides or {}),
        "combine": combine,
        "refit": asdict(refitting) if refitting is not None else None,
        "corrections": wanted,
        "correction_order": list(wanted),  # a configuration file sorts the keys of dicts
        "depth": depth,
        "seed": seed,
        "experts": {task: origin.to_dict() for task, origin in origins(loaded).items()},
        "expert_parameters": sum(model.num_parameters() for model in loaded.values()),
        "versions": versions(),
    }
    if report is not None:
        recipe["refit_errors"] = report.to_dict()
    merged = assemble(
        folded, planned.spec, planned.cut, trunk, alignment, readouts=readouts, head_dims=head_dims, method=recipe
    )
    correct(
        merged,
        folded,
        planned,
        alignment,
        calibration,
        wanted,
        processor=processor,
        batch_size=batch_size,
        accelerator=accelerator,
        moments=found,
        turned=turned,
    )
    if refitting is not None and refitting.joint_heads:
        calibrate_joint(merged, prepared(calibration, next(iter(loaded.values())), list(loaded), refitting, processor))
    merged.config.method["sha256"] = fingerprint_experts({"": merged})[""]
    merged.known_processor_files = processors_of(loaded, merged.branch_names, processor)
    return merged


def for_tasks(calibration: Any, tasks: Sequence[str]) -> Any:
    """Calibration data by task; what was given for a merged model among the experts is for each of its tasks."""
    if not isinstance(calibration, Mapping):
        return calibration
    found = {}
    for name, data in calibration.items():
        parts = [task for task in tasks if task.startswith(f"{name}/")]
        found |= dict.fromkeys(parts, data) if parts and name not in tasks else {name: data}
    return found


def refit_settings(refit: bool | RefitConfig | Mapping[str, Any]) -> RefitConfig | None:
    """The settings of the refit; None where there is none.

    Raises:
        RecipeError: for an unknown setting or a value out of range.
    """
    if isinstance(refit, RefitConfig):
        return refit
    if isinstance(refit, Mapping):
        return build_section(RefitConfig, refit, "refit")
    return RefitConfig() if refit else None
