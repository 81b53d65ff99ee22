"""`merge()`: the stages in order, and nothing else.

    plan -> observe -> align (-> root) -> combine -> refit -> assemble -> correct (-> polish -> residues)

Those in brackets are there where they are asked for.

Each stage can be called alone: it takes the plan and the results of those before, and returns its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel

from hf_zipit.adapters import given_inputs
from hf_zipit.align.align import check_settings, wants_folding
from hf_zipit.align.stage import align_trunk
from hf_zipit.assembly.assemble import assemble, plain_module
from hf_zipit.assembly.record import record
from hf_zipit.assembly.to_disk import write_merged
from hf_zipit.assembly.widening import widenable_spaces
from hf_zipit.combine.combine import check_base, check_rule
from hf_zipit.combine.tokens import share_rows
from hf_zipit.config import AUTO, MergeConfig
from hf_zipit.correct.stage import correct
from hf_zipit.data.calibration import Calibration
from hf_zipit.errors import DataError, SpecError
from hf_zipit.experts.loading import Experts, load_bases, load_experts
from hf_zipit.experts.sentences import Sentences
from hf_zipit.experts.vocabulary import check_vocabularies, united
from hf_zipit.files import check_result_folder
from hf_zipit.layerwise.stage import combined_trunk
from hf_zipit.maps.space_map import Alignment
from hf_zipit.observation.gather import statistics_for
from hf_zipit.observation.moments import Moments
from hf_zipit.observation.shared import moments_for
from hf_zipit.observation.statistics import Known
from hf_zipit.planning.auto import choose, without_refit
from hf_zipit.planning.plan import Plan, make_plan
from hf_zipit.planning.size import depth_for_size
from hf_zipit.polish.kind import check_polish
from hf_zipit.polish.report import rounded
from hf_zipit.polish.rooting import check_root, root
from hf_zipit.polish.stage import polish
from hf_zipit.refit.joint_heads import calibrate_joint, check_joint_heads
from hf_zipit.refit.stage import refit_trunk
from hf_zipit.registry import RULES
from hf_zipit.residues.routing import add_router, check_router
from hf_zipit.residues.stage import add_residues
from hf_zipit.steady import steady
from hf_zipit.symmetry.spec import MergeSpec


def split_settings(settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings as they are for the `Calibration`, and for the `MergeConfig`."""
    reading = {
        name: settings[name] for name in ("processor", "columns", "batch_size", "memory_gb") if name in settings
    }
    return reading, {name: value for name, value in settings.items() if name not in reading}


@steady
def plan(
    experts: Experts,
    config: MergeConfig | None = None,
    *,
    base: Any = None,
    data: bool = True,
    observed: bool = False,
    example_inputs: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Plan:
    """What a merge will do; touches no data, and finds every mistake that can be found without it.

    Args:
        experts, config, base, example_inputs, settings: as for `merge`.
        data, observed: whether there will be calibration data, or moments, which an automatic method depends on.

    Raises:
        ExpertError, SpecError, RecipeError: as `merge` does before it starts.
        DataError: the settings need data, and there will be none.
    """
    config = MergeConfig.of(config, **settings)
    as_stored = not (data or observed)  # nothing is computed with them
    loaded = load_experts(experts, as_stored=as_stored)
    if config.vocabulary == "union":
        loaded = united(loaded)
    else:
        check_vocabularies(loaded)
    first = next(iter(loaded.values()))
    config = choose(config, first, data=data, observed=observed)
    if not data and (missing := _needs_data(config)):
        raise DataError(f"{missing}: pass a little unlabelled data as calibration=")
    check_base(config, base)
    folding = wants_folding(config.method, config.residual, config.overrides)
    with given_inputs(example_inputs):
        if config.size is not None:
            spec = MergeSpec.from_model(first, folding=folding)
            depth = depth_for_size(loaded, spec, config.size, readouts=config.refit is not None)
            config = replace(config, depth=depth, size=None)
        planned = make_plan(
            loaded,
            config,
            folding=folding,
            bases=load_bases(base, loaded, as_stored=as_stored),
        )
        check_rule(planned)
        check_polish(planned)
        check_root(planned)
        wide = cache(lambda: widenable_spaces(first, planned.spec))
        needs = check_settings(planned.spec, len(loaded), config, wide)
        return replace(planned, needs=needs, widenable=wide() if "widths" in needs else frozenset())


def _needs_data(config: MergeConfig) -> str | None:
    """Why settings need calibration data; None where they do not (what methods need is seen later)."""
    if config.refit is not None:
        return "refit regresses on what the experts compute"
    if RULES.get(config.combine).layerwise:
        return f"combine={config.combine!r} merges layers on what the models compute"
    if config.root is not None:
        return "root trains experts on what they compute"
    if config.polish is not None:
        return "polish trains on what the experts compute"
    return f"{next(iter(config.corrections))} runs models on data" if config.corrections else None


@steady
def merge(
    experts: Experts,
    calibration: Any = None,
    config: MergeConfig | None = None,
    *,
    base: Any = None,
    moments: Moments | str | Path | None = None,
    statistics: Known | None = None,
    accelerator: Accelerator | None = None,
    output_dir: str | Path | None = None,
    example_inputs: Mapping[str, Any] | None = None,
    **settings: Any,
) -> PreTrainedModel:
    """Merge models of one architecture into one multi-task model, without training.

    Only `polish` and `root` train, where they are asked for.

    Args:
        experts: the models by task name: loaded ones, repo ids or folders; in a list, each is named like its folder
            or repo. They may come from different
            initialisations and may have different numbers of labels. A LoRA adapter is the model it makes of its base;
            a merged model is its tasks, named `NAME/TASK`. Models of sentence-transformers come back as such.
        calibration: a little unlabelled data, by task or for all tasks: a `datasets.Dataset`, a `DataLoader`, tensors,
            any iterable of batches, or a `Calibration`. Not needed by methods that read the weights only.
        config: how the experts are merged; or the fields of `MergeConfig` as keywords, `method="zip", depth=0.5`,
            which also change single settings of a config that is given. The default is the best that is known.
        base: for rules that combine what experts learnt (`combine="task-arithmetic"`), and kinds of residues that do
            (`residues="emr"`): the model that all of them started from, or one for each expert by task. Where there
            are several, they are aligned, and each one's maps are those of all experts that started from it (arXiv
            2410.12766).
        moments: moments of an earlier merge of the same experts (with several bases, of the bases), or their file:
            they are not observed then.
        statistics: for rules that read some (`combine="regmean"`): what `gather_statistics` returned, or its file, or
            several of them, by whoever has data; nothing is gathered then.
        accelerator: where to run; one with default settings is made if none is given.
        output_dir: a folder to save the merged model in. Without data it is written there tensor by tensor as it is
            merged, and neither it nor experts that are given as folders are held in memory: they may be larger.
        example_inputs: keyword arguments of a forward pass, two samples or more, for families for which none can be
            made up from the configuration. They are traced only; their values do not matter.
        settings: the fields of `MergeConfig`, and `processor`, `columns`, `batch_size` and `memory_gb` of
            `Calibration`.

    Returns:
        A `ZipItForImageClassification`, `ZipItForSequenceClassification`, ... in eval mode, on the CPU, in float32.
        Called as it is, it answers for all tasks; with `task="name"` for one. Of plain torch modules, for which
        `example_inputs` are needed, one more of their class, merged as a whole, neither refitted nor corrected.

    Raises:
        ExpertError: if the experts do not fit each other, or one holds NaN.
        DataError: if the calibration data cannot be used.
        RecipeError: if a setting is wrong.
        SpecError: if the architecture cannot be traced or cut.
        OutputError: if the folder cannot be written, or the disk is full.
    """
    if output_dir is not None:
        output_dir = check_result_folder(output_dir)
    if (sentences := Sentences.of(experts)) is not None:
        if not isinstance(calibration, Calibration):
            settings.setdefault("processor", sentences.processor)
        merged = merge(
            sentences.transformers, calibration, config, base=base, moments=moments, statistics=statistics,
            accelerator=accelerator, example_inputs=example_inputs, **settings,
        )  # fmt: skip
        whole = sentences.around(merged)
        if output_dir is not None:
            whole.save_pretrained(str(output_dir))
        return whole
    reading, settings = split_settings(settings)
    calibration = Calibration.of(calibration, accelerator=accelerator, **reading)
    config = MergeConfig.of(config, **settings)
    with given_inputs(example_inputs):
        planned = plan(experts, config, base=base, data=calibration is not None, observed=moments is not None)
        if calibration is not None and _needs_data(planned.config):
            calibration.read(planned.experts)  # before the work starts; observing reads it, too
            check_joint_heads(planned, calibration)
        check_router(planned, calibration)
        is_plain = not isinstance(planned.model, PreTrainedModel)
        if is_plain and output_dir is not None:
            raise SpecError(
                f"{planned.architecture} is a plain torch module, which cannot be saved; leave output_dir out"
            )
        found = moments_for(planned.matched, calibration, moments)
        maps = align_trunk(planned, found)
        planned, maps, rooted = root(planned, maps, calibration)
        their_own = planned.matched is planned and not rooted  # no moments of bases, or of what experts were before
        if not (their_own and planned.config.corrections):
            found = None  # their memory is needed
        read = statistics_for(planned, calibration, statistics)
        if output_dir is not None and calibration is None and read is None and planned.config.residues is None:
            share_rows(planned, maps)
            return write_merged(planned, maps, output_dir, processor=reading.get("processor"))

        def combine(maps: Alignment) -> dict[str, Tensor]:
            share_rows(planned, maps)
            return combined_trunk(planned, maps, calibration=calibration, statistics=read)

        trunk = combine(maps)
        try:
            refitted = refit_trunk(planned, trunk, maps, calibration, combine)
        except SpecError as error:
            if config.refit != AUTO:
                raise
            planned = without_refit(planned, error)
            refitted = refit_trunk(planned, trunk, maps)
        if is_plain:
            return plain_module(planned, refitted.tensors)
        maps = {**maps, **refitted.maps}
        merged = assemble(planned, refitted.tensors, maps, readouts=refitted.readouts, head_cuts=refitted.head_cuts)
        correct(merged, planned, maps, calibration, moments=found, reparametrised=refitted.reparametrised)
        polished = polish(merged, planned, maps, calibration)
        add_residues(merged, planned, maps, read)
        add_router(merged, planned, maps, calibration)
        calibrate_joint(merged, planned, calibration)
        errors = refitted.report.to_dict() if refitted.report else None
        record(merged, planned, calibration, errors, reading.get("processor"), polished and rounded(polished), rooted)
        if output_dir is not None:
            merged.save_pretrained(output_dir)
        return merged
