"""Residues as a stage of `merge`: a finished model in, the same model with a residue for every task out.

The residue of a tensor is the expert's own in merged units less the merged one. Under maps that only order units that
is exact: with all of it the trunk would be the expert's. Of kinds that can be kept more or less of, a budget of bytes
is spent step by step where a byte makes the squared output error of some layer smallest (greedily, which is the best
there is where steps of one tensor gain less and less), the same for every task. What is no matrix is kept in half
precision.
"""

from __future__ import annotations

import heapq
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_zipit.combine.layers import merged_grams
from hf_zipit.combine.matrices import view_of
from hf_zipit.maps.space_map import Alignment
from hf_zipit.maps.transform import to_merged
from hf_zipit.modeling.base import ZipItPreTrainedModel
from hf_zipit.modeling.residue import Dense, Residue, Stepwise, TaskTensor, name_of
from hf_zipit.modeling.residues import residue_bytes
from hf_zipit.observation.statistics import LayerStatistics
from hf_zipit.planning.plan import Plan
from hf_zipit.registry import RESIDUES
from hf_zipit.symmetry.proof import model_tensors

logger = logging.getLogger(__name__)


@dataclass
class Packed:
    """A residue that is ready, of the tensor of that name; task None: what all tasks share."""

    task: str | None
    tensor: str
    residue: Residue

    def setting(self) -> dict[str, object]:
        """Its entry in `config.residues`."""
        shape, size = list(self.residue.shape), self.residue.size
        return {
            "task": self.task, "tensor": self.tensor, "shape": shape, "kind": name_of(self.residue), "size": size
        }  # fmt: skip


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
        planned: the plan of the merge; its config holds the kind and the budget.
        maps: of its spaces.
        statistics: the inputs of layers, which say what an error of a weight costs; by weights alone without.
    """
    config = planned.config.residues
    if config is None or not planned.cut.trunk:
        return
    kind = RESIDUES.get(config.kind)
    read = TaskTensors(merged, planned, maps, statistics)
    if kind.stepwise:
        budget = int((config.size - 1) * sum(residue_bytes(merged))) // len(planned.tasks)
        packed = [
            found for number in range(len(planned.tasks)) for found in within(kind, read.of_task(number), budget)
        ]
        if not packed:
            logger.warning("No residue fits into %d bytes a task; give residues a larger size.", budget)
    else:
        packed = [found for name in read.names for found in whole(kind, read.of_tensor(name), config.options)]
    if not packed:
        return
    made = merged.add_residues([found.setting() for found in packed])
    for found, residue in zip(packed, made, strict=True):
        residue.load_state_dict(found.residue.state_dict())


def within(kind: type[Stepwise], tensors: Sequence[TaskTensor], budget: int) -> Iterator[Packed]:
    """What so many bytes buy of one task's tensors."""
    kinds = [kind if is_matrix(tensor) else Dense for tensor in tensors]
    taken = spend([kind.steps(tensor) for kind, tensor in zip(kinds, tensors, strict=True)], budget)
    for kind, tensor, steps in zip(kinds, tensors, taken, strict=True):
        if steps:
            yield Packed(tensor.task, tensor.tensor, kind.packed(tensor, steps))


def whole(kind: type[Residue], tensors: Sequence[TaskTensor], options: dict[str, object]) -> Iterator[Packed]:
    """What a kind without a budget keeps of one tensor of all tasks; nothing of tasks that are as the merged one."""
    differ = [tensor for tensor in tensors if tensor.residue.any()]
    if not differ:
        return
    if not is_matrix(tensors[0]):
        yield from (Packed(tensor.task, tensor.tensor, Dense.packed(tensor)) for tensor in differ)
        return
    shared, residues = kind.pack(tensors, **options)
    if shared is not None:
        yield Packed(None, tensors[0].tensor, shared)
    for tensor, residue in zip(tensors, residues, strict=True):
        if tensor.residue.any():
            yield Packed(tensor.task, tensor.tensor, residue)


def is_matrix(tensor: TaskTensor) -> bool:
    return tensor.merged.dim() > 1 and min(tensor.merged.flatten(1).shape) > 1


class TaskTensors:
    """The tensors of a merged model's trunk as its tasks have them, made as they are asked for.

    Attributes:
        names: of those that can have a residue.
    """

    def __init__(
        self, merged: ZipItPreTrainedModel, planned: Plan, maps: Alignment, statistics: LayerStatistics | None
    ) -> None:
        self.planned, self.maps, self.statistics = planned, maps, statistics
        self.trunk = model_tensors(merged.trunk)
        self.experts = [model_tensors(model) for model in planned.folded.values()]
        self.bases = [model_tensors(model) for model in planned.bases.values()]
        self.names = [
            name
            for name, tensor in self.trunk.items()
            if tensor.is_floating_point()
            and name in planned.cut.trunk
            and self._moved(self.experts, name, 0).shape == tensor.shape
        ]

    def _moved(self, models: Sequence[dict[str, Tensor]], name: str, expert: int) -> Tensor:
        labels, tensor = self.planned.spec.axes.get(name, ()), models[expert][name].double()
        return to_merged(tensor, labels, self.maps, self.planned.spec, expert) if labels else tensor

    def of_task(self, expert: int) -> list[TaskTensor]:
        """Those of one task that differ from the merged ones, with what is known of their inputs."""
        found = [self._read(name, expert, self._moved(self.experts, name, expert)) for name in self.names]
        return [tensor for tensor in found if tensor.residue.any()]

    def of_tensor(self, name: str) -> list[TaskTensor]:
        """One tensor of all tasks, with the origins of their task vectors."""
        own = [self._moved(self.experts, name, expert) for expert in range(len(self.experts))]
        started = [self._moved(self.bases, name, expert) for expert in range(len(self.bases))] or own[:1] * len(own)
        merged, tasks = self.trunk[name].double(), self.planned.tasks
        return [TaskTensor(task, name, merged, *both) for task, *both in zip(tasks, own, started, strict=True)]

    def _read(self, name: str, expert: int, own: Tensor) -> TaskTensor:
        labels, tensor, task = self.planned.spec.axes.get(name, ()), self.trunk[name], self.planned.tasks[expert]
        view, grams = view_of(tensor, labels), None
        if self.statistics is not None and view is not None:
            maps, source = of_expert(self.maps, expert), self.experts[expert][name]
            grams = merged_grams(self.statistics, [task], name, source, labels, maps, self.planned.spec)
        transposed = view is not None and view.transposed
        return TaskTensor(task, name, tensor.double(), own, own, grams and grams[0], transposed)


def of_expert(maps: Alignment, expert: int) -> Alignment:
    """The maps of one expert alone."""
    index = torch.tensor([expert])
    return {name: found.of_experts(index) for name, found in maps.items()}


def spend(steps: Sequence[Iterator[tuple[int, float]]], budget: int) -> list[int]:
    """How many steps of each to take with so many bytes: always the one that gains most by the byte."""
    waiting: list[tuple[float, int, int]] = []
    taken = [0] * len(steps)

    def offer(number: int) -> None:
        if (following := next(steps[number], None)) is not None and following[1] > 0:
            heapq.heappush(waiting, (-following[1] / following[0], number, following[0]))

    for number in range(len(steps)):
        offer(number)
    while waiting:
        _, number, cost = heapq.heappop(waiting)
        if cost <= budget:  # a dearer one may not fit where a cheaper one still does
            budget -= cost
            taken[number] += 1
            offer(number)
    return taken
