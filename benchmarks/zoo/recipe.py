"""How a pair is made: the data, the untrained models and the training schedule. One subclass a pair or family.

A recipe holds no tensor. Its data are prepared on demand, always the same way, and kept in memory only.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Generator, Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.zoo.pair import Metric, Splits, Tensors


@dataclass(frozen=True)
class Schedule:
    """One-cycle training: the learning rate is the peak."""

    epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    optimizer: Literal["adamw", "sgd"] = "adamw"


class Recipe(ABC):
    """One pair of the zoo, or a group of more experts.

    Attributes:
        name: the pair's name.
        folder: where its experts are, the name if empty; pairs may share experts.
        about: one line for tables.
        model_class: the experts' class.
        schedule: how both experts are trained.
        seeds: by task; a seed decides an expert's initialisation and the order of its training samples.
    """

    name: str
    folder: str = ""
    about: str
    model_class: ClassVar[type[PreTrainedModel]]
    schedule: Schedule
    seeds: Mapping[str, int]

    @abstractmethod
    def splits(self, tokenizer: PreTrainedTokenizerBase | None) -> Splits:
        """The data of both tasks, the same at every call."""

    @abstractmethod
    def untrained(self, task: str, tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedModel:
        """A freshly initialised expert; the caller seeds torch."""

    @abstractmethod
    def metric(self, tokenizer: PreTrainedTokenizerBase | None) -> Metric:
        """How the pair is scored."""

    def train_tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer both experts share, from the training texts; `None` without texts."""
        return None

    def augment(self, batch: Tensors, tokenizer: PreTrainedTokenizerBase | None, generator: Generator) -> Tensors:
        """A random change of a training batch."""
        return batch

    def loss(self, model: PreTrainedModel, batch: Tensors) -> Tensor:
        """What training minimises, a scalar."""
        return model(**batch).loss


def split_indices(count: int, validation: int, test: int, seed: int) -> dict[str, Tensor]:
    """A seeded partition of `count` samples into train, validation and test."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return {
        "train": order[validation + test :],
        "validation": order[:validation],
        "test": order[validation : validation + test],
    }
