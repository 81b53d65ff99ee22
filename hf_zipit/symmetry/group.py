"""Elements of a model's symmetry group: draw one, and apply it to the model's tensors.

An element has one change of basis per movable space: an order of its units where the space allows permutations, an
invertible matrix where it allows more; one for every unit of the spaces it lives within. Axes that hold the space move
by g, axes that read it by g^-T, so that every contraction in between stays what it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import pi, prod

import torch
from torch import Tensor

from hf_zipit.symmetry.spaces import AxisLabel, Factor, Symmetry, Trace
from hf_zipit.symmetry.sums import by_products

GroupElement = Mapping[str, Tensor]
"""Per movable space: int64 `[*within, size]`, an order (unit i of the result is unit order[i]), or float64
`[*within, size, size]`, a matrix. The leading axes count the units, in their new order, of the spaces it lives
within."""


def random_element(spec: Trace, generator: torch.Generator, permutations_only: bool = False) -> dict[str, Tensor]:
    """A random element of the inferred group. Linear maps have condition number at most 4, so that float32 can
    prove."""
    element = {}
    for space in spec.spaces.values():
        if space.symmetry is Symmetry.FIXED or (permutations_only and space.symmetry.in_pairs):
            continue
        lead = [spec.spaces[name].size for name in space.within]
        symmetry = Symmetry.PERMUTATION if permutations_only else space.symmetry
        drawn = torch.stack([_random_map(space.size, symmetry, generator) for _ in range(prod(lead))])
        element[space.name] = drawn.reshape(*lead, *drawn.shape[1:])
    return element


def _random_map(size: int, symmetry: Symmetry, generator: torch.Generator) -> Tensor:
    if symmetry is Symmetry.PERMUTATION:
        return torch.randperm(size, generator=generator)
    if symmetry is Symmetry.HALF_TURNS:
        return pair_rotations(pi * torch.randint(2, (size // 2,), generator=generator).double())
    if symmetry.in_pairs:
        turns = pair_rotations(2 * pi * torch.rand(size // 2, generator=generator, dtype=torch.float64))
        return turns if symmetry is Symmetry.ROTARY else of_neighbours(turns)
    if symmetry is Symmetry.LINEAR:
        scales = torch.rand(size, generator=generator, dtype=torch.float64) * 1.5 + 0.5
        return _random_orthogonal(size, generator) * scales @ _random_orthogonal(size, generator)
    if symmetry is Symmetry.ORTHOGONAL:
        return _random_orthogonal(size, generator)
    # Orthogonal maps that keep the vector of ones: rotate only its orthogonal complement.
    frame = torch.randn(size, size, generator=generator, dtype=torch.float64)
    frame[:, 0] = 1.0
    frame = torch.linalg.qr(frame).Q
    inner = torch.eye(size, dtype=torch.float64)
    inner[1:, 1:] = _random_orthogonal(size - 1, generator)
    return frame @ inner @ frame.T


def pair_rotations(angles: Tensor) -> Tensor:
    """The matrices that rotate unit i and unit i + n of 2n by the i-th angle.

    Args:
        angles: `[..., n]`, in radians.

    Returns:
        Orthogonal `[..., 2 n, 2 n]`.
    """
    cos, sin = torch.diag_embed(angles.cos()), torch.diag_embed(angles.sin())
    return torch.cat([torch.cat([cos, -sin], -1), torch.cat([sin, cos], -1)], -2)


def of_neighbours(matrices: Tensor) -> Tensor:
    """Matrices `[..., 2 n, 2 n]` that mix unit i and i + n, as those that mix 2 i and 2 i + 1 in the same way."""
    return matrices.unflatten(-1, (2, -1)).mT.flatten(-2).unflatten(-2, (2, -1)).transpose(-3, -2).flatten(-3, -2)


def _random_orthogonal(size: int, generator: torch.Generator) -> Tensor:
    q, r = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    return q * r.diagonal().sign()


def apply_element(tensors: Mapping[str, Tensor], spec: Trace, element: GroupElement) -> dict[str, Tensor]:
    """The tensors of the transformed model. Tensors without an axis label (unused ones) stay as they are."""
    return {
        name: transform(tensor, spec.axes[name], spec, element) if name in spec.axes else tensor
        for name, tensor in tensors.items()
    }


def transform(tensor: Tensor, axes: tuple[AxisLabel, ...], spec: Trace, element: GroupElement) -> Tensor:
    """Apply a group element to every labelled axis of one tensor; axes with an empty label stay as they are."""
    return by_products(tensor, axes, lambda part, labels: _transform(part, labels, spec, element), spec.length)


def _transform(tensor: Tensor, axes: tuple[AxisLabel, ...], spec: Trace, element: GroupElement) -> Tensor:
    """`transform`, of a tensor whose axes are no sums."""
    factors: list[Factor | None] = []
    sizes: list[int] = []
    for label, length in zip(axes, tensor.shape, strict=True):
        factors += label or (None,)
        sizes += [spec.spaces[factor.space].size for factor in label] or [length]
    moved = [i for i, factor in enumerate(factors) if factor is not None and factor.space in element]
    spread = tensor.reshape(sizes)
    # Outer spaces first: the maps of inner ones are numbered by the outer units' new order.
    for position in sorted(moved, key=lambda i: _nesting(factors[i].space, spec)):  # type: ignore[union-attr]
        spread = _along(spread, position, factors, spec, element)
    return spread.reshape(tensor.shape)


def _nesting(name: str, spec: Trace) -> int:
    return max((1 + _nesting(outer, spec) for outer in spec.spaces[name].within), default=0)


def _along(x: Tensor, position: int, factors: list[Factor | None], spec: Trace, element: GroupElement) -> Tensor:
    factor = factors[position]
    assert factor is not None
    space, moved = spec.spaces[factor.space], element[factor.space]
    names = [f.space if f else None for f in factors]
    outer = [names.index(name) for name in space.within]
    order = [*outer, *(i for i in range(x.ndim) if i not in outer and i != position), position]
    y = x.permute(order)
    lead, shape = y.shape[: len(outer)], y.shape
    y = y.reshape(*lead, -1, space.size)
    if moved.dtype == torch.int64:
        y = y.gather(-1, moved.unsqueeze(-2).expand(y.shape))
    else:
        matrix = torch.linalg.inv(moved).mT if factor.dual else moved
        y = (y.to(torch.float64) @ matrix.mT).to(x.dtype)
    return y.reshape(shape).permute([order.index(i) for i in range(x.ndim)])
