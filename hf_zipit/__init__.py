"""Merge Hugging Face models of different tasks and initialisations into one multi-task model, without training."""

from importlib.metadata import PackageNotFoundError, version

from hf_zipit.auto_classes import announce
from hf_zipit.lazy import lazily

try:
    __version__ = version("hf-zipit")
except PackageNotFoundError:  # run from a source tree that was not installed
    __version__ = "0.0.0"

HOMES, __getattr__, __dir__ = lazily(__name__, __file__)
__all__ = sorted(HOMES)

announce()
