"""Joint heads: the tasks' logits become comparable, and the order of the classes within a task stays."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_zipit import merge
from hf_zipit.config import MergeConfig
from hf_zipit.data.calibration import MicroBatch
from hf_zipit.errors import RecipeError
from hf_zipit.refit.joint_heads import calibrate_joint, log_odds

from .. import tiny
from ..test_invariants import calibration

LOUD = 25.0
"""What one expert's logits exceed the other's by, for no reason: it then takes every sample."""


@pytest.fixture
def merged() -> PreTrainedModel:
    """Two experts at depth 0, where the heads read the experts' own features; one is louder than the other."""
    models = dict(zip("ab", tiny.pair("vit"), strict=True))
    model = merge(models, method="identity", depth=0)
    head = next(m for m in reversed(list(model.branch("b").modules())) if isinstance(m, nn.Linear))
    head.bias.data += LOUD
    return model


def batches(model: PreTrainedModel) -> list[MicroBatch]:
    images = calibration(tiny.pair("vit")[0])["pixel_values"]
    return [MicroBatch({"pixel_values": images * 0.5 + 2 * task - 1}, task, len(images), task) for task in (0, 1)]


def calibrate(model: PreTrainedModel, data: list[MicroBatch]) -> None:
    """With micro-batches as they are given."""
    planned = SimpleNamespace(config=MergeConfig(method="identity", refit={"joint_heads": True}))
    known = all(batch.task is not None for batch in data)
    given = SimpleNamespace(
        by_task=known, micro_batches=lambda size: data, device="cpu", while_it_fits=lambda work: work()
    )
    calibrate_joint(model, planned, given)


def logits(model: PreTrainedModel, batch: MicroBatch, task: str | None = None) -> Tensor:
    with torch.no_grad():
        return model(**batch.inputs, **({} if task is None else {"task": task})).logits


def right(model: PreTrainedModel, data: list[MicroBatch]) -> list[float]:
    """Per task the share of samples whose highest joint logit is one of the own task's."""
    first = len(model.config.task_labels["a"])
    return [float(((logits(model, batch).argmax(-1) >= first).long() == batch.task).float().mean()) for batch in data]


def test_joint_logits_become_comparable(merged: PreTrainedModel):
    data = batches(merged)
    assert right(merged, data) == [0, 1]
    calibrate(merged, data)
    assert right(merged, data) == [1, 1]


def test_within_a_task_all_logits_move_by_the_same(merged: PreTrainedModel):
    data = batches(merged)
    before = {(task, batch.number): logits(merged, batch, task) for task in "ab" for batch in data}
    calibrate(merged, data)
    for (task, number), old in before.items():
        shift = logits(merged, data[number], task) - old
        assert shift.abs().max() > 1
        torch.testing.assert_close(shift, shift[:, :1].expand_as(shift), rtol=1e-4, atol=1e-4)


def test_samples_that_fill_up_a_batch_count_nothing(merged: PreTrainedModel):
    data = batches(merged)
    filled = []
    for batch in data:
        images = batch.inputs["pixel_values"]
        more = torch.cat([images, data[1 - batch.task].inputs["pixel_values"]])
        filled.append(replace(batch, inputs={"pixel_values": more}))
    calibrate(merged, filled)
    assert right(merged, data) == [1, 1]


def test_log_odds_of_two_gaussians_are_exact_however_unequal_their_numbers():
    """Of equal covariance, whose log-odds are linear: (m1 - m0) C^-1 x, zero half way between the means."""
    generator = torch.Generator().manual_seed(0)
    root = torch.tensor([[1.0, 0.0], [0.8, 0.6]])
    means = torch.tensor([[1.0, 0.5], [-1.0, 0.0]])
    rows = [
        (torch.randn(count, 2, generator=generator) @ root.T + mean, task)
        for task, (count, mean) in enumerate(zip((40_000, 4_000), means, strict=True))
    ]
    weight, shift = log_odds(rows, 0)
    expected = torch.linalg.solve(root @ root.T, means[0] - means[1])
    torch.testing.assert_close(weight, expected, rtol=0.06, atol=0.06)
    torch.testing.assert_close(shift, -(expected @ means.mean(0)), rtol=0.06, atol=0.06)
    other, back = log_odds(rows, 1)
    torch.testing.assert_close((other, back), (-weight, -shift), rtol=1e-3, atol=1e-3)


def test_both_kinds_of_samples_count_the_same():
    """However often the samples of one of them are repeated."""
    generator = torch.Generator().manual_seed(0)
    one, other = (
        torch.randn(60, 3, generator=generator) * torch.tensor([1.0, 3.0, 1.0]),
        torch.randn(50, 3, generator=generator) + 1,
    )
    once, often = (log_odds([(one, 0), *[(other, 1)] * times], 0) for times in (1, 20))
    torch.testing.assert_close(often, once, rtol=0.03, atol=0.03)


def test_a_head_without_a_bias_is_refused(merged: PreTrainedModel):
    head = next(m for m in reversed(list(merged.branch("b").modules())) if isinstance(m, nn.Linear))
    head.bias = None
    with pytest.raises(RecipeError, match="a head that ends in a linear layer.*that of 'b' does not"):
        calibrate(merged, batches(merged))


def test_samples_of_unknown_task_are_refused(merged: PreTrainedModel):
    with pytest.raises(RecipeError, match="needs the task of every calibration sample"):
        calibrate(merged, [replace(batch, task=None) for batch in batches(merged)])


def test_tasks_with_the_same_classes_are_refused():
    models = dict(zip("ab", tiny.pair("vit", labels=(2, 2)), strict=True))
    for model in models.values():
        model.config.id2label = {0: "cat", 1: "dog"}
    same = merge(models, method="identity", depth=0)
    with pytest.raises(RecipeError, match="needs tasks with different classes"):
        calibrate(same, batches(same))


def test_it_is_a_setting_of_the_refit():
    models = dict(zip("ab", tiny.pair("vit"), strict=True))
    data = {task: batch.inputs for task, batch in zip("ab", batches(models["a"]), strict=True)}
    both = [
        merge(models, data, method="identity", refit={"joint_heads": joint, "micro_batch": 8})
        for joint in (False, True)
    ]
    assert right(both[1], batches(both[1])) == [1, 1] != right(both[0], batches(both[0]))
