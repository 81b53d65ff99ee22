"""Merge Hugging Face models of different tasks and initialisations into one multi-task model, without training."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

try:
    __version__ = version("hf-zipit")
except PackageNotFoundError:  # run from a source tree that was not installed
    __version__ = "0.0.0"

# The face needs the version (what is saved says what saved it), so it comes after it.
from hf_zipit.evaluation.measure import evaluate  # noqa: E402
from hf_zipit.evaluation.task_data import task_datasets  # noqa: E402
from hf_zipit.landscapes.landscape import landscape  # noqa: E402
from hf_zipit.merging import merge, plan  # noqa: E402
from hf_zipit.modeling import (  # noqa: E402
    ZipItConfig,
    ZipItForImageClassification,
    ZipItForMaskedLM,
    ZipItForSequenceClassification,
    ZipItForTokenClassification,
    ZipItModel,
)
from hf_zipit.recipe.loading import load_recipe  # noqa: E402
from hf_zipit.refit import RefitConfig  # noqa: E402
from hf_zipit.running.run import run_recipe  # noqa: E402
from hf_zipit.searching import search  # noqa: E402
from hf_zipit.symmetry import MergeSpec, prove  # noqa: E402

__all__ = [
    "MergeSpec",
    "RefitConfig",
    "ZipItConfig",
    "ZipItForImageClassification",
    "ZipItForMaskedLM",
    "ZipItForSequenceClassification",
    "ZipItForTokenClassification",
    "ZipItModel",
    "evaluate",
    "landscape",
    "load_recipe",
    "merge",
    "metrics",
    "plan",
    "prove",
    "run_recipe",
    "search",
    "task_datasets",
]


def __getattr__(name: str) -> Any:
    """`hf_zipit.metrics`, imported when it is first asked for: `evaluate`, on which it stands, takes seconds."""
    if name == "metrics":
        return import_module("hf_zipit.evaluation.metrics")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
