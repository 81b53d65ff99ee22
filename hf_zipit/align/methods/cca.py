"""CCA merging: the linear map that makes one expert's units most correlated with another's (Horoi et al., Harmony in
Diversity, arXiv 2407.05385).

Whitened units u_t = S_tt^-1/2 x_t of two experts have cross-covariance S_aa^-1/2 S_ab S_bb^-1/2 = U R V^T, R the
canonical correlations. U V^T rotates b's whitened units to a's, so that

    g = S_aa^1/2 U V^T S_bb^-1/2

brings x_b to x_a: a Procrustes rotation between whitened units. It is a symmetry only where any invertible map is, as
inside a head, between its query and key or its value and output projections; other spaces are matched by `permute`.

Invariants: exchanging the experts inverts the map.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_zipit.align.method import register
from hf_zipit.align.procrustes import rotations_to_reference
from hf_zipit.errors import RecipeError
from hf_zipit.maps.space_map import LinearMap
from hf_zipit.symmetry.spec import Symmetry

SMALLEST = 1e-12
"""Variances below this share of the mean variance are noise, whatever the regularisation."""


@register("cca", needs={"moments", "covariances"}, least=Symmetry.LINEAR)
def canonical_correlations(
    covariance: Tensor, experts: int, *, regularisation: float = 0.1, absolute: bool = False
) -> LinearMap:
    """Every expert's units are brought into the basis of a reference expert, which stays: k = d.

    Args:
        covariance: float64 `[T * d, T * d]`.
        experts: T.
        regularisation: added to every variance before whitening, relative to an expert's mean variance; 0 or more.
            Without any, directions that hardly vary count as much as all others.
        absolute: add `regularisation` itself, as the published code does: the map then depends on the features' scale.
    """
    if not regularisation >= 0:
        raise RecipeError(f"cca's option regularisation is {regularisation}; it must be 0 or more.")
    units = covariance.shape[-1] // experts
    blocks = covariance.double().reshape(experts, units, experts, units)
    roots = []
    for t in range(experts):
        own = blocks[t, :, t]
        scale = own.diagonal().mean().clamp_min(1e-300)
        floor = max(regularisation, SMALLEST * scale) if absolute else max(regularisation, SMALLEST) * scale
        values, vectors = torch.linalg.eigh(own + floor * torch.eye(units).to(own))
        roots.append((vectors * values.sqrt() @ vectors.T, vectors / values.sqrt() @ vectors.T))
    whitening = torch.stack([inverse for _, inverse in roots])
    whitened = torch.einsum("apq,aqbr,brs->apbs", whitening, blocks, whitening)
    reference, rotations = rotations_to_reference(whitened)
    root, inverse_root = roots[reference]
    return LinearMap(
        torch.stack([root @ o @ inverse for o, (_, inverse) in zip(rotations, roots, strict=True)]),
        torch.stack([own @ o.T @ inverse_root for o, (own, _) in zip(rotations, roots, strict=True)]),
    )
