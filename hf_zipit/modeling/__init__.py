"""The merged multi-head model as a Hugging Face model. Its modules register themselves with the Auto classes.

A name is imported when it is first used: the configuration costs little, the models half of transformers.
"""

from __future__ import annotations

from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what HOMES says, for type checkers and editors
    from .base import ZipItPreTrainedModel as ZipItPreTrainedModel
    from .base import module_names as module_names
    from .configuration import ZipItConfig as ZipItConfig
    from .heads import ZipItForImageClassification as ZipItForImageClassification
    from .heads import ZipItForMaskedLM as ZipItForMaskedLM
    from .heads import ZipItForSequenceClassification as ZipItForSequenceClassification
    from .heads import ZipItForTokenClassification as ZipItForTokenClassification
    from .heads import ZipItModel as ZipItModel
    from .heads import build as build
    from .heads import merged_class as merged_class

HOMES = {
    "ZipItConfig": "configuration",
    "ZipItForImageClassification": "heads",
    "ZipItForMaskedLM": "heads",
    "ZipItForSequenceClassification": "heads",
    "ZipItForTokenClassification": "heads",
    "ZipItModel": "heads",
    "ZipItPreTrainedModel": "base",
    "build": "heads",
    "merged_class": "heads",
    "module_names": "base",
}
"""The module that every name of the package comes from."""

__all__ = sorted(HOMES)


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = resolve_name(f"{__name__}.{HOMES[name]}:{name}")
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *HOMES})
