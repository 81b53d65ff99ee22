"""The merge and unmerge maps applied to tensors: sum_t M_t W_t U_t without a matrix product.

An axis that holds a space's units (a vector axis) is merged by M_t, one that reads them (a dual axis) is entered
through U_t. Both only group units, so both are one `index_add_` along the axis; on a vector axis the units are
weighted by 1 / |group|. T M_t rather than M_t is applied to every expert, and the mean is taken over the experts:
then a one-to-one map only moves numbers, and every axis that has no map (a class, a position, a kernel's width) is
averaged as it should be.

Everything is summed in float64, in which the mean of T equal float32 numbers is that number, for every T.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_zipit.align.maps import Alignment
from hf_zipit.align.products import factor_indices, merged_index, merged_sizes
from hf_zipit.errors import SpecError
from hf_zipit.symmetry.spec import AxisLabel, MergeSpec, ProductKey, product_key


def merge_tensor(
    tensors: Sequence[Tensor], label_axes: Sequence[AxisLabel], alignment: Alignment, spec: MergeSpec
) -> Tensor:
    """The merged tensor: the mean over the experts of their tensors in the merged units.

    Args:
        tensors: the experts' tensors, of one shape and dtype.
        label_axes: one label per axis.
        alignment: the map of every movable space.
        spec: the sizes of the spaces.

    Returns:
        A tensor of the merged sizes, in the experts' dtype.

    Raises:
        SpecError: the tensors do not have the shape that the labels say, or integers that cannot be averaged differ.
    """
    if not tensors[0].is_floating_point():
        return _agreed(tensors, label_axes, alignment)
    total = sum(to_merged(tensor.double(), label_axes, alignment, spec, t) for t, tensor in enumerate(tensors))
    return (total / len(tensors)).to(tensors[0].dtype)


def plain_average(tensors: Sequence[Tensor]) -> Tensor:
    """The mean of tensors that the forward pass does not read, which therefore have no labels.

    Raises:
        SpecError: integers that cannot be averaged differ.
    """
    if not tensors[0].is_floating_point():
        return _agreed(tensors, (), {})
    return (sum(tensor.double() for tensor in tensors) / len(tensors)).to(tensors[0].dtype)


def to_merged(
    tensor: Tensor, label_axes: Sequence[AxisLabel], alignment: Alignment, spec: MergeSpec, expert: int
) -> Tensor:
    """One expert's tensor in the merged units: T M_t on vector axes, U_t on dual axes."""
    expected = [spec.size(product_key(label)) for label in label_axes]
    if list(tensor.shape) != expected:
        raise SpecError(
            f"Expert {expert}'s tensor is {list(tensor.shape)} where the spec expects {expected}; trace it anew."
        )
    for axis, label in enumerate(label_axes):
        if any(factor.space in alignment for factor in label):
            tensor = _along(tensor, axis, label, alignment, spec, expert)
    return tensor


def features_to_merged(
    features: Tensor, axis: int, label: AxisLabel, alignment: Alignment, spec: MergeSpec, expert: int
) -> Tensor:
    """One expert's features in merged units along one axis: T M_t on a vector axis, U_t transposed on a dual one."""
    if not any(factor.space in alignment for factor in label):
        return features
    return _along(features, axis % features.dim(), label, alignment, spec, expert)


def unmerge_index(alignment: Alignment, key: ProductKey, expert: int, spec: MergeSpec) -> Tensor:
    """For each of an expert's units of a product the merged unit that it reads: int64 `[size of the product]`.

    U_t x is `x[..., unmerge_index(...)]`. (The spec tells the sizes of fixed factors, which have no map.)
    """
    return merged_index(key, alignment, spec, expert)


def _along(tensor: Tensor, axis: int, label: AxisLabel, alignment: Alignment, spec: MergeSpec, expert: int) -> Tensor:
    key = product_key(label)
    index = merged_index(key, alignment, spec, expert).to(tensor.device)
    weight = _vector_weight(label, alignment, spec, expert)
    if weight is not None:
        tensor = tensor * weight.to(tensor).reshape(-1, *(1 for _ in tensor.shape[axis + 1 :]))
    shape = list(tensor.shape)
    shape[axis] = 1
    for size in merged_sizes(key, alignment, spec):
        shape[axis] *= size
    return tensor.new_zeros(shape).index_add_(axis, index, tensor)


def _vector_weight(label: AxisLabel, alignment: Alignment, spec: MergeSpec, expert: int) -> Tensor | None:
    """T / |group| of every unit, multiplied over the factors that the axis holds; None if it only reads."""
    weight = None
    indices = factor_indices(product_key(label), alignment, spec, expert)
    for factor in label:
        if factor.dual or factor.space not in alignment:
            continue
        space_map, within = alignment[factor.space], spec.spaces[factor.space].within
        counts = space_map.counts()[(*(indices[outer] for outer in within), indices[factor.space])]
        share = space_map.experts / counts.double()
        weight = share if weight is None else weight * share
    return weight


def _agreed(tensors: Sequence[Tensor], label_axes: Sequence[AxisLabel], alignment: Alignment) -> Tensor:
    """The one value of integer or boolean tensors, such as position ids; of counters, the largest."""
    if not tensors[0].dim():
        return torch.stack(list(tensors)).amax(0)
    if any(factor.space in alignment for label in label_axes for factor in label):
        raise SpecError(f"A {tensors[0].dtype} tensor has an axis in a movable space; it cannot be averaged there.")
    if not all(torch.equal(tensors[0], other) for other in tensors[1:]):
        raise SpecError(f"The experts have different values in a {tensors[0].dtype} tensor, which cannot be averaged.")
    return tensors[0].clone()
