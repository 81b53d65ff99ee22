"""The trunk of a merge: every tensor that the experts will share, brought into merged units and combined by one rule.

Everything is computed in float64, in which the mean of T equal float32 numbers is that number, for every T.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from hashlib import sha256
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_zipit.combine.layers import Layer, merged_fisher, merged_grams
from hf_zipit.combine.rule import task_vectors
from hf_zipit.config import MergeConfig
from hf_zipit.errors import ExpertError, RecipeError, SpecError
from hf_zipit.maps.products import merged_length
from hf_zipit.maps.space_map import Alignment
from hf_zipit.maps.transform import to_merged
from hf_zipit.observation.statistics import LayerStatistics
from hf_zipit.planning.compatible import all_finite
from hf_zipit.planning.plan import Plan
from hf_zipit.registry import RULES
from hf_zipit.symmetry.proof import model_tensors
from hf_zipit.symmetry.spec import AxisLabel, MergeSpec, product_key

Combine = Callable[..., Tensor]
"""A rule with its options: from the experts' tensors in merged units, their labels and `base=` to the merged one."""

PART = 1 << 16
"""Entries that are combined at a time where a rule combines every entry by itself: half a megabyte in float64, of
which several fit in a core's cache. Four times as many take three times as long."""


def check_base(config: MergeConfig, base: Any) -> None:
    """Raise RecipeError if a rule needs a base and has none, or the reverse."""
    rule = RULES.get(config.combine)
    if rule.needs_base and base is None and config.root is None:
        raise RecipeError(
            f"combine={config.combine!r} adds up what the experts learnt; pass the model that they "
            "started from as base="
        )
    of_vectors = config.residues is not None and config.residues.needs_origin
    if base is not None and not rule.needs_base and not of_vectors:
        with_base = [name for name in RULES if RULES.get(name).needs_base]
        raise RecipeError(f"combine={config.combine!r} reads no base; leave base= out, or choose one of {with_base}.")


def check_rule(planned: Plan) -> None:
    """Raise RecipeError if a rule's options are out of range, or it is not for so many experts."""
    rule, options = RULES.get(planned.config.combine), planned.config.combine_options
    zeros = torch.zeros(2, 2, dtype=torch.float64)
    rule.combine([zeros] * len(planned.tasks), (), planned, options, base=zeros, generator=torch.Generator())


def combine_trunk(planned: Plan, maps: Alignment, statistics: LayerStatistics | None = None) -> dict[str, Tensor]:
    """The merged tensors of the trunk, by their names in the source model; as `CombinedTrunk`, all at once."""
    return dict(CombinedTrunk(planned, maps, statistics))


class Trunk:
    """The tensors of a plan's trunk. As an iterable, `Vectors`: task vectors in merged units, made as they are read.

    Attributes:
        maps: those that change anything.
        trained: the parameters among the tensors, which rules combine; what was only counted is averaged.
    """

    def __init__(self, planned: Plan, maps: Alignment) -> None:
        self.planned = planned
        self.maps = {name: found for name, found in maps.items() if not found.is_identity}
        by_model = {id(model): model_tensors(model) for model in (*planned.folded.values(), *planned.bases.values())}
        self.experts = [by_model[id(model)] for model in planned.folded.values()]
        self.bases = [by_model[id(model)] for model in planned.bases.values()]
        parameters = dict(planned.model.named_parameters(remove_duplicate=False))
        self.trained = {name for name in planned.cut.trunk if name in parameters}
        self.elementwise = RULES.get(planned.config.combine).elementwise

    def read(self, name: str) -> tuple[list[Tensor], list[Tensor]]:
        """The experts' tensors and their bases', in their own units."""
        return [own[name] for own in self.experts], [own[name] for own in self.bases]

    def moved(self, name: str) -> tuple[list[Tensor], Tensor | None]:
        """The experts' tensors in merged units, and the origin of their task vectors: see `in_merged_units`."""
        own, bases = self.read(name)
        return in_merged_units(own, self.labels(name), self.maps, self.planned.spec, bases, self.planned.base_shares)

    def labels(self, name: str) -> Sequence[AxisLabel]:
        """Its labels; none for what the forward pass does not read."""
        return self.planned.spec.axes.get(name, ())

    def __iter__(self) -> Iterator[list[Tensor]]:
        # Tied parameters are one.
        once = {name for name, _ in self.planned.model.named_parameters()}
        spec, shares = self.planned.spec, self.planned.base_shares
        for name in sorted(once & self.trained):
            own, bases = self.read(name)
            for _, part in parts(own, self.labels(name), self.maps, spec, bases, self.elementwise):
                moved, origin = in_merged_units(part.tensors, part.labels, self.maps, spec, part.bases, shares)
                yield moved if origin is None else task_vectors(moved, origin)


class CombinedTrunk(Mapping[str, Tensor]):
    """The merged tensors of the trunk, by their names in the source model. Each is combined when it is asked for.

    `statistics` are for rules that read some (`statistics_for`).

    Raises:
        SpecError: a tensor does not have the shape that its labels say, or integers that cannot be combined differ.
        ExpertError: a merged tensor is not finite.
    """

    def __init__(self, planned: Plan, maps: Alignment, statistics: LayerStatistics | None = None) -> None:
        self.planned, self.trunk, self.statistics = planned, Trunk(planned, maps), statistics
        self.rule, self.options = RULES.get(planned.config.combine), planned.config.combine_options
        self.whole = self.rule.survey_of(self.trunk, self.options)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of all tensors; none is combined for it."""
        maps, spec, first = self.trunk.maps, self.planned.spec, self.trunk.experts[0]
        return {
            name: tuple(merged_length(label, maps, spec) for label in labels)
            if (labels := self.trunk.labels(name))
            else tuple(first[name].shape)
            for name in self
        }

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.planned.cut.trunk:
            raise KeyError(name)
        return self.tensor(name)

    def tensor(self, name: str, layer: Layer | None = None) -> Tensor:
        """The merged tensor; `layer` is what a layerwise rule is given."""
        return joined(self._parts(name, layer))

    def pieces(self, name: str) -> Iterator[Tensor]:
        """The merged tensor in pieces whose entries follow each other; it is whole where its parts lie otherwise."""
        parts = self._parts(name)
        first = next(parts)
        if first[0] is None or first[0].axis == 0:
            yield first[1]
            yield from (found for _, found in parts)
        else:
            yield joined(chain([first], parts))

    def _parts(self, name: str, layer: Layer | None = None) -> Iterator[tuple[At | None, Tensor]]:
        """What `joined` makes the merged tensor of."""
        trunk, planned = self.trunk, self.planned
        own, bases = trunk.read(name)
        combine, elementwise = mean, True
        if name in trunk.trained:
            given = {"whole": self.whole, "generator": generator_of(planned.config.seed, name), "layer": layer}
            known = self._read(name, own[0])
            combine = partial(self.rule.combine, plan=planned, options=self.options, **given, **known)
            elementwise = self.rule.elementwise
        where = (trunk.labels(name), trunk.maps, planned.spec)
        try:
            for at, found in combined_parts(own, *where, combine, bases, planned.base_shares, elementwise):
                if found.is_floating_point() and not all_finite(found):
                    raise ExpertError(
                        f"the merged tensor {name} is not finite; check the experts' weights and the options of "
                        f"combine={planned.config.combine!r}"
                    )
                yield at, found
        except SpecError as error:
            raise SpecError(f"the tensor {name} cannot be merged: {error}") from error

    def _read(self, name: str, tensor: Tensor) -> dict[str, Any]:
        """What is known of a parameter from data, as far as the rule wants it."""
        if self.statistics is None:
            return {}
        labels, found = self.trunk.labels(name), {}
        where = (self.statistics, self.planned.tasks, name)
        if "grams" in self.rule.wants:
            found["grams"] = merged_grams(*where, tensor, labels, self.trunk.maps, self.planned.spec)
        if "fisher" in self.rule.wants:
            found["fisher"] = merged_fisher(*where, labels, self.trunk.maps, self.planned.spec)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self.planned.cut.trunk))

    def __len__(self) -> int:
        return len(self.planned.cut.trunk)


def generator_of(seed: int, name: str) -> torch.Generator:
    """What draws for one parameter: the same for the same seed and name, whatever is drawn for others."""
    digest = sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


class At(NamedTuple):
    """Where a part of a tensor lies: along which axis, from where, and how long the tensor is there."""

    axis: int
    start: int
    size: int


def combined_parts(
    tensors: Sequence[Tensor],
    labels: Sequence[AxisLabel],
    maps: Alignment,
    spec: MergeSpec,
    combine: Combine,
    bases: Sequence[Tensor] = (),
    base_shares: Sequence[float] | None = None,
    elementwise: bool = False,
) -> Iterator[tuple[At | None, Tensor]]:
    """The merged tensor in the parts in which it is combined, one after the other, and where each lies; None: whole.

    In the experts' dtype, or in float32 where that is coarser: nothing merged is rounded to it.

    Args:
        tensors: the experts' tensors, of one shape and dtype.
        labels: one label per axis; none for a tensor that the forward pass does not read.
        maps, spec: the map of every movable space, and the sizes of all.
        combine: the rule.
        bases, base_shares: for rules that need them, as for `in_merged_units`.
        elementwise: the rule combines every entry by itself: a large tensor is then combined in parts.

    Raises:
        SpecError: as `CombinedTrunk` does.
    """
    if not tensors[0].is_floating_point():
        yield None, _agreed(tensors, labels, maps)
        return
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    for at, part in parts(tensors, labels, maps, spec, bases, elementwise):
        moved, origin = in_merged_units(part.tensors, part.labels, maps, spec, part.bases, base_shares)
        yield at, combine(moved, part.labels, **({} if origin is None else {"base": origin})).to(dtype)


def joined(parts: Iterable[tuple[At | None, Tensor]]) -> Tensor:
    """One tensor of its parts."""
    whole = None
    for at, found in parts:
        if at is None:
            return found
        if whole is None:
            whole = found.new_empty([*found.shape[: at.axis], at.size, *found.shape[at.axis + 1 :]])
        whole.narrow(at.axis, at.start, found.shape[at.axis]).copy_(found)
    return whole


class Part(NamedTuple):
    """The same part of the experts' and the bases' tensors, with the labels of its axes."""

    tensors: Sequence[Tensor]
    labels: Sequence[AxisLabel]
    bases: Sequence[Tensor]


def parts(
    tensors: Sequence[Tensor],
    labels: Sequence[AxisLabel],
    maps: Alignment,
    spec: MergeSpec,
    bases: Sequence[Tensor] = (),
    elementwise: bool = True,
) -> Iterator[tuple[At | None, Part]]:
    """Tensors in parts of about `PART` entries, with where they lie; else whole, with None.

    They are divided along the first axis on which no map depends.
    """
    shape = tensors[0].shape
    names = {name for label in labels for name in product_key(label) if name in maps}
    names |= {outer for name in names for outer in spec.spaces[name].within}
    free = (i for i, n in enumerate(shape) if n > 1 and not (labels and names.intersection(product_key(labels[i]))))
    axis = next(free, None) if elementwise and shape.numel() > PART else None
    if axis is None:
        yield None, Part(tensors, labels, bases)
        return
    step = max(PART * shape[axis] // shape.numel(), 1)
    own = (*labels[:axis], (), *labels[axis + 1 :]) if labels else ()
    for start in range(0, shape[axis], step):
        cut = partial(torch.narrow, dim=axis, start=start, length=min(step, shape[axis] - start))
        yield At(axis, start, shape[axis]), Part(_once(cut, tensors), own, _once(cut, bases))


def _once(function: Callable[[Tensor], Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
    """A function of every tensor; where two are the same object, so are the results."""
    done: dict[int, Tensor] = {}
    for tensor in tensors:
        if id(tensor) not in done:
            done[id(tensor)] = function(tensor)
    return [done[id(tensor)] for tensor in tensors]


def in_merged_units(
    tensors: Sequence[Tensor],
    labels: Sequence[AxisLabel],
    maps: Alignment,
    spec: MergeSpec,
    bases: Sequence[Tensor] = (),
    base_shares: Sequence[float] | None = None,
) -> tuple[list[Tensor], Tensor | None]:
    """The experts' tensors in merged units, float64, and the origin from which their task vectors start.

    Args:
        bases: the tensor that each expert started from. It is aligned like its expert; the mean of the aligned ones is
            the origin (arXiv 2410.12766), to which every expert's own task vector is added. Without any there is none.
        base_shares: how much each of them counts in that mean; all the same by default.
    """
    mapped = any(name in maps for label in labels for name in product_key(label))

    def moved(xs: Sequence[Tensor]) -> list[Tensor]:
        if mapped:
            return [to_merged(x.double(), labels, maps, spec, t) for t, x in enumerate(xs)]
        return _once(lambda x: to_merged(x.double(), labels, maps, spec, 0) if labels else x.double(), xs)

    own, started = moved(tensors), moved(bases)
    if not started:
        return own, None
    shares = base_shares or [1 / len(started)] * len(started)
    if all(start is started[0] or torch.equal(start, started[0]) for start in started):
        return own, started[0]
    origin = sum(share * start for share, start in zip(shares, started, strict=True))
    return [origin + (tensor - start) for tensor, start in zip(own, started, strict=True)], origin


def mean(tensors: Sequence[Tensor], labels: Sequence[AxisLabel], *, base: Tensor | None = None) -> Tensor:
    """The mean, which reads no base."""
    return sum(tensors) / len(tensors)


def merge_tensor(tensors: Sequence[Tensor], labels: Sequence[AxisLabel], maps: Alignment, spec: MergeSpec) -> Tensor:
    """The mean of the experts' tensors in merged units, sum_t M_t W_t U_t; see `combined_parts`."""
    return joined(combined_parts(tensors, labels, maps, spec, mean))


def _agreed(tensors: Sequence[Tensor], labels: Sequence[AxisLabel], maps: Mapping[str, Any]) -> Tensor:
    """The one value of integer or boolean tensors, such as position ids; of counters, the largest."""
    if not tensors[0].dim():
        return torch.stack(list(tensors)).amax(0)
    if any(name in maps for label in labels for name in product_key(label)):
        raise SpecError(f"A {tensors[0].dtype} tensor has an axis in a movable space; it cannot be averaged there.")
    if not all(torch.equal(tensors[0], other) for other in tensors[1:]):
        raise SpecError(f"The experts have different values in a {tensors[0].dtype} tensor, which cannot be averaged.")
    return tensors[0].clone()
