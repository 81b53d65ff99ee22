"""Atoms: splitting, tying, regrouping and duality, by hand and against random shapes."""

from __future__ import annotations

import random
from itertools import permutations, product
from math import prod

import pytest

from hf_zipit.symmetry.atoms import Atoms, dual
from hf_zipit.symmetry.spec import Symmetry


def test_an_axis_of_size_one_has_no_atom():
    assert Atoms().fresh(1) == ()


def test_tied_axes_are_one():
    atoms = Atoms()
    a, b = atoms.fresh(6), atoms.fresh(6)
    atoms.tie(a, b, "")
    assert atoms.resolve(a) == atoms.resolve(b)


def test_a_tie_keeps_the_smaller_symmetry_and_its_reason():
    atoms = Atoms()
    a, b = atoms.fresh(6), atoms.fresh(6)
    atoms.restrict(b, Symmetry.PERMUTATION, "relu")
    atoms.tie(a, b, "")
    assert atoms.symmetry(a[0]) is Symmetry.PERMUTATION
    assert atoms.reason(a[0]) == "relu"
    atoms.restrict(a, Symmetry.ORTHOGONAL, "norm")  # allows more than is left
    assert atoms.symmetry(b[0]) is Symmetry.PERMUTATION


def test_an_axis_tied_to_its_own_dual_is_orthogonal():
    atoms = Atoms()
    a, b = atoms.fresh(6), atoms.fresh(6)
    atoms.tie(a, dual(b), "")
    assert atoms.symmetry(a[0]) is Symmetry.LINEAR
    assert atoms.resolve(a) == dual(atoms.resolve(b))
    atoms.tie(a, b, "")
    assert atoms.symmetry(a[0]) is Symmetry.ORTHOGONAL


def test_duality_survives_chains_and_splits():
    atoms = Atoms()
    a, b, c = (atoms.fresh(6) for _ in range(3))
    atoms.tie(a, dual(b), "")
    atoms.tie(b, dual(c), "")
    assert atoms.resolve(a) == atoms.resolve(c)
    heads, inner = atoms.regroup([a], [2, 3], "")
    assert dual(atoms.resolve(b)) == heads + inner


def test_a_product_splits_what_it_is_tied_to():
    atoms = Atoms()
    width, heads, inner = atoms.fresh(12), atoms.fresh(3), atoms.fresh(4)
    atoms.tie(width, heads + inner, "")
    assert atoms.resolve(width) == atoms.resolve(heads + inner)


def test_parts_inherit_the_symmetry():
    atoms = Atoms()
    width = atoms.fresh(12, Symmetry.ORTHOGONAL, "norm")
    for ref in (ref for axis in atoms.regroup([width], [3, 4], "") for ref in axis):
        assert atoms.symmetry(ref) is Symmetry.ORTHOGONAL
        assert atoms.reason(ref) == "norm"


def test_products_that_do_not_nest_are_fixed():
    atoms = Atoms()
    left, right = atoms.fresh(8) + atoms.fresh(12), atoms.fresh(12) + atoms.fresh(8)
    atoms.tie(left, right, "uneven")
    assert {atoms.symmetry(ref) for ref in atoms.resolve(left + right)} == {Symmetry.FIXED}
    assert {atoms.reason(ref) for ref in atoms.resolve(left + right)} == {"uneven"}


def test_a_reshape_that_does_not_nest_is_fixed():
    atoms = Atoms()
    axes = [atoms.fresh(8), atoms.fresh(12)]
    out = atoms.regroup(axes, [12, 8], "uneven")
    assert [atoms.size(axis) for axis in out] == [12, 8]
    assert {atoms.symmetry(ref) for axis in [*axes, *out] for ref in atoms.resolve(axis)} == {Symmetry.FIXED}


def random_cut(rng: random.Random, size: int) -> list[int]:
    """A random ordered factorisation, with ones in it."""
    parts = [1] * rng.randint(0, 1)
    while size > 1:
        factor = rng.choice([n for n in range(2, size + 1) if size % n == 0])
        parts.append(factor)
        size //= factor
    return parts + [1] * rng.randint(0, 1)


@pytest.mark.parametrize("seed", range(30))
def test_random_reshapes_keep_sizes_and_come_back(seed):
    rng = random.Random(seed)
    size = rng.choice([12, 24, 36, 60, 64])
    atoms = Atoms()
    start = [atoms.fresh(n) for n in random_cut(rng, size)]
    shape = [atoms.size(axis) for axis in start]
    axes = start
    for _ in range(4):
        target = random_cut(rng, size)
        axes = atoms.regroup(axes, target, "uneven")
        assert [atoms.size(axis) for axis in axes] == target
    back = atoms.regroup(axes, shape, "uneven")
    flat = [ref for axis in start for ref in atoms.resolve(axis)]
    came = [ref for axis in back for ref in atoms.resolve(axis)]
    free = [[ref for ref in refs if atoms.symmetry(ref) is not Symmetry.FIXED] for refs in (flat, came)]
    assert free[0] == free[1]
    assert came == flat or len(free[0]) < len(flat)


def test_axes_beside_those_that_do_not_fit_stay_free():
    atoms = Atoms()
    heads, rows, units = (atoms.fresh(n) for n in (5, 6, 7))
    found = atoms.regroup([heads, rows, heads, units], [5, 6 * 5, 7], "uneven")
    assert (found[0], found[2]) == (heads, units)
    found = atoms.regroup([heads, atoms.fresh(6), atoms.fresh(8), units], [5, 16, 3, 7], "uneven")
    assert (found[0], found[3]) == (heads, units)
    assert {atoms.symmetry(ref) for axis in found[1:3] for ref in axis} == {Symmetry.FIXED}


@pytest.mark.parametrize("seed", range(30))
def test_random_ties_leave_equal_axes_or_fixed_ones(seed):
    rng = random.Random(seed)
    size = rng.choice([12, 24, 36, 60, 64])
    atoms = Atoms()
    sides = []
    for _ in range(3):
        parts = [atoms.fresh(n) for n in random_cut(rng, size)]
        side = tuple(ref for part in parts for ref in (dual(part) if rng.random() < 0.3 else part))
        atoms.restrict(side, rng.choice(list(Symmetry)[1:]))
        sides.append(side)
    for left, right in zip(sides, sides[1:], strict=False):
        atoms.tie(left, right, "uneven")
    for left, right in zip(sides, sides[1:], strict=False):
        left, right = atoms.resolve(left), atoms.resolve(right)
        assert prod(atoms.size((ref,)) for ref in left) == size
        agree = 0
        while agree < min(len(left), len(right)) and left[agree].atom == right[agree].atom:
            same_side = left[agree].dual == right[agree].dual
            assert same_side or atoms.symmetry(left[agree]) <= Symmetry.ORTHOGONAL
            agree += 1
        assert {atoms.symmetry(ref) for ref in (*left[agree:], *right[agree:])} <= {Symmetry.FIXED}


def test_rotations_of_pairs_and_orders_have_nothing_in_common():
    """And meeting them in any order is the same."""
    for first, second in permutations([Symmetry.ROTARY, Symmetry.PERMUTATION]):
        atoms = Atoms()
        a = atoms.fresh(6)
        atoms.restrict(a, first, "first")
        assert atoms.symmetry(a[0]) is first
        atoms.restrict(a, second)
        assert atoms.symmetry(a[0]) is Symmetry.FIXED
        assert atoms.reason(a[0]) == "first"
    for one, other, third in product(Symmetry, repeat=3):
        assert one.meet(other) is other.meet(one)
        assert one.meet(other).meet(third) is one.meet(other.meet(third))


def test_a_part_of_a_rotary_axis_has_no_pairs():
    atoms = Atoms()
    a = atoms.fresh(8)
    atoms.restrict(a, Symmetry.ROTARY)
    parts = [part for axis in atoms.regroup([a], [2, 4], "") for part in axis]
    assert [atoms.symmetry(part) for part in parts] == [Symmetry.FIXED] * 2
