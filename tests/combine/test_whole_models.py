"""Rules on whole models: what the seam gives them, one alignment for each base, and what is averaged by every rule."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from hf_zipit import merge, plan
from hf_zipit.align.stage import align_trunk
from hf_zipit.combine import combine
from hf_zipit.combine.combine import Trunk, combine_trunk
from hf_zipit.config import MergeConfig
from hf_zipit.data.calibration import Calibration
from hf_zipit.layerwise.stage import combined_trunk
from hf_zipit.maps.space_map import SpaceMap
from hf_zipit.observation.gather import statistics_for
from hf_zipit.planning.plan import Plan
from hf_zipit.registry import RULES
from hf_zipit.symmetry.group import apply_element, random_element
from hf_zipit.symmetry.proof import model_tensors, perturb
from tests import tiny
from tests.test_invariants import with_tensors

DRAW = ("dare", "dare-ties", "della")


@cache
def family() -> dict[str, nn.Module]:
    """A base, two experts that learnt a little from it, and the base and one expert with their units reordered."""
    generator = torch.Generator().manual_seed(1)
    base = tiny.build("vit", 7, num_labels=3)
    base = with_tensors(base, perturb(model_tensors(base), generator))

    def learnt(model: nn.Module) -> nn.Module:
        moved = {n: x + 0.01 * torch.randn(x.shape, generator=generator) for n, x in model_tensors(model).items()}
        return with_tensors(model, moved)

    found = {"base": base, "a": learnt(base), "b": learnt(base), "c": learnt(base)}
    spec = plan({"a": base, "b": base}, method="identity").spec
    element = random_element(spec, generator, True)
    for name in ("base", "b", "c"):
        tensors = apply_element(model_tensors(found[name]), spec, element)
        found[f"moved {name}"] = with_tensors(found[name], tensors)
    return found


def trunk_of(planned: Plan, rule: str, **options: object) -> dict[str, Tensor]:
    it = replace(planned, config=replace(planned.config, combine=rule, combine_options=options))
    data = {task: torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(ord(task))) for task in it.tasks}
    calibration = Calibration(data).read(it.experts) if RULES.get(rule).needs_data else None
    return combined_trunk(it, align_trunk(planned), calibration, statistics_for(it, calibration, None))


@cache
def planned(moved: bool) -> Plan:
    """Experts of one base, or of two that are the same but for the order of their units."""
    it = family()
    b, other = ("moved b", "moved base") if moved else ("b", "base")
    method = "weights" if moved else "identity"
    bases = {"a": it["base"], "b": it[other]}
    return plan({"a": it["a"], "b": it[b]}, method=method, combine="ties", base=bases)


@pytest.mark.parametrize("rule", [name for name in RULES if name not in DRAW])
def test_a_rule_after_aligning_a_reordered_copy_is_the_rule_on_the_original(rule: str):
    expected, found = trunk_of(planned(False), rule), trunk_of(planned(True), rule)
    # Which of the two orders the merged units are in is the alignment's choice: features are compared as sets.
    merged = {moved: with_tensors(family()["base"], model_tensors(family()["base"]) | trunk)
              for moved, trunk in ((False, expected), (True, found))}  # fmt: skip
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = {moved: model.vit(pixel_values=images).last_hidden_state for moved, model in merged.items()}
    torch.testing.assert_close(features[True].sort().values, features[False].sort().values, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("rule", DRAW)
def test_what_is_drawn_follows_the_seed(rule: str):
    it, options = planned(False), {"drop": 0.5}
    first, again = (trunk_of(it, rule, **options) for _ in range(2))
    other = trunk_of(replace(it, config=replace(it.config, seed=1)), rule, **options)
    assert all(torch.equal(first[name], again[name]) for name in first)
    name = "vit.layers.0.mlp.fc1.weight"
    assert not torch.equal(first[name], other[name])
    twin = "vit.layers.1.mlp.fc1.weight"  # every parameter has draws of its own
    base = model_tensors(family()["base"])
    assert not torch.equal(first[name] == base[name], first[twin] == base[twin])


@pytest.mark.parametrize("rule", [name for name in RULES if RULES.get(name).elementwise])
def test_elementwise_rules_combine_large_tensors_in_parts(rule: str, monkeypatch: pytest.MonkeyPatch):
    its = [planned(False), planned(True)]
    expected = [trunk_of(it, rule) for it in its]
    monkeypatch.setattr(combine, "PART", 100)
    for it, whole in zip(its, expected, strict=True):
        found = trunk_of(it, rule)
        assert all(torch.equal(found[name], tensor) for name, tensor in whole.items())


def test_ties_trims_over_the_whole_model():
    """One threshold an expert: as many entries stay as are asked for, in the model and not in every tensor."""
    it = planned(False)
    vectors = [list(part) for part in Trunk(it, {})]
    flat = torch.cat([part[0].abs().flatten() for part in vectors])
    (limit, _) = RULES.get("ties").survey_of(Trunk(it, {}), {"share": 0.1})
    assert float(limit) == float(flat.sort(descending=True).values[-(-len(flat) // 10) - 1])
    alone = [RULES.get("ties").survey_of([part], {"share": 0.1})[0] for part in vectors]
    assert len({round(x, 6) for x in alone}) > 1
    merged, base = trunk_of(it, "ties", share=0.1), model_tensors(family()["base"])
    expected = RULES.get("ties").combine(
        [model_tensors(m)["vit.layers.0.mlp.fc1.bias"].double() for m in it.experts.values()], (), it, {"share": 0.1},
        base=base["vit.layers.0.mlp.fc1.bias"].double(), whole=[limit, _],
    )  # fmt: skip
    torch.testing.assert_close(merged["vit.layers.0.mlp.fc1.bias"], expected.float())


def test_all_experts_of_a_base_get_its_maps():
    it = family()
    bases = {"a": it["base"], "b": it["moved base"], "c": it["moved base"]}
    experts = {"a": it["a"], "b": it["moved b"], "c": it["moved c"]}
    three = plan(experts, method="weights", combine="task-arithmetic", base=bases)
    assert three.base_groups == (("a",), ("b", "c"))
    assert three.base_shares == (0.5, 0.25, 0.25)
    maps = align_trunk(three)
    assert all(torch.equal(m.labels[1], m.labels[2]) for m in maps.values() if isinstance(m, SpaceMap))
    assert any(not torch.equal(m.labels[0], m.labels[1]) for m in maps.values())
    # The aligned bases are one model: the origin, whichever base has more experts.
    trunk = combine_trunk(replace(three, config=replace(three.config, combine_options={"scale": 1e-9})), maps)
    origin = model_tensors(it["base"])
    for name, tensor in trunk.items():
        torch.testing.assert_close(tensor.norm(), origin[name].norm(), rtol=1e-4, atol=1e-4)


def test_bases_are_observed_where_a_method_reads_activations():
    it = family()
    bases = {"a": it["base"], "b": it["moved base"], "c": it["moved base"]}
    images = torch.randn(24, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    settings = {"method": "permute", "combine": "task-arithmetic", "combine_options": {"scale": 0.5}}
    experts = {"a": it["a"], "b": it["moved b"], "c": it["moved c"]}
    by_task = {"a": images, "b": images.flip(0), "c": images + 1}
    merged = merge(experts, by_task, base=bases, corrections="rescale-shift", **settings)
    assert set(merged.config.method["bases"]) == {"a", "b", "c"}
    plain = merge({task: it[task] for task in "abc"}, base=it["base"], **(settings | {"method": "identity"}))
    moved = merge(experts, images, base=bases, **settings)
    with torch.no_grad():
        found, expected = (m(pixel_values=images[:4], task="a").logits for m in (moved, plain))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_running_statistics_are_averaged_whatever_the_rule():
    models = dict(zip("ab", tiny.pair("resnet-basic"), strict=True))
    for seed, model in enumerate(models.values()):
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.copy_(torch.rand(buffer.shape, generator=torch.Generator().manual_seed(seed)) + 0.5)
    base = tiny.build("resnet-basic", 5, num_labels=3)
    config = MergeConfig(method="identity", combine="task-arithmetic", combine_options={"scale": 1.0})
    found = combine_trunk(plan(models, config, base=base), {})
    names = [name for name in found if name.endswith("running_var")]
    assert names
    for name in names:
        a, b = (model_tensors(model)[name] for model in models.values())
        torch.testing.assert_close(found[name], (a + b) / 2)
