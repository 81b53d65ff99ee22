"""Circuits with a space inside: how similar two of them are, and the change of basis that makes them most similar.

A holds all that writes the space and B all that reads it, both `[d, everything else]`, a bias being one more column.

- Where any invertible map g is a symmetry, the circuit is A^T B: a basis takes A to g A and B to g^-T B. Two circuits
  are compared without being formed: <A^T B, A'^T B'> = sum (A A'^T) * (B B'^T). Both sides are brought into *balanced*
  coordinates h, in which A A^T = B B^T; what is left is a rotation O, by Procrustes on A and B together. So
  g = h_a^-1 O h_b, which a copy in another basis fulfils exactly, and which is inverted when experts are exchanged.
- Where a rotary embedding stands in between, only rotations of the pairs of units are, the same for A and B. A pair is
  one complex unit, a its row of A and b its row of B; the embedding multiplies it by a number that depends on
  positions, so that every pair has a circuit a b^H of its own, compared by Re <a, a'> <b', b>. The best rotation is
  the one by the argument of <a', a> + <b', b>.
- Where a scale of every unit stands there, too, only half turns of the pairs are left: their signs, for which the real
  parts count alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_zipit.align.procrustes import rotation
from hf_zipit.symmetry.group import of_neighbours, pair_rotations
from hf_zipit.symmetry.spec import Symmetry

SMALLEST = 1e-12
"""Squared singular values of A and B below this share of their mean are noise to the balanced coordinates, and a
pair's products of A and A', B and B' below this share of the largest to its angle."""


@dataclass(frozen=True)
class Bases:
    """What a symmetry means for circuits.

    Attributes:
        similarity: of A, B, A' and B', `[heads, copies or 1, d, everything else]` each, the inner products of the
            circuits, `[heads, copies or 1, heads', copies' or 1]`.
        matrices: of A, B, A' and B' of one head, `[d, everything else]` each, the change of basis that takes the
            primed circuit into the coordinates that the other one is compared in, and its inverse, `[d, d]`.
    """

    similarity: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    matrices: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


# Any invertible map --------------------------------------------------------------------------------------------------


def circuit_similarity(write: Tensor, read: Tensor, write_b: Tensor, read_b: Tensor) -> Tensor:
    """<A^T B, A'^T B'>; see `Bases`."""
    return (_products(write, write_b) * _products(read, read_b)).sum((2, 5))


def basis(write_a: Tensor, read_a: Tensor, write_b: Tensor, read_b: Tensor) -> tuple[Tensor, Tensor]:
    """O h_b and its inverse, float64 `[d, d]`: what takes b's circuit into a's balanced coordinates."""
    to_a, from_a = balance(write_a, read_a)
    to_b, from_b = balance(write_b, read_b)
    rotated, _ = rotation(to_a @ write_a @ (to_b @ write_b).T + from_a.T @ read_a @ (from_b.T @ read_b).T)
    return rotated @ to_b, from_b @ rotated.T


def balance(write: Tensor, read: Tensor) -> tuple[Tensor, Tensor]:
    """h and h^-1, symmetric, with h A (h A)^T = h^-T B (h^-T B)^T: both sides of a circuit in equal coordinates.

    h^2 = P^-1 # Q, the geometric mean of P^-1 = (A A^T)^-1 and Q = B B^T: the positive X with X P X = Q.
    """
    p, q = (_positive(side @ side.T) for side in (write, read))
    root, inverse = _roots(p)
    middle, _ = _roots(root @ q @ root)
    return _roots(inverse @ middle @ inverse)


def _positive(gram: Tensor) -> Tensor:
    floor = SMALLEST * gram.diagonal().mean()
    return gram + torch.where(floor > 0, floor, torch.ones_like(floor)) * torch.eye(len(gram)).to(gram)


def _roots(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The symmetric root of a positive matrix, and its inverse."""
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    values = values.clamp_min(1e-300).sqrt()
    return vectors * values @ vectors.T, vectors / values @ vectors.T


def _products(x: Tensor, y: Tensor) -> Tensor:
    """`[heads, copies, d, heads, copies, d]`, from two `[heads, copies, d, everything else]`."""
    return (x.flatten(0, 2) @ y.flatten(0, 2).T).reshape(*x.shape[:3], *y.shape[:3])


# Rotations of pairs -------------------------------------------------------------------------------------------------


def pair_similarity(write: Tensor, read: Tensor, write_b: Tensor, read_b: Tensor) -> Tensor:
    """The sum over pairs of Re <a, a'> <b', b>; see `Bases`."""
    writing, reading = (
        torch.einsum("hcnr,kmnr->hckmn", as_pairs(x).conj(), as_pairs(y))
        for x, y in ((write, write_b), (read, read_b))
    )
    return (writing * reading.conj()).real.sum(-1)


def pair_basis(write_a: Tensor, read_a: Tensor, write_b: Tensor, read_b: Tensor) -> tuple[Tensor, Tensor]:
    """The rotation of every pair that brings b's circuit nearest to a's, and the one back, float64 `[d, d]`."""
    sides = ((write_a, write_b), (read_a, read_b))
    product = sum((as_pairs(a) * as_pairs(b).conj()).sum(-1) for a, b in sides)
    # A pair that nothing writes or reads stays as it is.
    angles = torch.where(product.abs() > SMALLEST * product.abs().max(), product.angle(), 0.0)
    rotated = pair_rotations(angles)
    return rotated, rotated.mT


def sign_similarity(write: Tensor, read: Tensor, write_b: Tensor, read_b: Tensor) -> Tensor:
    """The sum over pairs of Re <a, a'> Re <b', b>; see `Bases`."""
    writing, reading = (
        torch.einsum("hcpnr,kmpnr->hckmn", x.unflatten(2, (2, -1)), y.unflatten(2, (2, -1)))
        for x, y in ((write, write_b), (read, read_b))
    )
    return (writing * reading).sum(-1)


def sign_basis(write_a: Tensor, read_a: Tensor, write_b: Tensor, read_b: Tensor) -> tuple[Tensor, Tensor]:
    """The sign of every pair that brings b's circuit nearest to a's, and the same, float64 `[d, d]`."""
    product = sum((a * b).sum(-1).unflatten(0, (2, -1)).sum(0) for a, b in ((write_a, write_b), (read_a, read_b)))
    signs = torch.where(product < 0, -torch.ones_like(product), torch.ones_like(product)).repeat(2).diag()
    return signs, signs


def neighbour_similarity(*sides: Tensor) -> Tensor:
    """As `pair_similarity`, the pairs being unit 2 i and unit 2 i + 1."""
    return pair_similarity(*map(_in_halves, sides))


def neighbour_basis(*sides: Tensor) -> tuple[Tensor, Tensor]:
    """As `pair_basis`, the pairs being unit 2 i and unit 2 i + 1."""
    rotated, back = pair_basis(*map(_in_halves, sides))
    return of_neighbours(rotated), of_neighbours(back)


def _in_halves(x: Tensor) -> Tensor:
    """Unit 2 i and unit 2 i + 1 of the axis before the last as unit i and unit i + n."""
    return x.unflatten(-2, (-1, 2)).transpose(-3, -2).flatten(-3, -2)


def as_pairs(x: Tensor) -> Tensor:
    """Unit i and unit i + n of the axis before the last as one complex unit: `[..., 2 n, r]` to `[..., n, r]`."""
    first, second = x.chunk(2, -2)
    return torch.complex(first, second)


FREE: Mapping[Symmetry, Bases] = {
    Symmetry.LINEAR: Bases(circuit_similarity, basis),
    Symmetry.ROTARY: Bases(pair_similarity, pair_basis),
    Symmetry.ROTARY_NEIGHBOURS: Bases(neighbour_similarity, neighbour_basis),
    Symmetry.HALF_TURNS: Bases(sign_similarity, sign_basis),
}
"""By symmetry; spaces of others are matched unit by unit."""
