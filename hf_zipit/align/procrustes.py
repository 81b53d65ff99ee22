"""Procrustes: the rotation that brings one expert's units nearest to another's.

O = argmax <x_a, O x_b> over orthogonal matrices is U V^T of the singular value decomposition of the cross product
x_a x_b^T (Generalised linear mode connectivity for transformers, arXiv 2506.22712). LayerNorm allows only rotations
that keep the vector of ones: then the same is solved on its orthogonal complement.

Invariants: exchanging the experts inverts the rotation; a rotated copy is rotated back exactly, wherever it varies.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import combinations

import torch
from torch import Tensor

from hf_zipit.maps.space_map import LinearMap, Map
from hf_zipit.symmetry.spec import MergeSpec, ProductKey, Symmetry

UNROTATED = 1e-9
"""What counts for leaving units as they are, relative to the largest singular value: decides for directions in which
nothing varies."""


def rotating(spec: MergeSpec) -> list[str]:
    """The spaces that allow rotations, but not every invertible map."""
    kinds = (Symmetry.ORTHOGONAL_ONES, Symmetry.ORTHOGONAL)
    return [name for name, space in spec.spaces.items() if space.symmetry in kinds and not space.within]


def rotate_streams(
    spec: MergeSpec, covariances: Mapping[ProductKey, Tensor], experts: int, names: Iterable[str]
) -> dict[str, Map]:
    """The rotations of some spaces, from what the experts compute there; a space that nothing observed has none."""
    maps: dict[str, Map] = {}
    for name in names:
        if (name,) in covariances:
            size = spec.spaces[name].size
            products = covariances[name,].reshape(experts, size, experts, size)
            maps[name] = match_rotations(products, ones=spec.spaces[name].symmetry is Symmetry.ORTHOGONAL_ONES)
    return maps


def match_rotations(products: Tensor, *, ones: bool = False) -> LinearMap:
    """The map of `rotations_to_reference`."""
    return LinearMap.rotation(rotations_to_reference(products, ones=ones)[1])


def rotations_to_reference(products: Tensor, *, ones: bool = False) -> tuple[int, Tensor]:
    """The rotation of every expert's units to those of the expert that the others can be brought nearest to.

    Args:
        products: `[T, d, T, d]`, of the experts' units with each other, such as second moments.
        ones: keep the vector of ones.

    Returns:
        The reference, and float64 `[T, d, d]`: the identity for the reference.
    """
    products = products.double()
    experts, units = products.shape[:2]
    own = torch.stack([products[t, :, t].trace() for t in range(experts)]).clamp_min(1e-300).sqrt()
    total = torch.zeros(experts, dtype=torch.float64)
    found = {}
    for a, b in combinations(range(experts), 2):
        found[a, b], similarity = rotation(products[a, :, b], ones=ones)
        total[[a, b]] += similarity / float(own[a] * own[b])
    reference = int(total.argmax())
    matrices = torch.eye(units, dtype=torch.float64).repeat(experts, 1, 1)
    for t in range(experts):
        if t != reference:
            matrices[t] = found[reference, t] if t > reference else found[t, reference].T
    return reference, matrices


def rotation(product: Tensor, *, ones: bool = False) -> tuple[Tensor, float]:
    """The orthogonal O with the largest <product, O>, both `[d, d]`, and that number.

    The product is the sum of x_a x_b^T; O brings x_b to x_a. With `ones` it keeps the vector of ones.
    """
    if ones:
        frame = complement_of_ones(len(product)).to(product)
        inner, _ = rotation(frame.T @ product @ frame)
        rotated = frame @ inner @ frame.T + 1.0 / len(product)
    else:
        scale = torch.linalg.matrix_norm(product, 2).clamp_min(1e-300)
        u, _, vh = torch.linalg.svd(product / scale + UNROTATED * torch.eye(len(product)).to(product))
        rotated = u @ vh
    return rotated, float((product * rotated).sum())


def complement_of_ones(units: int) -> Tensor:
    """An orthonormal basis `[d, d - 1]` of the vectors that sum to zero; float64."""
    frame = torch.eye(units, dtype=torch.float64)
    frame[:, 0] = 1.0
    return torch.linalg.qr(frame).Q[:, 1:]
