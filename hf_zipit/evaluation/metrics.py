"""Metrics that need no network: `evaluate.Metric`s that a `transformers.Trainer` takes as `compute_metrics`, too.

    Trainer(model=merged, eval_dataset=hf_zipit.task_datasets(merged, {"clothes": a, "shoes": b}),
            compute_metrics=hf_zipit.metrics.accuracy).evaluate()
    hf_zipit.metrics.accuracy.compute(predictions=[0, 1], references=[0, 0])

`evaluate.load` downloads a script for every metric; these are part of the package. Labels of -100 never count, as
everywhere in transformers. A Trainer keeps all logits until the end; a metric's `preprocess`, given as
`preprocess_logits_for_metrics`, keeps only what the metric reads: one number instead of a vocabulary's.

Importing `evaluate` takes seconds, so this module is imported when `hf_zipit.metrics` is first used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import evaluate
import numpy as np
import torch
from datasets import Features, Value
from datasets import Sequence as SequenceOf
from torch import Tensor
from transformers import EvalPrediction

from hf_zipit.data.labels import IGNORED, first
from hf_zipit.errors import DataError, RecipeError
from hf_zipit.evaluation.answer_metrics import ANSWER_METRICS, AnswerMetric
from hf_zipit.evaluation.answer_metrics import cer as cer
from hf_zipit.evaluation.answer_metrics import mean_average_precision as mean_average_precision
from hf_zipit.evaluation.answer_metrics import mean_iou as mean_iou
from hf_zipit.evaluation.answer_metrics import squad as squad
from hf_zipit.evaluation.answer_metrics import wer as wer
from hf_zipit.evaluation.intervals import Interval, resampled
from hf_zipit.extras import require
from hf_zipit.registry import suggestion

DRAWS = 200
"""Bootstrap draws of metrics that are computed anew for each."""

IDS = {"predictions": Value("int64"), "references": Value("int64")}


class TrainerMetric(evaluate.Metric):
    """An `evaluate.Metric` that can be called with what a Trainer hands to `compute_metrics`."""

    description = ""
    columns: Mapping[str, Any] = IDS

    def __init__(self, **settings: Any) -> None:
        # A file per process is what `evaluate` needs where it gathers itself; a Trainer has gathered before.
        alone = settings.get("num_process", 1) == 1
        super().__init__(**{"keep_in_memory": alone, **settings})

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.description,
            citation="",
            inputs_description=f"\n{self.description}\n",
            features=Features(self.columns),
        )

    def __call__(self, found: EvalPrediction) -> dict[str, float]:
        """The measures of a Trainer's predictions, whether or not they went through `preprocess`."""
        raise NotImplementedError

    def preprocess(self, logits: Any, labels: Any = None) -> Any:
        """What the metric reads of a batch's outputs: a Trainer's `preprocess_logits_for_metrics`."""
        raise NotImplementedError

    def intervals(self, found: EvalPrediction) -> dict[str, Interval]:
        """The measures of a Trainer's predictions with their 95 % intervals (bootstrap over samples)."""
        predictions, references = self.compared(found)
        generator, size = np.random.default_rng(0), len(references)
        values = self._compute(predictions.reshape(-1), references.reshape(-1))
        draws: dict[str, list[float]] = {name: [] for name in values}
        for _ in range(DRAWS):
            rows = generator.integers(size, size=size)
            if (references[rows] != IGNORED).any():
                for name, value in self._compute(predictions[rows].reshape(-1), references[rows].reshape(-1)).items():
                    draws[name].append(value)
        return {name: Interval.of(value, np.array(draws[name])) for name, value in values.items()}

    def compared(self, found: EvalPrediction) -> tuple[np.ndarray, np.ndarray]:
        """Predictions and references, samples first."""
        raise NotImplementedError


class ClassMetric(TrainerMetric):
    """Metrics of the most likely class: predictions and references are class ids."""

    def __call__(self, found: EvalPrediction) -> dict[str, float]:
        predictions, labels = self.compared(found)
        return self.compute(predictions=predictions.reshape(-1), references=labels.reshape(-1))

    def compared(self, found: EvalPrediction) -> tuple[np.ndarray, np.ndarray]:
        return class_ids(found)

    def preprocess(self, logits: Any, labels: Any = None) -> Tensor:
        return answers(logits)


class Accuracy(ClassMetric):
    """Share of right answers; for masked language models, over the masked positions."""

    description = "Share of right answers; labels of -100 do not count."

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        predictions, references = counted(predictions, references)
        return {"accuracy": float(np.mean(predictions == references))}


class F1(ClassMetric):
    """Harmonic mean of precision and recall, averaged over the classes (`average="macro"`), as in scikit-learn."""

    description = "F1 score; labels of -100 do not count. `average` as in scikit-learn, 'macro' by default."

    def _compute(self, predictions: Any, references: Any, average: str = "macro") -> dict[str, float]:
        require("sklearn")
        from sklearn.metrics import f1_score

        predictions, references = counted(predictions, references)
        return {"f1": float(f1_score(references, predictions, average=average, zero_division=0))}


class Perplexity(TrainerMetric):
    """Exponential of the mean negative log-probability of the right token, over the masked positions."""

    description = "Perplexity; predictions are the log-probabilities of the references. -100 does not count."
    columns = {"predictions": Value("float32"), "references": Value("int64")}

    def __call__(self, found: EvalPrediction) -> dict[str, float]:
        predictions, labels = self.compared(found)
        return self.compute(predictions=predictions.reshape(-1), references=labels.reshape(-1))

    def compared(self, found: EvalPrediction) -> tuple[np.ndarray, np.ndarray]:
        predictions, labels = first(found.predictions), first(found.label_ids)
        if predictions.ndim > labels.ndim:
            predictions = self.preprocess(torch.from_numpy(predictions), torch.from_numpy(labels)).numpy()
        return predictions, labels

    def preprocess(self, logits: Any, labels: Any = None) -> Tensor:
        """Log-probabilities of the labels, of their shape; 0 where they do not count."""
        logits, labels = first(logits), first(labels)
        logp = logits.float().log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        return logp.masked_fill(labels == IGNORED, 0.0)

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        predictions, _ = counted(predictions, references)
        return {"perplexity": float(np.exp(-np.mean(predictions, dtype=np.float64)))}


class RetrievalRecall(TrainerMetric):
    """Recall at k between images and texts: is the right one among the k nearest? (CLIP, arXiv 2103.00020.)

    Predictions are the image embeddings, references the text embeddings, a pair a row, both unit vectors. Pairs of
    equal `ids` are right answers for each other, as where several images have one caption.

    In a Trainer: let the collator add `return_loss=True` (a Trainer computes metrics only beside a loss) and set
    `label_names=["input_ids"]`, with all captions padded to one length: equal tokens are equal captions. A column of
    ids works, too: `label_names=["labels"]`.
    """

    description = "Recall at k of images for texts and of texts for images, by the cosine of their embeddings."
    columns = {"predictions": SequenceOf(Value("float32")), "references": SequenceOf(Value("float32"))}

    def __call__(self, found: EvalPrediction) -> dict[str, float]:
        images, texts, ids = self._pairs(found)
        return self.compute(predictions=images, references=texts, ids=ids)

    def intervals(self, found: EvalPrediction) -> dict[str, Interval]:
        """As for every metric; queries are drawn, and the candidates stay as they are."""
        images, texts, ids = self._pairs(found)
        hits = query_hits(images, texts, ids)
        drawn = resampled(np.stack(list(hits.values()), axis=1), np.ones(len(images)))
        return {name: Interval.of(hit.mean(), drawn[:, i]) for i, (name, hit) in enumerate(hits.items())}

    def _pairs(self, found: EvalPrediction) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Image embeddings, text embeddings and ids of a Trainer's predictions."""
        texts, images = (np.asarray(part) for part in self.preprocess(found.predictions))
        ids = first(found.label_ids)
        if ids is not None and ids.ndim > 1:
            ids = np.unique(ids, axis=0, return_inverse=True)[1].reshape(-1)
        return images, texts, np.arange(len(images)) if ids is None else ids

    def preprocess(self, logits: Any, labels: Any = None) -> Any:
        """Text and image embeddings: what stands behind the two similarity matrices in contrastive outputs."""
        if isinstance(logits, (tuple, list)) and len(logits) == 2:
            return tuple(logits)
        if not isinstance(logits, (tuple, list)) or len(logits) < 4:
            raise DataError("Retrieval recall needs the outputs of a contrastive model such as CLIP, with embeddings.")
        return tuple(logits[2:4])

    def _compute(
        self, predictions: Any, references: Any, k: Sequence[int] = (1, 5, 10), ids: Any = None
    ) -> dict[str, float]:
        images, texts = np.asarray(predictions), np.asarray(references)
        ids = np.arange(len(images)) if ids is None else np.asarray(ids)
        if not len(images) == len(texts) == len(ids):
            raise DataError(f"There are {len(images)} images, {len(texts)} texts and {len(ids)} ids; give pairs.")
        return {name: float(hit.mean()) for name, hit in query_hits(images, texts, ids, k).items()}


def query_hits(
    images: np.ndarray, texts: np.ndarray, ids: np.ndarray, k: Sequence[int] = (1, 5, 10)
) -> dict[str, np.ndarray]:
    """By measure, for every pair whether its queries find one of their own id among the k nearest: `[pairs]`."""
    similarity, found = images @ texts.T, {}
    for top in (top for top in k if top < len(images) or top == min(k)):
        there, back = found_in(similarity, ids, top), found_in(similarity.T, ids, top)
        found |= {f"image_to_text@{top}": there, f"text_to_image@{top}": back, f"recall@{top}": (there + back) / 2}
    return found


def found_in(similarity: np.ndarray, ids: np.ndarray, k: int) -> np.ndarray:
    """Whether each query of a similarity `[queries, candidates]` has one of its own id among the k nearest, 0 or 1."""
    nearest = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
    return (ids[nearest] == ids[:, None]).any(1).astype(np.float64)


def counted(predictions: Any, references: Any) -> tuple[np.ndarray, np.ndarray]:
    """Both without the positions that do not count; raises DataError if nothing counts."""
    predictions, references = np.asarray(predictions), np.asarray(references)
    kept = references != IGNORED
    if not kept.any():
        raise DataError("There is no label that counts: all of them are -100, or there are none.")
    return predictions[kept], references[kept]


def class_ids(found: EvalPrediction) -> tuple[np.ndarray, np.ndarray]:
    """What a Trainer predicts, the most likely classes where it kept the logits, and its labels."""
    predictions, labels = first(found.predictions), first(found.label_ids)
    return predictions.argmax(-1) if predictions.ndim > labels.ndim else predictions, labels


def answers(logits: Any, labels: Any = None) -> Tensor:
    """The most likely class of every sample or position."""
    return first(logits).argmax(-1)


accuracy, f1, perplexity, retrieval_recall = Accuracy(), F1(), Perplexity(), RetrievalRecall()

METRICS: dict[str, TrainerMetric | AnswerMetric] = {
    "accuracy": accuracy, "f1": f1, "perplexity": perplexity, "retrieval_recall": retrieval_recall, **ANSWER_METRICS
}  # fmt: skip
"""The metrics that have a name."""

Metric = str | evaluate.EvaluationModule | Callable[[EvalPrediction], Any]


def find_metrics(metrics: Metric | Iterable[Metric]) -> list[Callable[[EvalPrediction], dict[str, float]]]:
    """Metrics by name, modules of `evaluate` and plain functions, as functions of a Trainer's predictions.

    Raises RecipeError for a name that is none of ours.
    """
    given = [metrics] if isinstance(metrics, (str, evaluate.EvaluationModule)) or callable(metrics) else list(metrics)
    return [_as_function(metric) for metric in given]


def _as_function(metric: Metric) -> Callable[[EvalPrediction], dict[str, float]]:
    if isinstance(metric, str) and metric not in METRICS:
        raise RecipeError(
            f"There is no metric {metric!r}; {suggestion(metric, METRICS)} From Python, one of the Hub is passed as "
            f"evaluate.load({metric!r})."
        )
    metric = METRICS[metric] if isinstance(metric, str) else metric
    if isinstance(metric, (TrainerMetric, AnswerMetric)):
        return metric
    return ModuleOfAnswers(metric) if isinstance(metric, evaluate.EvaluationModule) else Named(metric)


class ModuleOfAnswers:
    """A module of `evaluate` that compares class ids, such as `evaluate.load("accuracy")`."""

    preprocess = staticmethod(answers)

    def __init__(self, module: evaluate.EvaluationModule) -> None:
        self.module = module

    def __call__(self, found: EvalPrediction) -> dict[str, float]:
        predictions, labels = counted(*class_ids(found))
        return self.module.compute(predictions=predictions, references=labels)


class Named:
    """A plain function; one that returns a bare number lends it its own name."""

    def __init__(self, function: Callable[[EvalPrediction], Any]) -> None:
        self.function = function

    def __call__(self, found: EvalPrediction) -> dict[str, float]:
        value = self.function(found)
        if isinstance(value, Mapping):
            return dict(value)
        return {getattr(self.function, "__name__", type(self.function).__name__): float(value)}
