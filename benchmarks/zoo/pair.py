"""What a benchmark sees of a pair: its experts, their data, and how they are scored.

A split is a dictionary of tensors with one row per sample, ready for the model, plus `labels`. Every score of the zoo
is a share of hits: of the positions whose label is not -100, those where the largest entry of one output is the label.
That covers classification, of images or of their places, hidden and following tokens, and zero-shot classification,
where the classes' prompts go with every batch. Detection counts its hits in its own way (`boxes`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

Tensors = dict[str, Tensor]
"""Rows of samples by the model's argument names."""

Splits = dict[str, dict[str, Tensors]]
"""By task, then by `"train"`, `"validation"`, `"test"`."""

Forward = Callable[..., Mapping[str, Any]]
"""Anything called like a model: with tensors by name, returning outputs by field. A model is one."""

IGNORED = -100


def rows(data: Tensors, index: Tensor | slice) -> Tensors:
    """The chosen samples of a split."""
    return {name: tensor[index] for name, tensor in data.items()}


def trim(data: Tensors) -> Tensors:
    """Cut the padding that no sample of a batch of texts needs; other tensors stay as they are."""
    if "attention_mask" not in data:
        return data
    width = data["attention_mask"].shape[1]
    used = int(data["attention_mask"].sum(1).max())
    return {name: t[:, :used] if t.ndim == 2 and t.shape[1] == width else t for name, t in data.items()}


@dataclass(frozen=True)
class Metric:
    """A share of hits.

    Attributes:
        name: what is measured, for tables.
        output: the output field that holds the candidates.
        classes: the names of every task's candidates, in label order; `None` where the tasks share their candidates (a
            vocabulary), so that a joint score has no meaning.
        prompts: by task, inputs that go with every batch of samples instead of the samples' own (zero-shot prompts).
        perplexity: whether the candidates are tokens that a language model gives probabilities.
        axis: the candidates' axis in the output field.
        joint: whether samples can be scored among the classes of all tasks, too.
    """

    name: str
    output: str = "logits"
    classes: Mapping[str, tuple[str, ...]] | None = None
    prompts: Mapping[str, Tensors] = field(default_factory=dict)
    perplexity: bool = False
    axis: int = -1
    joint: bool = True

    @torch.inference_mode()
    def hits(self, forward: Forward, data: Tensors, prompts: Tensors, batch_size: int = 256) -> float:
        """The share of hits of `forward` on a split."""
        hit = count = 0
        for output, labels in outputs(forward, data, prompts, batch_size):
            more, asked = self.tally(output, labels)
            hit += more
            count += asked
        return hit / count

    def tally(self, output: Mapping[str, Any], labels: Tensor) -> tuple[int, int]:
        """The hits of one batch, and out of how many."""
        logits, asked = self.asked(output, labels)
        return int((logits.argmax(-1) == asked).sum()), len(asked)

    @torch.inference_mode()
    def perplexity_of(self, forward: Forward, data: Tensors, prompts: Tensors, batch_size: int = 256) -> float:
        """The exponential of the mean negative log-likelihood of a split's labels."""
        lost = count = 0.0
        for logits, labels in self.answers(forward, data, prompts, batch_size):
            lost += float(cross_entropy(logits.float(), labels, reduction="sum"))
            count += len(labels)
        return math.exp(lost / count)

    def answers(
        self, forward: Forward, data: Tensors, prompts: Tensors, batch_size: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """What `forward` says where something is asked, `[asked, candidates]`, and the labels, batch by batch."""
        return (self.asked(*each) for each in outputs(forward, data, prompts, batch_size))

    def asked(self, output: Mapping[str, Any], labels: Tensor) -> tuple[Tensor, Tensor]:
        """What one output says where something is asked, `[asked, candidates]`, and the labels there."""
        asked = labels != IGNORED
        return self.logits(output)[asked], labels[asked]

    def logits(self, output: Mapping[str, Any]) -> Tensor:
        """What a model says, with the candidates along the last axis."""
        return output[self.output].movedim(self.axis, -1)

    def targets(self, labels: Tensor) -> Tensor:
        """A split's labels that are asked for, in a row."""
        return labels[labels != IGNORED]

    def chance(self, data: Tensors) -> float:
        """The share of hits of always giving the split's most frequent label."""
        labels = self.targets(data["labels"])
        return float(labels.bincount().max() / labels.numel())


def outputs(
    forward: Forward, data: Tensors, prompts: Tensors, batch_size: int
) -> Iterator[tuple[Mapping[str, Any], Tensor]]:
    """What `forward` says to a split, and the labels, batch by batch."""
    for batch in batches(data, batch_size):
        labels = batch.pop("labels")
        yield forward(**{**batch, **prompts}), labels


def batches(data: Tensors, batch_size: int) -> Iterator[Tensors]:
    """A split in order, in batches that are no wider than their longest text."""
    for start in range(0, len(data["labels"]), batch_size):
        yield trim(rows(data, slice(start, start + batch_size)))


@dataclass(frozen=True)
class Pair:
    """Two experts from different initialisations, without a common task.

    Attributes:
        name: the pair's name in the zoo.
        experts: by task, in evaluation mode.
        splits: by task and split, the samples with their labels.
        metric: how a model is scored.
        tokenizer: the tokenizer both experts share; `None` for images alone.
    """

    name: str
    experts: dict[str, PreTrainedModel]
    splits: Splits
    metric: Metric
    tokenizer: PreTrainedTokenizerBase | None = None

    def score(self, forward: Forward, task: str, split: str = "test") -> float:
        """The score of a model on one task, among this task's own classes."""
        return self.metric.hits(forward, self.splits[task][split], self.metric.prompts.get(task, {}))

    def perplexities(self, forwards: Mapping[str, Forward], split: str = "test") -> dict[str, float]:
        """By task, the perplexity of a model on it; empty unless the pair is one of language models.

        Args:
            forwards: the model for every task.
        """
        found, prompts = (forwards if self.metric.perplexity else {}), self.metric.prompts
        return {
            task: self.metric.perplexity_of(forward, self.splits[task][split], prompts.get(task, {}))
            for task, forward in found.items()
        }

    def joint_score(self, forward: Forward, split: str = "test") -> float | None:
        """The score on the samples of all tasks at once, among the classes of all tasks in order.

        `None` where that has no meaning.
        """
        if self.metric.classes is None or not self.metric.joint:
            return None
        merged: list[Tensors] = []
        offset = 0
        for task, classes in self.metric.classes.items():
            data = self.splits[task][split]
            merged.append({**data, "labels": data["labels"] + offset})
            offset += len(classes)
        return self.metric.hits(forward, concatenate(merged), concatenate(list(self.metric.prompts.values())))

    def calibration(self, task: str, samples: int, seed: int = 0) -> Tensors:
        """Unlabelled training samples of one task, drawn without replacement."""
        data = self.splits[task]["train"]
        order = torch.randperm(len(data["labels"]), generator=torch.Generator().manual_seed(seed))
        return {name: tensor for name, tensor in rows(data, order[:samples]).items() if name != "labels"}


def concatenate(parts: list[Tensors]) -> Tensors:
    """The samples of several splits, one after the other."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]} if parts else {}
