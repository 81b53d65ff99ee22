"""Partial merging: what is alike is merged, what is not is kept apart while the budget lasts."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from hf_zipit.adapters import adapter_for
from hf_zipit.align.align import align
from hf_zipit.align.cost import multiplications, parameters
from hf_zipit.align.method import Network
from hf_zipit.align.methods.partial import allocate, keep_apart, lacking_similarity, match_partial, worst_units
from hf_zipit.combine.combine import merge_tensor
from hf_zipit.errors import RecipeError
from hf_zipit.maps.space_map import SpaceMap
from hf_zipit.merging import merge, plan
from hf_zipit.symmetry.spec import Factor
from tests import tiny
from tests.align.toys import correlation, space, spec_of

LAYER = {
    "up.weight": ((Factor("hidden"),), (Factor("inputs", dual=True),)),
    "up.bias": ((Factor("hidden"),),),
    "down.weight": ((Factor("outputs"),), (Factor("hidden", dual=True),)),
}
SPEC = spec_of(
    space("hidden", 12),
    space("inputs", 4, fixed=True),
    space("outputs", 3, fixed=True),
    axes=LAYER,
    macs={"up": 2 * 48, "down": 2 * 36},
    samples=2,
)


def layer(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"up.weight": (12, 4), "up.bias": (12,), "down.weight": (3, 12)}
    weights = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    weights["up.bias"] += 2  # no unit is dead
    return weights


X = torch.randn(50, 4, generator=torch.Generator().manual_seed(9))


def hidden(weights: dict[str, Tensor]) -> Tensor:
    return (X @ weights["up.weight"].T + weights["up.bias"]).relu()


def outputs(weights: dict[str, Tensor]) -> Tensor:
    return hidden(weights) @ weights["down.weight"].T


def network(*experts: dict[str, Tensor], wide: bool = True) -> Network:
    acting = {("hidden",): correlation(*(hidden(weights).T for weights in experts))}
    return Network(SPEC, len(experts), acting, experts, widenable=frozenset({"hidden"} if wide else ()))


def merged(maps: dict[str, SpaceMap], *experts: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: merge_tensor([e[name] for e in experts], labels, maps, SPEC) for name, labels in LAYER.items()}


@pytest.mark.parametrize("count", [2, 3])
def test_with_everything_apart_a_layer_is_the_mean_of_the_layers(count):
    experts = [layer(seed) for seed in range(count)]
    maps = match_partial(network(*experts), budget=10.0)
    assert maps["hidden"].size == 12 * count
    expected = torch.stack([outputs(weights) for weights in experts]).mean(0)
    torch.testing.assert_close(outputs(merged(maps, *experts)), expected)


def test_with_nothing_apart_it_is_permute():
    experts = [layer(0), layer(1)]
    found = match_partial(network(*experts), budget=1.0)["hidden"]
    assert torch.equal(found.labels, align(SPEC, network(*experts).correlations, 2, "permute")["hidden"].labels)


def test_units_that_are_the_same_are_never_apart():
    """However large the budget; dead ones, which resemble nothing, neither."""
    weights = layer(0)
    weights["up.weight"][[2, 5]], weights["up.bias"][[2, 5]] = 0.0, -1.0
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    moved = {"up.weight": weights["up.weight"][order], "up.bias": weights["up.bias"][order]}
    moved["down.weight"] = weights["down.weight"][:, order]
    assert match_partial(network(weights, moved), budget=10.0)["hidden"].size == 12


def test_what_is_kept_apart_is_what_matches_worst():
    """Six units of the second expert are the first's, six are others: these are the six that stay."""
    one, two = layer(0), layer(1)
    for name in ("up.weight", "up.bias"):
        two[name][:6] = one[name][:6]
    per_unit = (4 + 1 + 3) / (48 + 12 + 36)
    found = match_partial(network(one, two), budget=1 + 6.5 * per_unit)["hidden"]
    assert found.size == 18
    assert torch.equal(found.labels[0], torch.arange(12))
    assert torch.equal(found.labels[1, :6], torch.arange(6))
    assert set(found.labels[1, 6:].tolist()) == set(range(12, 18))


@pytest.mark.parametrize("of", ["parameters", "flops"])
@pytest.mark.parametrize("budget", [1.0, 1.1, 1.3, 1.7])
def test_the_budget_is_kept_and_used(budget, of):
    experts = [layer(0), layer(1)]
    size = match_partial(network(*experts), budget=budget, of=of)["hidden"].size
    cost = {"parameters": parameters, "flops": multiplications}[of](SPEC, experts[0])
    share = cost.total({"hidden": size}) / cost.total({})
    one_more = cost.total({"hidden": size + 1}) / cost.total({})
    assert share <= budget + 1e-9 < one_more


def test_costs_count_what_they_say():
    cost, macs = parameters(SPEC, layer(0)), multiplications(SPEC, layer(0))
    assert (cost.total({}), macs.total({})) == (96, 84)
    assert cost.total({"hidden": 18}) == 18 * 8
    assert cost.per_unit("hidden") == 8
    assert macs.per_unit("hidden") == 7


def test_a_space_on_two_axes_costs_quadratically():
    spec = spec_of(space("units", 4), axes={"w": ((Factor("units"),), (Factor("units", dual=True),))})
    cost = parameters(spec, {"w": torch.zeros(4, 4)})
    assert cost.total({"units": 6}) == 36
    assert cost.per_unit("units") == 8


def test_tied_tensors_and_running_statistics_do_not_count():
    spec = replace(SPEC, axes={**LAYER, "again.weight": LAYER["up.weight"], "up.running_var": LAYER["up.bias"]})
    weights = layer(0)
    weights |= {"again.weight": weights["up.weight"], "up.running_var": torch.ones(12)}
    assert parameters(spec, weights).total({}) == 96


def test_the_budget_goes_where_it_gains_most():
    """Two spaces of equal gains, one of them four times as expensive: the cheap one is done first."""
    axes = {"a": ((Factor("cheap"),), ()), "b": ((Factor("dear"),), (Factor("wide", dual=True),))}
    spec = spec_of(space("cheap", 5), space("dear", 5), space("wide", 4, fixed=True), axes=axes)
    cost = parameters(spec, {"a": torch.zeros(5, 1), "b": torch.zeros(5, 4)})
    gains = {"cheap": torch.full((5,), 0.5), "dear": torch.full((5,), 0.5)}
    sizes = {"cheap": 5, "dear": 5}
    assert allocate(gains, cost, 1 + 3 / 25, sizes, 2) == {"cheap": 3, "dear": 0}
    assert allocate(gains, cost, 1 + 9 / 25, sizes, 2) == {"cheap": 5, "dear": 1}
    # ... also where it gains less than the dear one,
    assert allocate({**gains, "cheap": gains["cheap"] * 0.6}, cost, 1 + 9 / 25, sizes, 2) == {"cheap": 5, "dear": 1}
    # ... but not where it gains less than a quarter of it.
    assert allocate({**gains, "cheap": gains["cheap"] / 5}, cost, 1 + 9 / 25, sizes, 2) == {"cheap": 1, "dear": 2}


@pytest.mark.parametrize("seed", range(4))
def test_ties_do_not_depend_on_the_order_of_the_experts(seed):
    """Dead units of one expert only: all of them lack the same."""
    experts = [layer(seed), layer(seed + 10)]
    for number, weights in enumerate(experts):
        dead = torch.randperm(12, generator=torch.Generator().manual_seed(seed + number))[: 4 + number]
        weights["up.weight"][dead], weights["up.bias"][dead] = 0.0, -1.0
    for budget in (1.1, 1.2, 1.4):
        one = match_partial(network(*experts), budget=budget)
        other = match_partial(network(*experts[::-1]), budget=budget)
        torch.testing.assert_close(outputs(merged(one, *experts)), outputs(merged(other, *experts[::-1])))


def test_dead_units_lack_half_of_a_live_one_and_nothing_of_a_dead_one():
    x = torch.randn(4, 30, generator=torch.Generator().manual_seed(0))
    one, two = x.clone(), x.clone()
    one[[0, 1]], two[[0, 2]] = 0, 0
    maps = {"units": SpaceMap(4, torch.arange(4).repeat(2, 1))}
    found = lacking_similarity(("units",), correlation(one, two), maps, spec_of(space("units", 4)), 2)
    torch.testing.assert_close(found, torch.tensor([0.0, 0.5, 0.5, 0.0], dtype=torch.float64))


def test_kept_units_have_their_own_labels_in_every_row():
    labels = torch.stack([torch.arange(3).repeat(2, 1), torch.tensor([[2, 0, 1], [0, 2, 1]])])
    found = keep_apart(SpaceMap(3, labels), torch.tensor([[0], [2]]))
    assert found.size == 4
    assert torch.equal(found.labels[0], labels[0])
    assert found.labels[1].tolist() == [[2, 3, 1], [0, 3, 1]]


def test_the_worst_units_are_sought_in_every_row():
    gain = torch.tensor([[0.1, 0.9, 0.5], [0.7, 0.2, 0.3]])
    found = worst_units(gain, SpaceMap(3, torch.arange(3).expand(2, 2, 3).contiguous()), 2)
    assert found.tolist() == [[1, 2], [0, 2]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0.9}, "budget is 0.9"),
        ({"budget": float("nan")}, "budget is nan"),
        ({"of": "time"}, "of is 'time'"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(RecipeError, match=message):
        match_partial(network(layer(0), layer(1)), **options)


def test_where_nothing_may_be_wider():
    with pytest.raises(RecipeError, match="No layer of Toy can be made wider"):
        match_partial(network(layer(0), layer(1), wide=False))


# Whole models.

IMAGES = torch.randn(24, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@cache
def vits() -> dict[str, torch.nn.Module]:
    return dict(zip("ab", tiny.pair("vit"), strict=True))


@torch.no_grad()
def test_layers_of_a_vit_with_everything_apart_are_the_means_of_its_experts():
    """Heads keep their own attention patterns, so that this holds for attention, too."""
    whole = merge(vits(), IMAGES, method="partial", options={"budget": 3.0}, residual="identity")
    x = torch.randn(3, 17, 32, generator=torch.Generator().manual_seed(1))
    for path in ("vit.layers.0.mlp", "vit.layers.1.attention"):
        found, *own = (model.get_submodule(path)(x) for model in (whole.trunk, *vits().values()))
        found, own = (found, own) if isinstance(found, Tensor) else (found[0], [o[0] for o in own])
        torch.testing.assert_close(found, torch.stack(own).mean(0), rtol=1e-4, atol=1e-6)
    assert whole.trunk.get_submodule("vit.layers.0.mlp.fc1").out_features == 128


def test_a_merged_trunk_has_the_parameters_that_were_asked_for():
    whole = merge(vits(), IMAGES, method="partial", options={"budget": 1.3})
    trunk = plan(vits()).parameters["trunk"]
    assert 1.25 * trunk < sum(p.numel() for p in whole.trunk.parameters()) <= 1.3 * trunk


def test_a_merged_trunk_takes_the_multiplications_that_were_asked_for():
    whole = merge(vits(), IMAGES, method="partial", options={"budget": 1.3, "of": "flops"})
    counts = []
    for model, task in ((copy.deepcopy(vits()["a"]), {}), (whole, {"task": "a"})):
        model.set_attn_implementation("eager")  # the counter does not know attention in one op
        with FlopCounterMode(display=False) as counter:
            model(pixel_values=IMAGES[:2], **task)
        counts.append(counter.get_total_flops() - 2 * 2 * 32 * 3)  # without the classifier
    assert 1.25 < counts[1] / counts[0] <= 1.3


@pytest.mark.parametrize("name", ["vit", "resnet-bottleneck", "gpt2"])
def test_wide_layers_are_refitted(name):
    """The sizes that gpt2 writes into its forward pass are those of the wide model there."""
    models = dict(zip("ab", tiny.pair(name), strict=True))
    inputs = {k: v for k, v in adapter_for(models["a"]).inputs(models["a"]).items() if isinstance(v, Tensor)}
    settings = {"options": {"budget": 1.4}, "refit": {"micro_batch": 2}}
    whole = merge(models, inputs, method="partial", **settings)
    assert whole.config.trunk_shapes
    assert "refit_errors" in whole.config.method
    assert all(bool(torch.isfinite(t).all()) for t in whole.state_dict().values() if t.is_floating_point())
