"""What whole-network methods compare: the experts' weights, in the merged units of spaces that are fixed already.

Spaces that were decided before (a residual stream left at identity, an override) are not to be changed, but the other
spaces must see both experts through them: M_t on axes that hold such a space, U_t on axes that read it. After that
they are fixed spaces like any other.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hf_zipit.align.method import Network
from hf_zipit.maps.space_map import Alignment
from hf_zipit.maps.transform import to_merged
from hf_zipit.symmetry.spec import AxisLabel, MergeSpec, Symmetry, product_key

STATISTICS = ("running_mean", "running_var")
"""BatchNorm's: no parameters, and of a scale that would drown them."""


def comparable(network: Network) -> tuple[str, ...]:
    """The names of the weights that say something about how similar the experts' units are.

    Left out are a task's own head, whose classes mean something else in every expert; the scales of folded norms, all
    ones; running statistics; integers; tensors that some expert lacks or has in another shape; and second names of
    tied tensors.
    """
    first, *others = network.weights
    names: dict[tuple[object, ...], str] = {}
    folded = {norm.weight for norm in network.spec.folds}
    for name, labels in network.spec.axes.items():
        if name not in first or name in folded or not any(labels) or not first[name].is_floating_point():
            continue
        in_head = any(name == prefix or name.startswith(f"{prefix}.") for prefix in network.spec.head)
        shape = first[name].shape
        shared = all(name in other and other[name].shape == shape for other in others)
        if shared and not in_head and name.rpartition(".")[2] not in STATISTICS:
            memory = tuple((own[name].data_ptr(), own[name].stride()) for own in network.weights)
            names.setdefault((memory, labels), name)
    return tuple(names.values())


@dataclass(frozen=True)
class Expert:
    """An expert's weights as floats, in the merged units of the spaces that are fixed; made when asked for."""

    network: Network
    number: int
    names: tuple[str, ...]

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.network.weights[self.number][name]
        tensor = tensor if tensor.dtype == torch.float64 else tensor.float()
        spec, maps = self.network.spec, self.network.fixed_maps
        return to_merged(tensor, spec.axes[name], maps, spec, self.number)


def with_fixed_maps(network: Network) -> tuple[MergeSpec, list[Expert]]:
    """The spec in which spaces with a fixed map are fixed, of their merged sizes, and the experts' weights in it."""
    spaces = dict(network.spec.spaces)
    for name, space_map in network.fixed_maps.items():
        spaces[name] = replace(spaces[name], size=space_map.size, symmetry=Symmetry.FIXED, frozen_by="its fixed map")
    names = tuple(n for n in comparable(network) if resolvable(network.spec.axes[n], network.fixed_maps, network.spec))
    return replace(network.spec, spaces=spaces), [Expert(network, t, names) for t in range(network.experts)]


def resolvable(labels: Sequence[AxisLabel], maps: Alignment, spec: MergeSpec) -> bool:
    """Whether every axis can be mapped alone: a space's map has rows for the units that the space lives within, and a
    grouped convolution has those on another axis."""
    return all(
        set(spec.spaces[name].within) <= set(product_key(label))
        for label in labels for name in product_key(label) if name in maps
    )  # fmt: skip


def known_around(labels: Sequence[AxisLabel], maps: Alignment, spec: MergeSpec, own: Iterable[str] = ()) -> bool:
    """Whether every space of a tensor but `own` is fixed or has a map that can be applied to it."""
    spaces = {factor.space for label in labels for factor in label} - set(own)
    return all(name in maps or not spec.movable(name) for name in spaces) and resolvable(labels, maps, spec)
