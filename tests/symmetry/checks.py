"""What the tests of this room share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, nn

from hf_zipit.symmetry import MergeSpec, prove
from hf_zipit.symmetry.spec import Space, Symmetry, factors

SEEDS = range(3)
BROKEN = 1e-3
"""A wrong spec must be off by more than this."""


def worst_error(
    model: nn.Module, spec: MergeSpec, inputs: Mapping[str, Tensor] | None = None, seeds: range = SEEDS
) -> float:
    return max(prove(model, spec, seed=seed, inputs=inputs) for seed in seeds)


def spaces_of(spec: MergeSpec, tensor: str, axis: int) -> list[Space]:
    return [spec.spaces[factor.space] for factor in factors(spec.axes[tensor][axis])]


def with_symmetry(spec: MergeSpec, name: str, symmetry: Symmetry) -> MergeSpec:
    """The spec with another symmetry claimed for one space."""
    return replace(spec, spaces={**spec.spaces, name: replace(spec.spaces[name], symmetry=symmetry)})


def next_symmetries(space: Space) -> tuple[Symmetry, ...]:
    """The smallest symmetries that allow more than a space's own.

    Of a fixed space not the half turns, which are looked for only beside rotary embeddings.
    """
    more = [symmetry for symmetry in Symmetry if symmetry.meet(space.symmetry) is space.symmetry is not symmetry]
    more = [
        symmetry for symmetry in more if space.symmetry is not Symmetry.FIXED or symmetry is not Symmetry.HALF_TURNS
    ]
    return tuple(one for one in more if not any(one.meet(other) is other is not one for other in more))
