"""The merge and unmerge maps applied to one expert's tensors and features: T M_t W_t U_t.

An axis that holds a space's units (a vector axis) is merged by M_t, one that reads them (a dual axis) is entered
through U_t. Where both only group units, both are one `index_add_` along the axis and no matrix product; on a vector
axis the units are weighted by 1 / |group|. Changes of basis (`LinearMap`) are multiplied in afterwards. T M_t rather
than M_t is applied to every expert, and the mean is taken over the experts: then a one-to-one map only moves numbers,
and every axis that has no map (a class, a position, a kernel's width) is averaged as it should be.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import prod

import torch
from torch import Tensor

from hf_zipit.errors import SpecError
from hf_zipit.maps.products import change_basis, factor_indices, merged_index, merged_length, merged_sizes
from hf_zipit.maps.rows import axes_to_merge, row_by_row
from hf_zipit.maps.space_map import Alignment, LinearMap, SpaceMap
from hf_zipit.symmetry.spec import AxisLabel, MergeSpec, ProductKey, all_read, product_key, products
from hf_zipit.symmetry.sums import by_products, put_together, take_apart


def to_merged(
    tensor: Tensor, label_axes: Sequence[AxisLabel], alignment: Alignment, spec: MergeSpec, expert: int
) -> Tensor:
    """One expert's tensor in the merged units: T M_t on vector axes, U_t on dual axes; axes without a label stay."""
    expected = [spec.length(label) if label else n for label, n in zip(label_axes, tensor.shape, strict=False)]
    if list(tensor.shape) != expected:
        raise SpecError(
            f"Expert {expert}'s tensor is {list(tensor.shape)} where the spec expects {expected}; trace it again."
        )

    def along_all(part: Tensor, labels: tuple[AxisLabel, ...]) -> Tensor:
        for axis in axes_to_merge(labels, alignment, spec):
            part = row_by_row(part, axis, labels, alignment, spec, expert, _along)
        return part

    return by_products(tensor, label_axes, along_all, spec.length, partial(merged_length, maps=alignment, spec=spec))


def features_to_merged(
    features: Tensor, axis: int, label: AxisLabel, alignment: Alignment, spec: MergeSpec, expert: int
) -> Tensor:
    """One expert's features in merged units along one axis: T M_t on a vector axis, U_t transposed on a dual one."""
    if not any(name in alignment for name in product_key(label)):
        return features
    axis %= features.dim()
    parts = take_apart(features, axis, label, spec.length)
    done = [
        _along(part, axis, product, alignment, spec, expert)
        for part, product in zip(parts, products(label), strict=True)
    ]
    return put_together(done, axis, label, partial(merged_length, maps=alignment, spec=spec))


def shares_held(label: AxisLabel, alignment: Alignment, spec: MergeSpec, expert: int) -> Tensor:
    """How much of every merged unit on a vector axis is one expert's, as T M_t of ones: float64 `[k]`.

    A change of basis mixes one expert's units with nobody else's: there it is 1.
    """
    groups = {name: space_map for name, space_map in alignment.items() if isinstance(space_map, SpaceMap)}
    ones = torch.ones(spec.length(label), dtype=torch.float64)
    return features_to_merged(ones, 0, label, groups, spec, expert)


def own_features_to_merged(
    features: Tensor, axis: int, label: AxisLabel, alignment: Alignment, spec: MergeSpec, expert: int
) -> Tensor:
    """One expert's features as its merged weights read them: in each merged unit the mean of its own units there.

    An expert's weights in merged units, `to_merged`, compute of these what they compute of its own features. Merged
    units without a unit of this expert are zero.
    """
    moved = features_to_merged(features, axis, label, alignment, spec, expert)
    held = shares_held(label, alignment, spec, expert)
    if bool((held == 1).all()):
        return moved
    scale = torch.where(held > 0, 1 / held.clamp_min(1e-12), 0.0).to(moved)
    return moved * scale.reshape(-1, *(1 for _ in moved.shape[axis % moved.dim() + 1 :]))


def only_groups(alignment: Alignment, key: ProductKey) -> bool:
    """Whether U_t of a product is one-hot, so that an index does for it."""
    return not any(isinstance(alignment.get(name), LinearMap) for name in key)


def unmerge_index(alignment: Alignment, label: AxisLabel, expert: int, spec: MergeSpec) -> Tensor:
    """For each of an expert's units on an axis the merged unit that it reads: int64 `[units]`.

    U_t x is `x[..., unmerge_index(...)]`, where `only_groups`. (The spec tells the sizes of fixed factors, which have
    no map.)
    """
    length = partial(merged_length, maps=alignment, spec=spec)
    merged = take_apart(torch.arange(length(label)), 0, label, length)
    indices = (merged_index(product_key(product), alignment, spec, expert) for product in products(label))
    return put_together([own[index] for own, index in zip(merged, indices, strict=True)], 0, label, spec.length)


def unmerge_matrix(alignment: Alignment, label: AxisLabel, expert: int, spec: MergeSpec) -> Tensor:
    """U_t of an axis: float64 `[units, merged units]`."""
    eye = torch.eye(spec.length(label), dtype=torch.float64)
    return features_to_merged(eye, 0, all_read(label), alignment, spec, expert).T


def _along(tensor: Tensor, axis: int, label: AxisLabel, alignment: Alignment, spec: MergeSpec, expert: int) -> Tensor:
    key = product_key(label)
    if not any(isinstance(alignment.get(name), SpaceMap) for name in key):  # no units come together
        return change_basis(tensor, axis, label, alignment, spec, expert)
    index = merged_index(key, alignment, spec, expert).to(tensor.device)
    weight = _vector_weight(label, alignment, spec, expert)
    if weight is not None:
        tensor = tensor * weight.to(tensor).reshape(-1, *(1 for _ in tensor.shape[axis + 1 :]))
    shape = list(tensor.shape)
    shape[axis] = prod(merged_sizes(key, alignment, spec))
    grouped = tensor.new_zeros(shape).index_add_(axis, index, tensor)
    return change_basis(grouped, axis, label, alignment, spec, expert)


def _vector_weight(label: AxisLabel, alignment: Alignment, spec: MergeSpec, expert: int) -> Tensor | None:
    """T / |group| of every unit, multiplied over the factors that the axis holds; None if it only reads."""
    weight = None
    indices = factor_indices(product_key(label), alignment, spec, expert)
    for factor in label:
        space_map = alignment.get(factor.space)
        if factor.dual or not isinstance(space_map, SpaceMap):
            continue
        within = spec.spaces[factor.space].within
        counts = space_map.counts()[(*(indices[outer] for outer in within), indices[factor.space])]
        share = space_map.experts / counts.double()
        weight = share if weight is None else weight * share
    return weight
