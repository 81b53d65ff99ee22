"""Assembly: merged trunk, the experts' own branches and the maps between them become one Hugging Face model."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_zipit.combine.combine import CombinedTrunk
from hf_zipit.errors import ExpertError, SpecError
from hf_zipit.maps.products import merged_length
from hf_zipit.maps.space_map import Alignment
from hf_zipit.maps.transform import only_groups, unmerge_index, unmerge_matrix
from hf_zipit.modeling import ZipItConfig, ZipItPreTrainedModel, build
from hf_zipit.modeling.empty_model import has_output_bias
from hf_zipit.modeling.head_dims import HeadCut
from hf_zipit.planning.compatible import CLASSIFIERS, class_names
from hf_zipit.planning.cut import Cut, ReadPoint, towers
from hf_zipit.planning.plan import Plan
from hf_zipit.steady import forget
from hf_zipit.symmetry.proof import model_tensors
from hf_zipit.symmetry.spec import MergeSpec

Readouts = Mapping[ReadPoint, Sequence[tuple[Tensor, Tensor]]]
"""Per entry or exit and task a fitted map `(weight [d, k], bias [d])` from merged units to the expert's own."""


def assemble(
    planned: Plan,
    trunk: Mapping[str, Tensor],
    maps: Alignment,
    *,
    readouts: Readouts | None = None,
    head_cuts: Mapping[str, HeadCut] | None = None,
) -> PreTrainedModel:
    """The merged model, in eval mode, of the class for the experts' kind of head.

    The trunk's tensors are given by their name in the source model; the experts' outside it are copied. `readouts`
    take the place of U_t; `head_cuts` is by path what attention layers have whose heads are more and narrower than an
    expert's.
    """
    shapes = {name: tensor.shape for name, tensor in trunk.items()}
    merged = build(configured(planned, shapes, maps, readouts, head_cuts))
    fill(merged, MergedTensors(planned, trunk, maps, merged, readouts))
    return merged.eval()


def configured(
    planned: Plan,
    shapes: Mapping[str, Sequence[int]],
    maps: Alignment,
    readouts: Readouts | None = None,
    head_cuts: Mapping[str, HeadCut] | None = None,
) -> ZipItConfig:
    """The merged model's configuration; `shapes` are those of the trunk's tensors, the rest is as for `assemble`."""
    spec, cut, experts = planned.spec, planned.cut, planned.folded
    first = model_tensors(planned.model)
    return ZipItConfig(
        source_architecture=type(planned.model).__name__,
        source_config=planned.model.config,
        tasks=list(experts),
        task_labels=labels_of(experts),
        shared=list(cut.shared),
        entries=[_setting("module", entry, spec, maps, readouts) for entry in cut.entries],
        exits=[_setting("field", exit_, spec, maps, readouts) for exit_ in cut.exits],
        trunk_shapes={name: list(shape) for name, shape in shapes.items() if tuple(shape) != first[name].shape},
        head_dims={path: cut.width for path, cut in (head_cuts or {}).items()},
        rotary_pairs={path: cut.pairs for path, cut in (head_cuts or {}).items() if cut.pairs is not None},
        output_bias=has_output_bias(planned.model),
        depth=cut.depth,
        cut=first_own_block(spec, cut),
    )


@torch.no_grad()
def plain_module(planned: Plan, trunk: Mapping[str, Tensor]) -> nn.Module:
    """A module of the class of experts that are no Hugging Face models with the merged tensors, in eval mode.

    It has no tasks, because a plain module has no configuration that could say so, and no head of its own.

    Raises:
        SpecError: if something of the experts is not merged, or is not of the experts' size.
    """
    merged = copy.deepcopy(planned.model).eval()
    tensors = model_tensors(merged)
    apart = [name for name in tensors if name not in trunk]
    resized = [name for name, tensor in trunk.items() if tensor.shape != tensors[name].shape]
    if apart or resized or planned.cut.exits or planned.cut.entries:
        found = (*apart, *resized, *(place.target for place in (*planned.cut.exits, *planned.cut.entries)))[0]
        raise SpecError(
            f"{planned.architecture} is a plain torch module, which is merged as a whole or not at all, and {found} "
            "would be a task's own or of another size; merge it with depth=1 and a method that keeps sizes"
        )
    for name, tensor in trunk.items():
        tensors[name].copy_(tensor)
    forget(merged)
    return merged


def first_own_block(spec: MergeSpec, cut: Cut) -> str | None:
    """The path of the first block outside the trunk, None where all blocks are in it."""
    own = (path for paths, count in zip(towers(spec), cut.blocks, strict=True) for path in paths[count:])
    return next(own, None)


def labels_of(experts: Mapping[str, PreTrainedModel]) -> dict[str, dict[int, str]]:
    """Every task's own classes; empty for models whose output has none."""
    if not type(next(iter(experts.values()))).__name__.endswith(CLASSIFIERS):
        return {}
    return {task: class_names(model.config) for task, model in experts.items()}


def _setting(
    where: str, entry: ReadPoint, spec: MergeSpec, maps: Alignment, readouts: Readouts | None
) -> dict[str, Any]:
    units = spec.length(entry.label)
    size = merged_length(entry.label, maps, spec)
    kind = "index" if readouts is None and only_groups(maps, entry.key) else "dense"
    return {where: entry.target, "axis": entry.axis, "units": units, "size": size, "kind": kind}


class MergedTensors(Mapping[str, Tensor]):
    """Every tensor of a merged model by its name there, made or read when it is asked for.

    Args:
        planned, trunk, maps, readouts: as for `assemble`.
        merged: the model, which may be on the meta device.

    Raises:
        ExpertError: an expert lacks a tensor.
    """

    def __init__(
        self,
        planned: Plan,
        trunk: Mapping[str, Tensor],
        maps: Alignment,
        merged: ZipItPreTrainedModel,
        readouts: Readouts | None = None,
    ) -> None:
        self.spec, self.trunk, self.maps, self.readouts = planned.spec, trunk, maps, readouts
        self.sources = {task: model_tensors(model) for task, model in planned.folded.items()}
        self.places = {"entries": planned.cut.entries, "exits": planned.cut.exits}
        self.tasks = {key: task for task, key in merged.branch_names.items()}
        self.names = tuple(model_tensors(merged))

    def __getitem__(self, name: str) -> Tensor:
        part, _, rest = name.partition(".")
        if part == "trunk":
            return self.trunk[rest]
        key, _, own = rest.partition(".")
        task = self.tasks[key]
        if part in self.places:
            number, _, leaf = own.partition(".")
            return self._readout(self.places[part][int(number)], task, leaf)
        # A tensor of the trunk that hangs beside blocks, in no module of its own, is held by every branch.
        source = self.trunk[own] if own in self.trunk else self.sources[task].get(own)
        if source is None:
            raise ExpertError(f"the tensor {own} of the merged model is missing in the expert {task!r}")
        return source

    def pieces(self, name: str) -> Iterator[Tensor]:
        """A tensor in pieces whose entries follow each other, of a `CombinedTrunk` as it makes them."""
        part, _, rest = name.partition(".")
        if part == "trunk" and isinstance(self.trunk, CombinedTrunk):
            yield from self.trunk.pieces(rest)
        else:
            yield self[name]

    def _readout(self, place: ReadPoint, task: str, leaf: str) -> Tensor:
        number = list(self.sources).index(task)
        if self.readouts is not None:
            return self.readouts[place][number][leaf == "bias"]
        if leaf == "index":
            return unmerge_index(self.maps, place.label, number, self.spec)
        matrix = unmerge_matrix(self.maps, place.label, number, self.spec)
        return matrix if leaf == "weight" else matrix.new_zeros(len(matrix))

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


@torch.no_grad()
def fill(merged: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Copy the values into a model's tensors, each exactly once.

    Raises ExpertError for a value that has another shape than the model's configuration says.
    """
    for name, tensor in model_tensors(merged).items():
        value = values[name]
        if value.shape != tensor.shape:
            raise ExpertError(
                f"the tensor {name} of the merged model would be of shape {tuple(value.shape)}, but the experts' "
                f"configuration makes one of shape {tuple(tensor.shape)}"
            )
        tensor.copy_(value)
