"""The pass: exact moments, masks, subsampling, processes, placement, and leaving the experts as they were."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from torch import Tensor, nn

from hf_zipit import MergeConfig, plan
from hf_zipit import observe as observe_plan
from hf_zipit.data.calibration import Calibration
from hf_zipit.errors import DataError, ExpertError, RecipeError, SpecError
from hf_zipit.experts.fingerprint import fingerprint_experts
from hf_zipit.observation import Moments, gather_moments, record
from hf_zipit.symmetry.spec import MergeSpec, Probe
from tests.data.test_sources import KINDS, X
from tests.observation.models import (
    BERT_SPEC,
    HIDDEN,
    MLP,
    MLP_SPEC,
    PRE_SPEC,
    bert,
    covariance,
    hidden,
    mlps,
    spec_of,
    vit,
    vit_spec,
)
from tests.observation.worker import calibration

observe_module = importlib.import_module("hf_zipit.observation.observe")  # the package's `observe` is the function


def observe(
    spec: MergeSpec, experts: Mapping[str, nn.Module], inputs: Any, *, batch_size: int = 32, **settings: Any
) -> Moments:
    return gather_moments(spec, experts, Calibration(inputs, batch_size=batch_size).read(experts), **settings)


def data(rows: int = 50, seed: int = 0) -> Tensor:
    return torch.randn(rows, 5, generator=torch.Generator().manual_seed(seed))


def assert_same(one: Moments, two: Moments, tolerance: float = 1e-6) -> None:
    assert one.tasks == two.tasks and one.keys() == two.keys() and one.keys()
    for key in one.keys():  # noqa: SIM118
        assert one.count(key) == two.count(key) and one.probes(key) == two.probes(key)
        for probe in one.probes(key):
            torch.testing.assert_close(one.mean(key, probe), two.mean(key, probe), atol=tolerance, rtol=0)
            torch.testing.assert_close(one.covariance(key, probe), two.covariance(key, probe), atol=tolerance, rtol=0)
            torch.testing.assert_close(
                one.correlation(key, probe), two.correlation(key, probe), atol=tolerance, rtol=0
            )


def test_moments_are_those_of_all_experts_on_all_data():
    experts, parts = mlps(), {"clothes": data(37), "shoes": data(20, seed=1) + 1}
    moments = observe(MLP_SPEC, experts, parts, row_fraction=1.0, batch_size=8)
    features = hidden(experts, torch.cat([parts["clothes"], parts["shoes"]]))
    assert moments.tasks == ("clothes", "shoes") and moments.count(HIDDEN) == 57
    torch.testing.assert_close(moments.covariance(HIDDEN), covariance(features), atol=1e-6, rtol=0)
    torch.testing.assert_close(moments.mean(HIDDEN), features.mean(0), atol=1e-6, rtol=0)
    assert moments.fingerprint["experts"] == fingerprint_experts(experts)
    assert moments.fingerprint["samples"] == 57 and moments.fingerprint["row_fraction"] == 1.0


def test_outputs_are_seen_before_they_are_overwritten_in_place():
    experts, x = mlps(), data()
    before = torch.cat([expert.first(x) for expert in experts.values()], 1).detach().double()
    moments = observe(PRE_SPEC, experts, x, row_fraction=1.0)
    torch.testing.assert_close(moments.covariance(HIDDEN), covariance(before), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_data_gives_the_same_moments(kind: str):
    experts = mlps()
    moments = observe(MLP_SPEC, experts, KINDS[kind](), row_fraction=1.0, batch_size=4)
    assert_same(
        moments, observe(MLP_SPEC, experts, X, row_fraction=1.0, batch_size=4), 1e-3 * float(X.max()) ** 2 * 1e-6
    )


def test_passes_add():
    experts, x = mlps(), data(48)
    whole = observe(MLP_SPEC, experts, x, row_fraction=1.0, batch_size=16)
    parts = [observe(MLP_SPEC, experts, part, row_fraction=1.0, batch_size=16) for part in x.split(32)]
    merged = parts[0].merge(parts[1])
    assert_same(whole, merged)
    assert merged.fingerprint["samples"] == 48 and merged.fingerprint["experts"] == whole.fingerprint["experts"]


def test_the_order_of_experts_changes_only_the_order():
    experts, x = mlps(), data()
    swapped = {task: experts[task] for task in ("shoes", "clothes")}
    one, two = (observe(MLP_SPEC, e, x, row_fraction=1.0) for e in (experts, swapped))
    assert_same(one.select(("shoes", "clothes")), two)


def test_one_object_may_be_two_experts():
    expert, x = MLP(seed=1), data()
    moments = observe(MLP_SPEC, {"a": expert, "b": expert}, x, row_fraction=1.0)
    assert moments.count(HIDDEN) == len(x)
    correlation = moments.correlation(HIDDEN)
    torch.testing.assert_close(correlation[:6, 6:], correlation[:6, :6])


def test_axes_calls_and_keywords():
    """A channel axis in the middle, a module called twice, and a keyword that is no tensor before the one that is."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.twice = nn.Conv2d(3, 4, 1), Twice()

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.twice(flag=True, x=self.twice(flag=False, x=y)[1]["y"])[1]["y"]

    class Twice(nn.Module):
        def forward(self, flag: bool, x: Tensor) -> tuple[str, dict[str, Tensor]]:
            return "first", {"y": x + 1 if flag else 2 * x}

    experts = {"a": Net(), "b": Net()}
    spec = spec_of(
        Probe("conv", "output", 1, ("c",)),
        Probe("twice", "input", -3, ("c",)),
        Probe("twice", "output", 1, ("c",)),
        c=4,
    )
    x = torch.randn(6, 3, 2, 5)
    with torch.no_grad():
        out = torch.cat([experts[t].conv(x).movedim(1, -1).reshape(60, 4) for t in "ab"], 1).double()
    moments = observe(spec, experts, x, row_fraction=1.0, batch_size=4)
    expected = {"conv:output:1": out, "twice:input:-3": [out, 2 * out], "twice:output:1": [2 * out, 2 * out + 1]}
    for probe, rows in expected.items():
        rows = torch.cat(rows) if isinstance(rows, list) else rows
        assert moments.count(("c",), probe) == len(rows)
        torch.testing.assert_close(moments.covariance(("c",), probe), covariance(rows), atol=1e-5, rtol=1e-5)


def test_padded_tokens_are_no_data():
    experts = {"a": bert(1), "b": bert(2)}
    ids = [[5, 6, 7], [8], [9, 10], [11, 12, 13, 14]]
    padded = observe(BERT_SPEC, experts, [{"input_ids": row} for row in ids], row_fraction=1.0, batch_size=2)
    alone = [observe(BERT_SPEC, experts, torch.tensor([row]), row_fraction=1.0, batch_size=1) for row in ids]
    single = alone[0].merge(alone[1]).merge(alone[2]).merge(alone[3])
    assert padded.count(("mlp",)) == padded.count(("stream",)) == 10
    assert padded.count(("pooled",)) == 4  # one row a sample: the mask has nothing to say there
    assert_same(padded, single, 1e-5)


def test_subsampling_is_seeded_and_the_same_rows_for_all_experts():
    expert, x = MLP(seed=1), data(96).reshape(12, 8, 5)
    experts = {"a": expert, "b": expert}
    runs = [observe(MLP_SPEC, experts, x, row_fraction=0.25, seed=seed, batch_size=4) for seed in (0, 0, 1)]
    assert runs[0].count(HIDDEN) == 24
    assert torch.equal(runs[0].covariance(HIDDEN), runs[1].covariance(HIDDEN))
    assert not torch.allclose(runs[0].covariance(HIDDEN), runs[2].covariance(HIDDEN))
    c = runs[0].covariance(HIDDEN)
    torch.testing.assert_close(c[:6, 6:], c[:6, :6])  # other rows for b would break this


def test_batches_and_probes_choose_different_rows():
    rows = {
        (batch, probe): tuple(record.choose_rows(0.1, 1, 0, batch)(probe, 0, 200).tolist())
        for batch in range(3)
        for probe in ("a:input:-1", "b:input:-1")
    }
    assert len(set(rows.values())) == 6
    assert all(list(r) == sorted(set(r)) and len(r) == 20 and r[-1] < 200 for r in rows.values())
    assert record.choose_rows(0.1, 64, 0, 0)("a", 0, 64) is None
    assert len(record.choose_rows(0.1, 64, 0, 0)("a", 0, 65)) == 64


def test_automatic_share_bounds_the_cost(monkeypatch: pytest.MonkeyPatch):
    """(T d)^2 a row must add up to at most half of the forward passes' multiply-accumulates, which are known here."""
    monkeypatch.setattr(observe_module, "MINIMUM_ROWS", 1)
    experts, x = {"a": MLP(64, seed=1), "b": MLP(64, seed=2)}, data(400).reshape(10, 40, 5)
    spec = spec_of(Probe("last", "input", -1, HIDDEN), hidden=64)
    moments = observe(spec, experts, x, batch_size=10)
    forward = 2 * 400 * 64 * (5 + 3)
    cost = moments.count(HIDDEN) * (2 * 64) ** 2
    assert 0.3 * forward < cost <= 0.55 * forward
    assert moments.fingerprint["row_fraction"] == pytest.approx(0.5 * forward / (400 * (2 * 64) ** 2))
    monkeypatch.setattr(observe_module, "MINIMUM_ROWS", 64)
    assert observe(spec, experts, x, batch_size=10).count(HIDDEN) == 64


def test_only_some_products():
    model = vit(1)
    spec, images = vit_spec(model), torch.randn(4, 3, 8, 8)
    moments = observe(spec, {"a": model, "b": vit(2)}, images, keys=[("mlp1",)])
    assert moments.keys() == (("mlp1",),)
    with pytest.raises(SpecError, match="nowhere"):
        observe(spec, {"a": model}, images, keys=[("nowhere",)])


# --- the experts stay as they were ---


def state(experts: dict[str, MLP]) -> tuple[list[bool], int]:
    modules = [module for expert in experts.values() for module in expert.modules()]
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules)
    return [module.training for module in modules], hooks


@pytest.mark.parametrize("fails", [False, True])
def test_experts_are_left_as_they_were(fails: bool):
    experts = mlps()
    experts["clothes"].train()
    experts["clothes"].act.eval()
    experts["shoes"].eval()
    before = state(experts)
    x = data()
    if fails:
        with torch.no_grad():
            experts["shoes"].first.weight[2, 3] = torch.inf
        with pytest.raises(ExpertError, match="'shoes'.*NaN or infinite.*input of last"):
            observe(MLP_SPEC, experts, x, batch_size=8)
    else:
        observe(MLP_SPEC, experts, x, batch_size=8)
    assert state(experts) == before and before[1] == 0
    loss = experts["shoes"](data()).sum()
    loss.backward()  # nothing of the pass stands in the way of training
    assert experts["shoes"].first.weight.grad is not None


def test_dropout_is_off_during_the_pass():
    class Dropping(MLP):
        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.dropout(torch.relu(self.first(x)), 0.5, self.training))

    experts = {"clothes": Dropping(seed=1).train(), "shoes": Dropping(seed=2).train()}
    moments = observe(MLP_SPEC, experts, data(), row_fraction=1.0)
    torch.testing.assert_close(moments.covariance(HIDDEN), covariance(hidden(experts, data())), atol=1e-6, rtol=0)
    assert experts["clothes"].training


# --- what goes wrong is told ---


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_in_a_feature_names_expert_and_module(value: float):
    experts = mlps()
    with torch.no_grad():
        experts["shoes"].first.weight[2, 3] = value
    with pytest.raises(ExpertError, match="'shoes'.*output of first"):
        observe(PRE_SPEC, experts, data())


def test_silent_and_missing_probes_are_named():
    class Idle(MLP):
        def __init__(self) -> None:
            super().__init__()
            self.idle = nn.Linear(5, 6)

    idle = spec_of(Probe("idle", "output", -1, HIDDEN), hidden=6)
    with pytest.raises(SpecError, match="output of 'idle' was never seen.*'a'"):
        observe(idle, {"a": Idle(), "b": Idle()}, data())
    with pytest.raises(SpecError, match="'clothes' has no module 'idle'"):
        observe(idle, mlps(), data())
    with pytest.raises(SpecError, match=r"7 units on axis -1.*\[2, 6\]"):
        observe(spec_of(Probe("first", "output", -1, HIDDEN), hidden=7), mlps(), data())
    with pytest.raises(SpecError, match="axis 4"):
        observe(spec_of(Probe("first", "output", 4, HIDDEN), hidden=6), mlps(), data())
    with pytest.raises(SpecError, match="no probes"):
        observe(replace(MLP_SPEC, probes=()), mlps(), data())


def test_experts_that_run_differently_are_told():
    class Twice(MLP):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + super().forward(x)

    class Never(MLP):
        def forward(self, x: Tensor) -> Tensor:
            return x

    with pytest.raises(ExpertError, match=r"last:input:-1.*\{'a': 50, 'b': 100\}"):
        observe(MLP_SPEC, {"a": MLP(), "b": Twice()}, data(), batch_size=50, row_fraction=1.0)
    with pytest.raises(SpecError, match="'b' did not call.*last:input:-1"):
        observe(MLP_SPEC, {"a": MLP(), "b": Never()}, data())


def test_few_rows_wait_and_none_is_lost(monkeypatch: pytest.MonkeyPatch):
    experts, x = mlps(), data(50)
    expected = observe(MLP_SPEC, experts, x, row_fraction=1.0)
    for enough in (1, 7, 1000):
        monkeypatch.setattr(observe_module, "ENOUGH_ROWS", enough)
        assert_same(observe(MLP_SPEC, experts, x, row_fraction=1.0, batch_size=3), expected)


def test_inputs_that_do_not_fit_are_told():
    with pytest.raises(DataError, match=r"'clothes' cannot run.*'x': \[2, 4\]"):
        observe(MLP_SPEC, mlps(), torch.randn(9, 4))
    with pytest.raises(DataError, match="it is empty"):
        observe(MLP_SPEC, mlps(), data(0))


@pytest.mark.parametrize("row_fraction", [0, -0.1, 1.5, "half", None, True])
def test_share_is_checked(row_fraction: object):
    with pytest.raises(RecipeError, match="row_fraction"):
        MergeConfig(row_fraction=row_fraction)


def test_a_plan_says_what_is_observed():
    """Its experts with their norms folded, its trunk, its share of the rows and its seed."""
    experts, images = {"a": vit(1).eval(), "b": vit(2).eval()}, torch.randn(40, 3, 8, 8)
    planned = plan(experts, method="zip", residual="orthogonal", depth=0.5, row_fraction=0.6, seed=5)
    assert planned.spec.folds
    found = observe_plan(planned, images)
    expected = observe(planned.spec, planned.folded, images, row_fraction=0.6, seed=5)
    assert found.fingerprint == expected.fingerprint and set(found.keys()) == set(planned.spec.products())
    assert all(torch.equal(found.covariance(key), expected.covariance(key)) for key in expected.sums)
    assert found.fingerprint["experts"] == fingerprint_experts(planned.folded)


# --- placement ---


def test_offloaded_experts_are_observed_where_they_are():
    """Weights on the meta device outside forward, as under `device_map` with offloading."""
    placed, images = {"a": vit(1), "b": vit(2)}, torch.randn(8, 3, 8, 8)
    spec = vit_spec(placed["a"])
    expected = observe(spec, placed, images, row_fraction=1.0)
    for model in placed.values():
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        model.hf_device_map = {"": "cpu"}
    assert all(parameter.is_meta for parameter in placed["a"].parameters())
    moments = observe(spec, placed, images, row_fraction=1.0)
    assert_same(moments, expected)
    assert moments.fingerprint == expected.fingerprint
    assert all(parameter.is_meta for parameter in placed["a"].parameters())


def test_inputs_go_to_the_first_device_that_computes():
    expert, device = MLP(), torch.device("cpu")
    assert observe_module._entry_device(expert, device) == device
    for places, entry in (({"first": "disk", "last": 1}, 1), ({"": 0}, 0), ({"first": "cpu", "last": "disk"}, "cpu")):
        expert.hf_device_map = places
        assert observe_module._entry_device(expert, torch.device("meta")) == entry


def test_half_precision_experts_take_float32_data():
    experts = {task: expert.bfloat16() for task, expert in mlps().items()}
    moments = observe(MLP_SPEC, experts, data(), row_fraction=1.0)
    features = torch.cat([torch.relu(e.first(data().bfloat16())) for e in experts.values()], 1).detach().double()
    torch.testing.assert_close(moments.covariance(HIDDEN), covariance(features), atol=1e-6, rtol=0)


# --- several processes ---


@pytest.fixture(scope="module")
def two_processes(in_two_processes: Callable[[str], Path]) -> Path:
    """What two processes wrote, on good data (`good*`) and on data that only one of them finds damaged (`bad*`)."""
    return in_two_processes("tests.observation.worker")


def test_two_processes_give_the_moments_of_one(two_processes: Path):
    experts = {"clothes": vit(1), "shoes": vit(2)}
    single = observe(vit_spec(experts["clothes"]), experts, calibration(), batch_size=4, row_fraction=0.7, seed=3)
    ranks = [Moments.load(two_processes / f"good{rank}.safetensors", fingerprint_experts(experts)) for rank in (0, 1)]
    assert single.fingerprint["samples"] == 31
    for moments in ranks:
        assert_same(moments, single)
        assert moments.fingerprint == single.fingerprint


def test_an_error_in_one_process_is_told_by_all(two_processes: Path):
    told = [(two_processes / f"bad{rank}.txt").read_text() for rank in (0, 1)]
    assert told[0] == told[1] and "task 'shoes' (number 0 of its batch) holds nan in 'pixel_values'" in told[0]
