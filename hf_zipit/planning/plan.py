"""The plan: what a merge will do, worked out from the experts alone, before any data is touched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn

from hf_zipit.errors import SpecError
from hf_zipit.maps.rows import check_axes
from hf_zipit.planning.compatible import check_experts
from hf_zipit.planning.cut import Cut, cut_model
from hf_zipit.symmetry.folding import Model, fold
from hf_zipit.symmetry.proof import model_tensors
from hf_zipit.symmetry.spec import MergeSpec
from hf_zipit.symmetry.summary import coverage

BYTES_PER_MOMENT = 8
"""Second moments are accumulated in float64."""


@dataclass(frozen=True)
class Plan:
    """What a merge will do.

    Attributes:
        architecture: the experts' class.
        tasks: the experts, in order.
        spec: the architecture's spaces and labels; spaces that only branches have are fixed.
        cut: what is merged and what stays apart.
        parameters: elements of one expert, of the `trunk`, of all `branches`, of the `merged` model and of all
            `experts`.
        coverage: elements of the trunk under `movable` spaces, under `fixed` ones only, and `unused` by the forward
            pass.
        moment_bytes: memory of the moments.
        passes: forward passes over the calibration data (of all experts together), 0 where the method needs none.
        widenable: spaces that may be wider in the merged model than in an expert, where the method needs to know.
    """

    architecture: str
    tasks: tuple[str, ...]
    spec: MergeSpec
    cut: Cut
    parameters: Mapping[str, int]
    coverage: Mapping[str, int]
    moment_bytes: int
    passes: int
    widenable: frozenset[str] = frozenset()

    def to_dict(self) -> dict[str, Any]:
        """The plan without the spec's tables, ready for JSON."""
        return {
            "architecture": self.architecture,
            "tasks": list(self.tasks),
            "depth": self.cut.depth,
            "blocks_in_trunk": list(self.cut.blocks),
            "shared_modules": list(self.cut.shared),
            "entries": [asdict(entry) for entry in self.cut.entries],
            "spaces": {
                name: {"size": space.size, "symmetry": str(space.symmetry), "within": list(space.within)}
                for name, space in self.spec.spaces.items()
            },
            "unknown_ops": {name: list(modules) for name, modules in self.spec.unknown_ops.items()},
            "parameters": dict(self.parameters),
            "coverage": dict(self.coverage),
            "folded": [norm.weight for norm in self.spec.folds],
            "moment_bytes": self.moment_bytes,
            "passes": self.passes,
        }


def make_plan(experts: Mapping[str, nn.Module], depth: float | str, *, passes: int = 0, folding: bool = False) -> Plan:
    """Check the experts, infer the spec, divide the model.

    With `folding` the spec is that of the experts with their norms folded: see `fold_experts`.

    Raises:
        ExpertError: if the experts do not fit each other, or one holds NaN.
        SpecError: if the model cannot be traced or cut, or a tensor of the trunk is covered by no rule.
        RecipeError: if the depth is no share and no block.
    """
    first = next(iter(experts.values()))
    spec = MergeSpec.from_model(first, folding=folding)
    check_experts(experts, spec.head)
    cut = cut_model(first, spec, depth)
    tensors = model_tensors(first)
    spec = cut.trunk_spec(spec)
    check_coverage(spec, cut)
    sizes = {task: sum(p.numel() for p in model.parameters()) for task, model in experts.items()}
    trunk = {name for name, _ in first.named_parameters() if name in cut.trunk}
    in_trunk = sum(tensors[name].numel() for name in trunk)
    branches = sum(  # a head that is tied to the embeddings is untied: every task keeps its own
        sum(p.numel() for name, p in model.named_parameters(remove_duplicate=False) if name not in cut.trunk)
        for model in experts.values()
    )
    width = len(experts)
    return Plan(
        architecture=spec.architecture,
        tasks=tuple(experts),
        spec=spec,
        cut=cut,
        parameters={
            "expert": next(iter(sizes.values())),
            "experts": sum(sizes.values()),
            "trunk": in_trunk,
            "branches": branches,
            "merged": in_trunk + branches,
        },
        coverage=coverage(spec, first, trunk),
        moment_bytes=sum(BYTES_PER_MOMENT * (width * spec.size(probe.key)) ** 2 for probe in spec.probes),
        passes=passes,
    )


def with_readouts(planned: Plan) -> Plan:
    """The plan of a refit, which fits an affine map `[d, d + 1]` for every place and task that reads the trunk."""
    if not planned.cut.trunk:
        return planned
    sizes = [planned.spec.length(entry.label) for entry in (*planned.cut.entries, *planned.cut.exits)]
    readouts = len(planned.tasks) * sum(size * (size + 1) for size in sizes)
    grown = {part: planned.parameters[part] + readouts for part in ("branches", "merged")}
    return replace(planned, parameters={**planned.parameters, **grown})


def fold_experts(experts: Mapping[str, Model], planned: Plan) -> dict[str, Model]:
    """The experts that every stage after the plan works on: with their norms folded where the plan says so.

    They compute what the experts compute, and share all tensors that folding does not change.

    Raises:
        ExpertError: if a norm cannot be folded.
    """
    if not planned.spec.folds:
        return dict(experts)
    return {task: fold(model, planned.spec.folds, f"the expert {task!r}") for task, model in experts.items()}


def check_coverage(spec: MergeSpec, cut: Cut) -> None:
    """Every tensor of the trunk has a label on each axis, or is known to be unused; else an error names it."""
    for name in sorted(cut.trunk):
        if name not in spec.axes and name not in spec.unused:
            raise SpecError(f"the tensor {name} is covered by no rule; trace the model with inputs that use it")
        try:
            check_axes(spec.axes.get(name, ()), spec)
        except SpecError as error:
            raise SpecError(f"the tensor {name} cannot be merged: {error}") from error
