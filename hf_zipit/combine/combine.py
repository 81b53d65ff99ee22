"""The trunk of a merge: every tensor that the experts will share, combined by one rule."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from hf_zipit.errors import SpecError
from hf_zipit.maps.space_map import Alignment
from hf_zipit.maps.transform import plain_average
from hf_zipit.planning.plan import Plan
from hf_zipit.registry import RULES
from hf_zipit.symmetry.proof import model_tensors


def combine_trunk(
    experts: Mapping[str, nn.Module], planned: Plan, alignment: Alignment, combine: str = "average"
) -> dict[str, Tensor]:
    """The merged tensors of the trunk, by their names in the source model."""
    rule = RULES.get(combine).function
    spec = planned.spec
    experts_tensors = [model_tensors(model) for model in experts.values()]
    merged = {}
    for name in sorted(planned.cut.trunk):
        tensors = [in_float32(own[name]) for own in experts_tensors]
        labels = spec.axes.get(name)  # what the forward pass does not read has none
        try:
            merged[name] = rule(tensors, labels, alignment, spec) if labels is not None else plain_average(tensors)
        except SpecError as error:
            raise SpecError(f"the tensor {name} cannot be merged: {error}") from error
    return merged


def in_float32(tensor: Tensor) -> Tensor:
    """What is merged is not rounded to the experts' dtype, which may be coarse."""
    return tensor.float() if tensor.is_floating_point() else tensor
