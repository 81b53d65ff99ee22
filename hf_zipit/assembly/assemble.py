"""Assembly: merged trunk, the experts' own branches and the maps between them become one Hugging Face model."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_zipit.errors import ExpertError, SpecError
from hf_zipit.maps.products import merged_length
from hf_zipit.maps.space_map import Alignment
from hf_zipit.maps.transform import only_groups, unmerge_index, unmerge_matrix
from hf_zipit.modeling import ZipItConfig, build
from hf_zipit.planning.cut import Cut, ReadPoint, towers
from hf_zipit.planning.plan import Plan
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
    head_dims: Mapping[str, int] | None = None,
) -> PreTrainedModel:
    """The merged model, in eval mode, of the class for the experts' kind of head.

    The trunk's tensors are given by their name in the source model; the experts' outside it are copied. `readouts`
    take the place of U_t; `head_dims` is by path the width of a head in attention layers that have more and narrower
    heads than an expert's.
    """
    spec, cut, experts = planned.spec, planned.cut, planned.folded
    sources = {task: model_tensors(model) for task, model in experts.items()}
    first = sources[planned.tasks[0]]
    config = ZipItConfig(
        source_architecture=type(planned.model).__name__,
        source_config=planned.model.config,
        tasks=list(experts),
        task_labels=labels_of(experts),
        shared=list(cut.shared),
        entries=[_setting("module", entry, spec, maps, readouts) for entry in cut.entries],
        exits=[_setting("field", exit_, spec, maps, readouts) for exit_ in cut.exits],
        trunk_shapes={name: list(t.shape) for name, t in trunk.items() if t.shape != first[name].shape},
        head_dims=dict(head_dims or {}),
        depth=cut.depth,
        cut=first_own_block(spec, cut),
    )
    merged = build(config)
    fill(merged, sources, trunk)
    for number, task in enumerate(experts):
        key = merged.branch_names[task]
        modules = (*merged.entries[key], *merged.exits[key])
        for entry, module in zip((*cut.entries, *cut.exits), modules, strict=True):
            if readouts is not None:
                module.load_state_dict(dict(zip(("weight", "bias"), readouts[entry][number], strict=True)))
            elif only_groups(maps, entry.key):
                module.index.copy_(unmerge_index(maps, entry.label, number, spec))
            else:
                module.weight.data.copy_(unmerge_matrix(maps, entry.label, number, spec))
    return merged.eval()


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
    return merged


def first_own_block(spec: MergeSpec, cut: Cut) -> str | None:
    """The path of the first block outside the trunk, None where all blocks are in it."""
    own = (path for paths, count in zip(towers(spec), cut.blocks, strict=True) for path in paths[count:])
    return next(own, None)


def labels_of(experts: Mapping[str, PreTrainedModel]) -> dict[str, dict[int, str]]:
    """Every task's own classes; empty for models whose output has none."""
    kinds = ("ForImageClassification", "ForSequenceClassification", "ForTokenClassification")
    if not type(next(iter(experts.values()))).__name__.endswith(kinds):
        return {}
    return {task: dict(model.config.id2label) for task, model in experts.items()}


def _setting(
    where: str, entry: ReadPoint, spec: MergeSpec, maps: Alignment, readouts: Readouts | None
) -> dict[str, Any]:
    units = spec.length(entry.label)
    size = merged_length(entry.label, maps, spec)
    kind = "index" if readouts is None and only_groups(maps, entry.key) else "dense"
    return {where: entry.target, "axis": entry.axis, "units": units, "size": size, "kind": kind}


@torch.no_grad()
def fill(merged: nn.Module, sources: Mapping[str, Mapping[str, Tensor]], trunk: Mapping[str, Tensor]) -> None:
    """Copy the merged tensors into the trunk and the experts' own into the branches, each tensor exactly once."""
    for name, tensor in model_tensors(merged.trunk).items():
        tensor.copy_(trunk[name])
    for task, own in sources.items():
        for name, tensor in model_tensors(merged.branch(task)).items():
            # A tensor of the trunk that hangs beside blocks, in no module of its own, is held by every branch.
            source = trunk[name] if name in trunk else own.get(name)
            if source is None:
                raise ExpertError(f"the tensor {name} of the merged model is missing in the expert {task!r}")
            tensor.copy_(source)
