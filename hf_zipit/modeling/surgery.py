"""Representation surgery: a small network for every task takes away what merging put into its features.

Behind a site, x becomes x - up(relu(down x)) for the task that runs, with `down` `[rank, units]` and `up` `[units,
rank]` (arXiv 2402.02705). Sites are the readouts, where a branch reads the trunk, and, where `config.surgery` names
some (arXiv 2410.14389), modules in the trunk. Inside the trunk no task is known in a joint forward pass: then sites
in the trunk do nothing, and the readouts, which were learnt behind these, neither.

State dict: `surgery.trunk.NUMBER.TASK`, `surgery.entries.TASK.NUMBER` and `surgery.exits...`, each with `down` and
`up`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .entries import Entry
from .rescale import TrunkRescale
from .trunk import module_under, running_jointly


class Surgery(nn.Module):
    """`x - up(relu(down x))` along one axis; the identity until `up` is set."""

    def __init__(self, axis: int, units: int, rank: int) -> None:
        super().__init__()
        self.axis = axis
        self.down = nn.Parameter(torch.zeros(rank, units))
        self.up = nn.Parameter(torch.zeros(units, rank))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.movedim(self.axis, -1)
        off = (rows @ self.down.T.to(x.device)).relu() @ self.up.T.to(x.device)
        return (rows - off).movedim(-1, self.axis)

    @torch.no_grad()
    def reset(self) -> None:
        """What no file gave: the identity."""
        self.down.zero_()
        self.up.zero_()

    def extra_repr(self) -> str:
        return f"axis={self.axis}, units={len(self.up)}, rank={len(self.down)}"


class ReadoutSurgery(nn.Module):
    """Behind a readout; `alone`: not in joint forward passes."""

    def __init__(self, readout: Entry, rank: int, alone: bool) -> None:
        super().__init__()
        self.alone = alone
        self.own = Surgery(readout.axis, readout.units, rank)

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Forward hook of the entry or exit."""
        return output if self.alone and running_jointly() else self.own(output)


def make_surgery(
    settings: Mapping[str, Any], trunk: nn.Module, readouts: Mapping[str, nn.ModuleDict], tasks: Iterable[str]
) -> nn.ModuleDict:
    """The networks, hooked to their modules; bound methods, so that a deep copy reads the copy's.

    Args:
        settings: `config.surgery`; raises ZipItError if a site is not in the trunk.
        readouts: `entries` and `exits` of the merged model.
        tasks: the tasks' names as modules.
    """
    tasks, rank, sites = list(tasks), settings["rank"], settings["sites"]
    inside = nn.ModuleList()
    for site in sites:
        module = module_under(trunk, site["module"], "surgery")
        by_task = TrunkRescale({task: Surgery(site["axis"], site["size"], rank) for task in tasks})
        module.register_forward_pre_hook(by_task.before, with_kwargs=True)
        inside.append(by_task)
    found = nn.ModuleDict({"trunk": inside})
    for kind, by_name in readouts.items():
        made = {task: nn.ModuleList(ReadoutSurgery(r, rank, bool(sites)) for r in by_name[task]) for task in tasks}
        found[kind] = nn.ModuleDict(made)
        for task in tasks:
            for readout, own in zip(by_name[task], made[task], strict=True):
                readout.register_forward_hook(own.after)
    return found
