"""`evaluate.evaluator` measures a view of a merged model as it measures the expert, with this package's metrics."""

from __future__ import annotations

import pytest
from datasets import ClassLabel, Dataset, Features, Image
from evaluate import evaluator
from transformers import pipeline

import hf_zipit
from tests.docs_world import CLASSES, pictures, vit
from tests.processors import image_processor


def test_an_evaluator_takes_a_pipeline_around_a_view(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("transformers.TFPreTrainedModel", (), raising=False)  # evaluate 0.4 asks transformers 5 for it
    experts = {task: vit(task, seed) for seed, task in enumerate(CLASSES)}
    apart = hf_zipit.merge(experts, depth=0.0)
    own = CLASSES["shoes"]
    rows = [row for row in pictures(20, 0) if row["label"] >= len(CLASSES["clothes"])]
    rows = [{**row, "label": row["label"] - len(CLASSES["clothes"])} for row in rows]
    data = Dataset.from_list(rows, features=Features({"image": Image(), "label": ClassLabel(names=own)}))

    def score(model) -> float:
        pipe = pipeline("image-classification", model=model, image_processor=image_processor())
        return evaluator("image-classification").compute(
            pipe, data, metric=hf_zipit.metrics.accuracy, label_mapping={name: i for i, name in enumerate(own)}
        )["accuracy"]

    assert score(apart.for_task("shoes")) == pytest.approx(score(experts["shoes"]))
