"""Rooting as a stage of `merge`: experts trained from the weights of one of them, before they are combined.

After the model rooting of GAN Cocktail (arXiv 2106.03847): every expert but the anchor becomes a model that starts
from the anchor's trunk and learns to answer as that expert does on the unlabelled samples of its task. The experts
then have an initialisation in common, however they were trained, and are combined as those of one base are: the
anchor. It is training, of one model for every expert, off unless it is asked for. No label is read.

Where the paper's models draw the samples that they learn from, here they are the calibration data; and the expert's
own head reads the anchor's trunk at first through the alignment's pairs of units.

Invariants: the anchor computes what it did; on held-out samples no rooted expert is farther from its own than the
anchor's trunk is.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_zipit.assembly.assemble import assemble
from hf_zipit.data.calibration import Calibration
from hf_zipit.errors import RecipeError
from hf_zipit.maps.space_map import Alignment, LinearMap, Map, SpaceMap
from hf_zipit.maps.transform import to_merged
from hf_zipit.modeling import ZipItPreTrainedModel
from hf_zipit.modeling.empty_model import empty_model
from hf_zipit.planning.plan import Plan
from hf_zipit.polish.distance import Distance
from hf_zipit.polish.kind import Learnt
from hf_zipit.polish.report import rounded
from hf_zipit.polish.stage import train
from hf_zipit.refit.positions import Positions
from hf_zipit.registry import RULES
from hf_zipit.symmetry.proof import model_tensors
from hf_zipit.symmetry.spec import product_key


def check_root(planned: Plan) -> None:
    """Raise RecipeError if the experts cannot be rooted as the config asks. It is asked before any work."""
    config = planned.config
    if config.root is None:
        return
    if config.root.anchor not in (None, *planned.tasks):
        raise RecipeError(f"root's anchor is {config.root.anchor!r}; it must be one of {', '.join(planned.tasks)}.")
    if planned.bases:
        raise RecipeError("root makes one expert the base of all others; leave base= out, or root.")
    if config.vocabulary != "same":
        raise RecipeError("root trains experts on the samples of their own tasks, whose tokens must be the anchor's.")


def root(
    planned: Plan, maps: Alignment, calibration: Calibration | None
) -> tuple[Plan, Alignment, dict[str, Any] | None]:
    """The plan with rooted experts, in merged units, and what is left to align of them: nothing; and what was done.

    Nothing happens where the config does not ask for it.

    Args:
        planned: the plan of the merge; its config holds the settings.
        maps: of its spaces; they say which of the anchor's units an expert's head starts to read.
        calibration: the samples, the processes and the device.

    Raises:
        DataError: without calibration data, or with a single sample of a task.
        RecipeError: the maps group units, or the accelerator's precision is fp16.
    """
    config = planned.config.root
    if config is None or not planned.cut.trunk:
        return planned, maps, None
    if grouped := next((name for name, found in maps.items() if not one_to_one(found)), None):
        raise RecipeError(
            f"root needs pairs of units, but method={planned.config.method!r} groups those of {grouped} otherwise; "
            "choose a method that only orders them, such as 'permute', 'weights' or 'identity'"
        )
    anchor = config.anchor or planned.tasks[0]
    moved = {task: in_merged_units(planned, maps, number) for number, task in enumerate(planned.tasks)}
    planned = replace(planned, folded=moved)
    maps = {name: identity_of(found) for name, found in maps.items()}
    rooted, reports = dict(moved), {}
    for task in planned.tasks:
        if task != anchor:
            student = assemble(planned, {n: model_tensors(moved[anchor])[n] for n in planned.cut.trunk}, maps)
            report = train(student, planned, calibration, config.training, (task,), Towards(student, planned, task))
            reports[task] = rounded(report)
            rooted[task] = plain(student, task)
    rule, residues = RULES.get(planned.config.combine), planned.config.residues
    based = rule.needs_base or (residues is not None and residues.needs_origin)
    bases = dict.fromkeys(planned.tasks, moved[anchor]) if based else {}
    return replace(planned, folded=rooted, bases=bases), maps, {"anchor": anchor, "experts": reports}


class Towards:
    """What is learnt of a model for one task: its trunk and the task's own modules, towards the task's expert."""

    def __init__(self, student: ZipItPreTrainedModel, planned: Plan, task: str) -> None:
        self.student, self.planned, self.task = student, planned, task

    def __call__(self, positions: Positions) -> Learnt:
        student, weight = self.student, self.planned.config.root.training.feature_weight
        parts = {"trunk": student.trunk, "branch": student.branch(self.task)}
        parameters = {f"{part}.{n}": p for part, module in parts.items() for n, p in module.named_parameters()}
        learnt = {name: p for name, p in parameters.items() if p.is_floating_point()}
        return Learnt(learnt, Distance(student, self.planned, positions, weight))


def one_to_one(found: Map) -> bool:
    """Whether every expert has each merged unit once."""
    if isinstance(found, LinearMap):
        return found.matrices.shape[-1] == found.size
    return bool((found.labels.sort(-1).values == torch.arange(found.size)).all())


def identity_of(found: Map) -> SpaceMap:
    """The map of the same space of experts that are in merged units."""
    within = found.labels.shape[1:-1] if isinstance(found, SpaceMap) else found.matrices.shape[1:-2]
    return SpaceMap.identity(found.size, found.experts, within)


@torch.no_grad()
def in_merged_units(planned: Plan, maps: Alignment, expert: int) -> PreTrainedModel:
    """One expert, which computes what it did, with its units in the order, or the basis, of the merged ones."""
    model = copy.deepcopy(planned.folded[planned.tasks[expert]])
    tensors, spec = model_tensors(model), planned.spec
    moved = {}
    for name, labels in spec.axes.items():
        own = tuple(label if any(key in maps for key in product_key(label)) else () for label in labels)
        if name in tensors and any(own):  # the sizes of other axes, such as classes, are each expert's own
            moved[name] = to_merged(tensors[name].double(), own, maps, spec, expert)
    return with_tensors(model, moved)


def plain(student: ZipItPreTrainedModel, task: str) -> PreTrainedModel:
    """What was learnt for a task as a model of the experts' class, whose head is tied to nothing any more."""
    parts = model_tensors(student.branch(task)) | model_tensors(student.trunk)
    model = empty_model(student.config, task).eval()
    return with_tensors(model, {name: parts[name] for name in model_tensors(model)})


@torch.no_grad()
def with_tensors(model: PreTrainedModel, tensors: Mapping[str, torch.Tensor]) -> PreTrainedModel:
    """The model, with other values in some tensors."""
    own = model_tensors(model)
    for name, tensor in tensors.items():
        own[name].copy_(tensor)
    return model
