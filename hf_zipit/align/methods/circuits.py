"""Heads as circuits: pair them, and find the change of basis inside them, from the weights alone.

What an attention head computes depends on its query and key weights only through Q^T K, and on its value and output
weights only through O V: any invertible map of the dimensions in between cancels (Elhage et al., A Mathematical
Framework for Transformer Circuits, 2021). Compared weight by weight, two equal heads in different bases seem to
differ; their *circuits* are the same (arXiv 2506.22712). `circuit_pairs.py` pairs heads by that, `circuit_bases.py`
finds the bases inside.

Streams that allow rotations (a folded model's residual) are rotated by Procrustes on all weights that read or write
them; everything else is matched by `weights`. The three depend on each other, so they are visited one after the other:
first with the parameters that are aligned already (embeddings), then with all; the most similar end counts. Where
embeddings say nothing about part of a stream, that part is found bit by bit, and the rounds go on until it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations

import torch

from hf_zipit.align.aligned import comparable, known_around, resolvable
from hf_zipit.align.by_weights import match_by_weights
from hf_zipit.align.circuit_pairs import circuits_of, in_own_basis, match_family, unit_rows
from hf_zipit.align.method import Network, register
from hf_zipit.align.procrustes import match_rotations, rotating
from hf_zipit.errors import RecipeError
from hf_zipit.maps.space_map import LinearMap, Map
from hf_zipit.symmetry.spec import Symmetry

LEAST_IMPROVEMENT = 1e-11
"""Of the similarity, which falls by the square of what is wrong."""

ROUNDS = 20
"""At most, where part of a stream is open at first."""


@register("circuits", needs={"weights"}, scope="network", least=Symmetry.HALF_TURNS, folds=True)
def match_circuits(network: Network, *, sweeps: int = 2) -> dict[str, Map]:
    """Maps from the weights: streams by rotations, heads by circuits, the rest by `weights`.

    Args:
        network: the experts' weights are read.
        sweeps: at most this many rounds, 1 or more; more of them where embeddings leave part of a stream open.
    """
    if sweeps < 1:
        raise RecipeError(f"circuits' option sweeps is {sweeps}; it must be 1 or more.")
    network, families = circuits_of(network)
    opened = network.opened
    inside = {name for family in families for name in family.members}
    streams = [name for name in rotating(network.spec) if name in opened]
    rest = [name for name in opened if name not in inside and name not in streams]
    maps: dict[str, Map] = dict(network.fixed_maps)
    best, kept = -float("inf"), maps
    rounds = max(sweeps, ROUNDS) if any(left_open(name, network, maps) for name in streams) else sweeps
    for _ in range(rounds):
        for name in streams:
            others = {other: m for other, m in maps.items() if other != name}
            maps[name] = rotate_stream(name, network, others)
        if rest:
            maps |= match_by_weights(network, rest, maps)
        for family in families:
            maps |= match_family(family, network, maps)
        reached = similarity(network, maps)
        if reached <= best + LEAST_IMPROVEMENT:
            break
        best, kept = reached, dict(maps)
    return {name: in_own_basis(kept[name]) if name in inside else kept[name] for name in opened}


def rotate_stream(name: str, network: Network, maps: Mapping[str, Map]) -> LinearMap:
    """Procrustes on all weights that write or read a space and whose other axes are aligned."""
    experts, size = network.experts, network.spec.spaces[name].size
    products = torch.zeros(experts, size, experts, size, dtype=torch.float64)
    for tensor in aligned_around(name, network, maps):
        rows = torch.cat([unit_rows(network, tensor, maps, t, [name]) for t in range(experts)])
        products += (rows @ rows.T).reshape(products.shape)
    return match_rotations(products, ones=network.spec.spaces[name].symmetry is Symmetry.ORTHOGONAL_ONES)


def aligned_around(name: str, network: Network, maps: Mapping[str, Map]) -> list[str]:
    """The weights that write or read a space once and whose other axes are aligned."""
    found = []
    for tensor in comparable(network):
        labels = network.spec.axes[tensor]
        factors = [factor.space for label in labels for factor in label]
        if factors.count(name) == 1 and known_around(labels, maps, network.spec, [name]):
            found.append(tensor)
    return found


def left_open(name: str, network: Network, maps: Mapping[str, Map]) -> bool:
    """Whether the weights that are aligned around a space leave directions of it open, as fewer of them do."""
    sizes = [network.weights[0][tensor].numel() for tensor in aligned_around(name, network, maps)]
    return sum(sizes) < network.spec.spaces[name].size ** 2


def similarity(network: Network, maps: Mapping[str, Map]) -> float:
    """The mean cosine of two experts' weights in merged units."""
    gram = torch.zeros(network.experts, network.experts, dtype=torch.float64)
    for name in comparable(network):
        labels = network.spec.axes[name]
        if resolvable(labels, maps, network.spec):
            rows = [unit_rows(network, name, maps, t, []).flatten() for t in range(network.experts)]
            gram += torch.stack(rows) @ torch.stack(rows).T
    scale = gram.diagonal().clamp_min(1e-300).rsqrt()
    cosines = gram * torch.outer(scale, scale)
    pairs = list(combinations(range(network.experts), 2))
    return float(sum(cosines[pair] for pair in pairs)) / len(pairs)
