"""What models answer with whose answers are no classes, and what is right: texts, maps of classes, boxes.

By the merged class of a model's kind: the way to ask it, and the metrics that are measured where none is named.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor
from torch.nn import functional

from hf_zipit.data.inputs import ModelInputs, first_of, prepare
from hf_zipit.data.labels import IGNORED, LABEL_COLUMNS
from hf_zipit.data.processes import running
from hf_zipit.data.sources import rename
from hf_zipit.errors import DataError
from hf_zipit.evaluation.batches import Reading, Subject, told_in_a_sentence
from hf_zipit.hub.processors import OwnProcessor
from hf_zipit.modeling import (
    ZipItForCausalLM,
    ZipItForConditionalGeneration,
    ZipItForCTC,
    ZipItForMaskedLM,
    ZipItForObjectDetection,
    ZipItForQuestionAnswering,
    ZipItForSemanticSegmentation,
)

Answered = tuple[list[Any], list[Any]]
"""What was answered and what is right, sample by sample."""

TRANSCRIPTS = ("transcription", "transcript", "sentence", "text")
WRITTEN = ("target", "summary", "translation", "answer")
LONGEST = 30
"""An answer that is found in a text has at most so many tokens, as in the SQuAD scripts."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Some samples of the task `name`.

    Attributes:
        columns: by name, a value of every sample.
        inputs: what the model reads.
        given: the processor, or the model's own.
    """

    columns: dict[str, list[Any]]
    inputs: ModelInputs
    given: Any
    name: str

    @property
    def whose(self) -> str:
        return f" of the task {self.name!r}"

    @property
    def processor(self) -> Any:
        return self.given.loaded if isinstance(self.given, OwnProcessor) else self.given

    @property
    def tokenizer(self) -> Any:
        """What writes tokens as text; raises DataError if there is none."""
        found = getattr(self.processor, "tokenizer", self.processor)
        if not hasattr(found, "batch_decode"):
            raise DataError(
                f"{self.inputs.architecture} is measured by texts, and nothing writes the tokens{self.whose} as text: "
                "give its tokenizer or processor as `processor`."
            )
        return found

    def tensors(self, device: torch.device) -> dict[str, Tensor]:
        found = prepare(self.columns, self.inputs, self.given, self.whose)
        return {name: tensor.to(device) for name, tensor in found.items()}

    def right(self, *names: str) -> list[Any]:
        """The column of the right answers; raises DataError if there is none."""
        column = first_of((*LABEL_COLUMNS, *names), self.columns)
        if column is None:
            wanted = " or ".join(("labels", *names))
            raise DataError(f"The evaluation data{self.whose} has no {wanted}, only {sorted(self.columns)}.")
        return self.columns[column]

    def texts(self, names: Sequence[str]) -> list[Any]:
        """The right texts: as they are, or written from the ids of their tokens."""
        right = self.right(*names)
        if all(isinstance(text, str) for text in right):
            return right
        ids = [[int(i) for i in row if i != IGNORED] for row in right]
        if self.frames:  # here equal neighbours are two letters
            return self.tokenizer.batch_decode(ids, group_tokens=False)
        return self.tokenizer.batch_decode(ids, skip_special_tokens=True)

    @property
    def frames(self) -> bool:
        """Whether the tokenizer takes equal neighbours for one token, as of frames."""
        decode = getattr(self.tokenizer, "_decode", self.tokenizer.decode)
        return "group_tokens" in inspect.signature(decode).parameters


def transcribed(model: Any, batch: Batch) -> Answered:
    """The most likely token of every frame, written by the tokenizer, which takes equal neighbours for one (CTC)."""
    ids = model(**batch.tensors(model.device))["logits"].argmax(-1)
    return batch.tokenizer.batch_decode(ids), batch.texts(TRANSCRIPTS)


def written(model: Any, batch: Batch) -> Answered:
    """What the model writes, as its generation configuration says."""
    names = WRITTEN if batch.inputs.main == "input_ids" else (*TRANSCRIPTS, *WRITTEN)
    ids = model.generate(**batch.tensors(model.device))
    return batch.tokenizer.batch_decode(ids, skip_special_tokens=True), batch.texts(names)


def found_in_texts(model: Any, batch: Batch) -> Answered:
    """The likeliest span of every text: of `context`, asked `question`; or of tokens with the right positions.

    A context that is too long for the tokenizer is cut, and an answer is always given.
    """
    if "question" in batch.columns and "input_ids" not in batch.columns:
        read = batch.tokenizer(
            batch.columns["question"], batch.columns["context"], truncation="only_second", padding=True,
            return_offsets_mapping=True, return_tensors="pt",
        )  # fmt: skip
        inside = torch.tensor([[part == 1 for part in read.sequence_ids(i)] for i in range(len(read["input_ids"]))])
        tensors = {name: read[name].to(model.device) for name in read if batch.inputs.takes(name)}
        spans = likeliest_spans(model(**tensors), inside)
        offsets = read["offset_mapping"].tolist()
        said = [
            text[offsets[i][start][0] : offsets[i][end][1]]
            for i, (text, (start, end)) in enumerate(zip(batch.columns["context"], spans, strict=True))
        ]
        answers = batch.right("answers")
        return said, [a["text"] if isinstance(a, Mapping) else a for a in answers]
    tensors = batch.tensors(model.device)
    kinds = tensors.get("token_type_ids")
    inside = tensors.get("attention_mask", torch.ones_like(tensors["input_ids"])) == 1
    inside = inside & (kinds == 1) if kinds is not None and kinds.any() else inside
    try:
        right = list(zip(*(map(int, batch.columns[f"{end}_positions"]) for end in ("start", "end")), strict=True))
    except KeyError:
        raise DataError(
            f"The evaluation data{batch.whose} has neither a 'question', a 'context' and 'answers', nor 'input_ids', "
            f"'start_positions' and 'end_positions', only {sorted(batch.columns)}."
        ) from None

    def texts(spans: Iterable[tuple[int, int]]) -> list[str]:
        return [
            " ".join(map(str, ids[start : end + 1].tolist()))
            for ids, (start, end) in zip(tensors["input_ids"], spans, strict=True)
        ]

    return texts(likeliest_spans(model(**tensors), inside.cpu())), texts(right)


def likeliest_spans(output: Mapping[str, Tensor], inside: Tensor) -> list[tuple[int, int]]:
    """First and last token of every sample's likeliest answer `[samples]`, where tokens are `inside` of the text."""
    start, end = (output[f"{name}_logits"].float().cpu().masked_fill(~inside, -torch.inf) for name in ("start", "end"))
    scores = start[:, :, None] + end[:, None, :]
    allowed = torch.ones_like(scores[0], dtype=torch.bool).triu().tril(LONGEST - 1)
    best = scores.masked_fill(~allowed, -torch.inf).flatten(1).argmax(-1)
    return [divmod(int(i), scores.shape[-1]) for i in best]


def segmented(model: Any, batch: Batch) -> Answered:
    """The likeliest class of every pixel, at the size of the right map."""
    logits = model(**batch.tensors(model.device))["logits"].float()
    config = getattr(model.config, "source_config", model.config)
    ignored = getattr(config, "semantic_loss_ignore_index", IGNORED)
    right = [np.asarray(m).astype(np.int64) for m in batch.right("annotation", "mask", "segmentation")]
    given = [
        functional.interpolate(own[None], size=m.shape, mode="bilinear", align_corners=False)[0]
        .argmax(0)
        .cpu()
        .numpy()
        for own, m in zip(logits, right, strict=True)
    ]
    return given, [np.where(m == ignored, IGNORED, m) for m in right]


def detected(model: Any, batch: Batch) -> Answered:
    """Boxes in shares of the image, with classes and scores, as the model's image processor reads its outputs."""
    processor = getattr(batch.processor, "image_processor", batch.processor)
    if not hasattr(processor, "post_process_object_detection"):
        raise DataError(
            f"Nothing reads the boxes that {batch.inputs.architecture} finds{batch.whose}: give its image processor "
            "as `processor`."
        )
    output = model(**batch.tensors(model.device))
    found = processor.post_process_object_detection(output, threshold=0.0)
    given = [{name: found_one[name].cpu().numpy() for name in ("boxes", "labels", "scores")} for found_one in found]
    right = []
    for i, sample in enumerate(batch.right("objects")):
        if "class_labels" in sample:  # as an image processor makes them: center and size, in shares of the image
            boxes, labels = np.asarray(sample["boxes"], float).reshape(-1, 4), sample["class_labels"]
            corner = boxes[:, :2] - boxes[:, 2:] / 2
        else:  # as in COCO: corner and size, in pixels
            size = np.array([*batch.columns[first_of(("image", "img"), batch.columns) or "image"][i].size] * 2, float)
            boxes, labels = np.asarray(sample["bbox"], float).reshape(-1, 4) / size, sample["category"]
            corner = boxes[:, :2]
        right.append({"boxes": np.concatenate([corner, corner + boxes[:, 2:]], 1), "labels": np.asarray(labels)})
    return given, right


@dataclass(frozen=True)
class Kind:
    """Models of a kind.

    Attributes:
        metrics: what is measured where no metric is named.
        ask: gives what they answer and what is right; None where they answer with classes or tokens.
        reads: which metrics of answers fit.
    """

    metrics: tuple[str, ...]
    ask: Callable[[Any, Batch], Answered] | None = None
    reads: str = ""


KINDS: dict[type, Kind] = {
    ZipItForMaskedLM: Kind(("perplexity",)),
    ZipItForCausalLM: Kind(("perplexity",)),
    ZipItForCTC: Kind(("wer", "cer"), transcribed, "text"),
    ZipItForConditionalGeneration: Kind(("wer", "cer"), written, "text"),
    ZipItForQuestionAnswering: Kind(("squad",), found_in_texts, "text"),
    ZipItForSemanticSegmentation: Kind(("mean_iou",), segmented, "map"),
    ZipItForObjectDetection: Kind(("mean_average_precision",), detected, "boxes"),
}
"""By merged class."""


def own_metrics(subject: Subject) -> tuple[str, ...]:
    """The names of the metrics that fit the models of a kind; none where the accuracy says it.

    What is written for a text may be written in many ways, so there it is the perplexity of the right one.
    """
    kind = KINDS.get(subject.kind)
    reads_text = next(iter(subject.inputs.values())).main == "input_ids"
    if kind is not None and kind.ask is written and reads_text:
        return ("perplexity",)
    return () if kind is None else kind.metrics


def answered(subject: Subject, data: Any, task: str, reading: Reading, reads: str) -> Answered:
    """What a model answers on the data of a task, and what is right, over all processes.

    Raises DataError if it does not answer with what a metric `reads`, or the data lack something.
    """
    kind = KINDS.get(subject.kind, Kind(()))
    if kind.ask is None or kind.reads != reads:
        raise DataError(
            f"A metric of {reads} was named, but {subject.inputs[task].architecture} does not answer with {reads}; "
            "name one that fits it."
        )
    given = subject.processor(task) if reading.processor is None else reading.processor
    inputs = replace(subject.inputs[task], purpose="evaluation")
    state, said, right = PartialState(), [], []
    with running([subject.model], state.device):
        model = subject.model.for_task(task)
        for number, rows in enumerate(batches(data, reading.batch_size)):
            if number % state.num_processes == state.process_index:
                renamed = [rename(row, reading.columns) for row in rows]
                columns = {column: [row[column] for row in renamed] for column in renamed[0]}
                with told_in_a_sentence(subject, task):
                    own, expected = kind.ask(model, Batch(columns, inputs, given, task))
                said += own
                right += expected
    if state.num_processes > 1:
        said, right = gather_object(said), gather_object(right)
    if not right:
        raise DataError(f"The evaluation data of the task {task!r} is empty.")
    return said, right


def batches(data: Any, size: int) -> Iterator[list[Mapping[str, Any]]]:
    """The rows of a collection, some at a time."""
    rows = iter(data) if hasattr(data, "__iter__") else map(data.__getitem__, range(len(data)))
    while some := list(islice(rows, size)):
        yield some
