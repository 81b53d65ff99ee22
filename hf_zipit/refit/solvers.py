"""The regression of every kind of site, from its values and targets to its new tensors; and of the readout maps.

Batch norms are folded into their convolution and restored with statistics that belong to the new weights; the affine
part of a norm is regressed channel by channel; embeddings and added parameters are means of their targets. Where a
branch leaves the trunk, U_t becomes the linear map that best reconstructs expert t's own features: for a linear head
that is the regression on its logits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx
from torch.nn import functional

from hf_zipit.errors import SpecError
from hf_zipit.maps.transform import unmerge_matrix
from hf_zipit.planning.cut import Cut, ReadPoint
from hf_zipit.refit.convolution import folded, patches, restored
from hf_zipit.refit.fit import Fit
from hf_zipit.refit.positions import at_rows
from hf_zipit.refit.program import Program
from hf_zipit.refit.regression import ChannelSums, GroupedGram, SecondMoments, ridge, scale_and_shift
from hf_zipit.refit.solvable import RefitSite, setting
from hf_zipit.refit.values import MERGED
from hf_zipit.symmetry.spec import AxisLabel


def solve(fit: Fit, site: RefitSite) -> None:
    """Write the solution of one site into the merged model."""
    SOLVERS[site.kind](fit, site)


def solve_linear(fit: Fit, site: RefitSite) -> None:
    weight = fit.matrix(site)
    gram = fit.gram(weight)
    for b in range(len(fit.values.batches)):
        x = fit.values.of(site.node.args[0], MERGED, b)
        rows, picked = fit.pick(site, b)
        gram.add(at_rows(x, -1, rows), fit.targets.of(site, b, rows), picked)
    fit.write(site, *ridge(gram.reduce(fit.all_reduce), weight, fit.config.ridge, site.bias is not None))


BATCHED = 2**24
"""Of a grouped convolution's moments about so many numbers are held at once."""


def solve_conv(fit: Fit, site: RefitSite) -> None:
    """Of one with groups every group is a regression of its own."""
    merged = fit.values.merged
    weight, names = merged[site.weight], norm_names(fit, site)
    bias = merged[site.bias] if site.bias else None
    if site.length is not None:  # the directions have lengths of their own
        lengths = merged[site.length]
        over = [axis for axis, size in enumerate(lengths.shape) if size == 1]
        weight = weight * (lengths / weight.square().sum(over, keepdim=True).sqrt().clamp_min(1e-30))
    norm = {role: merged[name] for role, name in names.items()}
    eps = float(site.norm.args[7]) if site.norm is not None else None  # type: ignore[arg-type]
    flat, _ = folded(weight.flatten(1), bias, norm | {"eps": eps} if eps is not None else None)
    prior = flat.unflatten(0, (site.groups, -1))
    intercept = site.bias is not None or site.norm is not None
    moments = []
    for first in range(0, site.groups, at_once := max(1, BATCHED // prior.shape[2] ** 2)):
        moments += _moments_of_groups(fit, site, weight, prior[first : first + at_once], first)
    found = [ridge(own, start, fit.config.ridge, intercept) for own, start in zip(moments, prior, strict=True)]
    slope, shift = (torch.cat(parts) for parts in zip(*found, strict=True))
    fit.write(site, slope, shift if eps is None else torch.zeros_like(shift))
    if eps is not None:
        norms = [restored(*own, sums, eps) for own, sums in zip(found, moments, strict=True)]
        for role, name in names.items():
            merged[name] = torch.cat([own[role] for own in norms]).to(weight)


def _moments_of_groups(
    fit: Fit, site: RefitSite, weight: Tensor, prior: Tensor, first: int
) -> Sequence[SecondMoments]:
    """The moments of some of a convolution's groups, that start from slopes `[groups, k, d]`."""
    count, each, _ = prior.shape
    gram = fit.gram(prior[0]) if site.groups == 1 else GroupedGram(prior, fit.home)
    channels = slice(first * weight.shape[1], (first + count) * weight.shape[1])
    for b in range(len(fit.values.batches)):
        x = fit.values.of(site.node.args[0], MERGED, b)
        rows, picked = fit.pick(site, b)
        y = fit.targets.of(site, b, rows)
        seen = patches(x[:, channels], weight, site.node, rows)
        if site.groups > 1:
            seen = seen.unflatten(1, (count, -1))
            y = y[:, first * each : (first + count) * each].unflatten(1, (count, -1))
        gram.add(seen, y, picked)
    found = gram.reduce(fit.all_reduce)
    return [found] if isinstance(found, SecondMoments) else found


def norm_names(fit: Fit, site: RefitSite) -> dict[str, str]:
    """The tensors of the batch norm behind a convolution, by role; none where there is no such norm."""
    found = {}
    if site.norm is not None:
        for role, node in zip(("weight", "bias", "mean", "variance"), site.norm.args[1:5], strict=True):
            name = fit.values.program.tensor_of(node)
            if name is None:
                raise SpecError(f"the batch norm behind {site.module} has no {role}; refit needs one")
            found[role] = name
    return found


def solve_embedding(fit: Fit, site: RefitSite) -> None:
    """Each row is the weighted mean of its targets; rows that no sample uses keep the combined values."""
    table = fit.values.merged[site.weight]
    total, count = fit.zeros(*table.shape), fit.zeros(len(table))
    for b in range(len(fit.values.batches)):
        indices = fit.values.of(site.looked_up, MERGED, b)
        y = fit.targets.of(site, b)
        indices = indices.expand(y.shape[:-1]).reshape(-1).to(total.device)
        weight = fit.rows.weights(y.shape, b, -1)
        total.index_add_(0, indices, (y.flatten(0, -2) * weight[:, None]).to(total))
        count.index_add_(0, indices, weight.to(count))
    total, count = fit.all_reduce(total), fit.all_reduce(count)
    penalty = fit.config.ridge * count.mean().clamp_min(1e-12)
    fit.write(site, (total + penalty * table.to(total)) / (count + penalty)[:, None])


def solve_norm(fit: Fit, site: RefitSite) -> None:
    """The affine part of a layer norm or a group norm, or a gain: unit by unit."""
    scale = fit.values.merged[site.weight]
    channels = ChannelSums.empty(len(scale), fit.home)
    for b in range(len(fit.values.batches)):
        rows, picked = fit.pick(site, b)
        x = at_rows(_before_scale(fit, site, b), site.channel_axis, rows)
        channels.add(x, fit.targets.of(site, b, rows), picked)
    channels.sums = fit.all_reduce(channels.sums)
    found, shift = scale_and_shift(channels, scale + site.constant, fit.config.ridge, site.bias is not None)
    fit.write(site, found - site.constant, shift)


def _before_scale(fit: Fit, site: RefitSite, b: int) -> Tensor:
    """What a norm's scale, or a gain, is multiplied by."""
    node = site.node
    if site.kind == "gain":
        (factor,) = (x for x in node.args if isinstance(x, fx.Node) and _is_computed(fit, x, site))
        return fit.values.of(factor, MERGED, b)
    x = fit.values.of(node.args[0], MERGED, b)
    return normed(x, site)


def normed(x: Tensor, site: RefitSite) -> Tensor:
    """What a layer norm or a group norm makes of a value before its affine part."""
    eps = float(setting(site.node, 4, "eps", 1e-5))
    if site.kind == "group_norm":
        return functional.group_norm(x, site.node.args[1], eps=eps)  # type: ignore[arg-type]
    return functional.layer_norm(x, x.shape[-1:], eps=eps)


def _is_computed(fit: Fit, node: fx.Node, site: RefitSite) -> bool:
    """Whether a factor is not the gain itself, or what it is made into."""
    while node.op == "call_function" and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    return fit.values.program.tensor_of(node) != site.weight


def solve_table(fit: Fit, site: RefitSite) -> None:
    """A parameter that no input has a part in: the mean of its targets."""
    total, count = fit.zeros(*fit.values.merged[site.weight].shape), fit.zeros()
    for b, batch in enumerate(fit.values.batches):
        total += fit.targets.of(site, b).to(total) * batch.real
        count += batch.real
    fit.targets.forget(site)
    fit.write(site, fit.all_reduce(total) / fit.all_reduce(count))


def solve_offset(fit: Fit, site: RefitSite) -> None:
    """A parameter that is added: the mean of what is missing, over the axes along which it is repeated."""
    offset = fit.values.merged[site.weight]
    total, count = fit.zeros(*offset.shape), fit.zeros()
    for b, batch in enumerate(fit.values.batches):
        missing = fit.targets.of(site, b)[: batch.real].to(total)
        total += missing.sum_to_size([1] * (missing.dim() - offset.dim()) + list(offset.shape)).reshape(offset.shape)
        count += missing.numel() // offset.numel()
    fit.write(site, fit.all_reduce(total) / fit.all_reduce(count))


def regress_inputs(
    fit: Fit, nodes: Sequence[fx.Node], label: AxisLabel, intercept: bool = True
) -> tuple[SecondMoments, list[tuple[Tensor, Tensor]]]:
    """The merged model's moments of values, and per expert the slope and shift that make its own values of them.

    Args:
        nodes: the values, all of which count the same.
        label: their units.
        intercept: whether there is a shift; zeros otherwise.
    """
    experts = fit.values.experts
    start = torch.cat([unmerge_matrix(fit.alignment, label, t, fit.spec) for t in experts])
    moments: SecondMoments | None = None
    for node in nodes:
        gram = fit.gram(start.to(fit.home))
        for b in range(len(fit.values.batches)):
            value = fit.values.of(node, MERGED, b)
            rows, picked = fit.rows.pick(value.shape, b, -1, value.shape[-1])
            y = [at_rows(fit.values.of(node, t, b), -1, rows) for t in experts]
            gram.add(at_rows(value, -1, rows), torch.cat(y, -1), picked)
        found = gram.reduce(fit.all_reduce)
        moments = found if moments is None else moments.joined(found)
    assert moments is not None
    slope, shift = ridge(moments, start, fit.config.ridge, intercept)
    return moments, list(zip(slope.chunk(len(experts)), shift.chunk(len(experts)), strict=True))


def written(
    fit: Fit, site: RefitSite, expert: int, slope: Tensor, shift: Tensor, rows: slice | Tensor = slice(None)
) -> tuple[Tensor, Tensor]:
    """What an expert's weights, or some rows of them, make of its input, where that is a linear map of the merged
    model's.
    """
    weight = fit.matrix(site, expert)[rows].to(slope)
    constant = weight @ shift
    bias = fit.bias(site, expert)
    return weight @ slope, constant if bias is None else constant + bias[rows].to(constant)


SOLVERS: dict[str, Callable[[Fit, RefitSite], None]] = {
    "linear": solve_linear,
    "conv": solve_conv,
    "embedding": solve_embedding,
    "norm": solve_norm,
    "group_norm": solve_norm,
    "gain": solve_norm,
    "table": solve_table,
    "offset": solve_offset,
}
"""By `RefitSite.kind`."""


Readouts = dict[ReadPoint, list[tuple[Tensor, Tensor]]]
"""Per entry or exit and task `(weight [d, k], bias [d])`: from merged units to the expert's own."""


def find_readouts(program: Program, cut: Cut) -> dict[ReadPoint, fx.Node]:
    """The node whose value each entry or exit reads.

    Raises:
        SpecError: if an entry reads nothing of the trunk.
    """
    readouts = {}
    for entry in cut.entries:
        node = program.value_read_by(entry.target, entry.axis + 1)
        if node is None:
            raise SpecError(f"nothing of the trunk enters {entry.target}; this model cannot be refitted at this depth")
        readouts[entry] = node
    return readouts | {entry: program.outputs[entry.target] for entry in cut.exits}


def solve_readout(fit: Fit, entry: ReadPoint, node: fx.Node) -> list[tuple[Tensor, Tensor]]:
    """For every task the map from the merged units to the expert's own, on the task's own samples."""
    found = []
    for t in fit.values.experts:
        prior = unmerge_matrix(fit.alignment, entry.label, t, fit.spec)
        gram = fit.gram(prior)
        for b, batch in enumerate(fit.values.batches):
            if batch.task not in (None, t):
                continue
            x, y = (fit.values.of(node, who, b).movedim(entry.axis, -1) for who in (MERGED, t))
            gram.add(x.flatten(0, -2), y.flatten(0, -2), fit.rows.weights(y.shape, b, -1))
        found.append(ridge(gram.reduce(fit.all_reduce), prior, fit.config.ridge))
    return found
