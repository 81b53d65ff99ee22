"""The plane through two aligned experts and their merge: one model whose weights move, point by point."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_zipit.errors import ExpertError
from hf_zipit.maps.space_map import Alignment, SpaceMap
from hf_zipit.maps.transform import to_merged, unmerge_matrix
from hf_zipit.modeling.entries import DenseEntry
from hf_zipit.planning.plan import Plan
from hf_zipit.symmetry.proof import model_tensors

ON_THE_LINE = 1e-4
"""A merge that is nearer to the line between the experts than this share of their distance spans no plane with it."""


@dataclass(frozen=True, eq=False)
class Move:
    """A tensor's value at the first expert, and from there the ways to the second and to the merge.

    Attributes:
        targets: all its copies in the merged model.
        north: the way along the second axis.
        counts: whether it has a part in distances: parameters have, statistics have not.
        positive: whether it must not become negative, as a running variance.
    """

    targets: Sequence[Tensor]
    base: Tensor
    east: Tensor
    north: Tensor
    counts: bool
    positive: bool

    @classmethod
    def between(cls, targets: Sequence[Tensor], a: Tensor, b: Tensor, counts: bool = True) -> Move:
        """With the way to the merge as the second axis."""
        positive = not counts and all(bool((value >= 0).all()) for value in (a, b, targets[0]))
        return cls(targets, a, b - a, targets[0] - a, counts, positive)

    def put(self, x: float, y: float) -> None:
        moved = self.base + x * self.east + y * self.north
        for target in self.targets:
            target.copy_(moved.clamp_min(0) if self.positive else moved)


@dataclass(frozen=True, eq=False)
class Surface:
    """One merged model whose weights are overwritten, point by point.

    Attributes:
        method, depth: of the merge.
        model: the model; `move` changes it.
        moves: the tensors that `move` changes.
        points: the aligned experts and the merge, by name.
        exact: whether the aligned experts compute what the experts compute.
        through_merge: whether the merge spans the second axis.
    """

    method: str
    depth: float
    model: PreTrainedModel
    moves: Sequence[Move]
    points: Mapping[str, tuple[float, float]]
    exact: bool
    through_merge: bool

    @torch.no_grad()
    def move(self, x: float, y: float = 0.0) -> PreTrainedModel:
        """The model at a point: `a + x (b - a) + y * north`."""
        for move in self.moves:
            move.put(x, y)
        return self.model


@torch.no_grad()
def make_surface(
    planned: Plan, alignment: Alignment, merged: PreTrainedModel, pair: tuple[str, str], *, seed: int = 0
) -> Surface:
    """The plane through two aligned experts and a merge, which is changed from now on.

    Where the merge is on the line between the experts, `seed` draws the second axis. Raises ExpertError if the aligned
    trunks are the same.
    """
    moves = [*_trunk(planned, alignment, merged, pair), *_readouts(planned, alignment, merged)]
    length = _inner((move.east, move.east) for move in moves if move.counts)
    if not length > 0:
        raise ExpertError(
            f"the aligned trunks of the experts {pair[0]!r} and {pair[1]!r} are the same, with no line between them; "
            "choose other experts"
        )
    share = _inner((move.north, move.east) for move in moves if move.counts) / length
    norths = [move.north - share * move.east for move in moves]
    off = math.sqrt(_inner((n, n) for n, move in zip(norths, moves, strict=True) if move.counts) / length)
    through_merge = off > ON_THE_LINE
    if through_merge:
        norths = [north / off for north in norths]
    else:
        norths, off = _random_norths(moves, length, seed), 0.0
    moves = [replace(move, north=north) for move, north in zip(moves, norths, strict=True)]
    points = {pair[0]: (0.0, 0.0), pair[1]: (1.0, 0.0), "merge": (share, off)}
    return Surface(
        planned.config.method, planned.cut.depth, merged, moves, points, _is_exact(alignment), through_merge
    )


def _trunk(planned: Plan, alignment: Alignment, merged: PreTrainedModel, pair: tuple[str, str]) -> Iterator[Move]:
    """Every tensor of the trunk that something reads."""
    spec, experts = planned.spec, planned.folded
    tasks = list(experts)
    numbers = [tasks.index(task) for task in pair]
    sources = [model_tensors(experts[task]) for task in pair]
    parameters = {name for name, _ in experts[pair[0]].named_parameters(remove_duplicate=False)}
    trunk = model_tensors(merged.trunk)
    branches = [model_tensors(merged.branch(task)) for task in tasks]
    for name in sorted(planned.cut.trunk):
        labels = spec.axes.get(name)
        if labels is None or not sources[0][name].is_floating_point():
            continue
        # A tensor of the trunk that hangs beside blocks, in no module of its own, is held by every branch.
        targets = [trunk[name]] if name in trunk else [branch[name] for branch in branches]
        ends = (
            to_merged(source[name].float(), labels, alignment, spec, number).to(targets[0])
            for source, number in zip(sources, numbers, strict=True)
        )
        yield Move.between(targets, *ends, counts=name in parameters)


def _readouts(planned: Plan, alignment: Alignment, merged: PreTrainedModel) -> Iterator[Move]:
    """Fitted readouts belong to the merge; the aligned experts are read through U_t."""
    for number, task in enumerate(planned.tasks):
        key = merged.branch_names[task]
        pairs = [*zip(planned.cut.entries, merged.entries[key], strict=True)]
        pairs += zip(planned.cut.exits, merged.exits[key], strict=True)
        for entry, readout in pairs:
            if isinstance(readout, DenseEntry):
                plain = unmerge_matrix(alignment, entry.label, number, planned.spec).to(readout.weight)
                zeros = torch.zeros_like(readout.bias)
                yield Move.between([readout.weight], plain, plain)
                yield Move.between([readout.bias], zeros, zeros)


def _random_norths(moves: Sequence[Move], length: float, seed: int) -> list[Tensor]:
    """A random direction at a right angle to east, as long as it, in every tensor about as long as it is there."""
    generator = torch.Generator().manual_seed(seed)
    norths = []
    for move in moves:
        drawn = torch.randn(move.east.shape, generator=generator).to(move.east)
        norths.append(drawn * (move.counts * move.east.norm() / drawn.norm().clamp_min(1e-12)))
    slant = _inner(zip(norths, (move.east for move in moves), strict=True)) / length
    norths = [north - move.counts * slant * move.east for north, move in zip(norths, moves, strict=True)]
    scale = math.sqrt(length / _inner((north, north) for north in norths))
    return [north * scale for north in norths]


def _inner(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """The inner product of two directions, summed over their tensors."""
    return sum(float((a.double() * b.double()).sum()) for a, b in pairs)


def _is_exact(alignment: Alignment) -> bool:
    """Whether every map moves an expert's units without joining or dropping any."""

    def one_to_one(space_map: Any) -> bool:
        if not isinstance(space_map, SpaceMap):
            return True  # an invertible change of basis
        labels = space_map.labels
        every = torch.arange(space_map.size).expand(*labels.shape[:-1], -1)
        return labels.shape[-1] == space_map.size and torch.equal(labels.sort(-1).values, every)

    return all(one_to_one(space_map) for space_map in alignment.values())
