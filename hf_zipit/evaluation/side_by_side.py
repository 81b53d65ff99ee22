"""Experts as one model, which is the reference for every merge of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.utils import ModelOutput

from hf_zipit.data.labels import IGNORED
from hf_zipit.modeling import (
    ZipItForCausalLM,
    ZipItForConditionalGeneration,
    ZipItForMaskedLM,
    ZipItModel,
    merged_class,
)
from hf_zipit.modeling.joint import vote


def answers_ahead(kind: type[nn.Module], config: Any) -> bool:
    """Whether every position of such models answers for the next one, as of GPT-2 and LLaVA."""
    reads_on = issubclass(kind, ZipItForConditionalGeneration) and not getattr(config, "is_encoder_decoder", False)
    return issubclass(kind, ZipItForCausalLM) or reads_on


class SideBySide(nn.Module):
    """Experts as one model: the upper reference, called like a merged model.

    `forward(task=name)` is that expert, without a task the logits of all are concatenated along the classes; experts
    of one vocabulary vote.
    """

    accepts_loss_kwargs = False  # Trainer would pass the number of items on to the experts

    def __init__(self, experts: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.tasks = list(experts)
        self.experts = nn.ModuleList(experts.values())
        kinds = {merged_class(type(expert).__name__) for expert in self.experts}
        self.causal = any(
            answers_ahead(merged_class(type(e).__name__), getattr(e, "config", None)) for e in self.experts
        )
        self.vocabulary = self.causal or ZipItForMaskedLM in kinds
        self.kind = next(iter(kinds)) if len(kinds) == 1 else ZipItModel
        contrastive = any(hasattr(expert, "get_image_features") for expert in self.experts)
        self.plain = contrastive or (issubclass(self.kind, ZipItModel) and self.kind is not ZipItModel)

    def classes(self, task: str) -> int | None:
        """How many classes a task has; None where there is a vocabulary, or nothing to choose from."""
        if self.vocabulary or self.plain:
            return None
        return int(self.experts[self.tasks.index(task)].config.num_labels)

    def offsets(self) -> dict[str, int]:
        """For every task the joint id of its class 0."""
        ends = np.cumsum([0, *(self.classes(task) or 0 for task in self.tasks)]).tolist()
        return dict(zip(self.tasks, ends, strict=False))

    def for_task(self, task: str | None) -> nn.Module:
        """All of them, or one."""
        if task is None:
            return self
        expert = self.experts[self.tasks.index(task)]
        return expert if self.plain else SideBySide({task: expert})

    def forward(self, task: str | None = None, labels: Tensor | None = None, **inputs: Any) -> ModelOutput:
        chosen = self.experts if task is None else [self.experts[self.tasks.index(task)]]
        all_logits = [expert(**inputs).logits for expert in chosen]
        logits = vote(all_logits) if self.vocabulary else torch.cat(all_logits, dim=-1)
        if labels is None:
            return ModelOutput(logits=logits)
        if self.causal:  # what comes next
            labels = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
        loss = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED)
        return ModelOutput(loss=loss, logits=logits)
