"""The merged basis of a residual stream, chosen by what the experts compute there.

An alignment pairs units, and the merged stream is the mean of the experts'. Where pairs differ, as those of different
initialisations do, half of what two experts compute lies in the differences and is lost for every later module,
however well its weights are solved. But a stream hardly uses all of its directions. Of the T d directions that all
experts' streams have together, the merged stream takes the d with the most energy, V `[d, T d]`:

    z = sum_t M_t h_t,    [M_1 ... M_T] = V / sqrt(T),    U_t = sqrt(T) V_t^T.

That is a principal component analysis, thus the best linear map into d units and back. What counts is what the layers
behind the norms read: a direction counts as much as their outputs change along it (`read_metric`), and every direction
a little. Where that makes a difference, the rows of [M_1 ... M_T] are an orthonormal basis of the units from which the
readers' inputs are best made, as reduced-rank regression finds them. It needs a stream that allows every rotation, as
in a pre-LN model: there every reader is solved on what the merged model feeds into it, so that a norm's scale is no
obstacle. In a post-LN model a norm's scale acts on the stream itself, and in another basis one number a merged unit is
not what the experts' scales are (`normed_streams.py`). What that costs is known from the same moments, so a basis is
taken if it loses less than the alignment with it (`lost_with_scales`). Which rotation of V is taken has no influence
then; it is the one nearest to the alignment's maps, the combined weights' basis.

Invariant: experts whose streams agree under the alignment keep its maps.

Ours; SliceGPT (arXiv 2401.15024) takes principal components of one model's stream.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from transformers import PreTrainedModel

from hf_zipit.align.procrustes import complement_of_ones, rotating
from hf_zipit.data.processes import solving_device
from hf_zipit.factorise import eigh, qr, solve_positive, svd
from hf_zipit.maps.space_map import Alignment, LinearMap
from hf_zipit.maps.transform import unmerge_matrix
from hf_zipit.planning.cut import Cut
from hf_zipit.refit.normed_streams import normed_streams
from hf_zipit.refit.positions import Rows
from hf_zipit.refit.program import Program
from hf_zipit.refit.regression import add_upper, mirrored
from hf_zipit.refit.solvable import RefitSite
from hf_zipit.refit.solvers import find_readouts
from hf_zipit.symmetry.spaces import Fold, Reader
from hf_zipit.symmetry.spec import Factor, MergeSpec, Symmetry, product_key

AGREED = 1e-6
"""The alignment's maps are kept where they lose no more than this fraction of the energy than the best basis does."""

SEEN = 0.01
"""What a direction that no layer reads counts, relative to the mean direction."""

PRIOR = 1e-4
"""What the alignment's directions count more than others, relative to the mean energy: it decides where no sample
shows anything."""


@dataclass(frozen=True)
class Stream:
    """A residual stream that may have another basis.

    Attributes:
        norms: what reads it, where the norms' scales are the readers' business (pre-LN).
        readers: what reads it where it is what norms put out (post-LN), so that their scales are its own.
    """

    norms: tuple[Fold, ...] = ()
    readers: tuple[Reader, ...] = ()

    @property
    def weights(self) -> list[tuple[Reader, str | None]]:
        """Every reader, with the scale of the norm before it if that is not the stream's own."""
        return [(reader, norm.weight) for norm in self.norms for reader in norm.readers] + [
            (reader, None) for reader in self.readers
        ]


def rotatable(
    spec: MergeSpec, cut: Cut, model: PreTrainedModel, program: Program, maps: Alignment
) -> dict[str, Stream]:
    """The residual streams with a map that allow rotations, if it were not for the norms' scales."""
    folded = spec if spec.folds else MergeSpec.from_model(model, folding=True)
    same = [name for name, found in maps.items() if spec.spaces[name].size == found.size]
    streams = {
        name: Stream(norms=tuple(norm for norm in folded.folds if spec.axes[norm.weight] == ((Factor(name),),)))
        for name in rotating(folded)
        if name in same
    }
    others = [name for name in same if spec.spaces[name].symmetry is Symmetry.PERMUTATION and name not in streams]
    normed = normed_streams(program, spec, cut, others)
    return streams | {name: Stream(readers=readers) for name, readers in normed}


def stream_bases(
    streams: Mapping[str, Stream],
    program: Program,
    sites: Mapping[fx.Node, RefitSite],
    experts: Sequence[Mapping[str, Tensor]],
    rows: Rows,
    *,
    spec: MergeSpec,
    cut: Cut,
    maps: Alignment,
    all_reduce: Callable[[Tensor], Tensor] = lambda x: x,
) -> dict[str, LinearMap]:
    """The maps of residual streams that lose least; none for a stream whose alignment loses as little.

    Args:
        streams: by space those that may have another basis.
        program, sites: the forward pass, and where weights are solved.
        experts: their tensors.
        rows: the batches, and how much every position counts.
        spec, cut, maps: the spaces, what is merged, and the alignment.
        all_reduce: sums a tensor over all processes.
    """
    nodes = {value.node: value for value in stream_values(streams, program, sites, spec, cut)}
    sizes = {name: spec.spaces[name].size * len(experts) for name in streams}
    home = solving_device(rows.device)
    energies = {
        node: torch.zeros(sizes[value.space] + 1, sizes[value.space] + 1, dtype=torch.float64, device=home)
        for node, value in nodes.items()
    }
    counts = {node: torch.zeros((), dtype=torch.float64, device=home) for node in nodes}
    for b, batch in enumerate(rows.batches):
        inputs = {name: tensor.to(rows.device) for name, tensor in batch.inputs.items()}
        for node, *found in values_of(nodes, program, experts, inputs):
            axis = nodes[node].axis
            weight = rows.weights(found[0].shape, b, axis).sqrt()[:, None]
            joint = torch.cat([_as_rows(x, axis) for x in found], -1) * weight
            add_upper(energies[node], torch.cat([joint, weight], 1))
            counts[node] += weight.square().sum().to(home)
    moments = {
        node: _moments(all_reduce(energies.pop(node)), all_reduce(counts[node]), value.scale is not None)
        for node, value in nodes.items()
    }
    bases = {}
    for name, stream in streams.items():
        own = [(moments[node], value.scale) for node, value in nodes.items() if value.space == name]
        if not own:
            continue
        energy = torch.zeros_like(own[0][0])
        for found, _ in own:
            energy += found / len(own)
        start = torch.cat([unmerge_matrix(maps, (Factor(name),), t, spec) for t in range(len(experts))]).mT
        start = start.to(energy) / len(experts) ** 0.5
        basis = principal_basis(energy, start, read_metric(stream.weights, experts, energy))
        scales = [
            (found, torch.cat([expert[scale] for expert in experts])) for found, scale in own if scale is not None
        ]
        if basis is None or (scales and lost_with_scales(basis, scales) > lost_with_scales(start, scales)):
            continue
        bases[name] = LinearMap.rotation(torch.stack(basis.cpu().chunk(len(experts), 1)) * len(experts) ** 0.5)
    return bases


def _moments(sums: Tensor, count: Tensor, centred: bool) -> Tensor:
    """Second moments, about the mean of what was summed up or about zero, with a trace of one.

    Of the sums, `[n + 1, n + 1]`, the last column is that of the weights; only their upper triangle is made.
    """
    sums = mirrored(sums)
    energy, total = sums[:-1, :-1], sums[:-1, -1]
    energy = energy - torch.outer(total, total) / count.clamp_min(1e-30) if centred else energy
    return energy / energy.trace().clamp_min(1e-30)


def _as_rows(x: Tensor, axis: int) -> Tensor:
    """Rows `[positions, units]` of one length, as a norm leaves them."""
    x = x.movedim(axis, -1).flatten(0, -2)
    return x / x.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-12)


@dataclass(frozen=True)
class StreamValue:
    """A node that holds a residual stream.

    Attributes:
        space: the stream's; axis: the value's that has its units.
        scale: the name of the scale of the norm that put it out, if that is the stream's own.
    """

    node: fx.Node
    space: str
    axis: int
    scale: str | None = None


NO_WRITERS = {"norm", "gain", "table", "routed"}
"""Kinds of sites that put out units of a stream, but not the stream."""


def stream_values(
    streams: Mapping[str, Stream], program: Program, sites: Mapping[fx.Node, RefitSite], spec: MergeSpec, cut: Cut
) -> Iterator[StreamValue]:
    """The nodes that hold a stream after something was written into it or, where norms put it out, behind those.

    And those where a branch reads it.
    """
    for entry, node in find_readouts(program, cut).items():
        if len(entry.key) == 1 and entry.key[0] in streams:
            yield StreamValue(node, entry.key[0], entry.axis)
    for site in sites.values():
        key = product_key(site.label(spec))
        if len(key) != 1 or key[0] not in streams:
            continue
        if streams[key[0]].readers and site.kind == "norm":
            yield StreamValue(site.node, key[0], site.channel_axis, site.weight)
        elif not streams[key[0]].readers and site.kind not in NO_WRITERS:
            yield StreamValue(site.stream or site.output, key[0], site.target_axis)


def values_of(
    nodes: Collection[fx.Node],
    program: Program,
    experts: Sequence[Mapping[str, Tensor]],
    inputs: Mapping[str, Tensor],
) -> Iterator[tuple[fx.Node, Tensor]]:
    """Every node with each expert's value of it, one after the other; they run side by side."""
    held: list[dict[fx.Node, Tensor]] = [{} for _ in experts]
    last = max((program.position[node] for node in nodes), default=-1)
    for i, node in enumerate(program.nodes[: last + 1]):
        for own, tensors in zip(held, experts, strict=True):
            own[node] = program.run(node, own.__getitem__, tensors, inputs)
        if node in nodes:
            yield node, *(own[node] for own in held)
        for used in node.all_input_nodes:
            if program.last_use[used] == i:
                for own in held:
                    own.pop(used, None)


@torch.no_grad()
def read_metric(
    readers: Iterable[tuple[Reader, str | None]], experts: Sequence[Mapping[str, Tensor]], energy: Tensor
) -> Tensor:
    """How much every direction of the experts' streams changes what is read of them: `[T d, T d]`, block-diagonal.

    Every reader counts as much as the others, whatever the size of its outputs.

    Args:
        readers: the layers that read the stream, each with the scale before it, if there is one.
        experts: their tensors.
        energy: `[T d, T d]`, the joint second moments of the streams behind their norms.
    """
    size = len(energy) // len(experts)
    blocks = []
    for t, own in enumerate(experts):
        part = energy[t * size : (t + 1) * size, t * size : (t + 1) * size]
        read = torch.zeros_like(part)
        for reader, scale in readers:
            if reader.weight in own:
                weight = own[reader.weight].to(part).movedim(reader.axis, 1)
                weight = weight if scale is None else weight * own[scale].to(part)
                found = weight.mT @ weight
                read += found / (found * part).sum().clamp_min(1e-30)
        scale = read.trace().clamp_min(1e-30) / size
        blocks.append(read / scale + SEEN * torch.eye(size).to(part))
    return torch.block_diag(*blocks)


@torch.no_grad()
def principal_basis(energy: Tensor, start: Tensor, metric: Tensor | None = None) -> Tensor | None:
    """V `[d, T d]` with orthonormal rows: the directions that lose least, rotated to be nearest to `start`.

    The vectors of ones are one direction of both, which a LayerNorm leaves out.

    Args:
        energy: `[T d, T d]`.
        start: `[d, T d]`, orthonormal rows: the alignment's directions.
        metric: `[T d, T d]`, positive definite: what an error in a direction counts; None where all count the same.

    Returns:
        None where `start` loses as little.
    """
    size, joint = start.shape
    start = start.to(energy)
    energy = energy + PRIOR * energy.trace() / joint * start.mT @ start
    inside = complement_of_ones(size).to(energy)
    frame = torch.block_diag(*[inside] * (joint // size))
    metric = torch.eye(joint).to(energy) if metric is None else metric.to(energy)
    inner, weight, before = frame.mT @ energy @ frame, frame.mT @ metric @ frame, inside.mT @ start @ frame
    values, vectors = eigh(weight)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.mT
    best = qr(root @ eigh(root @ inner @ root)[1][:, 1 - size :])[0].mT
    u, _, v = svd(before @ best.mT)
    ones = energy.new_full((size, joint), joint**-0.5 * size**-0.5)
    basis = ones + inside @ u @ v @ best @ frame.mT
    gain = explained(basis, energy, metric) - explained(start, energy, metric)
    return basis if gain > AGREED * (energy * metric).sum() else None


def lost_with_scales(basis: Tensor, values: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """What a basis loses of streams that norms put out: what it leaves out, and what one scale a unit leaves of it.

    Args:
        basis: `[d, T d]`, orthonormal rows.
        values: of every norm the joint moments `[T d, T d]` of what the experts' norms put out, about their mean, and
            the experts' scales one after the other, `[T d]`.
    """
    total = basis.new_zeros(())
    for energy, scale in values:
        scale = scale.to(energy)
        floor = 1e-3 * scale.abs().mean()
        before = basis / torch.where(scale.abs() < floor, floor, scale)  # of what it was before it was scaled
        wanted, across, inputs = (
            ((left @ energy) * right).sum(1) for left, right in ((basis, basis), (basis, before), (before, before))
        )
        total += energy.trace() - explained(basis, energy, torch.eye(len(energy)).to(energy))
        total += (wanted - across.square() / inputs.clamp_min(1e-30)).sum()
    return total


def explained(basis: Tensor, energy: Tensor, metric: Tensor) -> Tensor:
    """How much of the energy, in a metric, a regression on some directions `[k, n]` makes of them."""
    across = basis @ energy
    inputs = across @ basis.mT
    floor = 1e-12 * inputs.diagonal().mean().clamp_min(1e-30)
    inputs = torch.diagonal_scatter(inputs, inputs.diagonal() + floor)
    return (solve_positive(inputs, across, floor) * (across @ metric)).sum()
