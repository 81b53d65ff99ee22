"""What the refit chooses by what the experts compute: the basis of a residual stream, and the units of an MLP."""

from __future__ import annotations

from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_zipit import merge
from hf_zipit.refit import (
    RefitReport,
    answer_refinement,
    attention_refinement,
    mlp_solver,
    stage,
    steps,
    unit_refinement,
)
from hf_zipit.refit.answers import divergence, spread_of, statistics
from hf_zipit.refit.fit import Fit
from hf_zipit.refit.mlp_solver import best_units, left_over
from hf_zipit.refit.mlps import Mlp
from hf_zipit.refit.stream_basis import explained, lost_with_scales, principal_basis, read_metric
from hf_zipit.refit.unit_refinement import MlpRows
from hf_zipit.symmetry.spaces import Reader

from .. import tiny
from ..test_invariants import calibration, experts

UNITS, EXPERTS = 6, 2


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def start() -> Tensor:
    return torch.cat([torch.eye(UNITS, dtype=torch.float64)] * EXPERTS, 1) / EXPERTS**0.5


def loss(basis: Tensor, x: Tensor) -> float:
    return float((x - x @ basis.mT @ basis).square().sum())


def streams(rank: int = 2, seed: int = 0) -> Tensor:
    """Two experts' streams, each of a low rank of its own, of which no unit varies along the ones."""
    parts = [drawn(200, rank, seed=seed + 2 * t) @ drawn(rank, UNITS, seed=seed + 2 * t + 1) for t in range(EXPERTS)]
    return torch.cat([part - part.mean(1, keepdim=True) for part in parts], 1)


def test_two_streams_of_low_rank_are_kept_whole():
    x = streams()
    basis = principal_basis(x.mT @ x, start())
    torch.testing.assert_close(basis @ basis.mT, torch.eye(UNITS, dtype=torch.float64))
    assert loss(basis, x) < 1e-3 * loss(start(), x)


def test_the_ones_stay_the_ones():
    x = streams()
    basis = principal_basis(x.mT @ x, start())
    ones = torch.ones(UNITS, 1, dtype=torch.float64)
    torch.testing.assert_close(basis.mT @ ones, start().mT @ ones)


def test_streams_that_agree_keep_the_alignment():
    """Also where few samples show few of their directions."""
    for count in (3, 100):
        part = drawn(count, UNITS)
        x = torch.cat([part, part], 1)
        assert principal_basis(x.mT @ x, start()) is None


def test_the_basis_is_the_one_nearest_to_the_alignment():
    """A little different second stream changes the basis little."""
    part = drawn(100, UNITS)
    x = torch.cat([part, part + 0.2 * drawn(100, UNITS, seed=5)], 1)
    basis = principal_basis(x.mT @ x, start())
    assert basis is not None and (basis - start()).abs().max() < 0.05


def test_the_directions_that_are_read_are_kept_first():
    """Of two streams that need all of their directions, a layer reads less than half of them, the weakest ones."""
    reader = torch.linalg.qr(drawn(UNITS, UNITS // 2 - 1, seed=8)).Q.mT
    x = drawn(200, EXPERTS, UNITS)
    x = x - 0.7 * x @ reader.mT @ reader
    x = (x - x.mean(-1, keepdim=True)).flatten(1)
    tensors = {"scale": torch.ones(UNITS), "reader": reader}
    metric = read_metric([(Reader("", "reader", None, 1), "scale")], [tensors] * EXPERTS, x.mT @ x)
    read = x.unflatten(1, (EXPERTS, UNITS)) @ reader.mT
    lost = []
    for given in (metric, None):
        basis = principal_basis(x.mT @ x, start(), given)
        torch.testing.assert_close(basis @ basis.mT, torch.eye(UNITS, dtype=torch.float64))
        made = x @ basis.mT @ torch.linalg.lstsq(x @ basis.mT, read.flatten(1)).solution
        lost.append(float((made - read.flatten(1)).square().sum() / read.square().sum()))
    assert lost[0] < 0.1 * lost[1]


def test_readers_count_alike_whatever_the_size_of_their_outputs():
    energy = drawn(4 * UNITS, EXPERTS * UNITS)
    energy = energy.mT @ energy
    tensors = {"scale": drawn(UNITS), "one": drawn(3, UNITS, seed=1), "other": drawn(UNITS, 5, seed=2)}
    readers = [(Reader("", "one", None, 1), "scale"), (Reader("", "other", None, 0), "scale")]
    metric = read_metric(readers, [tensors] * EXPERTS, energy)
    larger = read_metric(readers, [tensors | {"other": 100 * tensors["other"]}] * EXPERTS, energy)
    torch.testing.assert_close(larger, metric)


def gram_of(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x.mT @ x + 1e-9 * torch.eye(x.shape[1], dtype=x.dtype), x.mT @ y, y.square().sum()


def test_what_a_choice_leaves_is_what_least_squares_leaves():
    x, y, chosen = drawn(80, 7), drawn(80, 3, seed=1), torch.tensor([1, 4, 6])
    fitted = x[:, chosen] @ torch.linalg.lstsq(x[:, chosen], y).solution
    assert left_over(*gram_of(x, y), chosen) == pytest.approx(float((y - fitted).square().sum() / y.square().sum()))


def test_the_units_that_made_the_targets_are_found():
    """However much they are like others, of which each has a twin."""
    x = drawn(300, 10) + drawn(300, 1, seed=1)
    y = x[:, [2, 5, 7]] @ drawn(3, 4, seed=2)
    gram, cross, _ = gram_of(torch.cat([x, x], 1), y)
    found = best_units(gram, cross, 3) % 10
    assert sorted(found.tolist()) == [2, 5, 7]


@pytest.mark.parametrize("at_once", [1, 3])
def test_every_distinct_unit_is_chosen_before_a_twin(at_once: int, monkeypatch: pytest.MonkeyPatch):
    x, y = drawn(300, 6), drawn(300, 4, seed=1)
    gram, cross, _ = gram_of(torch.cat([x, x], 1), y)
    monkeypatch.setattr(mlp_solver, "STEPS", 6 // at_once)
    found = best_units(gram, cross, 6)
    assert len(set(found.tolist())) == 6
    assert at_once > 1 or sorted((found % 6).tolist()) == list(range(6))


@pytest.mark.parametrize("at_once", [1, 3])
def test_units_are_the_same_where_nobody_looks_at_every_step(at_once: int, monkeypatch: pytest.MonkeyPatch):
    """As on an accelerator; where two of a step say the same, that is told."""
    x, y = drawn(300, 12), drawn(300, 4, seed=1)
    gram, cross, _ = gram_of(x, y)
    monkeypatch.setattr(mlp_solver, "STEPS", 6 // at_once)
    found, independent = mlp_solver._best_units(gram, cross, 6, look=False)
    assert independent and torch.equal(found, best_units(gram, cross, 6))
    gram, cross, _ = gram_of(torch.cat([x, x], 1), y)
    assert bool(mlp_solver._best_units(gram, cross, 6, look=False)[1]) == (at_once == 1)


def pair(name: str) -> tuple[tuple[PreTrainedModel, ...], dict[str, dict[str, Tensor]]]:
    models = experts(name)
    data = calibration(models[0])
    return models, {t: {n: x[i::2] for n, x in data.items()} for i, t in enumerate("ab")}


def error(models: tuple[PreTrainedModel, ...], data: dict[str, dict[str, Tensor]], **settings: object) -> float:
    """The mean regression error of what MLPs write into the stream."""
    refit = {"micro_batch": 8, "rows_per_input": 0, **settings}
    merged = merge(dict(zip("ab", models, strict=True)), data, method="identity", refit=refit, corrections=())
    found = [
        e for module, by_task in RefitReport.of(merged).errors.items() if "fc2" in module for e in by_task.values()
    ]
    return sum(found) / max(len(found), 1)


@pytest.mark.parametrize("name", ["vit", "llama", "gpt2", "bert-sequence"])
def test_streams_get_a_basis_where_rotations_are_allowed(name: str):
    models, data = pair(name) if name in ("vit", "bert-sequence") else (tiny.pair(name), None)
    if data is None:
        ids = torch.randint(3, 49, (16, 7), generator=torch.Generator().manual_seed(0))
        data = {"a": {"input_ids": ids[::2]}, "b": {"input_ids": ids[1::2]}}
    found = {}

    def noting(*args: object, **kwargs: object):
        found.update(bases(*args, **kwargs))
        return found

    bases = stage.stream_bases
    with patch.object(stage, "stream_bases", noting):
        error(models, data, attention_steps=0, unit_steps=0, answer_steps=0, written_samples=0)
    assert found
    for space_map in found.values():
        gram = sum(m @ m.mT for m in space_map.matrices) / len(space_map.matrices) ** 2
        torch.testing.assert_close(gram, torch.eye(len(gram), dtype=gram.dtype) / len(space_map.matrices))


def test_streams_that_allow_no_rotation_keep_their_units():
    models, data = pair("resnet-basic")
    with patch.object(stage, "stream_bases") as called:
        error(models, data)
    called.assert_not_called()


def test_scales_that_differ_within_a_norm_cost_a_rotated_basis():
    """Units of the alignment that agree have scales of their own; where all are alike they cost nothing."""
    x = streams()
    basis, energy = principal_basis(x.mT @ x, start()), x.mT @ x
    left_out = energy.trace() - explained(basis, energy, torch.eye(len(energy)).to(energy))
    torch.testing.assert_close(lost_with_scales(basis, [(energy, torch.ones(EXPERTS * UNITS))]), left_out)
    scales = torch.cat([drawn(UNITS).exp()] * EXPERTS)
    agreed = torch.cat([x[:, :UNITS]] * EXPERTS, 1) * scales
    energy = agreed.mT @ agreed
    rotated = torch.linalg.qr(drawn(UNITS, UNITS, seed=9)).Q @ start()
    assert lost_with_scales(start(), [(energy, scales)]) < 1e-6 * energy.trace()
    assert lost_with_scales(rotated, [(energy, scales)]) > 0.03 * energy.trace()


@pytest.mark.parametrize("setting", ["choose_units", "stream_bases"])
def test_a_choice_brings_a_pair_nearer_to_its_experts(setting: str):
    """On average over experts of other initialisations."""
    totals = {True: 0.0, False: 0.0}
    for seed in range(3):
        models = tiny.pair("vit", seeds=(2 * seed, 2 * seed + 1))
        inputs = calibration(models[0])
        data = {t: {n: x[i::2] for n, x in inputs.items()} for i, t in enumerate("ab")}
        others = {"choose_units": False, "stream_bases": False}
        for chosen in totals:
            totals[chosen] += error(models, data, **{**others, setting: chosen})
    assert totals[True] < 0.97 * totals[False]


def test_units_are_fitted_through_their_nonlinearity():
    """Also on samples that nothing was fitted to."""
    models = tiny.pair("llama")
    for model in models:
        for name, tensor in model.named_parameters():
            if "mlp" in name:
                tensor.data *= 8  # random experts are nearly linear otherwise
    ids = torch.randint(3, 49, (4, 64, 7), generator=torch.Generator().manual_seed(0))
    data, other = ({t: {"input_ids": x} for t, x in zip("ab", part, strict=True)} for part in (ids[:2], ids[2:]))
    left = []
    for count in (0, 128):
        refit = {"unit_steps": count, "split_heads": False}
        merged = merge(dict(zip("ab", models, strict=True)), data, method="identity", refit=refit, corrections=())
        with torch.no_grad():
            off = [merged(**other[t], task=t).logits - m(**other[t]).logits for t, m in zip("ab", models, strict=True)]
        left.append(float(sum(x.square().mean() for x in off)))
    assert left[1] < 0.97 * left[0]


def test_units_stay_where_better_ones_are_worse_on_what_is_held_out():
    """Held-out targets that lie where the fitted ones do not."""
    models, data = pair("vit")
    split, refine, results = unit_refinement.split_rows, unit_refinement.refine_units, []

    def opposed(fit: Fit, mlp: Mlp) -> tuple[MlpRows, MlpRows, float]:
        fitted, _, spread = split(fit, mlp)
        put_out = unit_refinement.solve_reader(fit, mlp, fitted)
        made = unit_refinement.WhiteMlp(fit, mlp, fitted, put_out)(fitted.x).detach()
        return fitted, replace(fitted, lacking=2 * made - fitted.lacking), spread

    with patch.object(unit_refinement, "split_rows", opposed), patch.object(mlp_solver, "refine_units") as called:
        called.side_effect = lambda fit, mlp: results.append(refine(fit, mlp))
        error(models, data)
    assert results and not any(results)


def test_the_last_layer_is_fitted_to_what_experts_answer(monkeypatch: pytest.MonkeyPatch):
    """Also on samples that nothing was fitted to, and where there is room for a part of the answers alone.

    And it stays where there is nothing to gain.
    """
    models = tiny.pair("llama")
    for model in models:
        model.lm_head.weight.data *= 20  # random experts answer nearly the same to everything otherwise
    ids = torch.randint(3, 49, (4, 64, 7), generator=torch.Generator().manual_seed(0))
    data, other = ({t: {"input_ids": x} for t, x in zip("ab", part, strict=True)} for part in (ids[:2], ids[2:]))
    left = []
    for count, room in ((0, None), (64, None), (64, 64 * 7 * 25)):  # half of the answers
        refit = {"unit_steps": 0, "answer_steps": count}
        if room is not None:
            monkeypatch.setattr(answer_refinement, "NUMBERS", room)
        merged = merge(dict(zip("ab", models, strict=True)), data, method="identity", refit=refit, corrections=())
        with torch.no_grad():
            pairs = [
                (merged(**other[t], task=t).logits, m(**other[t]).logits) for t, m in zip("ab", models, strict=True)
            ]
        left.append(float(sum(divergence(*pair, "choice").mean() for pair in pairs)))
        report = RefitReport.of(merged)
        assert report is not None and bool(report.answers) == bool(count)
    assert left[1] < 0.97 * left[0]
    assert left[2] < 0.97 * left[0] and left[2] != left[1]
    assert all(after < before for before, after in report.answers.values())
    same = merge({"a": models[0], "b": models[0]}, data, method="identity", refit=True)
    report = RefitReport.of(same)
    assert report is not None and not report.answers


@pytest.mark.parametrize("kind", ["choice", "labels", "values"])
def test_a_constant_answer_is_off_by_the_spread(kind: str):
    """And an answer is not off from itself."""
    answers, weight = drawn(50, 5), torch.rand(50, dtype=torch.float64)
    middle, own = statistics(answers, kind)
    mean, inside = (weight @ middle / weight.sum(), weight @ own / weight.sum())
    best = {"choice": mean.log(), "labels": mean.logit(), "values": mean}[kind]
    off = weight @ divergence(best.expand_as(answers), answers, kind) / weight.sum()
    torch.testing.assert_close(spread_of(mean, inside, kind), off)
    torch.testing.assert_close(divergence(answers, answers, kind), torch.zeros(50, dtype=torch.float64))


def test_attention_is_fitted_through_its_softmax(monkeypatch: pytest.MonkeyPatch):
    """Also on samples that nothing was fitted to, and the same whatever the micro-batches."""
    monkeypatch.setattr(steps, "SAMPLES", 8)
    monkeypatch.setattr(steps, "LOOKED_AT", 100)
    models = tiny.pair("llama")
    for model in models:
        for part, tensor in model.named_parameters():
            if "q_proj" in part or "k_proj" in part:
                tensor.data *= 8  # random experts attend to all positions alike otherwise
    ids = torch.randint(3, 49, (4, 64, 7), generator=torch.Generator().manual_seed(0))
    data, other = ({t: {"input_ids": x} for t, x in zip("ab", part, strict=True)} for part in (ids[:2], ids[2:]))
    left = []
    for count, micro_batch in ((0, 16), (32, 16), (32, 8)):
        refit = {"attention_steps": count, "unit_steps": 0, "answer_steps": 0, "rows_per_input": 0}
        refit |= {"micro_batch": micro_batch, "written_samples": 0, "ridge": 1e-4}
        merged = merge(dict(zip("ab", models, strict=True)), data, method="identity", refit=refit, corrections=())
        with torch.no_grad():
            off = [merged(**other[t], task=t).logits - m(**other[t]).logits for t, m in zip("ab", models, strict=True)]
        left.append(float(sum(x.square().mean() for x in off)))
    before, after, again = left
    assert after < 0.97 * before
    assert after == pytest.approx(again, rel=0.02)


@pytest.mark.parametrize("setting", ["attention_steps", "unit_steps"])
def test_a_fit_starts_from_what_a_scaled_layer_writes(setting: str, monkeypatch: pytest.MonkeyPatch):
    """BEiT multiplies what its layers write, biases included; steps from anywhere else would seem to help."""
    monkeypatch.setattr(steps, "SAMPLES", 2)
    for module in (attention_refinement, unit_refinement):
        monkeypatch.setattr(module, "RIGHT", 0.0)
    models = experts("beit")
    for model in models:
        for name, tensor in model.named_parameters():
            if "lambda" in name or name.endswith("output.dense.bias"):
                tensor.data = tensor.data * 3
    data = {t: {n: x[i::2] for n, x in calibration(models[0]).items()} for i, t in enumerate("ab")}
    off = []
    for count in (0, 32):
        refit = {"attention_steps": 0, "unit_steps": 0, "answer_steps": 0, "micro_batch": 8, setting: count}
        merged = merge(dict(zip("ab", models, strict=True)), data, method="identity", refit=refit, corrections=())
        report = RefitReport.of(merged)
        assert report is not None
        off.append(report.mean)
    assert off[1] < 1.05 * off[0]
