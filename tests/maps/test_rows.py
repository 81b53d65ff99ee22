"""Grouped convolutions: inputs live within groups that are on another axis."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hf_zipit import merge, plan
from hf_zipit.errors import SpecError
from hf_zipit.maps.rows import check_axes, outer_elsewhere
from hf_zipit.maps.space_map import LinearMap, SpaceMap
from hf_zipit.maps.transform import to_merged
from hf_zipit.planning.plan import check_coverage
from hf_zipit.symmetry.group import apply_element, random_element
from hf_zipit.symmetry.proof import model_tensors, perturb
from hf_zipit.symmetry.spec import Factor
from tests import tiny
from tests.align.toys import space, spec_of

WEIGHT = ((Factor("groups"), Factor("outputs")), (Factor("inputs", dual=True),), (Factor("kernel"),))
SPEC = spec_of(
    space("kernel", 2, fixed=True),
    space("groups", 3),
    space("outputs", 4, "groups"),
    space("inputs", 5, "groups"),
    axes={"w": WEIGHT},
)


def random_maps() -> dict[str, SpaceMap]:
    """One expert's, of random labels."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"groups": (3, 3, ()), "outputs": (6, 4, (3,)), "inputs": (4, 5, (3,))}
    maps = {
        name: SpaceMap(k, torch.randint(k, (1, *lead, d), generator=generator)) for name, (k, d, lead) in sizes.items()
    }
    return {**maps, "groups": SpaceMap(3, torch.randperm(3, generator=generator)[None])}


def test_every_group_has_a_map_of_its_inputs():
    maps, w = random_maps(), torch.randn(12, 5, 2, generator=torch.Generator().manual_seed(1))
    expected = torch.zeros(3, 6, 4, 2)
    for g in range(3):
        h = int(maps["groups"].labels[0, g])
        share = 1 / maps["outputs"].counts()[h, maps["outputs"].labels[0, h]]
        for o in range(4):
            for i in range(5):
                place = h, int(maps["outputs"].labels[0, h, o]), int(maps["inputs"].labels[0, h, i])
                expected[place] += share[o] * w[4 * g + o, i]
    torch.testing.assert_close(to_merged(w, WEIGHT, maps, SPEC, 0), expected.reshape(18, 4, 2))


def test_changes_of_basis_in_every_group():
    matrices = torch.randn(1, 3, 5, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    maps = {"groups": random_maps()["groups"], "inputs": LinearMap.of(matrices)}
    w = torch.randn(12, 5, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    moved = torch.empty(3, 4, 5, 2, dtype=torch.float64)
    moved[maps["groups"].labels[0]] = w.reshape(3, 4, 5, 2)
    expected = torch.einsum("hoix,hij->hojx", moved, torch.linalg.inv(matrices[0]))
    torch.testing.assert_close(to_merged(w, WEIGHT, maps, SPEC, 0), expected.reshape(12, 5, 2))


@pytest.mark.parametrize("name", ["regnet", "bit", "mobilenet-v2", "llama"])
def test_one_experts_permutations_are_elements_of_the_group(name: str):
    model = tiny.build(name)
    spec = plan({"a": model, "b": model}, method="identity").spec
    generator = torch.Generator().manual_seed(0)
    tensors = perturb(model_tensors(model), generator)
    element = random_element(spec, generator, permutations_only=True)
    maps = {n: SpaceMap(order.shape[-1], order.argsort(-1)[None]) for n, order in element.items()}
    for n, expected in apply_element(tensors, spec, element).items():
        if n in spec.axes and expected.is_floating_point():
            assert torch.equal(to_merged(tensors[n], spec.axes[n], maps, spec, 0), expected), n


@torch.no_grad()
@pytest.mark.parametrize("method", ["permute", "zip", "weights", "dual", "partial"])
def test_a_grouped_model_with_its_permuted_copies(method: str):
    generator = torch.Generator().manual_seed(1)
    model = tiny.build("regnet")
    tensors = perturb(model_tensors(model), generator)
    model.load_state_dict(tensors)
    spec = plan({"a": model, "b": model}, method="identity").spec
    copies = {"a": model}
    for task in "bc":
        element = random_element(spec, generator, permutations_only=True)
        copies[task] = tiny.build("regnet")
        copies[task].load_state_dict(apply_element(tensors, spec, element))
    images = torch.randn(24, 3, 32, 32, generator=generator)
    whole = merge(copies, images, method=method)
    expected = model(pixel_values=images).logits
    for task in copies:
        found = whole(pixel_values=images, task=task).logits
        assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_units_whose_outer_units_are_nowhere_are_told_before_work_starts():
    lost = ((Factor("inputs", dual=True),), ())
    with pytest.raises(SpecError, match="inputs has units that live within groups, which do not stand side by side"):
        check_axes(lost, SPEC)
    check_axes(WEIGHT, SPEC)
    model = tiny.build("regnet")
    planned = plan({"a": model, "b": model}, method="zip")
    name = next(
        n for n, labels in planned.spec.axes.items() if len(labels) == 4 and outer_elsewhere(labels[1], planned.spec)
    )
    axes = {**planned.spec.axes, name: ((), *planned.spec.axes[name][1:])}
    with pytest.raises(SpecError, match=f"{name} cannot be merged"):
        check_coverage(replace(planned.spec, axes=axes), planned.cut)


def test_units_that_live_within_two_spaces_side_by_side_on_another_axis():
    """The hidden units of experts that are chosen in groups: `[groups x experts, units]`."""
    axes = ((Factor("groups"), Factor("experts")), (Factor("units"),))
    sizes = (space("groups", 2), space("experts", 3, "groups"), space("units", 4, "groups", "experts"))
    spec = spec_of(*sizes, axes={"w": axes})
    w, generator = torch.randn(6, 4), torch.Generator().manual_seed(0)
    order = random_element(spec, generator)["units"]
    moved = apply_element({"w": w}, spec, {"units": order})["w"]
    torch.testing.assert_close(moved, w.gather(1, order.flatten(0, 1)))
    torch.testing.assert_close(to_merged(moved, axes, {"units": SpaceMap(4, order[None])}, spec, 0), w)
    with pytest.raises(SpecError, match="side by side"):
        check_axes(((Factor("experts"), Factor("groups")), (Factor("units"),)), spec)
