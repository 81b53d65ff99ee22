"""The alignment of a trunk: what the methods read, taken from moments and experts, and the maps they find."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_zipit.align.align import align
from hf_zipit.maps.space_map import Alignment
from hf_zipit.observation.moments import Moments
from hf_zipit.observation.record import probe_name
from hf_zipit.planning.plan import Plan
from hf_zipit.registry import METHODS
from hf_zipit.symmetry.proof import model_tensors
from hf_zipit.symmetry.spec import MergeSpec, ProductKey, Symmetry


def align_trunk(planned: Plan, moments: Moments | None = None) -> Alignment:
    """Maps of the movable spaces in the trunk; `moments` are those of the models that are aligned, if it needs any.

    Those are the plan's folded experts, or their bases where there are several: all experts of one base get its maps
    (arXiv 2410.12766).
    """
    matched = planned.matched
    if matched is not planned:
        position = {task: number for number, group in enumerate(planned.base_groups) for task in group}
        index = torch.tensor([position[task] for task in planned.tasks])
        return {name: found.of_experts(index) for name, found in align_trunk(matched, moments).items()}
    config = planned.config
    weights = [
        {name: tensor for name, tensor in model_tensors(model).items() if name in planned.cut.trunk}
        for model in planned.folded.values()
    ]
    return align(
        planned.spec,
        {} if moments is None else correlations_of(moments, METHODS.get(config.method).scope == "space"),
        len(planned.folded),
        config.method,
        options=config.options,
        residual=config.residual,
        overrides=config.overrides,
        weights=weights,
        widenable=planned.widenable,
        covariances={} if moments is None else covariances_of(moments, planned.spec),
        seed=config.seed,
    )


def correlations_of(moments: Moments, by_space: bool = False) -> dict[ProductKey, Tensor]:
    """The correlations of all products, on the CPU; those of single spaces, which are large, where the moments are if
    they are all that a matcher is given of a space."""
    found = ((key, moments.correlation(key)) for key in moments.keys())  # noqa: SIM118
    return {key: values if by_space and len(key) == 1 else values.cpu() for key, values in found}


def covariances_of(moments: Moments, spec: MergeSpec) -> dict[ProductKey, Tensor]:
    """The covariances of the products with spaces that allow more than permutations, where their units are held.

    Dual units, such as those of a key, move by the inverse: pooled with the queries they would say nothing.
    """
    mixed = {name for name, space in spec.spaces.items() if space.symmetry > Symmetry.PERMUTATION}
    found = {}
    for key, probes in spec.products().items():
        held = [probe for probe in probes if not mixed & set(probe.reads)]
        if mixed & set(key) and held:
            found[key] = sum(moments.covariance(key, probe_name(probe)).cpu() for probe in held) / len(held)
    return found
