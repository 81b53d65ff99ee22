"""What `method="auto"` stands for: the best that is known for what a merge is given.

With calibration data the experts are matched unit by unit on their activations (`permute`) and every shared module is
then regressed on what the experts compute. Over the pairs of `docs/results.md` this alignment and plain averaging are
level before a refit, on average; it is exact for experts that are near each other or reordered copies, which averaging
is not. Without data the best on average is `circuits`, which matches heads by what they compute and the rest by
weights.

With residues nothing is refitted: they are of experts' weights, which refitted ones are not.

A convolutional network that is not refitted gets its BatchNorm statistics measured again, without which no merge of
one works. Nothing is chosen by looking at accuracies or labels, so that the same experts and settings give the same
choice.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from hf_zipit.config import AUTO, MergeConfig, RefitConfig
from hf_zipit.errors import RecipeError
from hf_zipit.planning.plan import Plan

logger = logging.getLogger(__name__)

WITH_DATA = "permute"
WITHOUT_DATA = "circuits"


def choose(config: MergeConfig, model: nn.Module, *, data: bool, observed: bool = False) -> MergeConfig:
    """The config with nothing left to choose, for models like one of the experts.

    Args:
        data, observed: whether there is calibration data, or moments of an earlier merge.
    """
    if not isinstance(model, PreTrainedModel):
        config = _for_plain_module(config, model)
    if not config.automatic:
        return config
    method = config.method if config.method != AUTO else WITH_DATA if data or observed else WITHOUT_DATA
    refit = config.refit
    if refit == AUTO:
        refit = RefitConfig() if data and config.depth != 0 and config.residues is None else None
    corrections = config.corrections
    if corrections == AUTO:
        corrections = needed_corrections(model) if data and refit is None else {}
    chosen = replace(config, method=method, refit=refit, corrections=corrections)
    logger.info(
        "Chosen for these experts %s data: %s%s%s.", "with" if data else "without", chosen.method,
        " + refit" if chosen.refit else "", "".join(f" + {name}" for name in chosen.corrections),
    )  # fmt: skip
    return chosen


def _for_plain_module(config: MergeConfig, model: nn.Module) -> MergeConfig:
    """Nothing is measured on a merged module without a configuration, so that it is neither refitted nor corrected.

    Raises RecipeError where that is asked for.
    """
    asked = {"refit": config.refit, "corrections": config.corrections, "polish": config.polish}
    asked["root"] = config.root
    for name, setting in asked.items():
        if setting and setting != AUTO:
            raise RecipeError(
                f"{name} is for Hugging Face models, and {type(model).__name__} is a plain torch module; leave it out"
            )
    return replace(config, refit=None, corrections={})


def needed_corrections(model: nn.Module) -> dict[str, dict[str, Any]]:
    """What a merge of such models that is not refitted needs."""
    statistics = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    return {"batchnorm-reset": {}} if statistics else {}


def without_refit(planned: Plan, why: Exception) -> Plan:
    """The plan without the refit that was chosen for it, which these models do not allow."""
    logger.warning("The refit that method='auto' chose is left out: %s", why)
    corrections = planned.config.corrections or needed_corrections(planned.model)
    return replace(planned, config=replace(planned.config, refit=None, corrections=corrections))
