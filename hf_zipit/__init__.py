"""Merge Hugging Face models of different tasks and initialisations into one multi-task model, without training."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("hf-zipit")
except PackageNotFoundError:  # run from a source tree that was not installed
    __version__ = "0.0.0"


from hf_zipit.merging import merge, plan
from hf_zipit.modeling import (
    ZipItConfig,
    ZipItForImageClassification,
    ZipItForMaskedLM,
    ZipItForSequenceClassification,
    ZipItForTokenClassification,
    ZipItModel,
)
from hf_zipit.symmetry import MergeSpec, prove
