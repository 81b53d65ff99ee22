"""Metrics of answers that are no classes: texts, maps of classes, boxes.

    hf_zipit.metrics.wer.compute(predictions=["the cat sat"], references=["the cat sat down"])

Like those of `metrics.py` they need no network. A metric adds up a few numbers of every sample and makes its measures
of the sums; so drawing samples again, for an interval, costs an addition.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import evaluate
import numpy as np
from datasets import Features, Value
from datasets import Sequence as SequenceOf

from hf_zipit.data.labels import IGNORED
from hf_zipit.errors import DataError
from hf_zipit.evaluation.intervals import Interval, resampled
from hf_zipit.extras import require


class AnswerMetric(evaluate.Metric):
    """An `evaluate.Metric` of what `hf_zipit.evaluation.kinds` reads from a model and from the data.

    Attributes:
        reads: what a prediction is: a `"text"`, a `"map"` of classes or `"boxes"`.
    """

    reads: ClassVar[str]
    columns: ClassVar[Mapping[str, Any]]

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"keep_in_memory": settings.get("num_process", 1) == 1, **settings})

    def _info(self) -> evaluate.MetricInfo:
        text = (self.__doc__ or "").partition("\n")[0]
        return evaluate.MetricInfo(
            description=text, citation="", inputs_description=f"\n{text}\n", features=Features(dict(self.columns))
        )

    def _compute(self, predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, float]:
        return self.measures(predictions, references)

    def measures(self, predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, float]:
        """The measures by name; raises DataError where there is nothing to measure."""
        sums = self.sums(predictions, references).sum(0)
        return {name: float(value) for name, value in self.values(sums).items()}

    def intervals(self, predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, Interval]:
        """The measures with their 95 % intervals (bootstrap over samples)."""
        sums = self.sums(predictions, references)
        drawn = self.values(resampled(sums, np.ones(len(sums))))
        return {name: Interval.of(float(value), drawn[name]) for name, value in self.values(sums.sum(0)).items()}

    def sums(self, predictions: Sequence[Any], references: Sequence[Any]) -> np.ndarray:
        """What is added up over samples: `[samples, k]`."""
        raise NotImplementedError

    def values(self, sums: np.ndarray) -> dict[str, np.ndarray]:
        """The measures made of sums (or means) over samples, `[..., k]`."""
        raise NotImplementedError


class WordErrorRate(AnswerMetric):
    """Words that were put in, left out or changed, per word of the reference, as `jiwer` counts them."""

    reads = "text"
    columns: ClassVar = {"predictions": Value("string"), "references": Value("string")}
    name_of_rate: ClassVar[str] = "wer"
    count: ClassVar[str] = "process_words"

    def sums(self, predictions: Sequence[str], references: Sequence[Any]) -> np.ndarray:
        require("jiwer")
        import jiwer

        found = []
        for said, written in zip(predictions, map(first_text, references), strict=True):
            if not written.strip():
                raise DataError("The text of a sample is empty, so it has no error rate; leave out such samples.")
            one = getattr(jiwer, self.count)(written, said)
            found.append((one.substitutions + one.deletions + one.insertions,
                          one.hits + one.substitutions + one.deletions))  # fmt: skip
        return np.array(found, dtype=np.float64)

    def values(self, sums: np.ndarray) -> dict[str, np.ndarray]:
        return {self.name_of_rate: sums[..., 0] / sums[..., 1]}


class CharacterErrorRate(WordErrorRate):
    """The same of characters."""

    name_of_rate, count = "cer", "process_characters"


class Squad(AnswerMetric):
    """Exact match, and F1 of the words, with the reference that fits best (SQuAD, arXiv 1606.05250), both in 0..1.

    As there, case, punctuation, articles and spaces do not count. Several references of a sample are a list.
    """

    reads = "text"
    columns: ClassVar = {"predictions": Value("string"), "references": SequenceOf(Value("string"))}

    def sums(self, predictions: Sequence[str], references: Sequence[Any]) -> np.ndarray:
        rows = []
        for given, right in zip(predictions, references, strict=True):
            right = [right] if isinstance(right, str) else list(right)
            rows.append(np.max([match(words_of(given), words_of(one)) for one in right or [""]], axis=0))
        return np.pad(np.array(rows, dtype=np.float64), ((0, 0), (0, 1)), constant_values=1.0)

    def values(self, sums: np.ndarray) -> dict[str, np.ndarray]:
        return {"exact_match": sums[..., 0] / sums[..., 2], "f1": sums[..., 1] / sums[..., 2]}


class MeanIoU(AnswerMetric):
    """Intersection over union of every class that occurs, averaged over classes; and the share of right pixels.

    Sums are over all pixels of all samples, as in Pascal VOC. Labels of -100 do not count.
    """

    reads = "map"
    columns: ClassVar = dict.fromkeys(("predictions", "references"), SequenceOf(SequenceOf(Value("int64"))))

    def sums(self, predictions: Sequence[Any], references: Sequence[Any]) -> np.ndarray:
        pairs = []
        for given, right in zip(predictions, references, strict=True):
            given, right = np.asarray(given), np.asarray(right)
            kept = right != IGNORED
            pairs.append((given[kept], right[kept]))
        if not any(right.size for _, right in pairs):
            raise DataError("There is no pixel that counts: all labels are -100, or there are none.")
        classes = 1 + max(int(part.max()) for pair in pairs for part in pair if part.size)

        def per_class(pixels: np.ndarray) -> np.ndarray:
            return np.bincount(pixels, minlength=classes)

        return np.array(
            [
                np.concatenate(
                    [hits := per_class(g[g == r]), per_class(g) + per_class(r) - hits, [hits.sum(), r.size]]
                )
                for g, r in pairs
            ],
            dtype=np.float64,
        )

    def values(self, sums: np.ndarray) -> dict[str, np.ndarray]:
        classes = sums.shape[-1] // 2 - 1
        shared, either = sums[..., :classes], sums[..., classes : 2 * classes]
        shares = np.divide(shared, either, out=np.zeros_like(shared), where=either > 0)
        return {
            "mean_iou": shares.sum(-1) / np.maximum((either > 0).sum(-1), 1),
            "overall_accuracy": sums[..., -2] / np.maximum(sums[..., -1], 1e-12),
        }


class MeanAveragePrecision(AnswerMetric):
    """Mean average precision of boxes, over IoU 0.5 to 0.95 (`map`) and at 0.5 (`map_50`), as `pycocotools` counts.

    Boxes are `[x1, y1, x2, y2]` in any unit; predictions have `scores` as well. Without intervals: average precision
    is no sum over samples.
    """

    reads = "boxes"
    columns: ClassVar = {
        "predictions": {
            "boxes": SequenceOf(SequenceOf(Value("float64"))),
            "labels": SequenceOf(Value("int64")),
            "scores": SequenceOf(Value("float64")),
        },
        "references": {"boxes": SequenceOf(SequenceOf(Value("float64"))), "labels": SequenceOf(Value("int64"))},
    }
    intervals = None  # type: ignore[assignment]

    def measures(self, predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, float]:
        require("pycocotools")
        import contextlib
        import io

        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

        if not any(len(right["labels"]) for right in references):
            raise DataError("There is no box to be found in the evaluation data, so there is no average precision.")
        right, given = COCO(), COCO()
        classes = {int(label) for boxes in (*predictions, *references) for label in boxes["labels"]}
        for coco, samples in ((right, references), (given, predictions)):
            coco.dataset = {
                "images": [{"id": image} for image in range(len(samples))],
                "categories": [{"id": label} for label in sorted(classes)],
                "annotations": list(annotations(samples)),
            }
        with contextlib.redirect_stdout(io.StringIO()):  # it prints as it goes
            right.createIndex()
            given.createIndex()
            found = COCOeval(right, given, "bbox")
            found.evaluate()
            found.accumulate()
        precision = found.eval["precision"][..., 0, -1]  # IoU, recall, class; boxes of all sizes, up to 100 an image
        return {"map": mean_of_known(precision), "map_50": mean_of_known(precision[:1])}


def annotations(samples: Sequence[Mapping[str, Any]]) -> Any:
    """The boxes of all samples as COCO's annotations."""
    number = 0
    for image, boxes in enumerate(samples):
        scores = boxes.get("scores", [1.0] * len(boxes["labels"]))
        for (left, top, right, bottom), label, score in zip(boxes["boxes"], boxes["labels"], scores, strict=True):
            number += 1
            wide, high = float(right - left), float(bottom - top)
            where = [float(left), float(top), wide, high]
            yield {
                "id": number, "image_id": image, "category_id": int(label), "bbox": where,
                "area": wide * high, "iscrowd": 0, "score": float(score),
            }  # fmt: skip


def mean_of_known(precision: np.ndarray) -> float:
    """The mean over classes that occur; -1 stands for the others."""
    known = precision[precision > -1]
    return float(known.mean()) if known.size else 0.0


def first_text(reference: Any) -> str:
    """The reference of an error rate: one text, or the first of several."""
    return reference if isinstance(reference, str) else reference[0]


def words_of(text: str) -> list[str]:
    """The words of an answer as SQuAD compares them."""
    text = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def match(given: list[str], right: list[str]) -> tuple[float, float]:
    """Exact match and F1 of two answers' words; nothing matches nothing."""
    same = sum((Counter(given) & Counter(right)).values())
    f1 = 2 * same / (len(given) + len(right)) if given and right else float(given == right)
    return float(given == right), f1


wer, cer, squad = WordErrorRate(), CharacterErrorRate(), Squad()
mean_iou, mean_average_precision = MeanIoU(), MeanAveragePrecision()

ANSWER_METRICS: dict[str, AnswerMetric] = {
    "wer": wer, "cer": cer, "squad": squad, "mean_iou": mean_iou, "mean_average_precision": mean_average_precision
}  # fmt: skip
"""Those that have a name."""
