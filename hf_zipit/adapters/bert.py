"""BERT, RoBERTa and DistilBERT: post-LN text encoders (and RoBERTa's pre-LN variant)."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from hf_zipit.adapters.auto import Adapter, register


@register
class BertAdapter(Adapter):
    model_types: ClassVar[tuple[str, ...]] = ("bert", "roberta", "roberta-prelayernorm", "distilbert", "electra")

    def readout_positions(self, model: nn.Module) -> dict[str, str]:
        name = type(model).__name__
        if name.endswith("ForMaskedLM"):
            return {"text": "masked"}
        return {"text": "first"} if name.endswith("ForSequenceClassification") else {}
