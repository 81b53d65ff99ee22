"""What weights say where activations say nothing: of spaces that no probe observes, and of units that all do the same.

Two units of one expert that are dead or constant, or one a multiple of the other, cannot be told apart by what they
do, and yet they are not the same: other inputs may wake them, and what reads a constant adds it up. Among them the
weights decide, by so little that no measured difference feels it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from hf_zipit.align.aligned import comparable, known_around
from hf_zipit.align.method import Network
from hf_zipit.maps.space_map import Alignment, Map
from hf_zipit.maps.transform import to_merged
from hf_zipit.registry import METHODS
from hf_zipit.symmetry.spec import ProductKey, factors, product_key

SAME = 1e-5
"""Correlations nearer than this to a unit's correlation with itself count as equal to it: float32 is no better."""

DECIDES_TIES = SAME / 2
"""What units of the same weights are more similar than correlations say; less than what `SAME` calls equal."""


def match_by_weights(network: Network, names: Collection[str], maps: Mapping[str, Map]) -> dict[str, Map]:
    """The maps of some spaces by `weights`, around those that are known; parameters with other spaces are left out."""
    spec = network.spec
    maps = {name: found for name, found in maps.items() if name not in names}
    waiting = {name for name in spec.spaces if spec.movable(name) and name not in maps and name not in names}
    known = {
        name
        for name, labels in spec.axes.items()
        if not waiting.intersection(factor.space for label in labels for factor in label)
    }
    weights = [{name: tensor for name, tensor in own.items() if name in known} for own in network.weights]
    alone = replace(network, spec=spec.with_fixed(waiting, "not matched yet"), weights=weights, fixed_maps=maps)
    found = METHODS.get("weights").function(alone)
    return {name: found[name] for name in names}


def product_rows(
    network: Network, maps: Alignment, family: Collection[str], held: bool = False
) -> Iterator[tuple[ProductKey, Tensor]]:
    """The weights of every unit of the products with a space of the family, parameter by parameter.

    Args:
        network: the experts' weights.
        maps: of other spaces; parameters with a movable one that has none are passed over.
        family: a space that stands alone, and those within it, which are solved together.
        held: only from axes that hold the family's spaces, not those that read them.

    Yields:
        A product, and float64 `[T * size, entries]`, the parameter's other axes in merged units.
    """
    spec = network.spec
    for name in comparable(network):
        labels = spec.axes[name]
        for axis, label in enumerate(labels):
            key = product_key(label)
            others = (*labels[:axis], (), *labels[axis + 1 :])
            within = {outer for n in key for outer in spec.spaces[n].within if spec.movable(n)}
            if held and any(factor.dual for factor in factors(label) if factor.space in family):
                continue
            # The axis of a grouped convolution that leaves out the groups says nothing alone.
            if set(key) & set(family) and within <= set(key) and known_around(others, maps, spec):
                rows = [
                    to_merged(weights[name].double(), others, maps, spec, t).movedim(axis, 0)
                    for t, weights in enumerate(network.weights)
                ]
                yield key, torch.cat(rows).flatten(1) if len(labels) > 1 else torch.cat(rows)[:, None]


def ambiguous_units(correlation: Tensor, experts: int) -> Tensor:
    """The units of a product that are dead, or that do the same as another one of their expert: bool `[T * size]`."""
    size = len(correlation) // experts
    variance = correlation.diagonal()
    blocks = correlation.reshape(experts, size, experts, size)
    own = torch.stack([blocks[t, :, t] for t in range(experts)])
    own.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
    to_itself = variance.reshape(experts, size)
    same = own >= torch.maximum(to_itself[:, :, None], to_itself[:, None, :]) - SAME
    return (variance == 0) | same.any(-1).flatten()


def told_apart(
    network: Network, correlations: Mapping[ProductKey, Tensor], maps: Alignment, family: Collection[str]
) -> dict[ProductKey, Tensor]:
    """The correlations of a family's products in which weights tell ambiguous units apart; those without any are left
    out.

    The similarity of weights is 2 <a, b> / (|a|^2 + |b|^2): 1 where they are the same, and only there. The maps are
    those of all spaces, the family's own as well.
    """
    unclear = {
        key: found
        for key, r in correlations.items()
        if set(key) & set(family) and bool((found := ambiguous_units(r, network.experts).cpu()).any())
    }
    products, squares = dict.fromkeys(unclear, 0), dict.fromkeys(unclear, 0)
    for key, rows in product_rows(network, maps, family) if unclear else ():
        if key in unclear:
            products[key] = products[key] + rows[unclear[key]] @ rows.T
            squares[key] = squares[key] + rows.square().sum(1)
    changed = {}
    for key, units in unclear.items():
        if isinstance(products[key], Tensor):
            similarity = products[key] / ((squares[key][units, None] + squares[key]) / 2).clamp_min(1e-300)
            rows = torch.zeros_like(correlations[key], dtype=torch.float64)
            rows[units] = DECIDES_TIES * similarity.to(rows)
            changed[key] = correlations[key] + torch.where(units[:, None].to(rows.device), rows, rows.T)
    return changed


def completed(
    network: Network, covariances: Mapping[ProductKey, Tensor], maps: Alignment, name: str
) -> dict[ProductKey, Tensor]:
    """The covariances of a space's products, in which weights tell apart directions that do not vary.

    Centred activations say nothing about those, and yet they may hold a constant. An expert's weights count for so
    little of its variance that no measured one feels it.
    """
    found = dict(covariances)
    for key, rows in product_rows(network, maps, [name], held=True) if network.weights else ():
        if key in found:
            size = len(rows) // network.experts
            variance, squares = (
                x.reshape(network.experts, size).mean(1) for x in (covariances[key].diagonal(), rows.square().sum(1))
            )
            scale = (DECIDES_TIES * variance.clamp_min(0).to(rows) / squares.clamp_min(1e-300)).sqrt()
            rows = rows * scale.repeat_interleave(size)[:, None]
            found[key] = found[key] + (rows @ rows.T).to(found[key])
    return found
