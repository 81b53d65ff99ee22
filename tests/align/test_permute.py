"""One-to-one matching: optimal for two experts, and independent of the experts' order for more."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch

from hf_zipit.align import assignment
from hf_zipit.align.methods.identity import identity
from hf_zipit.align.methods.permute import permute
from tests.align.toys import correlation, partition


def features(seed: int, experts: int = 3, units: int = 8, noise: float = 0.5) -> torch.Tensor:
    """Noisy permuted copies of the same units, `[experts, units, samples]`."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(units, 60, generator=generator)
    copies = [x[torch.randperm(units, generator=generator)] for _ in range(experts)]
    return torch.stack(copies) + noise * torch.randn(experts, units, 60, generator=generator)


def test_the_best_of_all_permutations_is_found_with_signed_correlations():
    for seed in range(5):
        a, b = features(seed, 2, 6, noise=3.0)
        similarity = correlation(a, -b)
        cross = similarity[:6, 6:]
        best = max(permutations(range(6)), key=lambda order: float(cross[torch.arange(6), list(order)].sum()))
        found = permute(similarity, 2)
        assert torch.equal(found.labels[0], torch.arange(6))
        assert torch.equal(found.labels[1][list(best)], torch.arange(6))


@pytest.mark.parametrize("ties", [False, True])
def test_an_auction_beforehand_changes_no_assignment(ties: bool, monkeypatch: pytest.MonkeyPatch):
    for seed in range(5):
        a, b = (torch.randn(60, 8, generator=torch.Generator().manual_seed(2 * seed + i)).double() for i in (0, 1))
        similarity = (a @ b.T).round() if ties else a @ b.T
        monkeypatch.setattr(assignment, "LARGE", 61)
        expected = assignment.assign(similarity)
        monkeypatch.setattr(assignment, "LARGE", 1)
        assert (assignment.assign(similarity) == expected).all()
        assert (assignment.assign(similarity.T)[expected] == range(60)).all()


@pytest.mark.parametrize("seed", range(5))
def test_the_order_of_the_experts_changes_names_only(seed):
    x = features(seed, noise=2.0)
    expected = partition(permute(correlation(*x), 3).labels)
    for order in permutations(range(3)):
        found = permute(correlation(*x[list(order)]), 3)
        assert partition(found.labels[torch.tensor(order).argsort()]) == expected
        assert len(found.labels.unique()) == found.size == 8


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("experts", [2, 3])
def test_dead_units_are_matched_the_same_from_every_side(experts, seed):
    """They tie with every unit that is left over, of which every expert has others."""
    x = features(seed, experts, units=12, noise=2.0)
    for t in range(experts):
        x[t, torch.randperm(12, generator=torch.Generator().manual_seed(10 * seed + t))[: 3 + t]] = 0
    expected = partition(permute(correlation(*x), experts).labels)
    for order in permutations(range(experts)):
        found = permute(correlation(*x[list(order)]), experts)
        assert partition(found.labels[torch.tensor(order).argsort()]) == expected


def test_two_experts_are_matched_to_the_first():
    assert torch.equal(permute(correlation(*features(0, 2)), 2).labels[0], torch.arange(8))


def test_dead_and_scaled_units_of_the_same_model_keep_their_partners():
    x = torch.randn(12, 30, generator=torch.Generator().manual_seed(0)).relu()
    x[[1, 4, 9]] = 0
    x[6], x[2] = 3 * x[3], x[3]
    for experts in (2, 3):
        assert torch.equal(permute(correlation(*[x] * experts), experts).labels, torch.arange(12).repeat(experts, 1))


def test_identity_merges_the_same_index():
    found = identity(torch.empty(12, 12, device="meta"), 3)
    assert found.size == 4
    assert torch.equal(found.counts(), torch.full((4,), 3))
