"""Dual-space matching: permuted copies are found again, and activations and weights both have their say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor

from hf_zipit.adapters import adapter_for
from hf_zipit.align.align import align, residual_spaces
from hf_zipit.align.method import Network
from hf_zipit.align.methods.dual import BALANCES, _State, match_dual
from hf_zipit.align.solver import Choice
from hf_zipit.data.calibration import Calibration
from hf_zipit.errors import RecipeError
from hf_zipit.maps.space_map import SpaceMap
from hf_zipit.observation.observe import gather_moments
from hf_zipit.symmetry.group import apply_element, random_element
from hf_zipit.symmetry.spec import Factor, MergeSpec, ProductKey
from tests import tiny
from tests.align.test_weights import assert_same, general, merged, noisy, permuted, spec_for
from tests.align.toys import correlation, space, spec_of

NAMES = ["vit", "bert", "resnet-basic", "clip", "llama", "bit"]


def correlations(name: str, experts: Sequence[Mapping[str, Tensor]]) -> dict[ProductKey, Tensor]:
    """What the experts do on the adapter's example inputs."""
    models = {}
    for t, weights in enumerate(experts):
        models[str(t)] = tiny.build(name)
        models[str(t)].load_state_dict({n: x.clone() for n, x in weights.items()}, strict=False)
    inputs = adapter_for(models["0"]).inputs(models["0"])
    inputs = {n: x for n, x in inputs.items() if isinstance(x, Tensor)}
    moments = gather_moments(spec_for(name), models, Calibration([inputs]).read(models), row_fraction=1.0)
    return {key: moments.correlation(key) for key in moments.keys()}  # noqa: SIM118 (not a mapping)


@pytest.mark.parametrize(
    ("name", "variant"), [*tiny.mostly_seldom(((name, "align") for name in NAMES), 2), ("vit", "zip")]
)
def test_a_permuted_copy_is_recovered(name, variant):
    spec, weights = general(name)
    experts = [weights, permuted(weights, spec, 1)]
    maps = align(spec, correlations(name, experts), 2, "dual", options={"variant": variant}, weights=experts)
    assert_same(merged(experts, maps, spec), weights)


@pytest.mark.parametrize(("name", "variant", "noise"), [("vit", "zip", 0.0), ("llama", "align", 0.02)])
def test_three_experts(name, variant, noise):
    """Zip may join what two experts' noisy copies share before it joins the third's: it gets exact ones."""
    spec, weights = general(name)
    experts = [permuted(noisy(weights, seed, noise), spec, seed) for seed in range(3)]
    exact = [permuted(weights, spec, seed) for seed in range(3)]
    maps = align(spec, correlations(name, experts), 3, "dual", options={"variant": variant}, weights=experts)
    # The same maps make one model of exact copies: up to the order of its units the one that they are copies of.
    found = merged(exact, maps, spec)
    again = align(spec, {}, 2, "weights", weights=[weights, found])
    assert_same(merged([weights, found], again, spec), weights)


@pytest.mark.parametrize("variant", ["align", "zip"])
def test_the_order_of_the_experts_changes_names_only(variant):
    spec = spec_for("vit")
    experts = [general("vit", seed)[1] for seed in range(2)]
    options = {"variant": variant, "sweeps": 2}
    one = align(spec, correlations("vit", experts), 2, "dual", options=options, weights=experts)
    other = align(spec, correlations("vit", experts[::-1]), 2, "dual", options=options, weights=experts[::-1])
    forward, backward = merged(experts, one, spec), merged(experts[::-1], other, spec)
    again = align(spec, {}, 2, "weights", weights=[forward, backward])
    assert_same(merged([forward, backward], again, spec), forward)


@pytest.mark.parametrize("name", ["vit", "llama"])
def test_a_residual_stream_at_identity_stays_there_and_the_rest_is_matched_through_it(name):
    spec, weights = general(name)
    residual = residual_spaces(spec)
    element = random_element(spec, torch.Generator().manual_seed(0), permutations_only=True)
    copy = apply_element(weights, spec, {n: order for n, order in element.items() if n not in residual})
    experts = [weights, copy]
    maps = align(spec, correlations(name, experts), 2, "dual", weights=experts, residual="identity")
    for n in residual:
        assert torch.equal(maps[n].labels, torch.arange(maps[n].size).repeat(2, 1))
    assert_same(merged(experts, maps, spec), weights)


def hidden(a: Tensor, b: Tensor) -> tuple[MergeSpec, list[dict[str, Tensor]]]:
    """Hidden units that read a fixed input with weights a and b."""
    axes = {"up": ((Factor("hidden"),), (Factor("input", dual=True),))}
    return spec_of(space("hidden", len(a)), space("input", a.shape[1], fixed=True), axes=axes), [{"up": a}, {"up": b}]


def opposed() -> tuple[MergeSpec, list[dict[str, Tensor]], Tensor, Tensor, Tensor]:
    """Units of which weights and activations say different things, and both orders."""
    generator = torch.Generator().manual_seed(0)
    weights, features = torch.randn(8, 20, generator=generator), torch.randn(8, 50, generator=generator)
    by_weights, by_activations = torch.randperm(8, generator=generator), torch.randperm(8, generator=generator)
    spec, experts = hidden(weights, weights[by_weights])
    return spec, experts, correlation(features, features[by_activations]), by_weights, by_activations


@pytest.mark.parametrize("variant", ["align", "zip"])
def test_the_balance_decides_whose_say_it_is(variant):
    spec, experts, acting, by_weights, by_activations = opposed()
    for balance, expected in [(0.0, by_activations), (0.1, by_activations), (0.9, by_weights), (1.0, by_weights)]:
        found = match_dual(
            Network(spec, 2, {("hidden",): acting}, experts), balance=balance, variant=variant, beta=0.0
        )
        assert torch.equal(found["hidden"].labels[0], torch.arange(8))
        assert torch.equal(found["hidden"].labels[1], expected)


def test_similarity_is_the_weighted_sum_of_pearson_correlations():
    """The assignment of independent units is the best one on lambda * R_w + (1 - lambda) * R_a."""
    generator = torch.Generator().manual_seed(3)
    a, b = 3 * torch.randn(9, 12, generator=generator) + 1, torch.randn(9, 12, generator=generator)
    acting = correlation(*torch.randn(2, 9, 10, generator=generator))
    spec, experts = hidden(a, b)
    for balance in (0.0, 0.3, 0.7, 1.0):
        mixed = balance * torch.corrcoef(torch.cat([a, b]).double()) + (1 - balance) * acting
        expected = align(spec, {("hidden",): mixed}, 2, "permute")["hidden"]
        found = match_dual(Network(spec, 2, {("hidden",): acting}, experts), balance=balance)["hidden"]
        assert torch.equal(found.labels, expected.labels)


def test_what_is_not_observed_is_matched_by_its_weights():
    a = torch.randn(7, 15, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(7, generator=torch.Generator().manual_seed(1))
    spec, experts = hidden(a, a[order])
    assert torch.equal(match_dual(Network(spec, 2, weights=experts))["hidden"].labels[1], order)


def test_units_with_equal_weights_everywhere_are_matched_by_what_they_do():
    """No variance over a unit's weights: its correlation is zero, not undefined."""
    spec, experts = hidden(torch.zeros(5, 6), torch.ones(5, 6))
    features = torch.randn(5, 30, generator=torch.Generator().manual_seed(0))
    order = torch.tensor([3, 1, 4, 0, 2])
    acting = {("hidden",): correlation(features, features[order])}
    assert torch.equal(match_dual(Network(spec, 2, acting, experts), balance=0.9)["hidden"].labels[1], order)


def test_the_best_sweep_is_kept_and_not_the_last(monkeypatch):
    """Sweeps of scripted similarity, each of which leaves another map."""
    scripted = iter([0.1, 0.5, 0.3, 0.2, 0.4])
    visits = []

    def visit(self: _State, root: str) -> bool:
        visits.append(root)
        self.maps = {root: SpaceMap(8, torch.arange(8).roll(len(visits)).repeat(2, 1))}
        return True

    monkeypatch.setattr(_State, "visit", visit)
    monkeypatch.setattr(_State, "mean_similarity", lambda self: next(scripted))
    spec, experts, acting, *_ = opposed()
    found = match_dual(Network(spec, 2, {("hidden",): acting}, experts), balance=0.5, patience=3)
    assert len(visits) == 5
    assert torch.equal(found["hidden"].labels[0], torch.arange(8).roll(2))


def test_it_starts_from_the_match_of_the_activations():
    spec, experts, acting, _, by_activations = opposed()
    state = _State(Network(spec, 2, {("hidden",): acting}, experts), 1.0, Choice.of("permute", {}))
    assert torch.equal(state.maps["hidden"].labels[1], by_activations)


def test_a_balance_that_is_not_given_is_searched():
    """What is kept is the most similar by activations and by weights, each relative to the best that was tried."""
    spec, experts, acting, by_weights, by_activations = opposed()
    network = Network(spec, 2, {("hidden",): acting}, experts)
    found = match_dual(network)["hidden"]
    tried = [match_dual(network, balance=balance)["hidden"] for balance in BALANCES]
    assert any(found.equals(other) for other in tried)
    kept = []
    for space_map in tried:
        state = _State(network, 0.5, Choice.of("permute", {}))
        state.maps = {"hidden": space_map}
        kept.append(state.both_similarities())
    most = [max(own) for own in zip(*kept, strict=True)]
    scores = [acting / most[0] + weights / most[1] for acting, weights in kept]
    assert found.equals(tried[scores.index(max(scores))])
    with pytest.raises(RecipeError, match="balance is 'all'"):
        match_dual(network, balance="all")


def test_fixed_maps_are_not_returned_nor_changed():
    spec, experts, acting, by_weights, _ = opposed()
    fixed = {"hidden": SpaceMap(8, torch.arange(8).repeat(2, 1))}
    assert match_dual(Network(spec, 2, {("hidden",): acting}, experts, fixed)) == {}
    assert torch.equal(fixed["hidden"].labels, torch.arange(8).repeat(2, 1))


@pytest.mark.parametrize(
    "options",
    [{"balance": 1.5}, {"balance": -0.1}, {"variant": "both"}, {"sweeps": 0}, {"patience": 0}, {"alpha": 2.0}],
)
def test_options_out_of_range(options):
    spec, experts, acting, *_ = opposed()
    with pytest.raises(RecipeError, match=next(iter(options))):
        match_dual(Network(spec, 2, {("hidden",): acting}, experts), **({"variant": "zip"} | options))
