"""Rescale and shift per task: affine corrections of the trunk's units, measured by `hf_zipit.correct.rescale_shift`.

A trunk module that was merged from several tasks' has no task's statistics. Where the task is known, `scale * x +
shift` per unit gives the units the statistics of that task's expert. Inside the trunk that is so when one task runs
alone. In a joint forward pass the trunk runs once for all, and only the readouts, where a branch reads the trunk, are
corrected, by a second pair of numbers that was measured behind the uncorrected trunk.

State dict: `rescales.trunk.NUMBER.TASK`, `rescales.entries.TASK.NUMBER.{alone,joint}`, `rescales.exits...`, each with
`scale` and `shift`; NUMBER counts `config.rescaled`, `config.entries` and `config.exits`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .entries import Entry, first_argument
from .trunk import module_under, running_jointly, running_task


class Affine(nn.Module):
    """`scale * x + shift` along one axis; buffers `[units]`. The identity until it is set."""

    def __init__(self, axis: int, units: int) -> None:
        super().__init__()
        self.axis = axis
        self.register_buffer("scale", torch.ones(units))
        self.register_buffer("shift", torch.zeros(units))

    def forward(self, x: Tensor) -> Tensor:
        shape = [1] * x.dim()
        shape[self.axis] = -1
        return x * self.scale.to(x.device).view(shape) + self.shift.to(x.device).view(shape)

    @torch.no_grad()
    def set(self, scale: Tensor, shift: Tensor) -> None:
        self.scale.copy_(scale)
        self.shift.copy_(shift)

    @torch.no_grad()
    def reset(self) -> None:
        """What no file gave: the identity."""
        self.scale.fill_(1)
        self.shift.fill_(0)

    def extra_repr(self) -> str:
        return f"axis={self.axis}, units={len(self.scale)}"


class TrunkRescale(nn.ModuleDict):
    """A trunk module's corrections by task; hooks of that module, which ask which task runs."""

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        """Forward pre-hook: correct the first argument, however it was passed."""
        task = running_task()
        if task is None:
            return None
        if args:
            return (self[task](args[0]), *args[1:]), kwargs
        name = first_argument(type(module))
        return args, {**kwargs, name: self[task](kwargs[name])}

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """Forward hook: correct the output."""
        task = running_task()
        return None if task is None else self[task](output)


class ReadoutRescale(nn.Module):
    """A readout's two corrections: when its task runs alone, and in a joint forward pass."""

    def __init__(self, readout: Entry) -> None:
        super().__init__()
        self.alone = Affine(readout.axis, readout.units)
        self.joint = Affine(readout.axis, readout.units)

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Forward hook of the entry or exit."""
        return self.joint(output) if running_jointly() else self.alone(output)


def make_rescales(
    settings: Sequence[Mapping[str, Any]],
    trunk: nn.Module,
    readouts: Mapping[str, nn.ModuleDict],
    tasks: Iterable[str],
) -> nn.ModuleDict:
    """The corrections, hooked to their modules; bound methods, so that a deep copy reads the copy's.

    Args:
        settings: `config.rescaled`; raises ZipItError if one is not in the trunk.
        readouts: `entries` and `exits` of the merged model.
        tasks: the tasks' names as modules.
    """
    tasks = list(tasks)
    inside = nn.ModuleList()
    for setting in settings:
        module = module_under(trunk, setting["module"], "rescaled")
        rescale = TrunkRescale({task: Affine(setting["axis"], setting["size"]) for task in tasks})
        if setting["where"] == "input":
            module.register_forward_pre_hook(rescale.before, with_kwargs=True)
        else:
            module.register_forward_hook(rescale.after)
        inside.append(rescale)
    found = nn.ModuleDict({"trunk": inside})
    for kind, by_task in readouts.items():
        found[kind] = nn.ModuleDict({task: nn.ModuleList(map(ReadoutRescale, by_task[task])) for task in tasks})
        for task in tasks:
            for readout, rescale in zip(by_task[task], found[kind][task], strict=True):
                readout.register_forward_hook(rescale.after)
    return found
