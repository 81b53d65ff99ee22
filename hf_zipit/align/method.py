"""The methods that align experts, by name.

A method is either a *matcher* of one space, a pure function of the correlations of the experts' units,

    matcher(correlation, experts, *, option=default, ...) -> Map

with `correlation` a float64 `[T * d, T * d]` of T experts, zero in the rows of dead units, the diagonal included, or
an *aligner* of the whole network, for methods in which the spaces depend on each other's maps (weight matching),

    aligner(network, *, option=default, ...) -> dict[str, Map]

that returns the maps of all movable spaces without a fixed map. Keyword-only parameters are options; a value out of
range is a RecipeError.

A matcher whose number of merged units can be chosen has an option `size` (`merged_size`); its maps may then be wider
or narrower than an expert's space, and the engine finds out which spaces allow that.

What a method `needs` tells the earlier stages what to gather: `"moments"`, `"weights"`, `"widths"` (which spaces may
be wider than an expert's), or nothing. Before any data is read a method is run once, dry, with its options on a space
of a few units (`solver.py`), so that values out of range show there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from hf_zipit.errors import RecipeError
from hf_zipit.maps.space_map import Map
from hf_zipit.registry import METHODS
from hf_zipit.symmetry.spec import MergeSpec, ProductKey, Symmetry

Scope = Literal["space", "network"]
Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Method:
    """A registered method.

    Attributes:
        name: what recipes call it.
        function: the matcher or aligner; its keyword-only parameters are the method's options.
        needs: what it reads: a subset of `{"moments", "covariances", "weights", "widths"}`. A matcher that needs
            covariances is given them in place of correlations.
        scope: `"space"` for a matcher of one space, `"network"` for an aligner of all spaces at once.
        least: the smallest symmetry of the spaces that a method is for. Others are matched by `permute`, or keep their
            units where not even permutations are allowed (rotary ones).
        folds: whether it wants the norms folded into their readers, so that streams can be rotated.
    """

    name: str
    function: Callable[..., Any]
    needs: frozenset[str]
    scope: Scope = "space"
    least: Symmetry = Symmetry.PERMUTATION
    folds: bool = False


@dataclass(frozen=True)
class Network:
    """What a whole-network method is given.

    Attributes:
        spec: the architecture's spaces and axis labels.
        experts: their number, T.
        correlations: per observed product of spaces, float64 `[T * size, T * size]`; empty if the method needs none.
        weights: one state dict per expert; empty unless the method needs weights.
        fixed_maps: maps that are decided already (a residual stream left at identity, overrides); not to be changed.
        widenable: the spaces that may have more merged units than an expert has; empty unless the method needs it.
        covariances: as `correlations`, for the products of spaces that allow more than permutations, from where their
            units are held and not read; empty unless the method needs them.
        seed: of everything that a method draws.
    """

    spec: MergeSpec
    experts: int
    correlations: Mapping[ProductKey, Tensor] = field(default_factory=dict)
    weights: Sequence[Mapping[str, Tensor]] = ()
    fixed_maps: Mapping[str, Map] = field(default_factory=dict)
    widenable: frozenset[str] = frozenset()
    covariances: Mapping[ProductKey, Tensor] = field(default_factory=dict)
    seed: int = 0

    @property
    def opened(self) -> list[str]:
        """The movable spaces without a fixed map."""
        return [name for name in self.spec.spaces if self.spec.movable(name) and name not in self.fixed_maps]

    def random_orders(self, names: Sequence[str], count: int) -> Iterator[list[str]]:
        """`count` seeded random orders of some names."""
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(count):
            yield [names[i] for i in torch.randperm(len(names), generator=generator)]


def merged_size(size: float, units: int, experts: int) -> int:
    """How many merged units a space of `units` has under an option `size`: a float is a share of the space's units, an
    int, which only makes sense for one space, their number.

    Raises:
        RecipeError: it is not between 1 and the units of all experts.
    """
    count = size if isinstance(size, int) else max(round(size * units), int(size > 0))
    if not 1 <= count <= experts * units:
        raise RecipeError(f"The option size is {size}; it must make between 1 and all {experts * units} units.")
    return count


def register(
    name: str, *, needs: set[str], scope: Scope = "space", least: Symmetry = Symmetry.PERMUTATION, folds: bool = False
) -> Callable[[Function], Function]:
    """Decorator that makes a function a method; a matcher sees correlations only, so it cannot need weights."""
    if scope == "space" and "weights" in needs:
        raise ValueError(f"{name!r} needs weights, which depend on other spaces' maps; make its scope 'network'.")

    def decorate(function: Function) -> Function:
        METHODS.add(name, Method(name, function, frozenset(needs), scope, least, folds))
        return function

    return decorate
