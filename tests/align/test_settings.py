"""Settings of alignment: values out of range are told before anything is read, and overrides do what they say."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

from hf_zipit import MergeConfig, merge, plan
from hf_zipit.align.align import check_settings, override_choice
from hf_zipit.align.method import Network, register
from hf_zipit.align.stage import align_trunk
from hf_zipit.errors import RecipeError
from hf_zipit.observation import Moments, observe
from hf_zipit.planning.plan import Plan
from hf_zipit.registry import METHODS
from tests import tiny
from tests.align.toys import space, spec_of

IMAGES = torch.randn(24, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@cache
def experts() -> dict[str, nn.Module]:
    return dict(zip("ab", tiny.pair("vit"), strict=True))


class Unread:
    def __iter__(self):
        raise AssertionError("data was read")


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("zip", {"alpha": 2.0}, "alpha is 2.0"),
    ("zip", {"beta": -0.1}, "beta is -0.1"),
    ("zip", {"alpha": "much"}, "alpha of 'zip' is 'much'; it must be a number"),
    ("zip", {"compat": 1}, "compat of 'zip' is 1; it must be true or false"),
    ("weights", {"sweeps": 0}, "sweeps is 0"),
    ("weights", {"sweeps": 2.5}, "sweeps of 'weights' is 2.5; it must be a whole number"),
    ("weights", {"sweeps": True}, "sweeps of 'weights' is True"),
    ("dual", {"balance": 1.5}, "balance is 1.5"),
    ("dual", {"variant": "both"}, "variant is 'both'"),
    ("dual", {"variant": "zip", "alpha": -1.0}, "alpha is -1.0"),
    ("dual", {"patience": 0}, "patience"),
    ("partial", {"budget": 0.5}, "budget is 0.5"),
    ("partial", {"of": "seconds"}, "of is 'seconds'"),
    ("partial", {"of": 3}, "of of 'partial' is 3; it must be a word"),
]


@pytest.mark.parametrize(("method", "options", "message"), WRONG)
def test_values_of_options_are_told_before_data_is_read(method, options, message):
    with pytest.raises(RecipeError, match=message) as told:
        merge(experts(), Unread(), method=method, options=options)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("method", METHODS.names())
def test_every_method_has_a_dry_run(method):
    """On three experts and a network that has nothing of what methods look for, such as heads; also on none at all."""
    for spec in (spec_of(space("units", 3)), spec_of(space("inputs", 3, fixed=True))):
        assert check_settings(spec, 3, MergeConfig(method=method)) <= {"moments", "covariances", "weights", "widths"}


def test_whole_network_methods_have_a_dry_run_with_their_options(monkeypatch):
    METHODS.names()
    monkeypatch.setattr(METHODS, "_entries", dict(METHODS._entries))

    @register("strict", needs={"weights"}, scope="network")
    def strict(network: Network, *, level: int = 1):
        if level > 2:
            raise RecipeError(f"level is {level}")
        return {}

    spec = spec_of(space("units", 3))
    assert check_settings(spec, 2, MergeConfig(method="strict", options={"level": 2})) == {"weights"}
    with pytest.raises(RecipeError, match="level is 3"):
        check_settings(spec, 2, MergeConfig(method="strict", options={"level": 3}))


# Overrides.


@cache
def gathered() -> tuple[Plan, Moments]:
    planned = plan(experts(), method="zip", row_fraction=1.0)
    return planned, observe(planned, IMAGES)


def aligned(method: str, **settings: Any):
    _, moments = gathered()
    return align_trunk(plan(experts(), method=method, **settings), moments)


def same(one, other) -> bool:
    return one.size == other.size and torch.equal(one.labels, other.labels)


@pytest.mark.parametrize("method", METHODS.names())
def test_an_override_decides_its_spaces_under_every_method(method):
    plain, own = aligned(method), aligned("zip", options={"alpha": 0.9, "beta": 1.0})
    found = aligned(method, overrides={"*.0.mlp.fc1": {"method": "zip", "alpha": 0.9, "beta": 1.0}})
    assert same(found["vit.layers.0.mlp.fc1"], own["vit.layers.0.mlp.fc1"])
    assert (found["vit.layers.0.mlp.fc1"].counts() > 2).any()
    if METHODS.get(method).scope == "space":
        assert same(found["vit.layers.1.mlp.fc1"], plain["vit.layers.1.mlp.fc1"])


def test_options_of_the_method_are_not_those_of_the_override():
    found = aligned("zip", options={"beta": 0.0}, overrides={"*.0.mlp.fc1": {"method": "zip", "beta": 1.0}})
    assert (found["vit.layers.0.mlp.fc1"].counts() != 2).any()
    assert (found["vit.layers.1.mlp.fc1"].counts() == 2).all()


def test_an_override_of_another_width_makes_a_model_of_that_width():
    whole = merge(experts(), IMAGES, method="weights", overrides={"*.1.mlp.fc1": {"method": "zip", "size": 48}})
    assert whole.config.trunk_shapes["vit.layers.1.mlp.fc1.weight"] == [48, 32]
    assert whole.config.method["overrides"] == [{"*.1.mlp.fc1": {"method": "zip", "size": 48}}]


def test_a_share_is_the_size_of_every_space_that_an_override_names():
    wide = {"method": "zip", "size": 0.75}
    whole = merge(experts(), IMAGES, method="weights", overrides={"*.mlp.fc1": wide})
    assert [whole.config.trunk_shapes[f"vit.layers.{i}.mlp.fc1.weight"] for i in range(2)] == [[48, 32]] * 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"options": {"size": 0.75}}, "changes the width of vit.residual and .* more spaces, with which ViT"),
        ({"options": {"size": 48}}, "a number of units; for the whole model it must be a share"),
        ({"overrides": {"vit.residual": {"method": "zip", "size": 48}}}, "changes the width of vit.residual, with"),
        ({"overrides": {"*.v_proj": {"method": "zip", "size": 0.5}}}, "it allows that of .*fc1"),
        ({"overrides": {"*.mlp.fc1": {"method": "zip", "size": 200}}}, "size is 200; it must make between 1 and all"),
        ({"options": {"size": 0.0}}, "size is 0.0"),
    ],
)
def test_widths_that_a_model_does_not_allow_are_told_before_data_is_read(settings, message):
    """LayerNorm takes its statistics over the residual stream: merged with itself at another width, a model would no
    longer be that model."""
    with pytest.raises(RecipeError, match=message) as told:
        merge(experts(), Unread(), method="zip", **settings)
    assert "\n" not in str(told.value)


def test_every_space_of_a_residual_network_may_have_another_width():
    models = dict(zip("ab", tiny.pair("resnet-basic"), strict=True))
    whole = merge(models, IMAGES, method="zip", options={"size": 1.5})
    assert whole.config.trunk_shapes["resnet.encoder.stages.1.layers.0.layer.0.convolution.weight"][0] == 24


def test_an_override_asks_for_the_data_that_it_needs():
    assert plan(experts(), method="weights").passes == 0
    assert plan(experts(), method="weights", overrides={"*.mlp.fc1": "permute"}).passes == 1


def test_an_override_for_what_only_branches_have_is_no_mistake():
    """A recipe has one set of overrides for all its depths."""
    planned = plan(experts(), method="zip", overrides={"*.layers.1.*": "permute"}, depth=0.5)
    assert planned.cut.depth == 0.5
    with pytest.raises(RecipeError, match="matches no movable space"):
        plan(experts(), method="zip", overrides={"*.layers.2.*": "permute"}, depth=0.5)


WRONG_OVERRIDES: list[tuple[Any, str]] = [
    ({"*.mlp.*": "permut"}, "no method named 'permut'; did you mean 'permute'"),
    ({"*.mlp.*": {"method": "zip", "alhpa": 0.1}}, "did you mean 'alpha'"),
    ({"*.mlp.*": {"method": "zip", "alpha": 3.0}}, "alpha is 3.0"),
    ({"*.mlp.*": {"alpha": 0.1}}, "names no method"),
    ({"*.mlp.*": 0.3}, "is 0.3; it must be a method's name or a mapping"),
    ({"*.mlp.*": None}, "is None; it must be"),
    ({"*.mlp.*": "partial"}, "'partial' aligns whole networks"),
    ({"*.pml.*": "zip"}, "matches no movable space"),
]


@pytest.mark.parametrize(("overrides", "message"), WRONG_OVERRIDES)
def test_wrong_overrides_are_told_before_data_is_read(overrides, message):
    with pytest.raises(RecipeError, match=message) as told:
        merge(experts(), Unread(), method="zip", overrides=overrides)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("method", ["weights", "dual", "partial"])
def test_what_lives_within_heads_cannot_be_matched_before_them(method):
    with pytest.raises(RecipeError, match="cannot be matched before vit.layers.0.attention.heads"):
        merge(experts(), Unread(), method=method, overrides={"*.v_proj": "permute"})
    plan(experts(), method=method, overrides={"*.v_proj": "permute", "*.heads": "permute"})


def test_an_override_as_a_choice():
    choice = override_choice("*", {"method": "zip", "alpha": 0.2})
    assert (choice.method.name, choice.options) == ("zip", {"alpha": 0.2})


# The seed.


@pytest.mark.parametrize("method", ["weights", "dual", "circuits"])
def test_the_seed_decides_what_is_drawn_and_nothing_else(method, monkeypatch):
    """The orders of visits; of a model and itself every order finds the same."""
    drawn: list[list[str]] = []
    draw = Network.random_orders

    def recorded(self: Network, names, count):
        for order in draw(self, names, count):
            drawn.append(order)
            yield order

    monkeypatch.setattr(Network, "random_orders", recorded)
    orders, maps = [], []
    for seed in (0, 0, 1):
        drawn.clear()
        _, moments = gathered()
        model = experts()["a"]
        options = {"balance": 0.5} if method == "dual" else {}
        planned = plan({"a": model, "b": model}, method=method, options=options, seed=seed)
        maps.append(align_trunk(planned, moments.select(["a", "a"])))
        orders.append([list(order) for order in drawn])
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0][0]) == sorted(orders[2][0])
    for name, space_map in maps[0].items():
        assert space_map.equals(maps[1][name])
        assert space_map.equals(maps[2][name])
