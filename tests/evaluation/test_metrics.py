"""Metrics: right by hand and by scikit-learn, in a Trainer and in `hf_zipit.evaluate`; nothing is downloaded."""

from __future__ import annotations

from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value, concatenate_datasets
from sklearn.metrics import f1_score
from torch.nn import functional as F
from transformers import DataCollatorWithPadding, EvalPrediction, Trainer, TrainingArguments

import hf_zipit
from hf_zipit import metrics
from hf_zipit.errors import DataError, RecipeError
from hf_zipit.modeling import ZipItPreTrainedModel
from tests.modeling.by_hand import FAMILIES, LABELS, make_experts, make_inputs, merge_by_hand
from tests.processors import tokenizer

SHARED = FAMILIES["vit"].part
GENERATOR = np.random.default_rng(0)
SCORES = GENERATOR.normal(size=(40, 3)).astype(np.float32)
RIGHT = GENERATOR.integers(0, 3, 40)


# ------------------------------------------------------------------------------------------------ the metrics alone


def test_accuracy_and_f1_are_those_of_scikit_learn() -> None:
    found = EvalPrediction(SCORES, RIGHT)
    answers = SCORES.argmax(-1)
    assert metrics.accuracy(found) == {"accuracy": pytest.approx((answers == RIGHT).mean())}
    assert metrics.f1(found) == {"f1": pytest.approx(f1_score(RIGHT, answers, average="macro"))}
    weighted = metrics.f1.compute(predictions=answers, references=RIGHT, average="weighted")
    assert weighted == {"f1": pytest.approx(f1_score(RIGHT, answers, average="weighted"))}


@pytest.mark.parametrize("name", ["accuracy", "f1", "perplexity"])
def test_what_went_through_preprocess_gives_the_same(name: str) -> None:
    metric = metrics.METRICS[name]
    kept = metric.preprocess(torch.from_numpy(SCORES), torch.from_numpy(RIGHT)).numpy()
    assert kept.shape == RIGHT.shape
    assert metric(EvalPrediction(kept, RIGHT)) == pytest.approx(metric(EvalPrediction(SCORES, RIGHT)), rel=1e-6)
    assert metric(EvalPrediction((SCORES, SCORES), RIGHT)) == metric(EvalPrediction(SCORES, RIGHT))


@pytest.mark.parametrize("name", ["accuracy", "f1", "perplexity"])
def test_ignored_positions_do_not_count(name: str) -> None:
    metric, labels = metrics.METRICS[name], RIGHT.copy()
    labels[::3] = -100
    kept = labels != -100
    expected = metric(EvalPrediction(SCORES[kept], RIGHT[kept]))
    assert metric(EvalPrediction(SCORES, labels)) == pytest.approx(expected)
    assert metric(EvalPrediction(SCORES.reshape(8, 5, 3), labels.reshape(8, 5))) == pytest.approx(expected)
    with pytest.raises(DataError, match="no label that counts"):
        metric(EvalPrediction(SCORES, np.full_like(RIGHT, -100)))


def test_perplexity_is_the_exponential_of_the_cross_entropy() -> None:
    loss = F.cross_entropy(torch.from_numpy(SCORES), torch.from_numpy(RIGHT))
    assert metrics.perplexity(EvalPrediction(SCORES, RIGHT)) == {"perplexity": pytest.approx(loss.exp().item())}
    uniform = np.zeros((4, 50), np.float32)
    assert metrics.perplexity(EvalPrediction(uniform, np.arange(4))) == {"perplexity": pytest.approx(50)}


def test_retrieval_recall_by_hand() -> None:
    angles = np.deg2rad([0, 10, 90, 100])
    images = np.stack([np.cos(angles), np.sin(angles)], 1)
    texts = images[[1, 0, 2, 3]]  # the first two are exchanged
    found = metrics.retrieval_recall.compute(predictions=images, references=texts, k=(1, 2))
    assert found["image_to_text@1"] == found["text_to_image@1"] == found["recall@1"] == 0.5
    assert found["recall@2"] == 1.0
    same = metrics.retrieval_recall.compute(predictions=images, references=texts, ids=[7, 7, 8, 9])
    assert same == {"image_to_text@1": 1.0, "text_to_image@1": 1.0, "recall@1": 1.0}
    with pytest.raises(DataError, match="3 ids"):
        metrics.retrieval_recall.compute(predictions=images, references=texts, ids=[7, 8, 9])
    with pytest.raises(DataError, match="contrastive"):
        metrics.retrieval_recall(EvalPrediction(SCORES, RIGHT))


# ------------------------------------------------------------------------------------------------------ in a Trainer


def images(classes: int, size: int = 10) -> Dataset:
    """Random pictures, with labels of a task that has so many classes."""
    pixels = torch.randn(size, 3, 16, 16, generator=torch.Generator().manual_seed(classes))
    features = {"labels": ClassLabel(names=list("abcde"[:classes]))}
    labels = Dataset.from_dict({"labels": [i % classes for i in range(size)]}, features=Features(features))
    return concatenate_datasets([Dataset.from_dict({"pixel_values": pixels.numpy()}), labels], axis=1)


def arguments(folder: Path, **settings: object) -> TrainingArguments:
    return TrainingArguments(
        str(folder), per_device_eval_batch_size=4, report_to=[], use_cpu=True, disable_tqdm=True, **settings
    )


@pytest.fixture(scope="module")
def vit() -> tuple[dict, ZipItPreTrainedModel]:
    experts = make_experts("vit", SHARED)
    return experts, merge_by_hand(experts, SHARED)


SETS = {"clothes": images(3), "shoes": images(2)}
KINDS = {
    "Dataset": lambda data: data,
    "Dataset with torch format": lambda data: data.with_format("torch", columns=["pixel_values", "labels"]),
    "IterableDataset": lambda data: data.to_iterable_dataset(),
    "list of rows": lambda data: list(data.with_format("torch")),
}


@torch.no_grad()
def shares(model: ZipItPreTrainedModel, task: str, joint: bool) -> float:
    rows = SETS[task].with_format("torch")[:]
    logits = model(pixel_values=rows["pixel_values"], task=None if joint else task).logits
    offset = model.config.offsets()[task] if joint else 0
    return float((logits.argmax(-1) == rows["labels"] + offset).float().mean())


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_trainer_measures_every_task_or_jointly(vit, tmp_path: Path, kind: str, joint: bool) -> None:
    _, model = vit
    sets = hf_zipit.task_datasets(model, {task: KINDS[kind](data) for task, data in SETS.items()}, joint=joint)
    trainer = Trainer(
        model=model, args=arguments(tmp_path), eval_dataset=sets, compute_metrics=hf_zipit.metrics.accuracy
    )
    found = trainer.evaluate()
    for task in SETS:
        assert found[f"eval_{task}_accuracy"] == pytest.approx(shares(model, task, joint))


def test_a_view_needs_no_task_column(vit, tmp_path: Path) -> None:
    _, model = vit
    for task, data in SETS.items():
        trainer = Trainer(model=model.for_task(task), args=arguments(tmp_path), compute_metrics=metrics.accuracy)
        assert trainer.evaluate(data)["eval_accuracy"] == pytest.approx(shares(model, task, joint=False))


def test_joint_labels_carry_the_joint_names(vit) -> None:
    _, model = vit
    sets = hf_zipit.task_datasets(model, {"shoes": SETS["shoes"].add_column("task", [1] * 10)}, joint=True)
    assert set(sets["shoes"]["labels"]) == {3, 4}
    assert sets["shoes"].features["labels"].names == [*LABELS["clothes"], *LABELS["shoes"]]
    assert sets["shoes"].column_names.count("task") == 0
    tokens = hf_zipit.task_datasets(model, {"shoes": [{"labels": [-100, 1]}]}, joint=True)["shoes"]
    assert tokens[0]["labels"] == [-100, 4]


def test_a_task_column_is_replaced_and_the_format_kept(vit) -> None:
    _, model = vit
    plain = SETS["shoes"].add_column("task", ["shoes"] * 10)
    found = hf_zipit.task_datasets(model, {"shoes": plain.with_format("torch", columns=["labels"])})["shoes"]
    assert found[0].keys() == {"labels", "task"}
    assert found[0]["task"] == torch.tensor(1)
    assert hf_zipit.task_datasets(model, {"shoes": plain})["shoes"][0]["task"] == 1


def test_wrong_tasks_and_joint_labels_of_shared_classes_are_told(vit) -> None:
    _, model = vit
    with pytest.raises(ValueError, match="did you mean 'shoes'"):
        hf_zipit.task_datasets(model, {"shoe": SETS["shoes"]})
    shared = merge_by_hand(make_experts("bert-lm"))
    with pytest.raises(DataError, match="joint ones already"):
        hf_zipit.task_datasets(shared, {"shoes": []}, joint=True)


def test_texts_are_padded_and_keep_their_task(tmp_path: Path) -> None:
    experts = make_experts("bert")
    model = merge_by_hand(experts)
    texts = ["the red boot", "a photo of the blue cap", "boot", "the cap"]
    data = Dataset.from_dict({"text": texts, "labels": [0, 1, 0, 1]}).map(lambda row: tokenizer()(row["text"]))
    sets = hf_zipit.task_datasets(model, {"shoes": data})
    collate = DataCollatorWithPadding(tokenizer())
    trainer = Trainer(
        model=model, args=arguments(tmp_path), eval_dataset=sets, data_collator=collate, compute_metrics=metrics.f1
    )
    inputs = tokenizer()(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        answers = experts["shoes"](**inputs).logits.argmax(-1)
    assert trainer.evaluate()["eval_shoes_f1"] == pytest.approx(f1_score([0, 1, 0, 1], answers, average="macro"))


# ---------------------------------------------------------------------------------------------- in hf_zipit.evaluate


class Errors(evaluate.Metric):
    """A metric as those of the Hub are: ids in, one number out."""

    def _info(self) -> evaluate.MetricInfo:
        features = Features({"predictions": Value("int32"), "references": Value("int32")})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        return {"errors": float(np.mean(np.asarray(predictions) != np.asarray(references)))}


def width(found: EvalPrediction) -> float:
    return found.predictions.shape[-1]


def test_metrics_by_name_module_and_function(vit) -> None:
    experts, model = vit
    given = ["accuracy", "f1", Errors(), width, lambda found: {"samples": len(found.label_ids)}]
    found = hf_zipit.evaluate(model, SETS, experts, metrics=given)
    for task, scores in found.scores.items():
        assert list(scores) == ["accuracy", "f1", "errors", "width", "samples"]
        assert scores["accuracy"] == pytest.approx(found.model.per_task[task])
        assert scores["errors"] == pytest.approx(1 - scores["accuracy"])
        assert (scores["width"], scores["samples"]) == (len(LABELS[task]), 10)
        # The trunk of these experts is shared, so a branch computes what its expert does.
        assert found.expert_scores[task] == pytest.approx(scores)
    assert found.to_dict()["scores"] == found.scores
    assert hf_zipit.evaluate(model, SETS, metrics="f1").scores["shoes"].keys() == {"f1"}
    assert hf_zipit.evaluate(model, SETS).scores == {}


def test_an_unknown_metric_is_told(vit) -> None:
    with pytest.raises(RecipeError, match="no metric 'acuracy'; did you mean 'accuracy'"):
        hf_zipit.evaluate(vit[1], SETS, metrics=["acuracy"])


def test_masked_language_models_have_accuracy_and_perplexity() -> None:
    experts = make_experts("bert-lm")
    model = merge_by_hand(experts)
    inputs = make_inputs("bert-lm")
    labels = torch.where(torch.rand(inputs["input_ids"].shape) < 0.5, inputs["input_ids"], -100)
    labels[0, 0] = 7
    rows = [dict(zip([*inputs, "labels"], row, strict=True)) for row in zip(*inputs.values(), labels, strict=True)]
    found = hf_zipit.evaluate(model, {"shoes": rows}, experts, metrics=["accuracy", "perplexity"], batch_size=2)
    with torch.no_grad():
        loss = experts["shoes"](**inputs, labels=labels).loss
    assert found.scores["shoes"]["perplexity"] == pytest.approx(loss.exp().item(), rel=1e-4)
    assert found.expert_scores["shoes"]["perplexity"] == pytest.approx(loss.exp().item(), rel=1e-4)
    assert found.model.joint is None and found.experts.joint is None
    assert found.model.per_task["shoes"] == found.scores["shoes"]["accuracy"]


@pytest.fixture(scope="module")
def clip() -> tuple[dict, ZipItPreTrainedModel, list[dict]]:
    shared = FAMILIES["clip"].part
    experts = make_experts("clip", shared)
    inputs = make_inputs("clip", batch=7)
    rows = [dict(zip(inputs, row, strict=True)) for row in zip(*inputs.values(), strict=True)]
    return experts, merge_by_hand(experts, shared), rows


@torch.no_grad()
def recall_of(expert: torch.nn.Module, rows: list[dict], k: int) -> float:
    inputs = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    similarity = expert(**inputs).logits_per_image
    own = similarity.diagonal()[:, None]
    return float(((similarity > own).sum(1) < k).float().mean())


@pytest.mark.parametrize("ids", [None, "labels"])
def test_contrastive_models_are_measured_by_retrieval(clip, ids: str | None) -> None:
    experts, model, rows = clip
    rows = rows if ids is None else [{**row, "labels": i} for i, row in enumerate(rows)]
    found = hf_zipit.evaluate(
        model, {"shoes": rows, "clothes": rows}, experts, metrics="retrieval_recall", batch_size=3
    )
    bare = [{name: value for name, value in row.items() if name != "labels"} for row in rows]
    for task, expert in experts.items():
        for k in (1, 5):
            assert found.scores[task][f"image_to_text@{k}"] == pytest.approx(recall_of(expert, bare, k))
        assert found.expert_scores[task] == found.scores[task]
    assert found.model is None and found.experts is None
    with pytest.raises(DataError, match="name metrics"):
        hf_zipit.evaluate(model, {"shoes": rows})


def test_a_trainer_measures_retrieval(clip, tmp_path: Path) -> None:
    experts, model, rows = clip

    def collate(batch: list[dict]) -> dict:
        stacked = {name: torch.stack([torch.as_tensor(row[name]) for row in batch]) for name in batch[0]}
        return stacked | {"return_loss": True}

    trainer = Trainer(
        model=model,
        args=arguments(tmp_path, label_names=["input_ids"]),
        data_collator=collate,
        eval_dataset=hf_zipit.task_datasets(model, {"clothes": rows, "shoes": rows}),
        compute_metrics=metrics.retrieval_recall,
        preprocess_logits_for_metrics=metrics.retrieval_recall.preprocess,
    )
    found = trainer.evaluate()
    for task, expert in experts.items():
        assert found[f"eval_{task}_image_to_text@1"] == pytest.approx(recall_of(expert, rows, 1))
        assert np.isfinite(found[f"eval_{task}_loss"])
