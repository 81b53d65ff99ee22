"""What must hold for every registered correction, and what each one promises, on tiny random models."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_zipit import merge, plan
from hf_zipit.align.stage import align_trunk
from hf_zipit.config import correction_options
from hf_zipit.correct.correction import register
from hf_zipit.correct.repair import is_folding, repair
from hf_zipit.correct.rescale_shift import chosen_sites, expert_statistics, to_own_average
from hf_zipit.correct.sites import Site, layers
from hf_zipit.correct.stage import correct
from hf_zipit.correct.statistics import Statistics, UnitSums, measure, shared_statistics
from hf_zipit.data.calibration import Calibration, pieces
from hf_zipit.errors import DataError, ExpertError, RecipeError, ZipItError
from hf_zipit.modeling.rescale import Affine
from hf_zipit.observation import gather_moments, observe
from hf_zipit.planning.plan import Plan
from hf_zipit.registry import CORRECTIONS
from hf_zipit.symmetry.proof import model_tensors

from .. import tiny
from ..test_invariants import (
    assert_bit_identical,
    assert_same,
    awake,
    in_general_position,
    outputs,
    traced_once,  # noqa: F401  # a fixture that is used by being here
    with_tensors,
)
from ..test_invariants import calibration as example_inputs
from ..test_invariants import case as invariant_case

KINDS = ["vit", "bert-masked", "bert-sequence", "clip", "resnet-basic", "resnet-bottleneck"]
TASKS = ("a", "b")
EXACT = 1e-12
"""An eps that bounds nothing: targets are met as exactly as float32 can."""

each_kind = pytest.mark.parametrize("name", KINDS)
each_correction = pytest.mark.parametrize("correction", CORRECTIONS.names())


@cache
def experts(name: str) -> dict[str, PreTrainedModel]:
    generator = torch.Generator().manual_seed(2)
    return dict(zip(TASKS, (awake(in_general_position(m, generator)) for m in tiny.pair(name)), strict=True))


def data(name: str, task: str) -> dict[str, Tensor]:
    """Inputs of a task; the second task's are other ones than the first's."""
    found = example_inputs(experts(name)[task])
    if task == "a":
        return found
    return {
        key: x * 1.5 + 0.5 if x.is_floating_point() else x.flip(0) if key != "input_ids" else roll(x)
        for key, x in found.items()
    }


def roll(ids: Tensor) -> Tensor:
    """Other tokens, but for the last, which CLIP pools."""
    return torch.cat([(ids[:, :-1] - 3 + 7) % 40 + 3, ids[:, -1:]], 1)


def calibration(name: str) -> dict[str, dict[str, Tensor]]:
    return {task: data(name, task) for task in TASKS}


def merged(name: str, **settings: object) -> PreTrainedModel:
    return merge(experts(name), calibration(name), **{"method": "zip", "batch_size": 64, **settings})


def planned_and_aligned(name: str) -> tuple[Plan, Mapping[str, object], Calibration]:
    """What `merged` finds on the way."""
    planned = plan(experts(name), method="zip")
    data = Calibration(calibration(name), batch_size=64).read(planned.experts)
    return planned, align_trunk(planned, observe(planned, data)), data


class Process(Accelerator):
    """One of several processes that run one after the other; what they sum up is kept, and is only their own."""

    def __init__(self, number: int, count: int) -> None:
        super().__init__(cpu=True)
        self.number, self.count, self.sums = number, count, []

    process_index = property(lambda self: self.number)
    num_processes = property(lambda self: self.count)

    def reduce(self, tensor: Tensor, reduction: str = "sum", scale: float = 1.0) -> Tensor:
        self.sums.append(tensor.clone())
        return tensor


def gap(found: Statistics, wanted: Statistics) -> float:
    """The largest difference of means and standard deviations, relative to the size of the values."""
    size = (wanted.std.square() + wanted.mean.square()).mean().sqrt()
    return max(float((x - y).abs().max() / size) for x, y in zip(found, wanted, strict=True))


def in_trunk(result: PreTrainedModel, sites: Mapping[str, Site]) -> dict[str, Site]:
    return {name: Site(f"trunk.{site.module}", site.where, site.axis, site.label) for name, site in sites.items()}


class OfTask(nn.Module):
    """A merged model that runs one task."""

    def __init__(self, model: PreTrainedModel, task: str) -> None:
        super().__init__()
        self.model, self.task = model, task

    def forward(self, **inputs: Tensor):
        return self.model(**inputs, task=self.task)

    def get_submodule(self, path: str) -> nn.Module:
        return self.model.get_submodule(path)


# Every correction.


@pytest.mark.parametrize("name", ["vit", "clip", "resnet-bottleneck"])
@each_correction
def test_model_with_itself_stays_that_model(name: str, correction: str):
    """Its BatchNorm statistics are those of the calibration data, so that a reset has nothing to change."""
    model = awake(in_general_position(tiny.build(name), torch.Generator().manual_seed(1)))
    inputs = example_inputs(model)
    result = merge({"a": model, "b": model}, inputs, method="zip", corrections=[correction], batch_size=64)
    for task in TASKS:
        assert_same(outputs(result, inputs, model, task=task), outputs(model, inputs, model), 1e-4)


@each_kind
def test_model_with_reordered_copy_under_all_corrections(name: str):
    """Units in another order have the same statistics; BatchNorm is asked elsewhere."""
    it = invariant_case(name)
    models = {"a": it.model, "b": it.moved}
    result = merge(models, dict(it.inputs), method="zip", corrections=["repair", "rescale-shift"])
    for task, model in models.items():
        assert_same(outputs(result, it.inputs, model, task=task), outputs(model, it.inputs, model), 1e-3)


@pytest.mark.parametrize("name", ["vit", "clip", "resnet-bottleneck"])
@each_correction
def test_saved_and_loaded(name: str, correction: str, tmp_path: Path):
    result = merged(name, corrections=[correction])
    result.save_pretrained(tmp_path / "merged")
    loaded, info = type(result).from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info.values()), info
    assert_bit_identical(dict(loaded.state_dict()), dict(result.state_dict()))
    inputs = data(name, "a")
    for task, model in experts(name).items():
        assert_bit_identical(outputs(loaded, inputs, model, task=task), outputs(result, inputs, model, task=task))
    first = experts(name)["a"]
    assert_bit_identical(outputs(loaded, inputs, first), outputs(result, inputs, first))


@each_correction
@pytest.mark.parametrize("name", ["vit", "resnet-basic"])
@pytest.mark.parametrize("depth", [0, 0.5])
def test_branches_and_experts_are_left_alone(name: str, correction: str, depth: float):
    before = copy.deepcopy(experts(name))
    plain, result = merged(name, depth=depth), merged(name, depth=depth, corrections=[correction])
    assert_bit_identical(dict(result.branches.state_dict()), dict(plain.branches.state_dict()))
    for task, model in experts(name).items():
        assert_bit_identical(dict(model.state_dict()), dict(before[task].state_dict()))
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not result.training
    assert not any(module.training for module in result.modules())


@each_correction
def test_refit_can_come_before(correction: str):
    result = merged("resnet-basic", refit={"micro_batch": 8}, corrections=[correction])
    for task, model in experts("resnet-basic").items():
        logits = outputs(result, data("resnet-basic", task), model, task=task)["logits"]
        assert logits.isfinite().all()
    assert result.config.method["corrections"] == [{correction: {}}]


@each_correction
@pytest.mark.parametrize("name", ["vit", "bert-sequence", "clip"])
def test_refit_of_a_model_with_itself_stays_that_model(name: str, correction: str):
    """The basis inside heads is the refit's own, so that units there have no expert's statistics to be given."""
    it = invariant_case(name)
    models = {"a": it.model, "b": it.model}
    result = merge(models, it.inputs, method="identity", refit=True, corrections=[correction])
    for task, model in models.items():
        assert_same(outputs(result, it.inputs, model, task=task), outputs(model, it.inputs, model), 1e-3)


@each_correction
def test_heads_that_were_split_are_left_alone(correction: str):
    """One model twice, once with its heads in another order, which is not undone: every head is there twice."""
    model = invariant_case("vit").model
    width = model.config.hidden_size // model.config.num_attention_heads
    narrow, moved = dict(model_tensors(model)), dict(model_tensors(model))
    for name, tensor in model_tensors(model).items():
        if any(part in name for part in ("q_proj", "k_proj", "v_proj")):
            units = tensor.unflatten(0, (-1, width)).clone()
            units[:, width // 2 :] = 0  # what is left fits into a head of half the width
            narrow[name], moved[name] = units.flatten(0, 1), units.roll(1, 0).flatten(0, 1)
        elif "o_proj.weight" in name:
            moved[name] = tensor.unflatten(1, (-1, width)).roll(1, 1).flatten(1)
    models = {"a": with_tensors(model, narrow), "b": with_tensors(model, moved)}
    inputs = invariant_case("vit").inputs
    result = merge(models, inputs, method="identity", refit=True, corrections=[correction])
    assert len(result.config.head_dims) == 2
    for task, expert in models.items():
        assert_same(outputs(result, inputs, expert, task=task), outputs(expert, inputs, expert), 1e-3)


# BatchNorm reset.


def norms(model: nn.Module) -> dict[str, nn.BatchNorm2d]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}


def test_batchnorm_reset_gives_the_statistics_of_the_data():
    """With one batch they are what a pass in training mode computes, of all tasks' samples together."""
    result = merged("resnet-bottleneck", corrections=["batchnorm-reset"])
    reference = merged("resnet-bottleneck")
    for norm in norms(reference.trunk).values():
        norm.train()
        norm.momentum = 1.0
    both = torch.cat([data("resnet-bottleneck", task)["pixel_values"] for task in TASKS])
    reference(pixel_values=both, task="a")
    assert norms(result.trunk)
    for name, norm in norms(result.trunk).items():
        expected = norms(reference.trunk)[name]
        torch.testing.assert_close(norm.running_mean, expected.running_mean)
        torch.testing.assert_close(norm.running_var, expected.running_var)
        assert norm.momentum == 0.1
        assert int(norm.num_batches_tracked) == 1


def test_batchnorm_reset_counts_samples_not_batches():
    """The first norm sees the images through one convolution: its mean over uneven batches is that over all images."""
    name = "resnet-basic"
    uneven = {task: {"pixel_values": data(name, task)["pixel_values"][:11]} for task in TASKS}
    settings = {"method": "identity", "corrections": ["batchnorm-reset"]}
    results = [merge(experts(name), uneven, batch_size=size, **settings) for size in (4, 64)]
    (batched, *_), (whole, *_) = (list(norms(result.trunk).values()) for result in results)
    torch.testing.assert_close(batched.running_mean, whole.running_mean)
    assert int(batched.num_batches_tracked) == 3


def test_batchnorm_reset_is_the_same_over_several_processes():
    """Two processes, one after the other, their sums added by hand."""
    name = "resnet-basic"
    planned = plan(experts(name), method="identity")
    function = CORRECTIONS.get("batchnorm-reset").function

    def first_norm(accelerator: Accelerator | None) -> nn.BatchNorm2d:
        data = Calibration(calibration(name), batch_size=7, accelerator=accelerator).read(planned.experts)
        result = merged(name, method="identity")
        function(result, planned, {}, data, None)
        return next(iter(norms(result.trunk).values()))

    sums: list[list[Tensor]] = []
    for number in range(2):
        process = Process(number, 2)
        first_norm(process)
        sums.append(process.sums)
    (counts_a, mean_a, var_a, *_), (counts_b, mean_b, var_b, *_) = sums
    whole = first_norm(None)
    total = counts_a + counts_b
    assert total.tolist() == [48, 4]
    torch.testing.assert_close(((mean_a + mean_b) / total[0]).float(), whole.running_mean)
    torch.testing.assert_close(((var_a + var_b) / total[0]).float(), whole.running_var)


# REPAIR.


@each_kind
def test_repair_gives_every_unit_its_targets(name: str):
    planned, alignment, data = planned_and_aligned(name)
    result = merged(name)
    before = measured_gap(result, planned, alignment, data)
    repair(result, planned, alignment, data, None, eps=EXACT)
    after = measured_gap(result, planned, alignment, data)
    assert after["with bias"] < 1e-4 < before["with bias"]
    assert after["std"] < 1e-4 < before["std"]


def measured_gap(
    result: PreTrainedModel, planned: Plan, alignment: Mapping[str, object], data: Calibration
) -> dict[str, float]:
    """The largest gap over the layers that can shift, and that of the standard deviations over all layers."""
    models = planned.experts
    first = planned.model
    sites = {s.module: s for s in layers(first, planned) if is_folding(first.get_submodule(s.module))}
    inputs = data.together(None, 1000)
    own = [measure(model, sites, [inputs], data.all_reduce) for model in models.values()]
    found = measure(OfTask(result, "a"), in_trunk(result, sites), [inputs], data.all_reduce)
    assert found.keys() == sites.keys()
    gaps = {"with bias": 0.0, "std": 0.0}
    for module, site in sites.items():
        target = shared_statistics([statistics[module] for statistics in own], site, alignment, planned.spec)
        layer = first.get_submodule(module)
        if isinstance(layer, nn.Embedding) or layer.bias is not None:
            gaps["with bias"] = max(gaps["with bias"], gap(found[module], target))
        zeros = torch.zeros_like(target.mean)
        gaps["std"] = max(gaps["std"], gap(Statistics(zeros, found[module].std), Statistics(zeros, target.std)))
    return gaps


@pytest.mark.parametrize("name", ["vit", "bert-sequence"])
def test_both_forms_of_repair_agree_where_nothing_is_assumed(name: str):
    """Experts that differ in one layer only: what it reads is what they read, so its statistics follow from it."""
    first = experts(name)["a"]
    planned = plan(experts(name), method="identity")
    path = next(site.module for site in layers(first, planned) if site.module.endswith(("query", "q_proj")))
    second = copy.deepcopy(first)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for tensor in second.get_submodule(path).parameters():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) / tensor.shape[-1] ** 0.5)
    models = {"a": first, "b": second}
    inputs = calibration(name)
    planned = plan(models, method="identity")
    data = Calibration(inputs, batch_size=64).read(models)
    moments = gather_moments(planned.spec, models, data, row_fraction=1.0)
    alignment = align_trunk(planned)
    plain, measured, closed = (merge(models, inputs, method="identity") for _ in range(3))
    repair(measured, planned, alignment, data, None, eps=EXACT)
    repair(closed, planned, alignment, data, moments, statistics="moments", eps=EXACT)
    before, direct, found = (model.trunk.get_submodule(path) for model in (plain, measured, closed))
    assert (direct.weight.norm(dim=1) > 1.02 * before.weight.norm(dim=1)).float().mean() > 0.9
    torch.testing.assert_close(found.weight, direct.weight, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found.bias, direct.bias, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["vit", "bert-sequence"])
def test_repair_from_moments_leaves_a_model_merged_with_itself(name: str):
    model = in_general_position(tiny.build(name), torch.Generator().manual_seed(1))
    inputs = example_inputs(model)
    settings = {"repair": {"statistics": "moments"}}
    result = merge({"a": model, "b": model}, inputs, method="zip", corrections=settings, row_fraction=1.0)
    assert_same(outputs(result, inputs, model, task="b"), outputs(model, inputs, model), 1e-4)


def test_repair_from_moments_needs_them():
    with pytest.raises(DataError, match="moments"):
        merged("vit", method="identity", corrections={"repair": {"statistics": "moments"}})


def test_repair_from_moments_without_a_site_is_refused():
    """A convolution's input is observed as units, not as the patches that it sums."""
    with pytest.raises(RecipeError, match="no linear layer of ResNet.*statistics='measured'"):
        merged("resnet-basic", corrections={"repair": {"statistics": "moments"}})


@pytest.mark.parametrize(("name", "warns"), [("vit", True), ("resnet-basic", False)])
def test_a_correction_that_changes_nothing_warns(name: str, warns: bool, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING, "hf_zipit"):
        merged(name, method="identity", corrections=["batchnorm-reset"])
    told = [r.getMessage() for r in caplog.records if r.name.startswith("hf_zipit")]
    assert [message.startswith("batchnorm-reset changed nothing") for message in told] == [True] * warns


def test_damaged_tensors_are_told(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(CORRECTIONS, "_entries", dict(CORRECTIONS._entries))

    @register("damage")
    def damage(merged, planned, maps, calibration, moments):
        next(merged.trunk.parameters()).data.fill_(torch.nan)

    with pytest.raises(ExpertError, match="damage leaves numbers that are not finite in trunk"):
        merged("vit", method="identity", corrections=["damage"])


def test_an_empty_trunk_needs_no_correction():
    planned = plan(experts("vit"), method="identity", depth=0, corrections=["repair"])
    result = merged("vit", method="identity", depth=0)
    before = copy.deepcopy(dict(result.state_dict()))
    correct(result, planned, {}, None)
    assert_bit_identical(dict(result.state_dict()), before)


# Rescale and shift.


@each_kind
def test_rescaled_units_have_their_experts_statistics(name: str):
    """In task mode at every site of the trunk and every readout; in the joint pass at the readouts.

    But for units that are constant in the merged model, which can be given a mean only.
    """
    planned, alignment, data = planned_and_aligned(name)
    models = experts(name)
    plain = merged(name)
    result = merged(name, corrections={"rescale-shift": {"eps": EXACT}})
    assert result.config.rescaled
    sites = chosen_sites(models["a"], planned, "*")
    worst, untouched = 0.0, 0.0
    for number, task in enumerate(TASKS):
        inputs = data.together(task, 1000)
        wanted = expert_statistics(models[task], sites, planned, inputs, data)
        assert sites.keys() <= wanted.keys()
        found, missed = (site_statistics(m, task, sites, inputs) for m in (result, plain))
        for key, site in sites.items():
            target, held = to_own_average(wanted[key], site, alignment, planned, number)
            assert held.float().mean() > 0.5
            worst = max(worst, gap(only(found[key], held), only(target, held)))
            untouched = max(untouched, gap(only(missed[key], held), only(target, held)))
        for joint in (False, True):
            for readout, statistics in door_statistics(result, task, inputs, joint).items():
                alive = statistics.std > 0
                assert alive.float().mean() > 0.9
                worst = max(worst, gap(only(statistics, alive), only(wanted[readout], alive)))
                torch.testing.assert_close(statistics.mean, wanted[readout].mean, atol=1e-4, rtol=1e-4)
    assert worst < 1e-3 < untouched


def only(statistics: Statistics, units: Tensor) -> Statistics:
    return Statistics(*(x[units] for x in statistics))


def site_statistics(
    model: PreTrainedModel, task: str, sites: Mapping[str, Site], inputs: Mapping[str, Tensor]
) -> dict[str, Statistics]:
    """Behind the corrections: with hooks that come after the model's own."""
    found: dict[str, Statistics] = {}

    def note(key: str, value: Tensor, axis: int) -> None:
        found[key] = UnitSums.of(value, axis, inputs.get("attention_mask")).statistics(lambda x: x)

    handles = []
    for key, site in sites.items():
        module = model.trunk.get_submodule(site.module)
        if site.where == "input":
            hook = lambda m, args, kwargs, k=key, a=site.axis: note(k, (*args, *kwargs.values())[0], a)  # noqa: E731
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        else:
            handles.append(module.register_forward_hook(lambda m, args, out, k=key, a=site.axis: note(k, out, a)))
    with torch.no_grad():
        model(**inputs, task=task)
    for handle in handles:
        handle.remove()
    return found


def door_statistics(
    model: PreTrainedModel, task: str, inputs: Mapping[str, Tensor], joint: bool
) -> dict[str, Statistics]:
    found: dict[str, Statistics] = {}
    handles = []
    for kind in ("entries", "exits"):
        for i, readout in enumerate(getattr(model, kind)[model.branch_names[task]]):

            def note(module: nn.Module, args: tuple, out: Tensor, name: str = f"{kind}:{i}") -> None:
                found[name] = UnitSums.of(out, module.axis, inputs.get("attention_mask")).statistics(lambda x: x)

            handles.append(readout.register_forward_hook(note))
    with torch.no_grad():
        model(**inputs, task=None if joint else task)
    for handle in handles:
        handle.remove()
    return found


def test_joint_passes_can_be_left_as_they_are():
    plain, result = merged("vit"), merged("vit", corrections={"rescale-shift": {"joint": False}})
    first, inputs = experts("vit")["a"], data("vit", "a")
    assert_bit_identical(outputs(result, inputs, first), outputs(plain, inputs, first))
    assert not torch.equal(result(**inputs, task="a").logits, plain(**inputs, task="a").logits)


def test_joint_trunk_is_not_rescaled():
    """The trunk runs once for all tasks: what it gives in a joint pass is what it gives without corrections."""
    plain, result = merged("vit"), merged("vit", corrections=["rescale-shift"])
    seen: list[Tensor] = []
    for model in (plain, result):
        with torch.no_grad():
            last = model.trunk.get_submodule("vit.layernorm")
            handle = last.register_forward_hook(lambda m, args, out: seen.append(out))
            model(**data("vit", "a"))
            handle.remove()
    assert len(seen) == 2
    assert torch.equal(*seen)


def test_rescaling_survives_a_deep_copy_and_calls_of_a_branch():
    result = merged("vit", corrections=["rescale-shift"])
    inputs = data("vit", "b")
    twin = copy.deepcopy(result)
    with torch.no_grad():
        expected = result(**inputs, task="b").logits
        assert torch.equal(result.branch("b")(**inputs).logits, expected)
        for module in result.modules():
            if isinstance(module, Affine):
                module.reset()
        assert torch.equal(twin(**inputs, task="b").logits, expected)
        assert torch.equal(result(**inputs, task="b").logits, merged("vit")(**inputs, task="b").logits)
        assert not torch.equal(result(**inputs, task="b").logits, expected)


def test_modules_of_the_rescaling_can_be_chosen():
    result = merged("vit", corrections={"rescale-shift": {"modules": ["*.fc2", "vit.layers.1"]}})
    chosen = {site["module"] for site in result.config.rescaled}
    assert chosen == {"vit.layers.0.mlp.fc2", "vit.layers.1.mlp.fc2", "vit.layers.1"}
    with pytest.raises(RecipeError, match="no module"):
        merged("vit", corrections={"rescale-shift": {"modules": ["*.fc9"]}})


def test_rescaling_twice_is_refused():
    result = merged("vit", corrections=["rescale-shift"])
    with pytest.raises(ZipItError, match="already"):
        result.add_rescales([])


# Data and settings.


def test_texts_of_different_length_are_padded_and_masked():
    short, long = ({"input_ids": torch.full((2, n), 5)} for n in (3, 5))
    joined = Calibration([short, long]).read(experts("bert-sequence")).together(None, 100)
    assert joined["input_ids"].shape == (4, 5)
    assert joined["attention_mask"].sum(1).tolist() == [3, 3, 5, 5]
    assert [len(p["input_ids"]) for p in pieces(joined, 3)] == [3, 1]


def test_padding_does_not_enter_statistics():
    value = torch.randn(4, 5, 3)
    mask = torch.ones(4, 5, dtype=torch.long)
    mask[0, 2:] = 0
    found = UnitSums.of(value, -1, mask).statistics(lambda x: x)
    rows = value[mask.bool()].double()
    torch.testing.assert_close(found.mean, rows.mean(0))
    torch.testing.assert_close(found.std, rows.std(0, unbiased=False))


def test_samples_are_shared_out_among_processes():
    def share(number: int, count: int, samples: int) -> Tensor:
        data = Calibration(calibration("vit"), batch_size=5, accelerator=Process(number, count))
        return data.read(experts("vit")).together("b", samples)["pixel_values"]

    parts = [share(number, 3, 10) for number in range(3)]
    assert sum(map(len, parts)) == 10
    everything = data("vit", "b")["pixel_values"][:10]
    assert sorted(x.sum().item() for part in parts for x in part) == sorted(x.sum().item() for x in everything)
    with pytest.raises(DataError, match="shared out"):
        share(0, 11, 10)


@pytest.mark.parametrize(
    ("corrections", "message"),
    [
        (["batchnorm"], "batchnorm-reset"),
        (["repair", "repair"], "twice"),
        (["rescale-shift", "repair"], "last"),
        ({"repair": {"sample": 3}}, "samples"),
    ],
)
def test_wrong_settings_are_told_before_work_starts(corrections: object, message: str):
    with pytest.raises(RecipeError, match=message):
        merge({"a": "nowhere", "b": "nowhere"}, {}, method="zip", corrections=corrections)


def test_corrections_need_data():
    with pytest.raises(DataError, match="calibration="):
        merge(experts("vit"), method="identity", corrections=["repair"])


def test_options_are_kept_in_order():
    assert correction_options("repair") == {"repair": {}}
    assert list(correction_options(["repair", "batchnorm-reset"])) == ["repair", "batchnorm-reset"]
