"""Greedy joining: the published partitions, an independent slow version, and what must hold for every input."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_zipit.align.methods.zip import zip_units
from hf_zipit.errors import RecipeError
from tests.align.toys import correlation, partition, vectors

PUBLISHED = vectors("zipit_zip_2models_d64")
ROWS = [row for row in range(len(PUBLISHED["alpha_beta"])) if row != 6]  # row 6 carries a fault of the published code


@pytest.mark.parametrize("row", ROWS)
def test_published_partitions(row):
    alpha, beta = PUBLISHED["alpha_beta"][row].tolist()
    found = zip_units(torch.from_numpy(PUBLISHED["corr"]).double(), 2, alpha=alpha, beta=beta, compat=True)
    assert partition(found.labels) == partition(PUBLISHED[f"label_{row}"])


@pytest.mark.parametrize("row", [0, 1, 2, 3, 4, 8])
def test_published_partitions_without_compat_where_beta_is_not_zero(row):
    alpha, beta = PUBLISHED["alpha_beta"][row].tolist()
    found = zip_units(torch.from_numpy(PUBLISHED["corr"]).double(), 2, alpha=alpha, beta=beta)
    assert partition(found.labels) == partition(PUBLISHED[f"label_{row}"])


def straightforward(original: np.ndarray, experts: int, size: int, alpha: float, beta: float) -> list[list[int]]:
    """The same algorithm with plain lists and a whole search at every join, without twins."""
    units = len(original) // experts
    similarity = original.copy()
    np.fill_diagonal(similarity, -np.inf)
    groups = [[unit] for unit in range(len(original))]
    budget = [int((len(original) - size) / experts * beta + 1e-4)] * experts

    def inside(first, second):
        return {unit // units for unit in first} & {unit // units for unit in second}

    while len(groups) > size:
        allowed = similarity.copy()
        for p, q in np.ndindex(allowed.shape):
            if any(budget[expert] <= 0 for expert in inside(groups[p], groups[q])):
                allowed[p, q] = -np.inf
        if (allowed == -np.inf).all():
            budget = [len(original)] * experts
            similarity = np.array([[original[np.ix_(p, q)].min() for p in groups] for q in groups])
            np.fill_diagonal(similarity, -np.inf)
            allowed = similarity
        p, q = sorted(map(int, np.unravel_index(allowed.argmax(), allowed.shape)))
        for expert in inside(groups[p], groups[q]):
            budget[expert] -= 1
        row = alpha * np.minimum(similarity[p], similarity[q])
        row[p] = -np.inf
        similarity[p] = similarity[:, p] = row
        groups[p] += groups.pop(q)
        similarity = np.delete(np.delete(similarity, q, 0), q, 1)
    return groups


@pytest.mark.parametrize("seed", range(12))
def test_cached_maxima_find_what_a_whole_search_finds(seed):
    generator = torch.Generator().manual_seed(seed)
    experts, units = 2 + seed % 3, 5 + seed
    features = torch.randn(experts, units, 12, generator=generator)  # few samples: strong correlations of both signs
    similarity = correlation(*features)
    alpha, beta = float(torch.rand((), generator=generator)) * 0.9 + 0.05, (0.0, 0.3, 1.0)[seed % 3]
    size = units + (-2, 0, 3)[seed % 3]
    found = zip_units(similarity, experts, alpha=alpha, beta=beta, size=size)
    expected = straightforward(similarity.numpy(), experts, size, alpha, beta)
    assert partition(found.labels) == {frozenset(group) for group in expected}
    assert found.size == size == len(found.labels.unique())


@pytest.mark.parametrize("seed", range(12))
def test_of_equal_correlations_the_first_is_joined_also_where_negative_ones_rose(seed):
    """Quarters times powers of a half are exact, so that ties abound, many of them of risen negative values."""
    generator = torch.Generator().manual_seed(seed)
    units = 5 + seed
    similarity = torch.randint(-4, 1 + 3 * (seed % 2), (2 * units, 2 * units), generator=generator).double() / 4
    similarity = torch.minimum(similarity, similarity.T).fill_diagonal_(1)
    found = zip_units(similarity, 2, alpha=0.5, beta=1, size=units - 2)
    expected = straightforward(similarity.numpy(), 2, units - 2, 0.5, 1)
    assert partition(found.labels) == {frozenset(group) for group in expected}


@pytest.mark.parametrize("seed", range(6))
def test_the_order_of_the_experts_changes_names_only(seed):
    generator = torch.Generator().manual_seed(seed)
    a, b, c = torch.randn(3, 9, 15, generator=generator)
    one, other = zip_units(correlation(a, b, c), 3), zip_units(correlation(c, a, b), 3)
    assert partition(one.labels) == partition(other.labels[[1, 2, 0]])


def test_beta_zero_joins_nothing_inside_an_expert():
    x = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    a = torch.cat([x, x + 0.01 * x.flip(1)])  # every unit has a near copy inside a
    found = zip_units(correlation(a, torch.randn(8, 50, generator=torch.Generator().manual_seed(1))), 2, beta=0)
    assert all(len({unit // 8 for unit in group}) == 2 or len(group) == 1 for group in partition(found.labels))
    inside = zip_units(correlation(a, torch.randn(8, 50)), 2, beta=1)
    assert any(len({unit // 8 for unit in group}) == 1 and len(group) > 1 for group in partition(inside.labels))


@pytest.mark.parametrize("experts", [2, 3])
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("alpha, beta", [(0.3, 0.125), (1.0, 1.0), (0.0, 0.0)])
def test_the_same_units_are_paired_though_some_are_dead_duplicated_or_scaled(seed, experts, alpha, beta):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(14, 40, generator=generator).relu()
    x[torch.randperm(14, generator=generator)[:4]] = 0
    x[3], x[7] = x[5], 2 * x[5]
    found = zip_units(correlation(*[x] * experts), experts, alpha=alpha, beta=beta)
    assert torch.equal(found.labels, torch.arange(14).repeat(experts, 1))


@pytest.mark.parametrize("experts", [2, 3])
@pytest.mark.parametrize("seed", range(5))
def test_permuted_copies_are_merged_into_groups_of_equal_features(seed, experts):
    """Each merged unit must hold one unit of every expert, and all of them must have the same features."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(16, 40, generator=generator).relu()
    x[:5] = 0
    x[8], x[9], x[12] = x[7], x[7], x[11]
    x = x[torch.randperm(16, generator=generator)]
    copies = [x[torch.randperm(16, generator=generator)] for _ in range(experts)]
    # The sums of a permuted copy are added in another order: the last bits of its correlations differ.
    noise = 1e-12 * torch.randn(16 * experts, 16 * experts, generator=generator, dtype=torch.float64)
    found = zip_units(correlation(*copies) + noise + noise.T, experts, beta=1.0)
    for merged in range(16):
        members = [(found.labels[t] == merged).nonzero().flatten().tolist() for t in range(experts)]
        assert [len(m) for m in members] == [1] * experts
        assert all(torch.equal(copies[t][members[t][0]], copies[0][members[0][0]]) for t in range(experts))


@pytest.mark.parametrize("compat", [False, True])
def test_any_size_can_be_reached(compat):
    similarity = correlation(*torch.randn(3, 6, 20, generator=torch.Generator().manual_seed(3)))
    for size in range(1, 19):
        found = zip_units(similarity, 3, beta=0, size=size, compat=compat)
        assert found.size == size == len(found.labels.unique())


def test_merged_units_are_numbered_by_their_first_members():
    found = zip_units(correlation(*torch.randn(2, 10, 20, generator=torch.Generator().manual_seed(3))), 2)
    flat = found.labels.flatten().tolist()
    firsts = [flat.index(merged) for merged in range(found.size)]
    assert firsts == sorted(firsts)


@pytest.mark.parametrize("options", [{"alpha": 1.5}, {"beta": -0.1}, {"size": 0}, {"size": 13}])
def test_options_out_of_range(options):
    with pytest.raises(RecipeError, match=next(iter(options))):
        zip_units(torch.eye(12, dtype=torch.float64), 2, **options)
