"""Rescale and shift per task (The Non-Local Model Merging Problem, arXiv 2410.12766; the authors' code calls it TACT).

After a module, for samples of task t,

    y = s_e (x - mu_m) / s_m + mu_e

with the statistics of expert t (in merged units) and of the merged model on unlabelled data of task t. Unlike REPAIR,
which has one correction for all tasks, this needs the task at inference. The corrections are stored in the merged
model, one per task and site, and applied when `task=` is given.

Sites are the outputs of the trunk's layers, the inputs of its blocks (the residual stream), and the readouts, where a
branch reads the trunk. In a joint forward pass the trunk runs once for all tasks, so nothing inside it can depend on
the task: there only the readouts are corrected, with statistics of their own, measured behind the uncorrected trunk.

Our choice where the paper and its notebook leave one: statistics are gathered in execution order, every site sees what
the corrected ones before it give (measured all at once, later corrections would fit inputs that never come); all
samples are together in one forward pass for that. Modules that run more than once in a forward pass are left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_zipit.correct.correction import register
from hf_zipit.correct.repair import PIECE
from hf_zipit.correct.sites import Site, block_inputs, layers
from hf_zipit.correct.statistics import (
    Statistics,
    UnitSums,
    View,
    measure,
    mixed_in_merged,
    statistics_to_merged,
    towards,
    watching,
)
from hf_zipit.data.calibration import Calibration, Inputs, pieces
from hf_zipit.data.processes import running
from hf_zipit.errors import RecipeError
from hf_zipit.maps.products import merged_length
from hf_zipit.maps.space_map import Alignment
from hf_zipit.modeling.rescale import Affine
from hf_zipit.modeling.trunk import run_together
from hf_zipit.observation.moments import Moments
from hf_zipit.observation.record import mask_of
from hf_zipit.planning.plan import Plan
from hf_zipit.symmetry.spec import fitted


@register("rescale-shift", last=True)
def rescale_shift(
    merged: PreTrainedModel,
    planned: Plan,
    alignment: Alignment,
    calibration: Calibration,
    moments: Moments | None,
    *,
    modules: Sequence[str] = ("*",),
    samples: int = 256,
    eps: float = 1e-5,
    joint: bool = True,
) -> None:
    """Add corrections to the merged model, each task's measured on its own samples, where they are known.

    Args:
        modules: patterns of the paths of the modules to correct, such as `("*.fc2", "vit.layers.?")`; the
            readouts always are.
        joint: whether the readouts are corrected in joint forward passes, too.
        merged, planned, alignment, calibration, moments, samples, eps: see `hf_zipit.correct.correction`.

    Raises:
        RecipeError: if no module has a path of these patterns.
    """
    sites = chosen_sites(planned.model, planned, modules)
    inputs = {task: calibration.together(task, samples) for task in planned.tasks}
    targets = {}
    for task, expert in planned.folded.items():
        view = mixed_in_merged(alignment, planned.spec, planned.tasks.index(task))
        with running([expert], calibration.device):
            targets[task] = expert_statistics(expert, sites, planned, inputs[task], calibration, view)
    sites = {name: site for name, site in sites.items() if all(name in found for found in targets.values())}
    sizes = {name: merged_length(site.label, alignment, planned.spec) for name, site in sites.items()}
    merged.add_rescales(
        [{"module": s.module, "where": s.where, "axis": s.axis, "size": sizes[name]} for name, s in sites.items()]
    )
    with running([merged], calibration.device):
        for number, task in enumerate(planned.tasks):
            own, held = dict(targets[task]), {}
            for name, site in sites.items():
                own[name], held[name] = to_own_average(own[name], site, alignment, planned, number)
            if joint:
                fit_task(merged, task, {}, own, {}, inputs[task], calibration, eps, jointly=True)
            fit_task(merged, task, sites, own, held, inputs[task], calibration, eps, jointly=False)


def chosen_sites(model: PreTrainedModel, planned: Plan, patterns: Sequence[str]) -> dict[str, Site]:
    """The sites in the trunk whose modules fit a pattern, by module and side.

    A table of embeddings is no site of its own: the first block's input is, which has all tables in it.
    """
    patterns = (patterns,) if isinstance(patterns, str) else patterns
    tables = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Embedding)}
    known = [site for site in layers(model, planned) if site.module not in tables]
    known += block_inputs(planned.spec, planned.cut)
    found = {
        f"{site.module}:{site.where}": site
        for site in known
        if any(fnmatchcase(site.module, pattern) for pattern in patterns)
    }
    if known and not found:
        raise RecipeError(
            f"rescale-shift finds no module {list(patterns)} in the trunk; there are {known[0].module} and others"
        )
    return found


def expert_statistics(
    expert: PreTrainedModel,
    sites: Mapping[str, Site],
    planned: Plan,
    inputs: Inputs,
    calibration: Calibration,
    view: View = lambda site, value: value,
) -> dict[str, Statistics]:
    """An expert's statistics at the sites, as `view` shows them, and at the readouts in its own units."""
    readouts = {
        readout_name("entries", i): Site(e.target, "input", e.axis, ()) for i, e in enumerate(planned.cut.entries)
    }
    fields = [(exit_.target, exit_.axis) for exit_ in planned.cut.exits]
    found = measure(expert, {**sites, **readouts}, pieces(inputs, PIECE), calibration.all_reduce, fields, view)
    for i, exit_ in enumerate(planned.cut.exits):
        if exit_.target in found:
            found[readout_name("exits", i)] = found.pop(exit_.target)
    return found


def readout_name(kind: str, number: int) -> str:
    return f"{kind}:{number}"


def to_own_average(
    own: Statistics, site: Site, alignment: Alignment, planned: Plan, expert: int
) -> tuple[Statistics, Tensor]:
    """Statistics of an expert's units in the merged units, and which merged units hold any unit of the expert."""
    merged, held = statistics_to_merged(own, site, alignment, planned.spec, expert)
    share = torch.where(held > 0, held, torch.ones_like(held))
    return Statistics(merged.mean / share, merged.std / share), held > 0


def fit_task(
    merged: PreTrainedModel,
    task: str,
    sites: Mapping[str, Site],
    targets: Mapping[str, Statistics],
    held: Mapping[str, Tensor],
    inputs: Inputs,
    calibration: Calibration,
    eps: float,
    jointly: bool,
) -> None:
    """One forward pass of a task; every correction is set when its site is reached, and applied right after."""
    key = merged.branch_names[task]
    affines: dict[str, Affine] = {}
    modules: dict[str, torch.nn.Module] = {}
    watched: dict[str, Site] = {}
    for kind, readouts in (("entries", merged.entries[key]), ("exits", merged.exits[key])):
        for i, readout in enumerate(readouts):
            name = readout_name(kind, i)
            if name in targets:
                pair = merged.rescales[kind][key][i]
                affines[name] = pair.joint if jointly else pair.alone
                modules[name], watched[name] = readout, Site("", "output", readout.axis, ())
    for i, (name, site) in enumerate(sites.items()):
        affines[name] = merged.rescales["trunk"][i][key]
        modules[name], watched[name] = merged.trunk.get_submodule(site.module), site
    mask = mask_of(inputs)

    def see(name: str, value: Tensor) -> None:
        now = UnitSums.of(value, watched[name].axis, mask).statistics(calibration.all_reduce)
        scale, shift = towards(targets[name], now, eps)
        if name in held:  # a merged unit without any unit of this expert has no target
            scale = scale.where(held[name], torch.ones_like(scale))
            shift = shift.where(held[name], torch.zeros_like(shift))
        affines[name].set(scale, shift)

    with watching(modules, watched, see):
        if not jointly:
            merged(**fitted(inputs, merged), task=task)
            return
        with run_together() as memo:
            memo.next_branch()
            merged.run_branch(task, fitted(inputs, merged))
