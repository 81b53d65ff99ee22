"""Mean and standard deviation of units at sites of a model, in the experts' units or in the merged ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from hf_zipit.correct.sites import Site
from hf_zipit.maps.space_map import Alignment
from hf_zipit.maps.transform import features_to_merged, only_groups, shares_held
from hf_zipit.modeling.entries import first_argument
from hf_zipit.observation.record import mask_of, unpadded
from hf_zipit.steady import same_draws
from hf_zipit.symmetry.spec import MergeSpec, fitted, product_key

ROWS = 65536
"""Rows that are summed in float64 at once."""

LARGEST = 100.0
"""A unit whose standard deviation would have to grow by more than this is dead."""


class Statistics(NamedTuple):
    """Mean and standard deviation of units, `[units]` float64 each."""

    mean: Tensor
    std: Tensor


@dataclass
class UnitSums:
    """Number, sum and sum of squares of rows `[rows, units]`: float64 `[3, units]`."""

    sums: Tensor

    @classmethod
    def of(cls, value: Tensor, axis: int, mask: Tensor | None = None) -> UnitSums:
        """The sums of one value. `mask`, `[samples, tokens]`: rows of padded tokens are left out."""
        rows = unpadded(value, axis, mask)
        rows = rows.reshape(-1, rows.shape[-1])
        sums = torch.zeros(3, rows.shape[1], dtype=torch.float64)
        for block in rows.split(ROWS):
            wide = block.double()
            sums += torch.stack([torch.ones_like(wide).sum(0), wide.sum(0), wide.square().sum(0)]).cpu()
        return cls(sums)

    def statistics(self, all_reduce: Callable[[Tensor], Tensor]) -> Statistics:
        """Over all processes; `all_reduce` sums a tensor over them."""
        count, total, squares = all_reduce(self.sums)
        mean = total / count
        return Statistics(mean, (squares / count - mean.square()).clamp_min(0).sqrt())


See = Callable[[str, Tensor], Tensor | None]
"""`see(name of the site, its value)`: what to go on with, None for the value itself."""


View = Callable[[Site, Tensor], Tensor]
"""`view(site, its value)`: the value in the units that are measured."""


def mixed_in_merged(alignment: Alignment, spec: MergeSpec, expert: int) -> View:
    """Shows units that a change of basis mixes in merged units: what they vary by cannot be told from each alone."""

    def view(site: Site, value: Tensor) -> Tensor:
        if only_groups(alignment, product_key(site.label)):
            return value
        return features_to_merged(value, site.axis, site.label, alignment, spec, expert)

    return view


@contextmanager
def watching(modules: Mapping[str, nn.Module], sites: Mapping[str, Site], see: See) -> Iterator[None]:
    """Show the value at every site to `see` before any other hook does something to it; `modules` are the sites'."""

    def before(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        key = None if args else first_argument(type(module))
        instead = see(name, args[0] if key is None else kwargs[key])
        if instead is None:
            return None
        return ((instead, *args[1:]), kwargs) if key is None else (args, {**kwargs, key: instead})

    def after(name: str, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        return see(name, output)

    handles = []
    try:
        for name, site in sites.items():
            if site.where == "input":
                hook = partial(before, name)
                handles.append(modules[name].register_forward_pre_hook(hook, with_kwargs=True, prepend=True))
            else:
                handles.append(modules[name].register_forward_hook(partial(after, name), prepend=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def measure(
    model: nn.Module,
    sites: Mapping[str, Site],
    inputs: Iterable[Mapping[str, Tensor]],
    all_reduce: Callable[[Tensor], Tensor],
    fields: Sequence[tuple[str, int]] = (),
    view: View = lambda site, value: value,
) -> dict[str, Statistics]:
    """The statistics of a model's units at sites that it passes exactly once in a forward pass; others are left out.

    Args:
        model: in eval mode.
        sites: by any names.
        inputs: batches.
        all_reduce: sums a tensor over the processes.
        fields: outputs to be measured, too: field (dotted) and axis; they are found under the field's name.
        view: what is measured of a site's value: itself, or its `mixed_in_merged` units.
    """
    found: dict[str, Tensor] = {}
    calls: Counter[str] = Counter()
    passes = 0
    mask: Tensor | None = None

    def add(name: str, value: Tensor, axis: int) -> None:
        sums = UnitSums.of(value, axis, mask).sums
        found[name] = found[name] + sums if name in found else sums
        calls[name] += 1

    def see(name: str, value: Tensor) -> None:
        add(name, view(sites[name], value), sites[name].axis)

    with watching({name: model.get_submodule(site.module) for name, site in sites.items()}, sites, see):
        for batch in inputs:
            mask = mask_of(batch)
            with same_draws():
                output = model(**fitted(batch, model))
            passes += 1
            for field, axis in fields:
                if (value := field_of(output, field)) is not None:
                    add(field, value, axis)
    return {name: UnitSums(sums).statistics(all_reduce) for name, sums in found.items() if calls[name] == passes}


def field_of(output: ModelOutput, field: str) -> Tensor | None:
    """A field of an output, dotted for nested ones."""
    found: Any = output
    for name in field.split("."):
        found = None if found is None else found.get(name)
    return found


def shared_statistics(experts: Sequence[Statistics], site: Site, alignment: Alignment, spec: MergeSpec) -> Statistics:
    """What every merged unit should have: the average of its units in all experts."""
    parts = [statistics_to_merged(own, site, alignment, spec, t)[0] for t, own in enumerate(experts)]
    return Statistics(*(torch.stack(values).mean(0) for values in zip(*parts, strict=True)))


def statistics_to_merged(
    own: Statistics, site: Site, alignment: Alignment, spec: MergeSpec, expert: int
) -> tuple[Statistics, Tensor]:
    """One expert's statistics under T M_t, and how much of every merged unit is the expert's: T M_t of ones.

    The mean over the experts of the first is the average over all units of a group; the first divided by the second
    is the average over the expert's own. Units that a change of basis mixes are measured in merged units already.
    """
    held = shares_held(site.label, alignment, spec, expert)
    if not only_groups(alignment, product_key(site.label)):
        return own, held
    return Statistics(*(features_to_merged(x, 0, site.label, alignment, spec, expert) for x in own)), held


def towards(target: Statistics, found: Statistics, eps: float) -> tuple[Tensor, Tensor]:
    """Scale and shift `[units]`, float64, that give units the target's mean and standard deviation.

    eps, relative to the mean variance, is added to *both* variances: units that have the right statistics are left
    alone. A unit that is dead in the merged model gets the mean only: on other data it may not be dead.
    """
    floor = eps * target.std.square().mean().clamp_min(1e-30)
    scale = ((target.std.square() + floor) / (found.std.square() + floor)).sqrt()
    scale = torch.where(found.std * LARGEST < target.std, torch.ones_like(scale), scale)
    return scale, target.mean - scale * found.mean


def along(x: Tensor, scale: Tensor, shift: Tensor, axis: int) -> Tensor:
    """`scale * x + shift` along an axis."""
    shape = [1] * x.dim()
    shape[axis] = -1
    return x * scale.to(x).view(shape) + shift.to(x).view(shape)
