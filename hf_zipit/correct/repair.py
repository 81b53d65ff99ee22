"""REPAIR (Jordan et al., arXiv 2211.08403): every merged unit gets the mean and standard deviation its units had.

Averaging units that are not perfectly correlated shrinks their variance, a little more with every layer. For every
linear, convolution, embedding or BatchNorm layer of the trunk the target is the average, over the units that were
merged into one, of their means and standard deviations in their own experts. The rescaling y -> a y + c is folded into
the layer's own weight and bias (a BatchNorm's affine part), so that the architecture stays as it is. Where a layer has
no bias only the standard deviation can be met.

Two forms. *Measured*: the merged model runs over the calibration data once, all samples together; every layer is
corrected as it is reached, so that those behind it see the corrected values. *From moments*: no forward pass at all. A
merged layer's input has mean M mu and covariance M C M^T, its variances rescaled to the target as if it had been
repaired already; its output the mean W M mu + b and the variances diag(W M C M^T W^T). That works for linear layers
whose input was observed (attention, MLP); others are left alone. A layer that runs more than once in a forward pass is
left alone, too: no single rescaling suits all its passes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_zipit.correct.correction import register
from hf_zipit.correct.sites import Site, is_batch_norm, layers
from hf_zipit.correct.statistics import (
    Statistics,
    UnitSums,
    along,
    measure,
    mixed_in_merged,
    shared_statistics,
    towards,
    watching,
)
from hf_zipit.data.calibration import Calibration, pieces
from hf_zipit.data.processes import running
from hf_zipit.errors import DataError, RecipeError
from hf_zipit.maps.space_map import Alignment
from hf_zipit.maps.transform import features_to_merged, only_groups
from hf_zipit.observation.moments import Moments
from hf_zipit.observation.record import mask_of, probe_name
from hf_zipit.planning.plan import Plan
from hf_zipit.symmetry.spec import Factor, MergeSpec, Probe, factors, fitted, product_key

PIECE = 64
"""Samples that an expert is given at once."""


@register("repair")
def repair(
    merged: PreTrainedModel,
    planned: Plan,
    alignment: Alignment,
    calibration: Calibration,
    moments: Moments | None,
    *,
    statistics: str = "measured",
    samples: int = 256,
    eps: float = 1e-5,
) -> None:
    """Fold a rescaling of every unit into the trunk's layers.

    Args:
        statistics: `"measured"` on the data, all of which all experts see, or from the experts' `"moments"`.
        merged, planned, alignment, calibration, moments, samples, eps: see `hf_zipit.correct.correction`.

    Raises:
        RecipeError: for an unknown form, or one that finds nothing to do.
        DataError: if moments are asked for and the merge gathered none.
    """
    first = planned.model
    sites = {site.module: site for site in layers(first, planned) if is_folding(first.get_submodule(site.module))}
    if statistics == "moments":
        with torch.no_grad():
            _repair_from_moments(merged, planned, alignment, moments, sites, eps)
    elif statistics == "measured":
        _repair_measured(merged, planned, alignment, calibration, sites, samples, eps)
    else:
        raise RecipeError(f"repair's statistics is {statistics!r}; it must be 'measured' or 'moments'")


def is_folding(module: nn.Module) -> bool:
    """Whether a rescaling of the output can be folded into the module's own tensors."""
    kinds = (nn.Linear, Conv1D, nn.Embedding, nn.modules.conv._ConvNd)
    return isinstance(module, kinds) or is_batch_norm(module)


def fold(module: nn.Module, scale: Tensor, shift: Tensor) -> Tensor:
    """Fold `scale * y + shift` into a layer that puts out y; returns the shift it could take, `[units]`."""
    if isinstance(module, nn.Embedding):
        module.weight.copy_(along(module.weight.double(), scale, shift, -1))
        return shift
    axis = -1 if isinstance(module, Conv1D) else 0
    module.weight.copy_(along(module.weight.double(), scale, torch.zeros_like(shift), axis))
    if module.bias is None:
        return torch.zeros_like(shift)
    module.bias.copy_(along(module.bias.double(), scale, shift, 0))
    return shift


def _repair_measured(
    merged: PreTrainedModel,
    planned: Plan,
    alignment: Alignment,
    calibration: Calibration,
    sites: Mapping[str, Site],
    samples: int,
    eps: float,
) -> None:
    inputs = calibration.together(None, samples)
    found = []
    for t, expert in enumerate(planned.folded.values()):
        view = mixed_in_merged(alignment, planned.spec, t)
        with running([expert], calibration.device):
            found.append(measure(expert, sites, pieces(inputs, PIECE), calibration.all_reduce, view=view))
    targets = {
        name: shared_statistics([own[name] for own in found], site, alignment, planned.spec)
        for name, site in sites.items()
        if all(name in own for own in found)
    }
    mask = mask_of(inputs)

    def see(name: str, value: Tensor) -> Tensor:
        axis = sites[name].axis
        now = UnitSums.of(value, axis, mask).statistics(calibration.all_reduce)
        scale, shift = (x.to(value.device) for x in towards(targets[name], now, eps))
        taken = fold(modules[name], scale, shift)
        return along(value, scale, taken, axis)

    modules = {name: merged.trunk.get_submodule(name) for name in targets}
    with running([merged], calibration.device), watching(modules, {name: sites[name] for name in targets}, see):
        merged(**fitted(inputs, merged), task=planned.tasks[0])


def _repair_from_moments(
    merged: PreTrainedModel,
    planned: Plan,
    alignment: Alignment,
    moments: Moments | None,
    sites: Mapping[str, Site],
    eps: float,
) -> None:
    if moments is None:
        raise DataError(
            "repair from moments needs a method that gathers them, such as 'zip'; use statistics='measured'"
        )
    observed = False
    for path, site in sites.items():
        module = merged.trunk.get_submodule(path)
        probe = probe_of(path, planned.spec) if isinstance(module, (nn.Linear, Conv1D)) else None
        if probe is None:
            continue
        observed = True
        name = probe_name(probe)
        mean, covariance = (found(probe.key, name).cpu() for found in (moments.mean, moments.covariance))
        size = len(mean) // len(planned.tasks)
        own = []
        for t, expert in enumerate(planned.folded.values()):
            units = slice(t * size, (t + 1) * size)
            view = partial(mixed_in_merged(alignment, planned.spec, t), replace(site, axis=0))
            own.append(output_statistics(expert.get_submodule(path), mean[units], covariance[units, units], view))
        target = shared_statistics(own, site, alignment, planned.spec)
        given = merged_input(probe, mean, covariance, alignment, planned.spec, len(planned.tasks))
        fold(module, *towards(target, output_statistics(module, *given), eps))
    if not observed:
        raise RecipeError(
            f"repair from moments finds no linear layer of {planned.architecture} whose input was observed, so that "
            "it would change nothing; use statistics='measured'"
        )


def probe_of(path: str, spec: MergeSpec) -> Probe | None:
    """The probe of a layer's input: its own, or a neighbour's that reads the same (query's for key and value)."""
    weight = spec.axes[f"{path}.weight"]
    # Not what it writes.
    keys = [product_key(label) for label in weight if any(factor.dual for factor in factors(label))]
    inputs = [p for p in spec.probes if p.where == "input" and p.key in keys]
    own = next((p for p in inputs if p.module == path), None)
    parent = path.rpartition(".")[0]
    return own or next((p for p in inputs if p.module.rpartition(".")[0] == parent), None)


def merged_input(
    probe: Probe, mean: Tensor, covariance: Tensor, alignment: Alignment, spec: MergeSpec, experts: int
) -> tuple[Tensor, Tensor]:
    """Mean `[k]` and covariance `[k, k]` of merged, repaired units, from the moments of all experts' `[T d]`."""
    label = tuple(Factor(name) for name in probe.key)
    size = len(mean) // experts
    eye = torch.eye(size, dtype=torch.float64)
    merge = torch.cat([features_to_merged(eye, 0, label, alignment, spec, t) for t in range(experts)], 1) / experts
    merged_covariance = merge @ covariance @ merge.T
    std = merged_covariance.diagonal().clamp_min(0).sqrt()
    if only_groups(alignment, probe.key):
        target = merge @ covariance.diagonal().clamp_min(0).sqrt()
    else:  # the mean over the experts of what their rotated units vary by
        own = [merge[:, i : i + size] * experts for i in range(0, len(mean), size)]
        blocks = [covariance[i : i + size, i : i + size] for i in range(0, len(mean), size)]
        variances = [((m @ block) * m).sum(1).clamp_min(0) for m, block in zip(own, blocks, strict=True)]
        target = torch.stack([variance.sqrt() for variance in variances]).mean(0)
    ratio = torch.where(std > 0, target / std, torch.ones_like(std))
    return merge @ mean, merged_covariance * torch.outer(ratio, ratio)


def output_statistics(
    module: nn.Module, mean: Tensor, covariance: Tensor, view: Callable[[Tensor], Tensor] = lambda x: x
) -> Statistics:
    """Of a linear layer's output, in the units that `view` shows, from mean `[d]` and covariance of its input."""
    weight = module.weight.detach().double().cpu()
    weight = weight.T if isinstance(module, Conv1D) else weight
    bias = torch.zeros(len(weight)).double() if module.bias is None else module.bias.detach().double().cpu()
    weight, bias = view(weight), view(bias)
    variance = ((weight @ covariance) * weight).sum(1).clamp_min(0)
    return Statistics(weight @ mean + bias, variance.sqrt())
