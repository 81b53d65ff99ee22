"""Entries and exits: where a branch reads the trunk, merged units become the task's own units again.

After merging a space of k units, expert t's d units are `x_t = U_t x`. A branch that keeps expert t's own weights is
entered through U_t: an index lookup where U_t is one-hot (every grouping of units), a matrix otherwise. Exits do the
same for outputs that leave the trunk directly, such as the last hidden state of a model without a head.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ZipItError
from .trunk import Shared


class Entry(nn.Module):
    """Maps merged units to a task's own along one axis: `[..., size, ...] -> [..., units, ...]`."""

    def __init__(self, axis: int, units: int, size: int) -> None:
        super().__init__()
        self.axis, self.units, self.size = axis, units, size

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        """Forward pre-hook: map the module's first argument, however it was passed."""
        if args:
            return (self.entered(args[0]), *args[1:]), kwargs
        name = first_argument(type(module))
        if name not in kwargs:
            raise ZipItError(
                f"{type(module).__name__} reads the trunk through its argument '{name}', but was called with "
                f"{sorted(kwargs)} only."
            )
        return args, {**kwargs, name: self.entered(kwargs[name])}

    def entered(self, x: Any) -> Any:
        """A tensor in the task's units; of a sequence, those tensors that have as many units as the merged model.

        A head may read one of them only (the last stage's): the others do not matter then.
        """
        if isinstance(x, (list, tuple)):
            return type(x)([self(item) if self._fits(item) else item for item in x])
        return self(x)

    def _fits(self, x: Any) -> bool:
        return isinstance(x, Tensor) and x.ndim > self.axis and x.shape[self.axis] == self.size

    def reset(self) -> None:
        """Fill a map that no file gave: the identity, repeated where d > k."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"axis={self.axis}, units={self.units}, size={self.size}"


class IndexEntry(Entry):
    """U_t is one-hot: buffer `index`, int64 `[d]`, holds the merged unit of each of the task's units."""

    def __init__(self, axis: int, units: int, size: int) -> None:
        super().__init__(axis, units, size)
        self.register_buffer("index", torch.arange(units) % size)

    def forward(self, x: Tensor) -> Tensor:
        return x.index_select(self.axis, self.index.to(x.device))

    @torch.no_grad()
    def reset(self) -> None:
        self.index.copy_(torch.arange(self.units) % self.size)


class DenseEntry(Entry):
    """Any affine map: parameters `weight`, `[d, k]`, and `bias`, `[d]`."""

    def __init__(self, axis: int, units: int, size: int) -> None:
        super().__init__(axis, units, size)
        self.weight = nn.Parameter(torch.empty(units, size))
        self.bias = nn.Parameter(torch.empty(units))
        self.reset()

    def forward(self, x: Tensor) -> Tensor:
        last = x.dim() - 1  # a number: torch.onnx's older exporter writes -1 into the graph, which no runtime takes
        y = nn.functional.linear(x.movedim(self.axis, last), self.weight.to(x.device), self.bias.to(x.device))
        return y.movedim(last, self.axis)

    @torch.no_grad()
    def reset(self) -> None:
        self.weight.copy_(torch.eye(self.size)[torch.arange(self.units) % self.size])
        self.bias.zero_()


ENTRY_KINDS: dict[str, type[Entry]] = {"index": IndexEntry, "dense": DenseEntry}


def make_entries(settings: Sequence[Mapping[str, Any]], where: str) -> nn.ModuleList:
    """One entry for each dict of `config.entries` or `config.exits`; `where` is the key that says what it maps."""
    return nn.ModuleList(make_entry(setting, where) for setting in settings)


def make_entry(setting: Mapping[str, Any], where: str) -> Entry:
    kind = setting.get("kind", "index")
    if missing := [key for key in (where, "axis", "units", "size") if key not in setting]:
        raise ZipItError(f"The {where} map {dict(setting)} lacks '{missing[0]}'.")
    if kind not in ENTRY_KINDS:
        raise ZipItError(f"The map of {where} '{setting[where]}' is of kind '{kind}'; use one of {list(ENTRY_KINDS)}.")
    return ENTRY_KINDS[kind](setting["axis"], setting["units"], setting["size"])


def attach(branch: nn.Module, settings: Sequence[Mapping[str, Any]], entries: nn.ModuleList) -> None:
    """Hook each entry to its module of the branch. A bound method, so that a deep copy reads the copy's entry."""
    modules = dict(branch.named_modules(remove_duplicate=False))
    for setting, entry in zip(settings, entries, strict=True):
        path = setting["module"]
        # What lies below a stand-in is not among these; the stand-in itself is, but stands for the trunk's module.
        module = modules.get(path)
        if module is None or isinstance(module, Shared):
            raise ZipItError(f"The entry at '{path}' is not a module of the branches: it is shared or does not exist.")
        module.register_forward_pre_hook(entry.before, with_kwargs=True)


def leave(output: Any, settings: Sequence[Mapping[str, Any]], exits: nn.ModuleList) -> Any:
    """Map the fields of a task's output that come straight from the trunk. A field that is None stays None."""
    for setting, exit_map in zip(settings, exits, strict=True):
        *parents, name = setting["field"].split(".")
        holder = output
        for parent in parents:
            holder = None if holder is None else holder.get(parent)
        if holder is not None and holder.get(name) is not None:
            holder[name] = exit_map(holder[name])
    return output


@cache
def first_argument(module_class: type[nn.Module]) -> str:
    """The name of the first parameter of a module's forward."""
    return next(name for name in inspect.signature(module_class.forward).parameters if name != "self")
