"""The alignment of a trunk: what the methods read, taken from moments and experts, and the maps they find."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from hf_zipit.align.align import align
from hf_zipit.maps.space_map import Alignment
from hf_zipit.observe import Moments
from hf_zipit.observe.record import probe_name
from hf_zipit.planning.plan import Plan
from hf_zipit.symmetry.proof import model_tensors
from hf_zipit.symmetry.spec import MergeSpec, ProductKey, Symmetry


def align_trunk(
    experts: Mapping[str, nn.Module],
    planned: Plan,
    moments: Moments | None,
    method: str,
    *,
    options: Mapping[str, Any] | None = None,
    residual: str = "match",
    overrides: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Alignment:
    """Maps of the movable spaces in the trunk."""
    correlations = {} if moments is None else {key: moments.correlation(key) for key in moments.keys()}  # noqa: SIM118
    covariances = {} if moments is None else covariances_of(moments, planned.spec)
    return align(
        planned.spec,
        correlations,
        len(experts),
        method,
        options=options,
        residual=residual,
        overrides=overrides,
        weights=[{n: t for n, t in model_tensors(m).items() if n in planned.cut.trunk} for m in experts.values()],
        widenable=planned.widenable,
        covariances=covariances,
        seed=seed,
    )


def covariances_of(moments: Moments, spec: MergeSpec) -> dict[ProductKey, Tensor]:
    """The covariances of the products with spaces that allow more than permutations, where their units are held.

    Dual units, such as those of a key, move by the inverse: pooled with the queries they would say nothing.
    """
    mixed = {name for name, space in spec.spaces.items() if space.symmetry > Symmetry.PERMUTATION}
    found = {}
    for key, probes in spec.products().items():
        held = [probe for probe in probes if not mixed & set(probe.reads)]
        if mixed & set(key) and held:
            found[key] = sum(moments.covariance(key, probe_name(probe)) for probe in held) / len(held)
    return found
