"""Merge Hugging Face models of different tasks and initialisations into one multi-task model, without training.

The face is light: a name is imported when it is first used (PEP 562), so that `import hf_zipit` costs next to nothing.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

from hf_zipit.auto_classes import announce

if TYPE_CHECKING:  # what HOMES says, for type checkers and editors
    from hf_zipit.adapters import register as register_adapter  # noqa: F401
    from hf_zipit.align.method import register as register_method  # noqa: F401
    from hf_zipit.combine.rule import register as register_rule  # noqa: F401
    from hf_zipit.config import MergeConfig as MergeConfig
    from hf_zipit.correct.correction import register as register_correction  # noqa: F401
    from hf_zipit.data.calibration import Calibration as Calibration
    from hf_zipit.evaluation import metrics as metrics
    from hf_zipit.evaluation.measure import evaluate as evaluate
    from hf_zipit.evaluation.task_data import task_datasets as task_datasets
    from hf_zipit.landscapes.landscape import landscape as landscape
    from hf_zipit.merging import merge as merge
    from hf_zipit.merging import plan as plan
    from hf_zipit.modeling import ZipItConfig as ZipItConfig
    from hf_zipit.modeling import ZipItForImageClassification as ZipItForImageClassification
    from hf_zipit.modeling import ZipItForMaskedLM as ZipItForMaskedLM
    from hf_zipit.modeling import ZipItForSequenceClassification as ZipItForSequenceClassification
    from hf_zipit.modeling import ZipItForTokenClassification as ZipItForTokenClassification
    from hf_zipit.modeling import ZipItModel as ZipItModel
    from hf_zipit.observation import Moments as Moments
    from hf_zipit.observation import observe as observe
    from hf_zipit.recipe.loading import load_recipe as load_recipe
    from hf_zipit.refit import RefitConfig as RefitConfig
    from hf_zipit.running.run import run_recipe as run_recipe
    from hf_zipit.searching import search as search
    from hf_zipit.symmetry import MergeSpec as MergeSpec
    from hf_zipit.symmetry import prove as prove

try:
    __version__ = version("hf-zipit")
except PackageNotFoundError:  # run from a source tree that was not installed
    __version__ = "0.0.0"

HOMES = {
    "Calibration": "hf_zipit.data.calibration:Calibration",
    "MergeConfig": "hf_zipit.config:MergeConfig",
    "MergeSpec": "hf_zipit.symmetry:MergeSpec",
    "Moments": "hf_zipit.observation:Moments",
    "RefitConfig": "hf_zipit.refit:RefitConfig",
    "ZipItConfig": "hf_zipit.modeling:ZipItConfig",
    "ZipItForImageClassification": "hf_zipit.modeling:ZipItForImageClassification",
    "ZipItForMaskedLM": "hf_zipit.modeling:ZipItForMaskedLM",
    "ZipItForSequenceClassification": "hf_zipit.modeling:ZipItForSequenceClassification",
    "ZipItForTokenClassification": "hf_zipit.modeling:ZipItForTokenClassification",
    "ZipItModel": "hf_zipit.modeling:ZipItModel",
    "evaluate": "hf_zipit.evaluation.measure:evaluate",
    "landscape": "hf_zipit.landscapes.landscape:landscape",
    "load_recipe": "hf_zipit.recipe.loading:load_recipe",
    "merge": "hf_zipit.merging:merge",
    "metrics": "hf_zipit.evaluation.metrics",
    "observe": "hf_zipit.observation:observe",
    "plan": "hf_zipit.merging:plan",
    "prove": "hf_zipit.symmetry:prove",
    "register_adapter": "hf_zipit.adapters:register",
    "register_correction": "hf_zipit.correct.correction:register",
    "register_method": "hf_zipit.align.method:register",
    "register_rule": "hf_zipit.combine.rule:register",
    "run_recipe": "hf_zipit.running.run:run_recipe",
    "search": "hf_zipit.searching:search",
    "task_datasets": "hf_zipit.evaluation.task_data:task_datasets",
}
"""Where every name of the face comes from."""

__all__ = sorted(HOMES)


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = resolve_name(HOMES[name])
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *HOMES})


announce()
