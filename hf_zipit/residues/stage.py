"""Residues as a stage of `merge`: a finished model in, the same model with a residue for every task out.

The residue of a tensor is the expert's own in merged units less the merged one. Under maps that only order units that
is exact: with all of it the trunk would be the expert's. A budget of bytes is spent step by step where a byte makes
the squared output error of some layer smallest (greedily, which is the best there is where steps of one tensor gain
less and less). Every task gets the same.
"""

from __future__ import annotations

import heapq
import logging
from collections.abc import Iterator

import torch

from hf_zipit.combine.layers import merged_grams
from hf_zipit.combine.matrices import view_of
from hf_zipit.maps.space_map import Alignment
from hf_zipit.maps.transform import to_merged
from hf_zipit.modeling.base import ZipItPreTrainedModel
from hf_zipit.modeling.residues import residue_bytes
from hf_zipit.observation.statistics import LayerStatistics
from hf_zipit.planning.plan import Plan
from hf_zipit.residues.candidates import Candidate
from hf_zipit.symmetry.proof import model_tensors

logger = logging.getLogger(__name__)


@torch.no_grad()
def add_residues(
    merged: ZipItPreTrainedModel,
    planned: Plan,
    maps: Alignment,
    statistics: LayerStatistics | None = None,
) -> None:
    """Give a merged model its tasks' residues, in place; nothing happens where the config asks for none.

    Args:
        merged: after all corrections and training.
        planned: the plan of the merge; its config holds the budget.
        maps: of its spaces.
        statistics: the inputs of layers, which say what an error of a weight costs; by weights alone without.
    """
    config = planned.config.residues
    if config is None or not planned.cut.trunk:
        return
    budget = int((config.size - 1) * sum(residue_bytes(merged))) // len(planned.tasks)
    chosen: list[tuple[Candidate, int]] = []
    for number in range(len(planned.tasks)):
        found = list(candidates(merged, planned, maps, number, statistics))
        chosen += [(candidate, steps) for candidate, steps in zip(found, spend(found, budget), strict=True) if steps]
    if not chosen:
        logger.warning("No residue fits into %d bytes a task; give residues a larger size.", budget)
        return
    made = merged.add_residues([candidate.setting(steps) for candidate, steps in chosen])
    for (candidate, _), residue in zip(chosen, made, strict=True):
        candidate.fill(residue)


def candidates(
    merged: ZipItPreTrainedModel, planned: Plan, maps: Alignment, expert: int, statistics: LayerStatistics | None
) -> Iterator[Candidate]:
    """What could be kept for one task: of every tensor of the trunk."""
    task, spec, config = planned.tasks[expert], planned.spec, planned.config.residues
    assert config is not None
    own = model_tensors(planned.folded[task])
    for name, tensor in model_tensors(merged.trunk).items():
        labels, source = spec.axes.get(name, ()), own[name]
        if not tensor.is_floating_point() or name not in planned.cut.trunk:
            continue
        target = to_merged(source.double(), labels, maps, spec, expert) if labels else source.double()
        residue = target - tensor.double()
        if target.shape != tensor.shape or not residue.any():
            continue
        view = view_of(tensor, labels)
        grams = None
        if statistics is not None and view is not None:
            grams = merged_grams(statistics, [task], name, source, labels, of_expert(maps, expert), spec)
        kind = config.kind if tensor.dim() > 1 and min(residue.flatten(1).shape) > 1 else "dense"
        yield Candidate(task, name, residue, target, grams and grams[0], kind, view is not None and view.transposed)


def of_expert(maps: Alignment, expert: int) -> Alignment:
    """The maps of one expert alone."""
    index = torch.tensor([expert])
    return {name: found.of_experts(index) for name, found in maps.items()}


def spend(found: list[Candidate], budget: int) -> list[int]:
    """How many steps of every candidate to take with so many bytes: always the one that gains most by the byte."""
    steps = [candidate.steps() for candidate in found]
    waiting: list[tuple[float, int, int]] = []
    taken = [0] * len(found)

    def offer(number: int) -> None:
        if (following := next(steps[number], None)) is not None and following[1] > 0:
            heapq.heappush(waiting, (-following[1] / following[0], number, following[0]))

    for number in range(len(found)):
        offer(number)
    while waiting:
        _, number, cost = heapq.heappop(waiting)
        if cost <= budget:  # a dearer one may not fit where a cheaper one still does
            budget -= cost
            taken[number] += 1
            offer(number)
    return taken
