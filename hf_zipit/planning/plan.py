"""The plan: what a merge will do, worked out from the experts alone, before any data is touched."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_zipit.config import AUTO, MergeConfig
from hf_zipit.errors import ExpertError, SpecError
from hf_zipit.maps.rows import check_axes
from hf_zipit.planning.compatible import check_experts
from hf_zipit.planning.cut import Cut, cut_model
from hf_zipit.steady import forget
from hf_zipit.symmetry.folding import fold
from hf_zipit.symmetry.proof import model_tensors
from hf_zipit.symmetry.spec import MergeSpec
from hf_zipit.symmetry.summary import coverage

logger = logging.getLogger(__name__)

UNREAD = 0.02
"""The share of the trunk's elements that may be read by no example input without a word."""

BYTES_PER_MOMENT = 8
"""Second moments are accumulated in float64."""


@dataclass(frozen=True, eq=False)
class Plan:
    """What a merge will do, and what it does it with: every stage takes it.

    Attributes:
        config: the settings, nothing left to choose.
        experts: the models by task, as they were given.
        folded: the models that every later stage works on: with their norms folded where the plan says so. They
            compute what the experts compute, and share all tensors that folding does not change.
        bases: by task the model that the expert started from, folded in the same way, one object for all experts
            that have it in common; empty where no rule asks for them.
        spec: the architecture's spaces and labels; spaces that only branches have are fixed.
        cut: what is merged and what stays apart.
        parameters: elements of one expert, of the `trunk`, of all `branches`, of the `merged` model and of all
            `experts`. Sizes are those of maps that group units; a method may make layers wider.
        coverage: elements of the trunk under `movable` spaces, under `fixed` ones only, and `unused` by the forward
            pass.
        moment_bytes: memory of the moments.
        needs: what the methods read: a subset of `{"moments", "covariances", "weights", "widths"}`.
        widenable: spaces that may be wider in the merged model than in an expert, where the method needs to know.
    """

    config: MergeConfig
    experts: Mapping[str, PreTrainedModel]
    folded: Mapping[str, PreTrainedModel]
    bases: Mapping[str, PreTrainedModel]
    spec: MergeSpec
    cut: Cut
    parameters: Mapping[str, int]
    coverage: Mapping[str, int]
    moment_bytes: int
    needs: frozenset[str] = frozenset()
    widenable: frozenset[str] = frozenset()

    @property
    def architecture(self) -> str:
        """The experts' class."""
        return self.spec.architecture

    @property
    def tasks(self) -> tuple[str, ...]:
        """The experts' names, in order."""
        return tuple(self.experts)

    @property
    def model(self) -> PreTrainedModel:
        """The first expert, for what all have in common."""
        return next(iter(self.folded.values()))

    @property
    def base_groups(self) -> tuple[tuple[str, ...], ...]:
        """The tasks by the base that they started from, in order; empty without bases."""
        groups: dict[int, tuple[str, ...]] = {}
        for task, base in self.bases.items():
            groups[id(base)] = (*groups.get(id(base), ()), task)
        return tuple(groups.values())

    @property
    def base_shares(self) -> tuple[float, ...]:
        """How much each task's base counts in the mean of all bases, whose experts may be more or fewer."""
        sizes = {task: len(group) for group in self.base_groups for task in group}
        return tuple(1 / (len(self.base_groups) * sizes[task]) for task in self.bases)

    @property
    def matched(self) -> Plan:
        """The plan whose `folded` models decide how units are aligned: bases, if there are several.

        Each base goes by the name of the first expert that started from it; the data stays that of all experts.
        """
        if len(self.base_groups) < 2:
            return self
        bases = {group[0]: self.bases[group[0]] for group in self.base_groups}
        return replace(self, folded=bases, bases={})

    @property
    def passes(self) -> int:
        """Forward passes of all experts over the calibration data before they are aligned, 0 where none is needed."""
        return int("moments" in self.needs)

    def to_dict(self) -> dict[str, Any]:
        """The plan without the models and the spec's tables, ready for JSON."""
        return {
            "architecture": self.architecture,
            "tasks": list(self.tasks),
            "config": self.config.to_dict(),
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


def make_plan(
    experts: Mapping[str, PreTrainedModel],
    config: MergeConfig,
    *,
    folding: bool = False,
    bases: Mapping[str, PreTrainedModel] | None = None,
) -> Plan:
    """The plan, but for what the methods need: check the experts, infer the spec, divide the model.

    With `folding` it is for the experts with their norms folded into their readers.

    Raises:
        ExpertError: if the experts do not fit each other, one holds NaN, or a norm cannot be folded.
        SpecError: if the model cannot be traced or cut, or a tensor of the trunk is covered by no rule.
        RecipeError: if the depth is no share and no block.
    """
    first = next(iter(experts.values()))
    for model in (*experts.values(), *(bases or {}).values()):
        forget(model)  # what was kept of earlier passes may be a part of a graph, which cannot be copied
    spec = MergeSpec.from_model(first, folding=folding)
    check_experts(experts, spec.head)
    cut = cut_model(first, spec, config.depth)
    tensors = model_tensors(first)
    spec = cut.trunk_spec(spec)
    check_coverage(spec, cut)
    warn_of_unread(spec, cut, first)
    check_bases(bases or {}, tensors, cut)
    trunk = {name for name, _ in first.named_parameters() if name in cut.trunk}

    def folded(models: Mapping[str, PreTrainedModel], what: str) -> dict[str, PreTrainedModel]:
        done: dict[int, PreTrainedModel] = {}  # a model that several tasks share stays one
        for task, model in models.items():
            if id(model) not in done:
                done[id(model)] = fold(model, spec.folds, f"the {what} {task!r}") if spec.folds else model
        return {task: done[id(model)] for task, model in models.items()}

    return Plan(
        config=config,
        experts=dict(experts),
        folded=folded(experts, "expert"),
        bases=folded(bases or {}, "base of"),
        spec=spec,
        cut=cut,
        parameters=count_parameters(experts, spec, cut, readouts=config.refit not in (None, AUTO)),
        coverage=coverage(spec, first, trunk),
        moment_bytes=sum(BYTES_PER_MOMENT * (len(experts) * spec.size(probe.key)) ** 2 for probe in spec.probes),
    )


def count_parameters(experts: Mapping[str, nn.Module], spec: MergeSpec, cut: Cut, *, readouts: bool) -> dict[str, int]:
    """Elements by part. A refit fits an affine map `[d, d + 1]` for every place and task that reads the trunk."""
    first = next(iter(experts.values()))
    sizes = [sum(p.numel() for p in model.parameters()) for model in experts.values()]
    in_trunk = sum(p.numel() for name, p in first.named_parameters() if name in cut.trunk)
    branches = sum(  # a head that is tied to the embeddings is untied: every task keeps its own
        sum(p.numel() for name, p in model.named_parameters(remove_duplicate=False) if name not in cut.trunk)
        for model in experts.values()
    )
    if readouts and cut.trunk:
        read = [spec.length(place.label) for place in (*cut.entries, *cut.exits)]
        branches += len(experts) * sum(size * (size + 1) for size in read)
    return {
        "expert": sizes[0],
        "experts": sum(sizes),
        "trunk": in_trunk,
        "branches": branches,
        "merged": in_trunk + branches,
    }


def check_bases(bases: Mapping[str, nn.Module], tensors: Mapping[str, Tensor], cut: Cut) -> None:
    """A base must have every tensor of the trunk in the experts' shape; raises ExpertError that names the first."""
    for task, base in bases.items():
        own = model_tensors(base)
        for name in sorted(cut.trunk):
            found = tuple(own[name].shape) if name in own else "missing"
            if found != tuple(tensors[name].shape):
                raise ExpertError(
                    f"the tensor {name} is {found} in the base of {task!r}, but {tuple(tensors[name].shape)} in the "
                    "experts; give the model that they were trained from, loaded with their class"
                )


def warn_of_unread(spec: MergeSpec, cut: Cut, model: nn.Module) -> None:
    """Warn where a good part of the trunk is read by no example input, such as a vision tower by a text alone."""
    sizes = {name: p.numel() for name, p in model.named_parameters() if name in cut.trunk}
    unread = {name: size for name, size in sizes.items() if name in spec.unused}
    if sum(unread.values()) > UNREAD * sum(sizes.values()):
        logger.warning(
            "Nothing of the example inputs of %s reaches %s (and %d tensors more): what is not reached is not aligned "
            "but combined as it is; pass example_inputs that use it.",
            spec.architecture, next(iter(unread)), len(unread) - 1,
        )  # fmt: skip


def check_coverage(spec: MergeSpec, cut: Cut) -> None:
    """Every tensor of the trunk has a label on each axis, or is known to be unused; else an error names it."""
    for name in sorted(cut.trunk):
        if name not in spec.axes and name not in spec.unused:
            raise SpecError(f"the tensor {name} is covered by no rule; trace the model with inputs that use it")
        try:
            check_axes(spec.axes.get(name, ()), spec)
        except SpecError as error:
            raise SpecError(f"the tensor {name} cannot be merged: {error}") from error
