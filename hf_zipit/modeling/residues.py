"""Residues: what a task's own weights are more than the merged ones, in a few bits, added while that task runs alone.

A tensor W of the trunk is W + R_t for the time in which its module runs for task t. In a joint forward pass the trunk
runs once for all tasks, without any residue, unless gates give every token some (`gates.py`). Residues stay packed in
memory, in one of the kinds of `kinds/`, and are unpacked module by module as these run.

State dict: `residues.NUMBER.TASK.TENSOR.*`, NUMBER counting the modules that have some; `all-tasks` in place of a task
holds what all tasks share of a tensor.

Invariant: a saved and loaded model computes bit-identical outputs.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..errors import ZipItError
from .residue import Residue, kind_of
from .trunk import module_under, running_task

SHARED = "all-tasks"
"""Under this name, which no task's module has, what all tasks share."""

LOCK = threading.RLock()
"""Held while a module has a task's tensors: another thread may run it for another task."""


class ModuleResidues(nn.ModuleDict):
    """One module's residues by task and by tensor, and the hooks that put them in and take them out again.

    `found`: by task and by the tensor's name in the module.
    """

    def __init__(self, found: Mapping[str, Mapping[str, Residue]]) -> None:
        super().__init__({task: nn.ModuleDict(own) for task, own in found.items()})
        self._kept: list[tuple[dict[str, Any], str, Tensor]] = []

    def enter(self, module: nn.Module, args: Any) -> None:
        """Forward pre-hook: the module has the running task's tensors."""
        task = running_task()
        LOCK.acquire()
        for name in self._names(task):
            home = module._parameters if name in module._parameters else module._buffers
            own = home[name]
            self._kept.append((home, name, own))
            home[name] = own + self._unpacked(task, name).to(own)

    def tensors(self, task: str) -> dict[str, Tensor]:
        """A task's residues, float32, by the tensors' names in the module."""
        return {name: self._unpacked(task, name) for name in self._names(task)}

    def _names(self, task: str | None) -> list[str]:
        """The tensors of the module that a task has residues of."""
        return list(self[task]) if task in self else []

    def _unpacked(self, task: str, name: str) -> Tensor:
        shared = self[SHARED][name] if SHARED in self and name in self[SHARED] else None
        return self[task][name].tensor(shared)

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook, called whatever happened, in `enter` as well: the module has its own tensors again."""
        while self._kept:
            home, name, own = self._kept.pop()
            home[name] = own
        LOCK.release()


def make_residues(settings: Sequence[Mapping[str, Any]], trunk: nn.Module, names: Mapping[str, str]) -> nn.ModuleList:
    """The residues, zero, hooked to their modules; bound methods, so that a deep copy reads the copy's.

    Args:
        settings: `config.residues`: of each the `task` (None: of all), the `tensor` of the trunk, its `shape`, the
            `kind` and the `size`, which is the kind's own (planes, rank). Raises ZipItError where there is no such
            task, module or kind.
        trunk: of the merged model.
        names: the tasks' names as modules.
    """
    by_module: dict[str, dict[str, dict[str, Residue]]] = {}
    for setting in settings:
        path, _, leaf = setting["tensor"].rpartition(".")
        kind = kind_of(setting["kind"])
        if kind is None or setting["task"] not in (None, *names):
            raise ZipItError(f"The residue {dict(setting)} is of no kind or no task that this model has.")
        task = SHARED if setting["task"] is None else names[setting["task"]]
        by_module.setdefault(path, {}).setdefault(task, {})[leaf] = kind(setting["shape"], setting["size"])
    found = nn.ModuleList()
    for path, residues in by_module.items():
        module = module_under(trunk, path, "residues")
        own = ModuleResidues(residues)
        module.register_forward_pre_hook(own.enter)
        module.register_forward_hook(own.leave, always_call=True)
        found.append(own)
    return found


def residue_of(residues: Iterable[nn.Module], settings: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> Any:
    """The residues in the order of their settings."""
    numbers: dict[str, int] = {}
    for setting in settings:
        numbers.setdefault(setting["tensor"].rpartition(".")[0], len(numbers))
    modules = list(residues)
    for setting in settings:
        path, _, leaf = setting["tensor"].rpartition(".")
        task = SHARED if setting["task"] is None else names[setting["task"]]
        yield modules[numbers[path]][task][leaf]


def residue_bytes(model: nn.Module) -> tuple[int, int]:
    """Bytes of a merged model without what is added to its trunk for tasks or samples, and of this."""
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in model.state_dict().items()}
    added = ("residues.", "router.", "gates.", "mixtures.")
    kept = sum(size for name, size in sizes.items() if name.startswith(added))
    return sum(sizes.values()) - kept, kept
