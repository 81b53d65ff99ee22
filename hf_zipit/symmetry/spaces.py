"""The words of a merge spec: the spaces of a model, and the space that every axis of every tensor belongs to.

A *space* is a set of units that has to be treated the same way wherever it shows up. An *axis label* is a product of
spaces, major to minor: the output axis of a query projection is `(heads, query)`. Each factor of a label also says
whether the axis holds the space's units as they are (a vector: `x -> g x`) or reads them (a dual: `w -> w g^-1`).

The spec holds no tensor: it depends on the model's class and configuration, not on its weights.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import TypeVar


class Symmetry(enum.IntEnum):
    """Which changes of basis of a space leave the function as it is; a larger value allows more of them.

    But for those of pairs of units (`in_pairs`), which stand beside the permutations: neither allows the other.
    """

    FIXED = 0
    HALF_TURNS = 1  # new signs for any pairs of units, i and i + d/2 (what a scale beside a rotary embedding leaves)
    ROTARY = 2  # a rotation of every such pair by an angle of its own (what rotary embeddings allow)
    ROTARY_NEIGHBOURS = 3  # the same of units 2 i and 2 i + 1
    PERMUTATION = 4
    ORTHOGONAL_ONES = 5  # orthogonal maps that keep the vector of ones (what LayerNorm without affine part allows)
    ORTHOGONAL = 6
    LINEAR = 7

    def __str__(self) -> str:
        return {"ORTHOGONAL_ONES": "orthogonal, keeps ones"}.get(self.name, self.name.lower().replace("_", " "))

    @property
    def in_pairs(self) -> bool:
        """Whether it is about pairs of units, each of which is turned by itself."""
        return Symmetry.FIXED < self < Symmetry.PERMUTATION

    def meet(self, other: Symmetry) -> Symmetry:
        """What both allow."""
        least, most = sorted((self, other))
        if not least.in_pairs or most in (least, Symmetry.ORTHOGONAL, Symmetry.LINEAR):
            return least
        return least if (least, most) == (Symmetry.HALF_TURNS, Symmetry.ROTARY) else Symmetry.FIXED


@dataclass(frozen=True)
class Space:
    """A set of units that move together.

    Attributes:
        name: a path-like name, such as `vit.layers.0.mlp.fc1`.
        size: the number of units, *per unit of the spaces in `within`*.
        symmetry: the changes of basis that leave the network's function as it is.
        within: the spaces of which every unit has its own, independent basis of this space: the head a `head_dim`
            sits in. Empty for a space that stands alone.
        frozen_by: for a fixed space, what fixed it (an op, an input, an output).
    """

    name: str
    size: int
    symmetry: Symmetry
    within: tuple[str, ...] = ()
    frozen_by: str | None = None


@dataclass(frozen=True)
class Factor:
    """One space in an axis label; `dual` where the axis reads the space instead of holding its units."""

    space: str
    dual: bool = False


@dataclass(frozen=True)
class Sum:
    """The direct sum of axes, of one after another: what one projection to queries, keys and values puts out."""

    terms: tuple[AxisLabel, ...]


AxisLabel = tuple[Factor | Sum, ...]
"""The spaces (or direct sums) whose product an axis is, major to minor; empty for an axis of size one."""

ProductKey = tuple[str, ...]
"""The names of the spaces of an axis label, major to minor."""


def product_key(label: AxisLabel) -> ProductKey:
    """The names of the spaces of a label, those of its sums as well."""
    return tuple(factor.space for factor in factors(label))


def products(label: AxisLabel) -> list[AxisLabel]:
    """The labels without sums whose direct sum a label is; one, for most.

    A sum that stands within a product is multiplied out: heads x (queries + keys) is heads x queries + heads x keys.
    """
    for i, factor in enumerate(label):
        if isinstance(factor, Sum):
            return [product for term in factor.terms for product in products(label[:i] + term + label[i + 1 :])]
    return [label]


def factors(label: AxisLabel) -> Iterator[Factor]:
    """All factors of a label, those of its sums as well."""
    for factor in label:
        if isinstance(factor, Sum):
            for term in factor.terms:
                yield from factors(term)
        else:
            yield factor


def flipped(label: AxisLabel) -> AxisLabel:
    """What an axis reads, as one that holds it, and the other way round."""
    return _mapped(label, lambda factor: replace(factor, dual=not factor.dual))


def all_read(label: AxisLabel) -> AxisLabel:
    """The label of an axis that reads all that another one holds or reads."""
    return _mapped(label, lambda factor: replace(factor, dual=True))


def all_held(label: AxisLabel) -> AxisLabel:
    """The label of an axis that holds all that another one holds or reads."""
    return _mapped(label, lambda factor: replace(factor, dual=False))


def _mapped(label: AxisLabel, function: Callable[[Factor], Factor]) -> AxisLabel:
    return tuple(
        Sum(tuple(_mapped(term, function) for term in factor.terms)) if isinstance(factor, Sum) else function(factor)
        for factor in label
    )


@dataclass(frozen=True)
class Probe:
    """A place where a product of spaces can be observed: one axis of a module's first input, or of its output.

    Attributes:
        module: the module's path in the model.
        where: `"input"` (first positional or keyword argument) or `"output"`.
        axis: the axis of that tensor.
        key: the names of the spaces whose product that axis is.
        reads: those of them that the axis reads instead of holding (a key's dimensions, that move as a query's dual).
        span: where the axis is a direct sum, which of its units these are: `(width, start, stop)` for those from
            `start` to `stop` of every `width`; None for all.
    """

    module: str
    where: str
    axis: int
    key: ProductKey
    reads: tuple[str, ...] = ()
    span: tuple[int, int, int] | None = None


@dataclass(frozen=True)
class Block:
    """A cut can be made before a block: `path` is its module, `tower` the chain of blocks it stands in."""

    path: str
    tower: int


@dataclass(frozen=True)
class Place:
    """How far into the model a value is made: the last block of every tower it depends on, and whether on the head.

    `blocks[tower]` is -1 before the first block.
    """

    blocks: tuple[int, ...]
    head: bool = False


@dataclass(frozen=True)
class Crossing:
    """A value that is made in one place and read in a later one: where a cut may have to translate it.

    Attributes:
        value: a name of the value, unique in the trace.
        axes: one label per axis of the value.
        made: where it is made.
        read: where it is read.
        stack: the module that reads it, after all that contain it, outermost first.
        beside: for each of them the other values of the same form that it reads and that are made outside of it: what
            it is given first may be any of them.
    """

    value: str
    axes: tuple[AxisLabel, ...]
    made: Place
    read: Place
    stack: tuple[str, ...]
    beside: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Reader:
    """A linear layer that reads a folded norm: `axis` of its `weight` holds the norm's units; `bias` may be None."""

    module: str
    weight: str
    bias: str | None
    axis: int


@dataclass(frozen=True)
class Fold:
    """A norm whose affine part can be folded into the linear layers that read it.

    Attributes:
        weight: the name of its scale, which becomes ones.
        bias: the name of its shift, None where it has none. It goes into the readers' biases where all of them have
            one; else it stays, divided by the scale.
        readers: all that reads the norm's output.
    """

    weight: str
    bias: str | None
    readers: tuple[Reader, ...]


Kind = TypeVar("Kind", bound="Trace")


@dataclass(frozen=True)
class Trace:
    """Everything that merging needs to know about an architecture.

    Attributes:
        architecture: the model's class name.
        spaces: every space, by name, in order of first use.
        axes: for every parameter and buffer name (tied names included), one label per axis.
        unused: names of parameters and buffers that the forward pass does not read.
        probes: where each product of movable spaces can be observed.
        modules: paths of the modules that own a tensor or call an op with one, in execution order.
        blocks: where the model can be cut, in execution order.
        head: path prefixes that belong to a task's own head.
        places: for every tensor that is used, where it is used last.
        first_places: for every tensor that is used, where it is used first.
        crossings: values that pass from one place to another.
        outputs: for every output tensor by its field name, one label per axis.
        output_places: where every output is made.
        unknown_ops: ops that the interpreter has no rule for, with the modules they ran in; they freeze what they
            touch.
        macs: multiply-accumulates of one forward pass, per module, and `samples`, the batch size they were counted at.
        folds: the norms that have to be folded before this holds (`folding.fold`): their scales count as ones.
    """

    architecture: str
    spaces: Mapping[str, Space]
    axes: Mapping[str, tuple[AxisLabel, ...]]
    unused: frozenset[str] = frozenset()
    probes: tuple[Probe, ...] = ()
    modules: tuple[str, ...] = ()
    blocks: tuple[Block, ...] = ()
    head: tuple[str, ...] = ()
    places: Mapping[str, Place] = field(default_factory=dict)
    first_places: Mapping[str, Place] = field(default_factory=dict)
    crossings: tuple[Crossing, ...] = ()
    outputs: Mapping[str, tuple[AxisLabel, ...]] = field(default_factory=dict)
    output_places: Mapping[str, Place] = field(default_factory=dict)
    unknown_ops: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    macs: Mapping[str, int] = field(default_factory=dict)
    samples: int = 1
    folds: tuple[Fold, ...] = ()

    def size(self, key: ProductKey) -> int:
        """Number of units of a product of spaces."""
        return prod(self.spaces[name].size for name in key)

    def length(self, label: AxisLabel) -> int:
        """Number of units on an axis."""
        return prod(
            sum(map(self.length, factor.terms)) if isinstance(factor, Sum) else self.spaces[factor.space].size
            for factor in label
        )

    def output_label(self, weight: str, axis: int) -> AxisLabel:
        """The units that a module puts out along an axis of its weight.

        The weight of a folded norm is all ones and has no units; its readers' weights tell them.
        """
        for norm in self.folds:
            if norm.weight == weight:
                reader = norm.readers[0]
                return flipped(self.axes[reader.weight][reader.axis])
        return self.axes[weight][axis]

    def movable(self, name: str) -> bool:
        return self.spaces[name].symmetry is not Symmetry.FIXED

    def with_fixed(self: Kind, names: Collection[str], reason: str) -> Kind:
        """The same, but for some spaces that are fixed."""
        fixed = {name: replace(self.spaces[name], symmetry=Symmetry.FIXED, frozen_by=reason) for name in names}
        return replace(self, spaces={**self.spaces, **fixed})

    def products(self) -> dict[ProductKey, tuple[Probe, ...]]:
        """The probes of every observable product of spaces, in execution order."""
        found: dict[ProductKey, list[Probe]] = {}
        for probe in self.probes:
            found.setdefault(probe.key, []).append(probe)
        return {key: tuple(probes) for key, probes in found.items()}

    def families(self) -> Iterator[tuple[Space, tuple[Space, ...]]]:
        """Spaces that stand alone, each with the movable spaces that live within it (heads with their dims).

        The outer space may be fixed while the inner ones move; a family in which nothing moves is left out.
        """
        for root in self.spaces.values():
            inner = tuple(s for s in self.spaces.values() if root.name in s.within and self.movable(s.name))
            if not root.within and (inner or self.movable(root.name)):
                yield root, inner
