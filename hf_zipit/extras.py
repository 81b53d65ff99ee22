"""Packages that only some things need: what brings them, and a sentence where one is missing."""

from __future__ import annotations

from importlib.util import find_spec

from hf_zipit.errors import ZipItError

EXTRAS = {
    "sklearn": ("scikit-learn", "eval", "the data set sklearn-digits and the metric f1"),
    "jiwer": ("jiwer", "eval", "the metrics wer and cer"),
    "pycocotools": ("pycocotools", "eval", "the metric mean_average_precision"),
    "matplotlib": ("matplotlib", "plots", "pictures"),
    "PIL": ("pillow", "vision", "images"),
    "peft": ("peft", "peft", "experts that are LoRA adapters"),
    "optuna": ("optuna", "search", "search --sampler tpe"),
    "gradio": ("gradio", "app", "the page in the browser"),
    "codecarbon": ("codecarbon", "co2", "--co2 and what a card says of emissions"),
    "sentence_transformers": ("sentence-transformers", "st", "merging SentenceTransformers"),
}
"""By the name it is imported by: the package, the extra that brings it, what it is for."""


def installed(module: str) -> bool:
    """Whether a package of `EXTRAS` is there."""
    return find_spec(module) is not None


def require(module: str) -> None:
    """Raise ZipItError, which says how to install it, where a package of `EXTRAS` is missing."""
    if not installed(module):
        package, extra, purpose = EXTRAS[module]
        raise ZipItError(f"{package} is not installed, which {purpose} need: pip install 'hf-zipit[{extra}]'")
