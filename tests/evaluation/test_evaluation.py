"""Accuracies: right by construction on models whose answers are known, and refused where they would mean nothing."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.utils import ModelOutput

from hf_zipit.errors import DataError
from hf_zipit.evaluation.measure import accuracy, evaluate
from hf_zipit.evaluation.results import Accuracies
from hf_zipit.evaluation.side_by_side import SideBySide


class Told(nn.Module):
    """An expert whose logits are part of its input."""

    def __init__(self, start: int, classes: int) -> None:
        super().__init__()
        self.columns = slice(start, start + classes)
        self.config = PretrainedConfig(num_labels=classes)
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor) -> ModelOutput:
        return ModelOutput(logits=x[..., self.columns])


def experts() -> dict[str, Told]:
    return {"a": Told(0, 2), "b": Told(2, 3)}


def rows(logits: list[list[float]], labels: list[int]) -> list[dict[str, torch.Tensor]]:
    return [{"x": torch.tensor(x), "labels": torch.tensor(y)} for x, y in zip(logits, labels, strict=True)]


# The columns are a0 a1 | b0 b1 b2.
A = rows([[3.0, 1, 0, 0, 0], [1.0, 2, 5, 0, 0], [4.0, 0, 1, 1, 1]], [0, 1, 1])
B = rows([[0.0, 9, 0, 1, 0], [0.0, 0, 0, 0, 7]], [1, 2])


def test_per_task_looks_at_the_tasks_own_classes_and_joint_at_all():
    found = accuracy(experts(), {"a": A, "b": B})
    assert found.per_task == pytest.approx({"a": 2 / 3, "b": 1.0})
    assert found.joint_per_task == pytest.approx({"a": 1 / 3, "b": 0.5})
    assert found.samples == {"a": 3, "b": 2}
    assert found.mean == pytest.approx((2 / 3 + 1) / 2)
    assert found.joint == pytest.approx(2 / 5)


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_the_batch_size_changes_nothing(batch_size):
    assert accuracy(experts(), {"a": A, "b": B}, batch_size=batch_size) == accuracy(experts(), {"a": A, "b": B})


def test_swapping_the_tasks_changes_nothing_but_their_order():
    swapped = dict(reversed(experts().items()))
    one, other = accuracy(experts(), {"a": A, "b": B}), accuracy(swapped, {"b": B, "a": A})
    assert (one.per_task, one.joint_per_task) == (other.per_task, other.joint_per_task)
    assert one.joint == pytest.approx(other.joint)


def test_a_joint_answer_is_never_better_than_the_same_answer_with_the_task_known():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(200, 5, generator=generator).tolist()
    labels = torch.randint(0, 2, (200,), generator=generator).tolist()
    found = accuracy(experts(), {"a": rows(noise, labels)})
    assert 0 < found.joint_per_task["a"] < found.per_task["a"] < 1


def test_the_logits_side_by_side_are_the_experts_own():
    model, x = SideBySide(experts()), torch.randn(4, 5)
    assert torch.equal(model(x=x).logits, torch.cat([model(x=x, task=task).logits for task in ("a", "b")], -1))
    assert model.offsets() == {"a": 0, "b": 2}


def test_ignored_positions_do_not_count():
    tokens = [{"x": torch.eye(5)[:4], "labels": torch.tensor([0, 1, -100, -100])}]
    found = accuracy(experts(), {"a": tokens})
    assert found.samples == {"a": 2}
    assert found.per_task == {"a": 1.0}


def test_the_training_mode_is_left_as_it_was():
    model = SideBySide(experts()).train()
    accuracy(model, {"a": A})
    assert model.training
    own = {"a": Told(0, 2).eval(), "b": Told(2, 3).train()}
    accuracy(own, {"a": A, "b": B})
    assert [expert.training for expert in own.values()] == [False, True]


def test_the_experts_stand_beside_the_model(tmp_path):
    found = evaluate(experts(), {"a": A, "b": B}, experts())
    assert found.model == found.experts
    saved = json.loads(found.to_json(tmp_path / "accuracy.json").read_text())
    assert saved == found.to_dict()
    assert saved["model"]["joint"] == found.model.joint


def test_without_joint_classes_there_is_no_joint_accuracy():
    assert Accuracies({"a": 1.0}, {}, {"a": 3}).joint is None


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "nothing to evaluate on"),
        ({"c": A}, "no task 'c'"),
        ({"a": []}, "'a' is empty"),
        ({"a": {"train": A, "test": A}}, "'a' is a dict of train, test; give a data set of one split"),
        ({"a": [{"x": torch.zeros(5)}]}, "'a' has no 'labels'"),
        ({"a": rows([[0.0] * 5], [-100])}, "no label that counts"),
        ({"a": rows([[0.0] * 5], [2])}, "label 2.*2 classes"),
    ],
)
def test_data_that_cannot_be_measured_on_is_refused(data, message):
    with pytest.raises(DataError, match=message):
        accuracy(experts(), data)


def test_a_model_that_is_not_merged_is_refused():
    with pytest.raises(DataError, match="is not a merged model"):
        accuracy(Told(0, 2), {"a": A})


def test_a_weighted_mean_of_the_tasks_is_the_joint_accuracy():
    found = Accuracies({"a": 1.0, "b": 0.0}, {"a": 1.0, "b": 0.0}, {"a": 30, "b": 10})
    assert found.joint == pytest.approx(np.mean([1] * 30 + [0] * 10))
