"""Procrustes, CCA and circuits on tensors alone: what they recover, and that exchanging the experts inverts them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hf_zipit.align.circuit_bases import FREE, balance, basis, pair_basis, pair_similarity
from hf_zipit.align.circuit_pairs import CircuitFamily, circuits_of, match_family
from hf_zipit.align.method import Network
from hf_zipit.align.methods.cca import canonical_correlations
from hf_zipit.align.methods.circuits import match_circuits
from hf_zipit.align.procrustes import match_rotations, rotation
from hf_zipit.errors import RecipeError
from hf_zipit.maps.space_map import LinearMap, SpaceMap
from hf_zipit.maps.transform import features_to_merged, to_merged, unmerge_matrix
from hf_zipit.symmetry.group import _random_map, apply_element, random_element, transform
from hf_zipit.symmetry.spec import Factor, Space, Symmetry, product_key
from tests.align.toys import space, spec_of


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def drawn(size, symmetry, seed=5):
    return _random_map(size, symmetry, torch.Generator().manual_seed(seed))


def near(x, y, tolerance=1e-9):
    torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


# Procrustes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetry", [Symmetry.ORTHOGONAL, Symmetry.ORTHOGONAL_ONES])
def test_a_rotation_is_undone(symmetry):
    x, o = random(6, 50), drawn(6, symmetry)
    found, similarity = rotation(x @ (o @ x).T, ones=symmetry is Symmetry.ORTHOGONAL_ONES)
    near(found @ o, torch.eye(6).double(), 1e-7)
    assert similarity == pytest.approx(float((x * x).sum()))


def test_the_vector_of_ones_is_kept_whatever_the_products_say():
    found, _ = rotation(random(6, 6), ones=True)
    near(found @ torch.ones(6).double(), torch.ones(6).double())
    near(found @ found.T, torch.eye(6).double())


def test_it_is_the_best_rotation():
    product = random(5, 5)
    found, best = rotation(product)
    for seed in range(20):
        other = found @ torch.matrix_exp(0.3 * (random(5, 5, seed=seed) - random(5, 5, seed=seed).T))
        assert float((product * other).sum()) <= best + 1e-12
    near(rotation(product.T)[0], found.T)


def test_where_nothing_varies_units_stay():
    x = torch.cat([random(3, 40), torch.zeros(2, 40).double()])
    o = torch.eye(5).double()
    o[:3, :3] = drawn(3, Symmetry.ORTHOGONAL)
    near(rotation(x @ (o @ x).T)[0] @ o, torch.eye(5).double(), 1e-6)
    near(rotation(torch.zeros(4, 4).double())[0], torch.eye(4).double())


def test_all_experts_are_rotated_to_the_one_that_resembles_the_others_most():
    base = random(6, 200)
    noisy = [base + share * random(6, 200, seed=9 + t) for t, share in enumerate((2, 0, 1))]
    x = torch.cat([drawn(6, Symmetry.ORTHOGONAL, t) @ own for t, own in enumerate(noisy)])
    maps = match_rotations((x @ x.T).reshape(3, 6, 3, 6))
    assert torch.equal(maps.matrices[1], torch.eye(6).double())
    near(maps.matrices @ maps.inverses, torch.eye(6).double().expand(3, 6, 6))


# CCA -----------------------------------------------------------------------------------------------------------------


def covariance(*features):
    x = torch.cat(features)
    return x @ x.T / x.shape[1]


def test_cca_without_regularisation_undoes_any_invertible_map():
    x, g = random(5, 300), drawn(5, Symmetry.LINEAR)
    maps = canonical_correlations(covariance(x, g @ x), 2, regularisation=0)
    near(maps.matrices[1] @ g, torch.eye(5).double(), 1e-6)
    near(maps.matrices[0], torch.eye(5).double())


def test_cca_with_regularisation_undoes_rotations_and_orders():
    x, o = random(5, 300), drawn(5, Symmetry.ORTHOGONAL)
    near(canonical_correlations(covariance(x, o @ x), 2).matrices[1] @ o, torch.eye(5).double(), 1e-6)


def test_exchanging_the_experts_inverts_cca():
    x, y = random(5, 300), 0.5 * random(5, 300) + random(5, 300, seed=1)
    there, back = canonical_correlations(covariance(x, y), 2), canonical_correlations(covariance(y, x), 2)
    near(there.matrices[1], back.inverses[1])
    near(there.matrices[1] @ there.inverses[1], torch.eye(5).double())


def test_cca_survives_dead_units_and_says_what_is_wrong():
    x = torch.cat([random(3, 40), torch.zeros(2, 40).double()])
    maps = canonical_correlations(covariance(x, x), 2, regularisation=0)
    assert maps.matrices.isfinite().all()
    near(maps.matrices[1], torch.eye(5).double(), 1e-6)
    with pytest.raises(RecipeError, match="regularisation"):
        canonical_correlations(covariance(x, x), 2, regularisation=-1)


# Circuits ------------------------------------------------------------------------------------------------------------


def test_balanced_sides_are_equal():
    write, read = random(4, 20), random(4, 30, seed=1)
    h, back = balance(write, read)
    near(h @ write @ (h @ write).T, back.T @ read @ (back.T @ read).T)
    near(h @ back, torch.eye(4).double())


def test_a_circuit_in_another_basis_is_brought_back():
    write, read, g = random(4, 20), random(4, 30, seed=1), drawn(4, Symmetry.LINEAR)
    own, other = basis(write, read, write, read), basis(write, read, g @ write, torch.linalg.inv(g).T @ read)
    near(own[1] @ other[0] @ g, torch.eye(4).double(), 1e-7)


def test_a_circuit_of_low_rank_is_brought_back():
    """As a head has whose queries use half of its dimensions: the circuit comes back, the rest does not matter."""
    write, read, g = random(4, 2) @ random(2, 20), random(4, 30, seed=1), drawn(4, Symmetry.LINEAR)
    copy = g @ write, torch.linalg.inv(g).T @ read
    own, other = basis(write, read, write, read), basis(write, read, *copy)
    mean_write = (own[0] @ write + other[0] @ copy[0]) / 2
    mean_read = (own[1].T @ read + other[1].T @ copy[1]) / 2
    near(mean_write.T @ mean_read, write.T @ read, 1e-4)


def rotary(x, angle):
    """A rotary embedding of `[d, columns]` at one position."""
    half = torch.cat([-x[len(x) // 2 :], x[: len(x) // 2]])
    angles = (angle * 0.3 ** torch.arange(len(x) // 2)).repeat(2)[:, None]
    return x * angles.cos() + half * angles.sin()


def test_turns_of_pairs_pass_through_a_rotary_embedding_and_nothing_else_does():
    x = random(6, 20)
    for symmetry in Symmetry:
        if symmetry is not Symmetry.FIXED:
            g = drawn(6, symmetry)
            g = torch.eye(6).double()[g] if symmetry is Symmetry.PERMUTATION else g
            same = torch.allclose(g @ rotary(x, 1.7), rotary(g @ x, 1.7))
            assert same == (symmetry in (Symmetry.ROTARY, Symmetry.HALF_TURNS)), symmetry


@pytest.mark.parametrize("symmetry", [symmetry for symmetry in Symmetry if symmetry.in_pairs])
def test_circuits_find_the_turns_of_pairs_of_every_kind(symmetry):
    bases, write, read, g = FREE[symmetry], random(6, 20), random(6, 30, seed=1), drawn(6, symmetry)
    matrix, inverse = bases.matrices(write, read, g @ write, g @ read)
    near(matrix @ g, torch.eye(6).double())
    near(matrix @ inverse, torch.eye(6).double())
    sides = [side[None, None] for side in (write, read)]
    moved = [(g @ side)[None, None] for side in (write, read)]
    near(bases.similarity(*sides, *moved), bases.similarity(*sides, *sides))


def test_a_circuit_with_turned_pairs_is_turned_back():
    write, read, g = random(6, 20), random(6, 30, seed=1), drawn(6, Symmetry.ROTARY)
    matrix, inverse = pair_basis(write, read, g @ write, g @ read)
    near(matrix @ g, torch.eye(6).double())
    near(matrix @ inverse, torch.eye(6).double())
    near(pair_basis(write, read, write, read)[0], torch.eye(6).double())


def test_no_other_turn_of_the_pairs_is_better_and_exchanging_the_experts_inverts_it():
    write, read, write_b, read_b = (random(6, 9, seed=i) for i in range(4))

    def distance(g):
        return float((write - g @ write_b).square().sum() + (read - g @ read_b).square().sum())

    best, back = pair_basis(write, read, write_b, read_b)
    near(pair_basis(write_b, read_b, write, read)[0], back)
    for seed in range(20):
        assert distance(best) <= distance(drawn(6, Symmetry.ROTARY, seed)) + 1e-12


def test_a_pair_that_nothing_writes_stays():
    """Nor does what is left of it by rounding turn it."""
    write, read = random(6, 9), random(6, 9, seed=1)
    write[[1, 4]] *= 1e-17
    read[[1, 4]] *= 1e-17
    g = drawn(6, Symmetry.ROTARY)
    matrix, _ = pair_basis(write, read, g @ write, g @ read)
    near(matrix[[1, 4]], torch.eye(6).double()[[1, 4]])


def test_circuits_under_a_rotary_embedding_are_compared_at_all_distances():
    """Their mean inner product over angles is what is computed, and turns of one expert's pairs change nothing."""
    sides = [random(4, 5, seed=i)[None, None] for i in range(4)]
    g = drawn(4, Symmetry.ROTARY)
    found = pair_similarity(*sides)
    near(pair_similarity(sides[0], sides[1], g @ sides[2], g @ sides[3]), found)
    # Angles of which every pair goes round once, at speeds that have nothing to do with each other.
    turns = [drawn(4, Symmetry.ROTARY, seed) for seed in range(4000)]
    write, read, write_b, read_b = (side[0, 0] for side in sides)
    mean = sum(((t @ write).T @ read * ((t @ write_b).T @ read_b)).sum() for t in turns) / len(turns)
    # Of a complex number the real part squared is half, on average.
    assert float(found) / 2 == pytest.approx(float(mean), rel=0.1)


GROUPED = spec_of(
    space("kv", 3),
    space("copies", 2, "kv"),
    Space("value", 4, Symmetry.LINEAR, ("kv",)),
    Space("dim", 6, Symmetry.ROTARY, ("kv",)),
    space("stream", 7, fixed=True),
    axes={
        "q": ((Factor("kv"), Factor("copies"), Factor("dim")), (Factor("stream", True),)),
        "k": ((Factor("kv"), Factor("dim", True)), (Factor("stream", True),)),
        "v": ((Factor("kv"), Factor("value")), (Factor("stream", True),)),
        "bias": ((Factor("kv"), Factor("value")),),
        "o": ((Factor("stream"),), (Factor("kv", True), Factor("copies", True), Factor("value", True))),
    },
)


def grouped_weights(seed=0):
    shapes = [[GROUPED.size(product_key(label)) for label in labels] for labels in GROUPED.axes.values()]
    return {
        name: random(*shape, seed=seed + i) for i, (name, shape) in enumerate(zip(GROUPED.axes, shapes, strict=True))
    }


@pytest.mark.parametrize("seed", range(4))
def test_grouped_heads_are_paired_with_their_copies_and_turned_back(seed):
    weights = grouped_weights()
    element = random_element(GROUPED, torch.Generator().manual_seed(seed))
    copy = apply_element(weights, GROUPED, element)
    network = Network(GROUPED, 2, weights=[weights, copy])
    maps = match_family(CircuitFamily("kv", ("value", "dim"), "copies"), network, {})
    for name, labels in GROUPED.axes.items():
        ours, theirs = (to_merged(w[name], labels, maps, GROUPED, t) for t, w in enumerate((weights, copy)))
        near(theirs, ours, 1e-6)


def test_pairs_whose_heads_circuits_cannot_match_are_left_alone():
    """As where something inside the heads was decided before: nothing else can turn pairs."""
    weights = grouped_weights()
    kept = SpaceMap(4, torch.arange(4).expand(2, 3, 4))
    network = Network(GROUPED, 2, weights=[weights, grouped_weights(50)], fixed_maps={"value": kept})
    seen, families = circuits_of(network)
    assert families == []
    assert seen.spec.spaces["dim"].symmetry is Symmetry.FIXED
    assert set(match_circuits(network)) == {"kv", "copies"}
    assert set(match_circuits(replace(network, fixed_maps={}))) == {"kv", "copies", "value", "dim"}


def test_exchanging_the_experts_changes_no_circuit():
    a, b = grouped_weights(), grouped_weights(50)

    def circuits(first, second):
        network = Network(GROUPED, 2, weights=[first, second])
        maps = match_family(CircuitFamily("kv", ("value", "dim"), "copies"), network, {})
        means = {
            name: sum(to_merged(w[name], labels, maps, GROUPED, t) for t, w in enumerate((first, second)))
            for name, labels in GROUPED.axes.items()
        }
        value, out = means["v"].reshape(3, 4, 7), means["o"].reshape(7, 3, 2, 4)
        query, key = means["q"].reshape(3, 2, 6, 7), means["k"].reshape(3, 6, 7)
        # Whatever the heads' order.
        return torch.einsum("okcv,kvi->koi", out, value).sum(0), torch.einsum("kcdi,kdj->ij", query, key)

    for one, other in zip(circuits(a, b), circuits(b, a), strict=True):
        near(one, other, 1e-7)


# Applying changes of basis -------------------------------------------------------------------------------------------

HEADS = spec_of(
    Space("stream", 6, Symmetry.ORTHOGONAL), space("heads", 3), Space("dim", 4, Symmetry.LINEAR, ("heads",))
)
LABELS = ((Factor("stream"),), (Factor("heads", True), Factor("dim", True)))


def alignment_of(element, experts=2):
    """The element for every expert but the first, as maps."""
    maps = {}
    for name, g in element.items():
        if g.dtype == torch.int64:
            same = torch.arange(g.shape[-1]).expand(g.shape)
            maps[name] = SpaceMap(g.shape[-1], torch.stack([same, *[g.argsort(-1)] * (experts - 1)]))
        else:
            eye = torch.eye(g.shape[-1]).double().expand(g.shape)
            maps[name] = LinearMap.of(torch.stack([eye, *[g] * (experts - 1)]))
    return maps


def test_a_map_does_what_the_group_element_does():
    element = random_element(HEADS, torch.Generator().manual_seed(2))
    maps, x = alignment_of(element), random(6, 12)
    expected = transform(x, LABELS, HEADS, element)
    near(to_merged(x, LABELS, maps, HEADS, 1), expected)
    near(to_merged(x, LABELS, maps, HEADS, 1), expected)
    assert torch.equal(to_merged(x, LABELS, maps, HEADS, 0), x)
    features = random(2, 12, 5)
    held = tuple(Factor(f.space) for f in LABELS[1])
    near(
        features_to_merged(features, 1, held, maps, HEADS, 1),
        transform(features.movedim(1, 2), ((), (), held), HEADS, element).movedim(2, 1),
    )


@pytest.mark.parametrize("key", [("stream",), ("heads", "dim")])
def test_the_unmerge_matrix_inverts_the_merge(key):
    element = random_element(HEADS, torch.Generator().manual_seed(2))
    maps, size = alignment_of(element), HEADS.size(key)
    label = tuple(map(Factor, key))
    merge = features_to_merged(torch.eye(size).double(), 0, label, maps, HEADS, 1)
    near(unmerge_matrix(maps, label, 1, HEADS) @ merge, torch.eye(size).double())


def test_identity_matrices_do_what_identity_labels_do():
    eye = {name: torch.eye(s.size).double() for name, s in HEADS.spaces.items()}
    eye["dim"] = eye["dim"].repeat(3, 1, 1)
    same = {name: torch.arange(g.shape[-1]).expand(g.shape[:-1]) for name, g in eye.items()}
    x = random(6, 12).float()
    for label in (LABELS, tuple(tuple(Factor(f.space, not f.dual) for f in axis) for axis in LABELS)):
        found = [to_merged(x, label, alignment_of(g), HEADS, 1) for g in (eye, same)]
        assert torch.equal(*found)


def test_the_regularisation_of_cca_is_relative_unless_it_is_to_be_absolute():
    """Published is the absolute one, with which the map depends on the features' scale."""
    x, y = random(5, 60), 0.5 * random(5, 60) + random(5, 60, seed=1)
    both = torch.cat([x, y])
    covariance = both @ both.T / 60
    for absolute, same in ((False, True), (True, False)):
        one, other = (
            canonical_correlations(scale * covariance, 2, absolute=absolute).matrices for scale in (1.0, 1e-3)
        )
        assert torch.allclose(one, other, atol=1e-9) == same
