"""Weight matching: the published sweeps, and permuted copies that are found again without data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np
import pytest
import torch
from torch import Tensor

from hf_zipit.align.align import align, residual_spaces
from hf_zipit.align.aligned import comparable, with_fixed_maps
from hf_zipit.align.method import Network
from hf_zipit.align.methods.weights import Descent, match_weights
from hf_zipit.align.similarity import families
from hf_zipit.combine.combine import merge_tensor
from hf_zipit.errors import RecipeError
from hf_zipit.maps.space_map import SpaceMap
from hf_zipit.symmetry.group import apply_element, random_element
from hf_zipit.symmetry.proof import model_tensors, perturb
from hf_zipit.symmetry.spec import Factor, MergeSpec
from tests import tiny
from tests.align.toys import space, spec_of, vectors

PUBLISHED = vectors("gitrebasin_mlp")
NAMES = ["vit", "bert", "resnet-basic", "resnet-bottleneck", "clip", "llama", "bit"]
"""Pre- and post-LN, BatchNorm, two towers, grouped-query attention, GroupNorm."""

Tensors = Mapping[str, Tensor]


@lru_cache
def spec_for(name: str) -> MergeSpec:
    return MergeSpec.from_model(tiny.build(name))


def general(name: str, seed: int = 0) -> tuple[MergeSpec, dict[str, Tensor]]:
    """A tiny model's spec and weights in general position: those of another seed have nothing in common."""
    tensors = model_tensors(tiny.build(name, seed))
    return spec_for(name), perturb(tensors, torch.Generator().manual_seed(seed))


def permuted(weights: Tensors, spec: MergeSpec, seed: int) -> dict[str, Tensor]:
    element = random_element(spec, torch.Generator().manual_seed(seed), permutations_only=True)
    return apply_element(weights, spec, element)


def noisy(weights: Tensors, seed: int, amount: float) -> dict[str, Tensor]:
    """The weights plus noise, a share of every tensor's own size."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: x + amount * x.square().mean().sqrt() * torch.randn(x.shape, generator=generator)
        if x.is_floating_point() and bool(x.isfinite().all()) else x
        for name, x in weights.items()
    }  # fmt: skip


def merged(weights: Sequence[Tensors], maps: Mapping[str, SpaceMap], spec: MergeSpec) -> dict[str, Tensor]:
    return {name: merge_tensor([own[name] for own in weights], spec.axes[name], maps, spec) for name in spec.axes}


def assert_same(found: Tensors, expected: Tensors) -> None:
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


def mlp() -> MergeSpec:
    """The published case: 12-20-24-28-5."""
    chain = ["in", "P_0", "P_1", "P_2", "out"]
    sizes = [12, 20, 24, 28, 5]
    axes = {}
    for layer in range(4):
        axes[f"layer{layer}.weight"] = ((Factor(chain[layer + 1]),), (Factor(chain[layer], dual=True),))
        axes[f"layer{layer}.bias"] = ((Factor(chain[layer + 1]),),)
    spaces = [space(name, size, fixed=name in ("in", "out")) for name, size in zip(chain, sizes, strict=True)]
    return spec_of(*spaces, axes=axes)


@pytest.mark.parametrize("case", ["indep", "permuted_noisy"])
def test_published_sweeps(case):
    spec = mlp()
    weights = [{name: torch.from_numpy(PUBLISHED[f"{case}.{ab}.{name}"]) for name in spec.axes} for ab in "AB"]
    descent = Descent(*_settled(spec, weights))
    orders = descent.run([[f"P_{i}" for i in sweep] for sweep in PUBLISHED[f"{case}.order"]])
    for i in range(3):
        assert orders[f"P_{i}"].tolist() == PUBLISHED[f"{case}.perm.P_{i}"].tolist()
    moved = apply_element(weights[1], spec, orders)
    for name in spec.axes:
        assert torch.equal(moved[name], torch.from_numpy(PUBLISHED[f"{case}.Bperm.{name}"]))
    distance = sum(float((weights[0][name] - moved[name]).double().square().sum()) for name in spec.axes)
    np.testing.assert_allclose(distance, PUBLISHED[f"{case}.sqdist"][1], rtol=1e-6)


def _settled(spec: MergeSpec, weights: Sequence[Tensors]):
    fixed, experts = with_fixed_maps(Network(spec, 2, weights=weights))
    return fixed, *experts


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", NAMES)
def test_a_permuted_copy_is_recovered_without_data(name, seed):
    spec, weights = general(name, seed)
    copy = permuted(weights, spec, seed)
    assert any(not torch.equal(copy[n], weights[n]) for n in spec.axes)
    maps = align(spec, {}, 2, "weights", weights=[weights, copy])
    assert_same(merged([weights, copy], maps, spec), weights)


@pytest.mark.parametrize("seed", range(4))
def test_a_space_on_two_axes_of_one_tensor_is_found(seed):
    """Parallel streams that are mixed with one another: units are as similar as the other axis's order makes them."""
    mixed = {"mix": ((Factor("streams"),), (Factor("streams", dual=True), Factor("inputs", dual=True)))}
    spec = spec_of(space("streams", 8), space("inputs", 1, fixed=True), axes=mixed)
    weights = {"mix": torch.randn(8, 8, generator=torch.Generator().manual_seed(seed))}
    copy = permuted(weights, spec, seed)
    maps = align(spec, {}, 2, "weights", weights=[weights, copy])
    assert_same(merged([weights, copy], maps, spec), weights)


@pytest.mark.parametrize("name", NAMES)
def test_a_model_with_itself_keeps_its_units(name):
    spec, weights = general(name)
    maps = align(spec, {}, 2, "weights", weights=[weights, weights])
    for space_map in maps.values():
        assert torch.equal(space_map.labels[1], space_map.labels[0])


@pytest.mark.parametrize("name", ["vit", "llama", "resnet-basic"])
def test_three_experts_are_brought_to_the_one_in_the_middle(name):
    """The middle one is the least noisy; the others are as it plus noise, in other orders of the units."""
    spec, weights = general(name)
    others = [permuted(noisy(weights, seed, 0.2), spec, seed) for seed in (1, 2)]
    exact = [permuted(weights, spec, seed) for seed in (1, 2)]
    maps = align(spec, {}, 3, "weights", weights=[others[0], weights, others[1]])
    for space_map in maps.values():
        assert torch.equal(space_map.labels[1], torch.arange(space_map.size).expand_as(space_map.labels[1]))
    # The noise must not have changed what is matched: the same maps bring exact copies back to the original.
    assert_same(merged([exact[0], weights, exact[1]], maps, spec), weights)


@pytest.mark.parametrize("reference", [0, 2])
def test_maps_to_a_reference_that_is_not_the_first(reference):
    spec, weights = general("llama")
    experts = [permuted(noisy(weights, seed, 0.2), spec, seed) for seed in range(3)]
    exact = [permuted(weights, spec, seed) for seed in range(3)]
    experts[reference] = exact[reference]
    maps = align(spec, {}, 3, "weights", weights=experts)
    assert_same(merged(exact, maps, spec), exact[reference])


def grouped() -> MergeSpec:
    """A mixture whose experts come in groups: their hidden units are within the expert and its group."""
    chosen, inputs = (Factor("groups"), Factor("experts")), (Factor("inputs", dual=True),)
    axes = {
        "gate.weight": (chosen, inputs),
        "up.weight": (chosen, (Factor("hidden"),), inputs),
        "down.weight": (chosen, (Factor("outputs"),), (Factor("hidden", dual=True),)),
    }
    spaces = [space("groups", 3), space("experts", 4, "groups"), space("hidden", 5, "groups", "experts")]
    return spec_of(*spaces, space("inputs", 6, fixed=True), space("outputs", 2, fixed=True), axes=axes)


def drawn(spec: MergeSpec, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn([spec.length(label) for label in labels], generator=generator)
        for name, labels in spec.axes.items()
    }


@pytest.mark.parametrize("reference", range(3))
def test_units_two_levels_deep_are_brought_to_any_reference(reference):
    spec = grouped()
    weights = drawn(spec, 0)
    exact = [permuted(weights, spec, seed) for seed in range(3)]
    experts = [own if t == reference else noisy(own, t, 0.2) for t, own in enumerate(exact)]
    maps = align(spec, {}, 3, "weights", weights=experts)
    assert_same(merged(exact, maps, spec), exact[reference])


def test_blocks_that_change_places_take_along_what_is_two_levels_deep():
    spec = grouped()
    descent = Descent(*_settled(spec, [drawn(spec, seed) for seed in (0, 1)]))

    def blocks() -> list[tuple[float, ...]]:
        return [tuple(block.flatten().tolist()) for block in descent._current("up.weight")]

    assert descent.visit(descent.families["hidden"])
    before = blocks()
    assert descent.visit(descent.families["groups"], {"hidden"})
    assert blocks() != before and set(blocks()) == set(before)


@pytest.mark.parametrize("count", [2, 3])
def test_the_order_of_the_experts_changes_names_only(count):
    """Experts that have little in common: which units are joined may not depend on who comes first."""
    spec = spec_for("vit")
    experts = [general("vit", seed)[1] for seed in range(count)]
    one = align(spec, {}, count, "weights", weights=experts)
    other = align(spec, {}, count, "weights", weights=experts[::-1])
    forward, backward = merged(experts, one, spec), merged(experts[::-1], other, spec)
    # The units of the merged models have different orders, but the models are the same up to them.
    again = align(spec, {}, 2, "weights", weights=[forward, backward])
    assert_same(merged([forward, backward], again, spec), forward)


@pytest.mark.parametrize("name", ["vit", "bert", "llama", "resnet-bottleneck"])
def test_every_visit_gains(name):
    spec, weights = spec_for(name), [general(name, seed)[1] for seed in (0, 1)]
    descent = Descent(*_settled(spec, weights))
    reached, gained = descent.cosine(), 0
    for sweep in Network(spec, 2).random_orders(tuple(descent.families), 4):
        for root in sweep:
            changed = descent.visit(descent.families[root])
            now = descent.cosine()
            assert now > reached if changed else now == reached
            reached, gained = now, gained + changed
    assert gained > len(descent.families) / 2


@pytest.mark.parametrize("name", ["vit", "llama", "bit"])
def test_no_family_can_be_improved_at_the_end(name):
    """A space that was passed over because nothing around it changed must have nothing to gain."""
    spec, weights = spec_for(name), [general(name, seed)[1] for seed in (0, 1)]
    descent = Descent(*_settled(spec, weights))
    descent.run(Network(spec, 2).random_orders(tuple(descent.families), 100))
    assert not any(descent.visit(family) for family in families(spec).values())


@pytest.mark.parametrize("name", ["vit", "bert", "llama"])
def test_a_residual_stream_at_identity_stays_there_and_the_rest_is_matched_through_it(name):
    spec, weights = general(name)
    residual = residual_spaces(spec)
    assert residual
    element = random_element(spec, torch.Generator().manual_seed(0), permutations_only=True)
    copy = apply_element(weights, spec, {n: order for n, order in element.items() if n not in residual})
    maps = align(spec, {}, 2, "weights", weights=[weights, copy], residual="identity")
    for n in residual:
        assert torch.equal(maps[n].labels, torch.arange(maps[n].size).repeat(2, 1))
    assert_same(merged([weights, copy], maps, spec), weights)


def test_settled_maps_are_looked_through():
    """With the right maps of the residual stream and one layer's heads given, one sweep finds the rest; with a wrong
    one it cannot."""
    spec, weights = general("llama")
    element = random_element(spec, torch.Generator().manual_seed(0), permutations_only=True)
    copy = apply_element(weights, spec, element)
    (residual,) = residual_spaces(spec)
    # The copy's unit i is the original's unit element[i].
    fixed_maps = {name: SpaceMap(len(element[name]), torch.stack([torch.arange(len(element[name])), element[name]]))
               for name in (residual, "model.layers.0.self_attn.heads")}  # fmt: skip
    found = match_weights(Network(spec, 2, weights=[weights, copy], fixed_maps=fixed_maps), sweeps=1)
    assert not set(found) & set(fixed_maps)
    assert_same(merged([weights, copy], {**fixed_maps, **found}, spec), weights)

    wrong = _identity(residual, 32)
    found = match_weights(Network(spec, 2, weights=[weights, copy], fixed_maps=wrong))
    with pytest.raises(AssertionError):
        assert_same(merged([weights, copy], {**wrong, **found}, spec), weights)


def test_settled_groups_are_looked_through():
    """Two of the stream's units are joined: hidden units are matched by the sum of what they read from the two."""
    labels = {"up": ((Factor("hidden"),), (Factor("stream", dual=True),))}
    spec = spec_of(space("hidden", 6), space("stream", 4), axes=labels)
    generator = torch.Generator().manual_seed(0)
    a = torch.nn.functional.normalize(torch.randn(6, 3, generator=generator)) @ torch.eye(3, 4).roll(1, 1)
    order = torch.randperm(6, generator=generator)
    # b reads the same from the merged unit, but something else from either of the joined ones.
    b = (a + 10 * torch.randn(6, 1, generator=generator) * torch.tensor([1.0, -1.0, 0.0, 0.0]))[order]
    joined = {"stream": SpaceMap(3, torch.tensor([[0, 0, 1, 2], [0, 0, 1, 2]]))}
    found = match_weights(Network(spec, 2, weights=[{"up": a}, {"up": b}], fixed_maps=joined))
    assert torch.equal(found["hidden"].labels[1], order)
    apart = match_weights(Network(spec, 2, weights=[{"up": a}, {"up": b}], fixed_maps=_identity("stream", 4)))
    assert not torch.equal(apart["hidden"].labels[1], order)


def _identity(name: str, size: int) -> dict[str, SpaceMap]:
    return {name: SpaceMap(size, torch.arange(size).repeat(2, 1))}


def test_what_is_compared():
    spec, weights = general("bert-masked")
    names = comparable(Network(spec, 2, weights=[weights, weights]))
    assert "bert.embeddings.word_embeddings.weight" in names
    assert not any(name.startswith(spec.head) for name in names)
    spec, weights = general("resnet-basic")
    other = dict(weights)
    wider = next(name for name, tensor in weights.items() if tensor.dim() == 4)
    other[wider] = torch.cat([other[wider]] * 2)
    names = comparable(Network(spec, 2, weights=[weights, other]))
    assert names and wider not in names
    assert not any("running" in name or "num_batches" in name or name.startswith("classifier") for name in names)


def test_tied_weights_are_compared_once():
    table = torch.randn(5, 4)
    labels = ((Factor("words"),), (Factor("stream"),))
    spec = spec_of(space("words", 5, fixed=True), space("stream", 4), axes={"embed": labels, "decode": labels})
    assert comparable(Network(spec, 2, weights=[{"embed": table, "decode": table}] * 2)) == ("embed",)
    untied = {"embed": table, "decode": table.clone()}
    assert comparable(Network(spec, 2, weights=[untied] * 2)) == ("embed", "decode")


def test_sweeps_out_of_range():
    spec, weights = spec_for("vit"), [general("vit", seed)[1] for seed in (0, 1)]
    with pytest.raises(RecipeError, match="sweeps"):
        match_weights(Network(spec, 2, weights=weights), sweeps=0)
