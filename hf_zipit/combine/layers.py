"""What rules that read data are given for one parameter, in merged units: the inputs of its layer, its importance.

Nothing here computes on data: the sums were gathered before (`hf_zipit.observation.statistics`, in the experts' own
units) or are made while the layers are merged one by one (`hf_zipit.layerwise`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from hf_zipit.combine.matrices import solve_right, view_of
from hf_zipit.maps.space_map import Alignment, LinearMap, Map
from hf_zipit.maps.transform import own_features_to_merged, to_merged
from hf_zipit.observation.statistics import LayerStatistics
from hf_zipit.symmetry.spec import AxisLabel, MergeSpec, all_held


@dataclass(frozen=True)
class Layer:
    """What one layer is fed in the model that is merged so far, and in each expert, on the expert's own task's data.

    Everything is in merged units, float64, and means over the rows. A layer is a matrix `[out, in]`, or a norm: then
    inputs are the normalised ones, and all that is `[in, in]` here is its diagonal.

    Attributes:
        merged: by task E[x x^T] of the merged model's inputs, `[in, in]`.
        cross: by task E[x z^T], z the expert's inputs.
        merged_mean, expert_mean: by task E[x] and E[z], `[in]`.
        weights: the experts' matrices, and `biases`, where the layer has one.
        solved: the layer's merged matrix, where the parameter to be merged is its bias; None where it is the matrix.
    """

    merged: Sequence[Tensor]
    cross: Sequence[Tensor]
    merged_mean: Sequence[Tensor]
    expert_mean: Sequence[Tensor]
    weights: Sequence[Tensor]
    biases: Sequence[Tensor] | None = None
    solved: Tensor | None = None

    @property
    def is_norm(self) -> bool:
        return self.weights[0].dim() == 1

    def bias(self, solved: Tensor) -> Layer:
        """The same, for its bias."""
        return replace(self, solved=solved)


def read_axis(tensor: Tensor, labels: Sequence[AxisLabel]) -> int | None:
    """The axis along which a weight reads its layer's input; the only one of a norm's scale; None without an input."""
    if not labels:
        return None
    if tensor.dim() == 1:
        return 0
    view = view_of(tensor, labels)
    return None if view is None else 0 if view.transposed else 1


def merged_grams(
    statistics: LayerStatistics, tasks: Sequence[str], name: str, tensor: Tensor,
    labels: Sequence[AxisLabel], maps: Alignment, spec: MergeSpec,
) -> list[Tensor] | None:  # fmt: skip
    """By expert E[x x^T] of what a weight reads, in merged units `[in, in]`, of a norm `[units]`; None if not known.

    Args:
        tensor, labels: the weight in one expert.
    """
    axis = read_axis(tensor, labels)
    found = [statistics.mean("grams", task, name) for task in tasks]
    if axis is None or any(gram is None for gram in found):
        return None
    label, kernel = all_held(labels[axis]), prod(tensor.shape[2:])
    grams = []
    for expert, gram in enumerate(found):
        assert gram is not None
        if gram.dim() == 1:
            grams.append(own_features_to_merged(gram, 0, label, maps, spec, expert))
            continue
        spread = gram.reshape(tensor.shape[axis], kernel, tensor.shape[axis], kernel)
        for side in (0, 2):
            spread = own_features_to_merged(spread, side, label, maps, spec, expert)
        grams.append(spread.flatten(2).flatten(0, 1))
    return grams


def merged_fisher(
    statistics: LayerStatistics, tasks: Sequence[str], name: str,
    labels: Sequence[AxisLabel], maps: Alignment, spec: MergeSpec,
) -> list[Tensor] | None:  # fmt: skip
    """By expert the diagonal of the Fisher information of a parameter in merged units; None if not known.

    Gradients move by the inverse transposes of what their weights move by; a diagonal by the squares of these.
    """
    found = [statistics.mean("fisher", task, name) for task in tasks]
    if any(own is None for own in found):
        return None
    squared: dict[str, Map] = {
        name: LinearMap(own.inverses.mT.square(), own.matrices.mT.square()) if isinstance(own, LinearMap) else own
        for name, own in maps.items()
    }
    return [to_merged(own, labels, squared, spec, t) if labels else own for t, own in enumerate(found)]


def on_layers(
    tensors: Sequence[Tensor], labels: Sequence[AxisLabel], grams: Sequence[Tensor] | None,
    function: Callable[[list[Tensor]], Tensor],
) -> Tensor:  # fmt: skip
    """What a function makes of the matrices `[out, in]` of a layer whose inputs are known; other tensors' mean."""
    view = view_of(tensors[0], labels)
    if view is None or grams is None:
        return sum(tensors) / len(tensors)
    return view.tensor(function([view.matrix(tensor) for tensor in tensors]), tensors[0])


def regressed(weights: Sequence[Tensor], grams: Sequence[Tensor], start: Tensor) -> Tensor:
    """The matrix with the least sum over experts of E|W x - W_t x|^2, `[out, in]`.

    Directions that no input shows are those of `start`.
    """
    change = sum((weight - start) @ gram for weight, gram in zip(weights, grams, strict=True))
    return start + solve_right(change, sum(grams))


def shrunk(gram: Tensor, share: float) -> Tensor:
    """A Gram matrix whose entries off the diagonal are multiplied by a share."""
    return share * gram + (1 - share) * torch.diag(gram.diagonal())
