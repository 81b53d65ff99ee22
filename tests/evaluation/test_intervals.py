"""Intervals: they hold the truth as often as they say, and pairs are compared sample by sample."""

from __future__ import annotations

import numpy as np
import pytest
from transformers import EvalPrediction

from hf_zipit import metrics
from hf_zipit.errors import DataError
from hf_zipit.evaluation.intervals import Answers, Comparison, accuracy_interval, calibration_error
from hf_zipit.evaluation.measure import evaluate

from .test_evaluation import A, B, experts


def answers(right: np.ndarray, confidence: np.ndarray | float = 1.0, labels: np.ndarray | None = None) -> Answers:
    """Answers of two classes of which these are right."""
    labels = np.ones(right.shape, dtype=np.int64) if labels is None else labels
    return Answers(np.where(right, labels, 1 - labels), np.broadcast_to(confidence, right.shape).copy(), labels)


def test_an_interval_holds_the_truth_in_about_95_of_100_cases():
    generator = np.random.default_rng(0)
    found = [accuracy_interval(answers(generator.random(200) < 0.8)) for _ in range(100)]
    assert 88 <= sum(one.low <= 0.8 <= one.high for one in found) <= 100
    widths = [one.high - one.low for one in found]
    assert np.mean(widths) == pytest.approx(2 * 1.96 * np.sqrt(0.8 * 0.2 / 200), rel=0.1)


def test_positions_of_one_sample_stay_together():
    alone = np.random.default_rng(0).random(100) < 0.5
    together = accuracy_interval(answers(np.repeat(alone[:, None], 20, axis=1)))  # 20 tokens that say the same
    assert together == accuracy_interval(answers(alone))


def test_what_does_not_count_changes_nothing():
    right = np.random.default_rng(0).random((50, 4)) < 0.5
    labels = np.ones((50, 4), dtype=np.int64)
    padded = answers(np.pad(right, ((0, 0), (0, 3))), labels=np.pad(labels, ((0, 0), (0, 3)), constant_values=-100))
    assert accuracy_interval(padded) == accuracy_interval(answers(right))
    assert calibration_error(padded) == calibration_error(answers(right))


def test_a_pair_is_surer_than_its_parts():
    generator = np.random.default_rng(0)
    right = generator.random(400) < 0.7
    better = right | (generator.random(400) < 0.05)
    found = Comparison.of({"a": answers(better)}, {"a": answers(right)})
    difference, alone = found.difference["a"], accuracy_interval(answers(right))
    assert difference.value == pytest.approx(better.mean() - right.mean()) and found.mean == difference
    assert difference.high - difference.low < (alone.high - alone.low) / 2
    assert found.agreement["a"].value == pytest.approx((better == right).mean())
    with pytest.raises(DataError, match="not measured on the same samples"):
        Comparison.of({"a": answers(right)}, {"a": answers(right[:10])})
    assert Comparison.of({"a": answers(right)}, {"b": answers(right)}) is None


def test_the_calibration_error_is_the_gap_of_confidence_and_accuracy():
    generator = np.random.default_rng(0)
    confidence = generator.uniform(0.5, 1, 4_000)
    assert calibration_error(answers(generator.random(4_000) < confidence, confidence)).value < 0.04
    sure = answers(generator.random(4_000) < 0.6, 0.95)
    assert calibration_error(sure).value == pytest.approx(0.35, abs=0.03)


def test_an_evaluation_tells_intervals_differences_and_agreement():
    found = evaluate(experts(), {"a": A, "b": B}, experts(), metrics=["f1"])
    assert found.model.intervals["a"].low <= found.model.per_task["a"] <= found.model.intervals["a"].high
    assert found.comparison.mean.value == found.comparison.mean.high == 0
    assert {task: each.value for task, each in found.comparison.agreement.items()} == {"a": 1, "b": 1}
    assert found.score_intervals["a"]["f1"].value == found.scores["a"]["f1"]
    assert "answers" not in found.to_dict() and found.to_dict()["comparison"]["agreement"]["a"]["value"] == 1


def test_metrics_have_the_intervals_of_their_own_values():
    generator = np.random.default_rng(0)
    logits, labels = generator.normal(size=(60, 3)).astype(np.float32), generator.integers(3, size=60)
    for metric in (metrics.accuracy, metrics.f1, metrics.perplexity):
        given = EvalPrediction(logits, labels)
        for name, interval in metric.intervals(given).items():
            assert interval.value == pytest.approx(metric(given)[name], rel=1e-5)
            assert interval.low < interval.value < interval.high
    vectors = [v / np.linalg.norm(v, axis=1, keepdims=True) for v in generator.normal(size=(2, 40, 4))]
    pairs = EvalPrediction(tuple(vectors), None)
    found = metrics.retrieval_recall.intervals(pairs)
    assert {name: each.value for name, each in found.items()} == pytest.approx(metrics.retrieval_recall(pairs))
