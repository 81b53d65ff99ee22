"""The merged multi-head model as a Hugging Face model. Importing this package registers it with the Auto classes."""

from __future__ import annotations

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoModelForZeroShotImageClassification,
)

from .base import ZipItPreTrainedModel, module_names
from .configuration import ZipItConfig
from .heads import (
    ZipItForImageClassification,
    ZipItForMaskedLM,
    ZipItForSequenceClassification,
    ZipItForTokenClassification,
    ZipItModel,
    build,
    merged_class,
)

AutoConfig.register(ZipItConfig.model_type, ZipItConfig, exist_ok=True)
for _auto, _model in (
    (AutoModel, ZipItModel),
    (AutoModelForZeroShotImageClassification, ZipItModel),
    (AutoModelForImageClassification, ZipItForImageClassification),
    (AutoModelForSequenceClassification, ZipItForSequenceClassification),
    (AutoModelForTokenClassification, ZipItForTokenClassification),
    (AutoModelForMaskedLM, ZipItForMaskedLM),
):
    _auto.register(ZipItConfig, _model, exist_ok=True)

__all__ = [
    "ZipItConfig",
    "ZipItForImageClassification",
    "ZipItForMaskedLM",
    "ZipItForSequenceClassification",
    "ZipItForTokenClassification",
    "ZipItModel",
    "ZipItPreTrainedModel",
    "build",
    "merged_class",
    "module_names",
]
