"""One task of a merged model as a plain model of the experts' class, so that merged models can be merged again.

The trunk is the model's first part, the branch the rest. In between stands the entry, `x_t = U_t x`, for which a plain
model has no place. Two ways lead it away:

- where U_t only orders units, the trunk itself is put into the task's order (a symmetry of the trunk);
- where the modules that read the trunk are linear, as heads are, `W (U x + b) = (W U) x + W b`.

A branch that starts with a whole block (depth below 1) whose U_t merges units of one expert leaves neither: adding to
the residual stream and normalising it do not commute with U_t. That is an error, and so is any difference of the
outputs: what is returned was run beside the merged model.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_zipit.adapters import example_inputs
from hf_zipit.errors import ExpertError
from hf_zipit.modeling.base import ZipItPreTrainedModel
from hf_zipit.modeling.configuration import ZipItConfig
from hf_zipit.modeling.empty_model import empty_model, untie
from hf_zipit.modeling.entries import DenseEntry, Entry
from hf_zipit.modeling.head_dims import head_dim_name
from hf_zipit.planning.cut import ReadPoint, cut_model
from hf_zipit.registry import CONVERSIONS
from hf_zipit.symmetry.group import transform
from hf_zipit.symmetry.proof import model_tensors
from hf_zipit.symmetry.spec import MergeSpec, ProductKey, fitted, product_key

TOLERANCE = 1e-4
"""Largest relative difference to the outputs of the merged model."""


@partial(CONVERSIONS.add, "expert")
@torch.no_grad()
def plain_expert(merged: ZipItPreTrainedModel, task: str) -> PreTrainedModel:
    """The model of the experts' class that computes what the merged one computes for a task.

    It is in eval mode, on the CPU, and shares no memory with the merged one. The output's own fields are the same;
    features inside nested outputs (CLIP's towers) may be in the merged basis.

    Raises:
        ExpertError: if no plain model can compute the task.
    """
    config, key = merged.config, merged.branch_names[merged.known(task)]
    if config.rescaled is not None:
        raise ExpertError(_cannot(merged, task, "it is rescaled and shifted per task; merge without that correction"))
    if config.surgery is not None:
        raise ExpertError(_cannot(merged, task, "its features are corrected per task; merge without surgery"))
    if config.mixtures:
        raise ExpertError(_cannot(merged, task, "its MLPs are weighed for every sample; merge without that"))
    if config.residues:
        raise ExpertError(_cannot(merged, task, "it has residues per task; take the expert that it was merged from"))
    if config.output_bias:
        reason = "its head rules out tokens that only other experts have; take the expert that it was merged from"
        raise ExpertError(_cannot(merged, task, reason))
    model = empty_model(with_heads(config, merged, task), task).eval()
    own = model_tensors(model)  # tables of biases have a column for every head
    if any(list(own[name].shape) != list(shape) for name, shape in config.trunk_shapes.items()):
        raise ExpertError(_cannot(merged, task, "its merged layers are wider or narrower than an expert's"))
    trunk, branch = model_tensors(merged.trunk), model_tensors(merged.branches[key])
    found = {name: (trunk if name in trunk else branch)[name] for name in model_tensors(model)}
    found = {name: tensor.detach().cpu() for name, tensor in found.items()}
    if config.entries or config.exits:
        found = _without_readouts(merged, task, model, found, set(trunk))
    for name, tensor in model_tensors(model).items():
        tensor.copy_(found[name])
    _tie(model)
    if difference(merged, model, task) > TOLERANCE:
        reason = "units of one expert were merged before its branch; merge at depth 1, or by 'permute'"
        raise ExpertError(_cannot(merged, task, reason))
    model.config.architectures = [type(model).__name__]
    model.name_or_path = merged.name_or_path
    model.config._commit_hash = getattr(config, "_commit_hash", None)
    model.merged_task = task  # for the recipe of the next merge
    return model


def _tie(model: PreTrainedModel) -> None:
    """Tie what is tied in the experts' class, if it came out equal; else its configuration says that nothing is."""
    own = model_tensors(model)
    ties = model.get_expanded_tied_weights_keys(all_submodels=True)
    if all(own[name].equal(own[source]) for name, source in ties.items() if {name, source} <= own.keys()):
        model.tie_weights()
    else:
        untie(model.config)


def with_heads(config: ZipItConfig, merged: ZipItPreTrainedModel, task: str) -> ZipItConfig:
    """The configuration with the trunk's number of heads as the source's own.

    Raises:
        ExpertError: if layers of one tower have different numbers of heads, which no plain model can have.
    """
    if not config.head_dims:
        return config
    changed = copy.deepcopy(config)
    plain = empty_model(changed, task)
    towers: dict[int, tuple[PreTrainedConfig, set[int]]] = {}
    for path, module in plain.named_modules():
        if (name := head_dim_name(module)) is not None:
            own = getattr(module, "config", plain.config)
            old = getattr(module, name)
            towers.setdefault(id(own), (own, set()))[1].add(old // config.head_dims.get(path, old))
    for own, factors in towers.values():
        if len(factors) > 1:
            reason = "its layers have different numbers of heads; merge at depth 1, refit with split_heads off"
            raise ExpertError(_cannot(merged, task, reason))
        (factor,), heads = factors, own.num_attention_heads
        if factor > 1 and isinstance(getattr(own, "head_dim", None), int):
            reason = "its heads are narrower than its configuration's head_dim; refit with split_heads off"
            raise ExpertError(_cannot(merged, task, reason))
        # Some classes have a number for every stage.
        own.num_attention_heads = [n * factor for n in heads] if isinstance(heads, (list, tuple)) else heads * factor
    changed.source_config = plain.config
    return changed


def _cannot(merged: ZipItPreTrainedModel, task: str, reason: str) -> str:
    return f"the task {task!r} of this merged model cannot be a plain {merged.config.source_architecture}: {reason}"


def _without_readouts(
    merged: ZipItPreTrainedModel, task: str, model: PreTrainedModel, tensors: dict[str, Tensor], trunk: set[str]
) -> dict[str, Tensor]:
    """The plain model's tensors with the entries and exits led away."""
    config, key = merged.config, merged.branch_names[task]
    spec = MergeSpec.from_model(model)
    depth = 1.0 if config.depth is None else config.depth
    cut = cut_model(model, spec, depth if config.cut is None else config.cut)
    settings = [*config.entries, *config.exits]
    readouts = [*cut.entries, *cut.exits]
    targets = [setting.get("module", setting.get("field")) for setting in settings]
    if [readout.target for readout in readouts] != targets:
        raise ExpertError(_cannot(merged, task, "its configuration does not say where it was cut"))
    maps = dict(zip(readouts, [*merged.entries[key], *merged.exits[key]], strict=True))
    tensors = dict(tensors)
    orders = _orders(maps, spec)
    for name in trunk & tensors.keys() & spec.axes.keys():
        tensors[name] = transform(tensors[name], spec.axes[name], spec, orders)
    for readout in cut.entries:
        if readout.key[0] not in orders:
            _fold(readout, maps[readout], model, tensors, trunk, spec)
    return tensors


def _orders(maps: Mapping[ReadPoint, Entry], spec: MergeSpec) -> dict[str, Tensor]:
    """By space the order of units, int64 `[units]`, where every readout of the space only orders them."""
    found: dict[str, Tensor] = {}
    mixed: set[str] = set()
    for readout, entry in maps.items():
        order = _order(entry)
        space = readout.key[0]
        if (
            len(readout.key) > 1
            or order is None
            or spec.spaces[space].within
            or not torch.equal(found.setdefault(space, order), order)
        ):
            mixed.update(readout.key)
    return {space: order for space, order in found.items() if space not in mixed}


def _order(entry: Entry) -> Tensor | None:
    """The order that an entry puts units into; None if it does more."""
    if isinstance(entry, DenseEntry):
        return None
    index = entry.index.cpu()
    return index if torch.equal(index.sort().values, torch.arange(entry.size)) else None


def _fold(
    readout: ReadPoint, entry: Entry, model: nn.Module, tensors: dict[str, Tensor], trunk: set[str], spec: MergeSpec
) -> None:
    """Put U_t, and where it has one its bias, into the linear layers of the branch that read the trunk here.

    Where such a layer has no bias (CLIP's projections), the trunk's last one is shifted by s with W U_t s = W b.
    """
    weight, bias = as_matrix(entry)
    for name in sorted(tensors.keys() & spec.axes.keys() - trunk):
        owner, _, leaf = name.rpartition(".")
        reads = [axis for axis, label in enumerate(spec.axes[name]) if product_key(label) == readout.key]
        if reads != [1] or leaf != "weight" or not isinstance(model.get_submodule(owner), nn.Linear):
            continue  # if it matters, the outputs will differ
        matrix, own, last = tensors[name].double(), f"{owner}.bias", _last_bias(readout.key, trunk, spec)
        tensors[name] = (matrix @ weight).to(tensors[name].dtype)
        if own in tensors:
            tensors[own] = (tensors[own].double() + matrix @ bias).to(tensors[own].dtype)
        elif bias.any() and last is not None:
            shift = torch.linalg.pinv(matrix @ weight) @ (matrix @ bias)
            tensors[last] = (tensors[last].double() + shift).to(tensors[last].dtype)


def _last_bias(key: ProductKey, trunk: set[str], spec: MergeSpec) -> str | None:
    """The bias of the trunk's last module that writes the units of `key`."""
    names = [f"{module}.bias" for module in reversed(spec.modules)]
    return next((n for n in names if n in trunk and [product_key(a) for a in spec.axes.get(n, ())] == [key]), None)


def as_matrix(entry: Entry) -> tuple[Tensor, Tensor]:
    """U_t, float64 `[d, k]`, and its bias `[d]`."""
    if isinstance(entry, DenseEntry):
        return entry.weight.detach().cpu().double(), entry.bias.detach().cpu().double()
    one_hot = torch.eye(entry.size, dtype=torch.float64)[entry.index.cpu()]
    return one_hot, torch.zeros(entry.units, dtype=torch.float64)


@torch.no_grad()
def difference(merged: ZipItPreTrainedModel, model: PreTrainedModel, task: str) -> float:
    """The largest relative difference of the outputs' own tensors, on the adapter's example inputs."""
    inputs = example_inputs(model)
    mode = merged.training
    expected, got = merged.eval()(**fitted(inputs, merged), task=task), model(**inputs)
    merged.train(mode)
    worst = 0.0
    for name, value in expected.items():
        if isinstance(value, Tensor):
            error = (got[name] - value.cpu()).abs().max() / value.abs().max().clamp_min(1e-12).cpu()
            worst = max(worst, float(error))
    return worst
