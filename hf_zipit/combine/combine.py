"""The trunk of a merge: every tensor that the experts will share, brought into merged units and combined by one rule.

Everything is computed in float64, in which the mean of T equal float32 numbers is that number, for every T.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hf_zipit.combine.rule import BASE
from hf_zipit.config import MergeConfig
from hf_zipit.errors import ExpertError, RecipeError, SpecError
from hf_zipit.maps.space_map import Alignment
from hf_zipit.maps.transform import to_merged
from hf_zipit.planning.plan import Plan
from hf_zipit.registry import RULES
from hf_zipit.symmetry.proof import model_tensors
from hf_zipit.symmetry.spec import AxisLabel, MergeSpec, product_key

Combine = Callable[[Sequence[Tensor], Sequence[AxisLabel]], Tensor]
"""A rule with its options: from the experts' tensors in merged units, and their labels, to the merged one."""


def check_rule(config: MergeConfig, base: Any) -> None:
    """Raise RecipeError if a rule's options are out of range, or it needs a base and has none, or the reverse."""
    rule = RULES.get(config.combine)
    if rule.needs_base and base is None:
        raise RecipeError(
            f"combine={config.combine!r} adds up what the experts learnt; pass the model that they "
            "started from as base="
        )
    if base is not None and not rule.needs_base:
        with_base = [name for name in RULES if RULES.get(name).needs_base]
        raise RecipeError(f"combine={config.combine!r} reads no base; leave base= out, or choose one of {with_base}.")
    zeros = torch.zeros(2, dtype=torch.float64)
    bases = {BASE: zeros} if rule.needs_base else {}
    rule.function([zeros, zeros], (), None, **bases, **config.combine_options)


def combine_trunk(planned: Plan, maps: Alignment) -> dict[str, Tensor]:
    """The merged tensors of the trunk, by their names in the source model.

    Raises:
        SpecError: a tensor does not have the shape that its labels say, or integers that cannot be combined differ.
        ExpertError: a merged tensor is not finite.
    """
    rule = RULES.get(planned.config.combine)
    experts = [model_tensors(model) for model in planned.folded.values()]
    bases = [model_tensors(model) for model in planned.bases.values()]
    merged = {}
    for name in sorted(planned.cut.trunk):
        labels = planned.spec.axes.get(name, ())  # what the forward pass does not read has none
        tensors = [in_float32(own[name]) for own in experts]
        origins = [in_float32(own[name]) for own in bases]
        combine = partial(rule.function, plan=planned, **planned.config.combine_options)
        try:
            merged[name] = combine_tensor(tensors, labels, maps, planned.spec, combine, origins)
        except SpecError as error:
            raise SpecError(f"the tensor {name} cannot be merged: {error}") from error
        if merged[name].is_floating_point() and not bool(torch.isfinite(merged[name]).all()):
            raise ExpertError(
                f"the merged tensor {name} is not finite; check the experts' weights and the options of "
                f"combine={planned.config.combine!r}"
            )
    return merged


def combine_tensor(
    tensors: Sequence[Tensor],
    labels: Sequence[AxisLabel],
    maps: Alignment,
    spec: MergeSpec,
    combine: Combine,
    bases: Sequence[Tensor] = (),
) -> Tensor:
    """The merged tensor, in the experts' dtype.

    Args:
        tensors: the experts' tensors, of one shape and dtype.
        labels: one label per axis; none for a tensor that the forward pass does not read.
        maps, spec: the map of every movable space, and the sizes of all.
        combine: the rule.
        bases: for rules that need them, the tensor that each expert started from. It is aligned like its expert; the
            mean of the aligned ones is the origin (arXiv 2410.12766), from which every expert's task vector starts.

    Raises:
        SpecError: as `combine_trunk` does.
    """
    if not tensors[0].is_floating_point():
        return _agreed(tensors, labels, maps)
    own, started = (
        [to_merged(x.double(), labels, maps, spec, t) if labels else x.double() for t, x in enumerate(xs)]
        for xs in (tensors, bases)
    )
    if not started:
        return combine(own, labels).to(tensors[0].dtype)
    origin = sum(started) / len(started)
    moved = [origin + (tensor - start) for tensor, start in zip(own, started, strict=True)]
    return combine(moved, labels, base=origin).to(tensors[0].dtype)


def merge_tensor(tensors: Sequence[Tensor], labels: Sequence[AxisLabel], maps: Alignment, spec: MergeSpec) -> Tensor:
    """The mean of the experts' tensors in merged units, sum_t M_t W_t U_t; see `combine_tensor`."""
    return combine_tensor(tensors, labels, maps, spec, lambda own, _: sum(own) / len(own))


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
