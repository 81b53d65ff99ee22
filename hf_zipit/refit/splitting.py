"""More and narrower heads: which attention layers of an architecture can have them.

Two experts' heads weigh positions differently, and no mean of the two is near both. But what is in one head is of low
rank: T experts' heads side by side, each with a share of head_dim, take no more parameters or operations than one
expert's heads, and lose little.

Whether layers can be cut so depends on their class, and is proven by running it. A head of which all but the first
units are zero computes what a narrower head does with those, beside heads of zeros, if it weighs its logits as much.
So a model with random heads of that kind, and its cut copy with the same weights, must agree. What is added to the
logits of each head has more of it as well (`head_biases.py`).

Queries and keys of a head may be normed before they are rotated (Qwen3). A narrower head's norm does what that of a
whole one does whose other units are zero, but for a factor, which the gain makes up for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from hf_zipit.modeling.head_dims import HeadCut, head_dim_name, pair_units
from hf_zipit.refit.attention import Attention, bias_of, differs_by_head
from hf_zipit.refit.head_biases import HeadBiases, find_biases, with_heads
from hf_zipit.refit.program import Arguments, Program, resized_copy
from hf_zipit.refit.solvable import RefitSite
from hf_zipit.symmetry.ops import op_name, shape_of
from hf_zipit.symmetry.proof import model_tensors, run_with
from hf_zipit.symmetry.spec import MergeSpec

RESHAPING = ("view", "reshape")
"""Ops that write sizes down."""

SAMPLES = 2
"""A proof runs this many,"""

TOLERANCE = 1e-4
"""and allows so large a difference of the outputs, relative to the largest of them, in float32."""


@dataclass(frozen=True)
class SplitHeads:
    """An attention layer with narrower heads.

    Attributes:
        count, groups, width: of the heads, and of those that have keys and values.
        scale: what whole heads multiply their logits by, in units of what the narrower ones do.
        arguments: of the ops between the heads' means and the output projection.
        biases: what is added to the logits, where every head has its own.
        norm: by how much a narrower head's norm makes it smaller than a whole one's does.
    """

    count: int
    groups: int
    width: int
    scale: float
    arguments: Mapping[fx.Node, Arguments]
    biases: HeadBiases | None = None
    norm: float = 1.0

    @property
    def asked(self) -> tuple[float, float]:
        """What queries and keys of whole heads are multiplied by: where norms take their length out, so that what the
        norms add to it counts the same."""
        return self.scale, 1.0 if self.norm == 1.0 else self.scale

    def gains(self, layer: Attention, tensors: Mapping[str, Tensor], pairs: Sequence[int] | None) -> dict[str, Tensor]:
        """By name the gains of narrower queries and keys, which have some of the whole ones' rotary pairs; none where
        nothing norms them.
        """
        apart = layer.apart
        if apart is None or apart.gains is None:
            return {}
        units = list(range(self.width)) if pairs is None else pair_units(pairs, layer.width)
        factors = (self.norm * self.scale, self.norm)
        return {
            site.weight: (tensors[site.weight][units] + site.constant) * factor - site.constant
            for site, factor in zip(apart.gains, factors, strict=True)
        }


def narrower(width: int, experts: int) -> int | None:
    """The greatest divisor of a head's width of which every expert's head can have one; None if there is none."""
    return next((dim for dim in range(width // experts, 0, -1) if width % dim == 0), None)


def find_splits(
    program: Program,
    layers: Iterable[Attention],
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    fields: Sequence[str] | None,
    experts: int,
    spec: MergeSpec,
) -> dict[Attention, SplitHeads]:
    """The layers that can be cut, and how; none where the class does not allow it.

    Args:
        program: the forward pass, with the merged model's sizes.
        layers: its attention layers.
        model: an expert.
        inputs: some samples.
        fields: the outputs that count.
        experts: how many heads are to take the place of one.
        spec: the spaces.
    """
    widths = {}
    for layer in layers:
        dim = narrower(layer.width, experts)
        if dim is not None and layer.module is not None and head_dim_name(model.get_submodule(layer.module)):
            widths[layer] = dim
    biases = find_biases(program, widths, model, inputs, fields, spec)
    splits = {}
    for layer, dim in widths.items():
        split = _split(program, layer, dim, biases.get(layer))
        if split is not None:
            splits[layer] = split
    for together in {split.biases for split in splits.values()} - {None}:
        if not splits.keys() >= set(together.layers):  # type: ignore[union-attr]
            splits = {layer: split for layer, split in splits.items() if split.biases is not together}
    if splits and is_proven(splits, model, inputs, fields):
        return splits
    # Layers that share biases are split together, those without any as well, and normed ones: what fails does so
    # alone.
    kinds = {layer: (split.biases, split.norm == 1.0) for layer, split in splits.items()}
    groups = [
        {layer: splits[layer] for layer in splits if kinds[layer] == kind} for kind in dict.fromkeys(kinds.values())
    ]
    if len(groups) < 2:
        return {}
    proven = [group for group in groups if is_proven(group, model, inputs, fields)]
    splits = {layer: split for layer, split in splits.items() if any(layer in group for group in proven)}
    return splits if len(proven) == 1 or (proven and is_proven(splits, model, inputs, fields)) else {}


def _split(program: Program, layer: Attention, dim: int, biases: HeadBiases | None) -> SplitHeads | None:
    """The layer with heads of another width; None where an op has a place for every head or every unit of one."""
    count, ratio = layer.heads * layer.width // dim, layer.width / dim
    apart = None if layer.weights is not None or layer.fused else layer.apart
    normed = layer.logits is None and apart is not None and apart.gains is not None and not apart.placed
    if not (layer.logits or (normed and layer.turned)) or (layer.turned and dim % 2):
        return None
    bias = bias_of(layer.node)
    if biases is None and bias is not None and (differs_by_head(bias) or len(shape_of(bias)) < 3):
        return None
    axes: dict[fx.Node, int | None] = {layer.node: 1}
    arguments = {}
    for node in layer.behind:
        given, shape = program.arguments(node), shape_of(node)
        args = given.args
        axis = axes[node] = _heads_axis(node, axes)
        if axis is None and shape[-1] != layer.heads * layer.width:
            return None
        if axis is not None and (shape[axis], shape[-1]) != (layer.heads, layer.width):
            return None
        if axis is not None and op_name(node) in RESHAPING:
            sizes = list(args[1])
            sizes[axis], sizes[-1] = (-1 if sizes[at] == -1 else new for at, new in ((axis, count), (-1, dim)))
            args = (args[0], sizes)
        arguments[node] = Arguments(args, given.kwargs)
    norm = ratio**0.5 if normed else 1.0
    return SplitHeads(count, layer.groups * layer.width // dim, dim, ratio**-0.5, arguments, biases, norm)


def _heads_axis(node: fx.Node, axes: Mapping[fx.Node, int | None]) -> int | None:
    """Which axis has the heads, given that of earlier ops; None where they lie side by side."""
    name, source = op_name(node), node.args[0]
    axis = axes[source]  # type: ignore[index]
    if axis is None or (name in RESHAPING and shape_of(node) != shape_of(source)):  # type: ignore[arg-type]
        return None
    order = list(range(len(shape_of(node))))
    if name == "transpose":
        one, other = node.args[1:3]
        order[one], order[other] = order[other], order[one]  # type: ignore[index]
    elif name == "permute":
        order = [order[dim] for dim in node.args[1]]  # type: ignore[union-attr,index]
    return order.index(axis)


@torch.no_grad()
def is_proven(
    splits: Mapping[Attention, SplitHeads],
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    fields: Sequence[str] | None,
) -> bool:
    """Whether a model with narrower heads computes what the splits say."""
    some = {name: tensor[:SAMPLES] for name, tensor in inputs.items()}
    cuts = {layer.module: _some_cut(layer, split) for layer, split in splits.items() if layer.module is not None}
    tensors, narrow_tensors = _half_empty_heads(splits, cuts, model_tensors(model))
    resized = set(_tables(splits)).union(*(split.gains(layer, tensors, None) for layer, split in splits.items()))
    shapes = {name: list(narrow_tensors[name].shape) for name in resized}
    head_dims = {path: cut.width for path, cut in cuts.items()}
    rotary_pairs = {path: cut.pairs for path, cut in cuts.items() if cut.pairs is not None}
    try:
        whole = run_with(model, tensors, some, fields)
        narrow = run_with(resized_copy(model, shapes, head_dims, rotary_pairs), narrow_tensors, some, fields)
    except Exception:  # a model's own code may raise anything where a shape is not what it expects
        return False
    return bool(whole) and all(
        (narrow[name] - x).abs().max() <= TOLERANCE * x.abs().max() for name, x in whole.items()
    )


def _some_cut(layer: Attention, split: SplitHeads) -> HeadCut:
    """A cut of a layer whose rotary pairs are not its first ones, nor its last."""
    if not layer.turned:
        return HeadCut(split.width)
    half, kept = layer.width // 2, split.width // 2
    return HeadCut(split.width, [half - 1 - i * (half // kept) for i in reversed(range(kept))])


def _half_empty_heads(
    splits: Mapping[Attention, SplitHeads], cuts: Mapping[str, HeadCut], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Random queries, keys, values and output projections, nothing beyond the units that are kept; as whole heads, and
    as narrower ones beside heads of zeros.
    """
    generator = torch.Generator().manual_seed(0)
    found, narrow = dict[str, Tensor](), dict[str, Tensor]()
    for layer, split in splits.items():
        maps = (*layer.asked, layer.value)
        for site in dict.fromkeys((*(own.site for own in maps), layer.output)):
            for name in filter(None, (site.weight, site.bias)):
                found[name] = torch.randn(tensors[name].shape, generator=generator) / tensors[name].shape[-1] ** 0.5
                narrow[name] = found[name].clone()
        pairs = cuts[layer.module].pairs if layer.module in cuts else None
        for own in maps:
            kept = list(range(split.width)) if own is layer.value or not pairs else pair_units(pairs, layer.width)
            order = [*kept, *(unit for unit in range(layer.width) if unit not in set(kept))]
            for whole, cut in zip(_rows(own.site, found), _rows(own.site, narrow), strict=True):
                heads = whole[own.rows].clone().unflatten(0, (-1, layer.width))
                heads[:, order[split.width :]] = 0
                whole[own.rows] = heads.flatten(0, 1)
                rows = heads[:, order].flatten(0, 1)
                if own is layer.asked[0]:
                    rows = _side_by_side(rows, layer, split.width)
                if own in layer.asked:
                    rows = rows * split.asked[layer.asked.index(own)]
                cut[own.rows] = rows
        for name in split.gains(layer, tensors, None):
            found[name] = 0.5 + torch.rand(tensors[name].shape, generator=generator)
        narrow |= split.gains(layer, found, pairs)
        weight = _rows(layer.output, narrow)[0].mT
        weight.copy_(_side_by_side(weight.clone(), layer, split.width))
        for name, axis in ({} if split.biases is None else split.biases.tables).items():
            if name not in found:
                found[name] = torch.randn(tensors[name].shape, generator=generator)
                # Of every head all parts but the first are zeros, whose bias does not matter.
                parts = with_heads(found[name].movedim(axis, 0)[:, None], 1, split.count // layer.heads)
                order = _side_by_side(torch.arange(split.count), layer, 1)
                narrow[name] = parts.flatten(0, 1)[order].movedim(0, axis)
    return {**tensors, **found}, {**tensors, **narrow}


def _tables(splits: Mapping[Attention, SplitHeads]) -> dict[str, int]:
    """The tables of biases, by name the axis of the heads."""
    return {
        n: axis for split in splits.values() if split.biases is not None for n, axis in split.biases.tables.items()
    }


def _rows(site: RefitSite, tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """Views of a linear map's weight `[outputs, inputs]` and its bias, if there is one."""
    weight = tensors[site.weight]
    parts = [weight.mT if site.turned else weight, *([] if site.bias is None else [tensors[site.bias]])]
    return [part[site.rows] for part in parts]


def _side_by_side(rows: Tensor, layer: Attention, dim: int) -> Tensor:
    """Rows by query head and unit, in another order: in each group first those parts that go with its keys' first."""
    return rows.unflatten(0, (layer.groups, layer.heads // layer.groups, -1, dim)).transpose(1, 2).flatten(0, 3)
