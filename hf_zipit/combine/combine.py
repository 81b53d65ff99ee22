"""The trunk of a merge: every tensor that the experts will share, brought into merged units and combined by one rule.

Everything is computed in float64, in which the mean of T equal float32 numbers is that number, for every T.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor

from hf_zipit.combine.layers import Layer, merged_fisher, merged_grams
from hf_zipit.combine.rule import task_vectors
from hf_zipit.config import MergeConfig
from hf_zipit.errors import ExpertError, RecipeError, SpecError
from hf_zipit.maps.space_map import Alignment
from hf_zipit.maps.transform import to_merged
from hf_zipit.observation.statistics import LayerStatistics
from hf_zipit.planning.plan import Plan
from hf_zipit.registry import RULES
from hf_zipit.symmetry.proof import model_tensors
from hf_zipit.symmetry.spec import AxisLabel, MergeSpec, product_key

Combine = Callable[..., Tensor]
"""A rule with its options: from the experts' tensors in merged units, their labels and `base=` to the merged one."""


def check_base(config: MergeConfig, base: Any) -> None:
    """Raise RecipeError if a rule needs a base and has none, or the reverse."""
    rule = RULES.get(config.combine)
    if rule.needs_base and base is None:
        raise RecipeError(
            f"combine={config.combine!r} adds up what the experts learnt; pass the model that they "
            "started from as base="
        )
    if base is not None and not rule.needs_base:
        with_base = [name for name in RULES if RULES.get(name).needs_base]
        raise RecipeError(f"combine={config.combine!r} reads no base; leave base= out, or choose one of {with_base}.")


def check_rule(planned: Plan) -> None:
    """Raise RecipeError if a rule's options are out of range, or it is not for so many experts."""
    rule, options = RULES.get(planned.config.combine), planned.config.combine_options
    zeros = torch.zeros(2, 2, dtype=torch.float64)
    rule.combine([zeros] * len(planned.tasks), (), planned, options, base=zeros, generator=torch.Generator())


def combine_trunk(planned: Plan, maps: Alignment, statistics: LayerStatistics | None = None) -> dict[str, Tensor]:
    """The merged tensors of the trunk, by their names in the source model.

    `statistics` are for rules that read some (`statistics_for`).

    Raises:
        SpecError: a tensor does not have the shape that its labels say, or integers that cannot be combined differ.
        ExpertError: a merged tensor is not finite.
    """
    combiner = Combiner(planned, maps, statistics)
    return {name: combiner.tensor(name) for name in sorted(planned.cut.trunk)}


class Combiner:
    """The rule of a plan, applied to tensors of the trunk one by one."""

    def __init__(self, planned: Plan, maps: Alignment, statistics: LayerStatistics | None = None) -> None:
        self.planned, self.maps, self.statistics = planned, maps, statistics
        self.rule, self.options = RULES.get(planned.config.combine), planned.config.combine_options
        self.trunk = Trunk(planned, maps)
        self.whole = self.rule.survey_of(self.trunk, self.options)

    def tensor(self, name: str, layer: Layer | None = None) -> Tensor:
        """The merged tensor, in the experts' dtype; `layer` is what a layerwise rule is given. Raises as above."""
        own, bases = self.trunk.read(name)
        planned, combine = self.planned, mean
        try:
            if name in self.trunk.trained:
                given = {"whole": self.whole, "generator": generator_of(planned.config.seed, name), "layer": layer}
                combine = partial(
                    self.rule.combine, plan=planned, options=self.options, **given, **self._read(name, own[0])
                )
            merged = combine_tensor(
                own, self.trunk.labels(name), self.maps, planned.spec, combine, bases, planned.base_shares
            )
        except SpecError as error:
            raise SpecError(f"the tensor {name} cannot be merged: {error}") from error
        if merged.is_floating_point() and not bool(torch.isfinite(merged).all()):
            raise ExpertError(
                f"the merged tensor {name} is not finite; check the experts' weights and the options of "
                f"combine={planned.config.combine!r}"
            )
        return merged

    def _read(self, name: str, tensor: Tensor) -> dict[str, Any]:
        """What is known of a parameter from data, as far as the rule wants it."""
        if self.statistics is None:
            return {}
        labels, found = self.trunk.labels(name), {}
        where = (self.statistics, self.planned.tasks, name)
        if "grams" in self.rule.wants:
            found["grams"] = merged_grams(*where, tensor, labels, self.maps, self.planned.spec)
        if "fisher" in self.rule.wants:
            found["fisher"] = merged_fisher(*where, labels, self.maps, self.planned.spec)
        return found


class Trunk:
    """The tensors of a plan's trunk. As an iterable, `Vectors`: task vectors in merged units, made as they are read.

    Attributes:
        trained: the parameters among the tensors, which rules combine; what was only counted is averaged.
    """

    def __init__(self, planned: Plan, maps: Alignment) -> None:
        self.planned, self.maps = planned, maps
        self.experts = [model_tensors(model) for model in planned.folded.values()]
        self.bases = [model_tensors(model) for model in planned.bases.values()]
        parameters = dict(planned.model.named_parameters(remove_duplicate=False))
        self.trained = {name for name in planned.cut.trunk if name in parameters}

    def read(self, name: str) -> tuple[list[Tensor], list[Tensor]]:
        """The experts' tensors and their bases', in their own units."""
        own, bases = ([in_float32(model[name]) for model in models] for models in (self.experts, self.bases))
        return own, bases

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
        for name in sorted(once & self.trained):
            moved, origin = self.moved(name)
            yield moved if origin is None else task_vectors(moved, origin)


def generator_of(seed: int, name: str) -> torch.Generator:
    """What draws for one parameter: the same for the same seed and name, whatever is drawn for others."""
    digest = sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def combine_tensor(
    tensors: Sequence[Tensor],
    labels: Sequence[AxisLabel],
    maps: Alignment,
    spec: MergeSpec,
    combine: Combine,
    bases: Sequence[Tensor] = (),
    base_shares: Sequence[float] | None = None,
) -> Tensor:
    """The merged tensor, in the experts' dtype.

    Args:
        tensors: the experts' tensors, of one shape and dtype.
        labels: one label per axis; none for a tensor that the forward pass does not read.
        maps, spec: the map of every movable space, and the sizes of all.
        combine: the rule.
        bases, base_shares: for rules that need them, as for `in_merged_units`.

    Raises:
        SpecError: as `combine_trunk` does.
    """
    if not tensors[0].is_floating_point():
        return _agreed(tensors, labels, maps)
    moved, origin = in_merged_units(tensors, labels, maps, spec, bases, base_shares)
    return combine(moved, labels, **({} if origin is None else {"base": origin})).to(tensors[0].dtype)


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
    own, started = (
        [to_merged(x.double(), labels, maps, spec, t) if labels else x.double() for t, x in enumerate(xs)]
        for xs in (tensors, bases)
    )
    if not started:
        return own, None
    shares = base_shares or [1 / len(started)] * len(started)
    if all(torch.equal(start, started[0]) for start in started):
        return own, started[0]
    origin = sum(share * start for share, start in zip(shares, started, strict=True))
    return [origin + (tensor - start) for tensor, start in zip(own, started, strict=True)], origin


def mean(tensors: Sequence[Tensor], labels: Sequence[AxisLabel], *, base: Tensor | None = None) -> Tensor:
    """The mean, which reads no base."""
    return sum(tensors) / len(tensors)


def merge_tensor(tensors: Sequence[Tensor], labels: Sequence[AxisLabel], maps: Alignment, spec: MergeSpec) -> Tensor:
    """The mean of the experts' tensors in merged units, sum_t M_t W_t U_t; see `combine_tensor`."""
    return combine_tensor(tensors, labels, maps, spec, mean)


def in_float32(tensor: Tensor) -> Tensor:
    """What is merged is not rounded to the experts' dtype, which may be coarse."""
    return tensor.float() if tensor.is_floating_point() else tensor


def _agreed(tensors: Sequence[Tensor], labels: Sequence[AxisLabel], maps: Mapping[str, Any]) -> Tensor:
    """The one value of integer or boolean tensors, such as position ids; of counters, the largest."""
    if not tensors[0].dim():
        return torch.stack(list(tensors)).amax(0)
    if any(name in maps for label in labels for name in product_key(label)):
        raise SpecError(f"A {tensors[0].dtype} tensor has an axis in a movable space; it cannot be averaged there.")
    if not all(torch.equal(tensors[0], other) for other in tensors[1:]):
        raise SpecError(f"The experts have different values in a {tensors[0].dtype} tensor, which cannot be averaged.")
    return tensors[0].clone()
