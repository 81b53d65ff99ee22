"""What a merged model remembers of its making, as a recipe: the `recipe.yaml` beside the weights.

`config.method` holds it: the settings of `merge`, where every expert came from, the versions of the packages, the
number of CPU threads and, where a recipe was run, that recipe. What is written can be run again
(`hf-zipit run recipe.yaml`) to the same file; it pins the experts' revisions and weights. A merge that was called from
Python got its calibration data as an object, which no file can name; the recipe then says so in its first line.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import yaml
from transformers import PreTrainedModel

from hf_zipit.config import MergeConfig
from hf_zipit.recipe.sections import SETTINGS, Recipe

ORDER = [key for f in fields(Recipe) for key in (SETTINGS if f.name == "settings" else (f.name,))]
"""The keys of a recipe as people write them; a configuration file sorts them by letter."""

ORDERED = ("experts",)
"""Sections whose order means something."""

PINS = ("model", "task", "revision", "subfolder", "sha256")
"""What a recipe says of an expert, beside what its author wrote."""

NO_DATA = "# Merged from Python: add `calibration` (see the documentation) to run this again.\n"


def recorded_recipe(model: PreTrainedModel, name: str) -> dict[str, Any]:
    """The recipe of a merged model as plain values; empty for one that `hf_zipit.merge` did not make.

    It has the name that is given, unless a recipe named it.
    """
    method = model.config.method
    if "experts" not in method:
        return {}
    recipe = dict(method["recipe"]) if "recipe" in method else _from_settings(method, name)
    written = recipe.get("experts", {})
    recipe["experts"] = {}
    for task in model.config.tasks:  # those of a merged model that a recipe named together are `NAME/TASK`
        origin = method["experts"].get(task, {})
        entry = written.get(task) or written.get(task.rpartition("/")[0]) or {}
        recipe["experts"][task] = {**entry, **{key: origin[key] for key in PINS if key in origin}}
    if bases := {task: origin.get("model") for task, origin in method.get("bases", {}).items()}:
        recipe.setdefault("base", bases)
    if "threads" in method:  # sums are cut up by them
        recipe.setdefault("threads", method["threads"])
    recipe["versions"] = method.get("versions", {})
    keys = [*(key for key in ORDER if key in recipe), *(key for key in recipe if key not in ORDER)]
    return {key: recipe[key] if key in ORDERED else _sorted(recipe[key]) for key in keys}


def _sorted(value: Any) -> Any:
    """Nested mappings by letter, as a configuration file has them: a card that is made again is the same."""
    if not isinstance(value, Mapping):
        return value
    return {key: _sorted(item) for key, item in sorted(value.items())}


def recipe_text(model: PreTrainedModel, name: str) -> str:
    """The same as YAML; empty if there is none."""
    recipe = recorded_recipe(model, name)
    if not recipe:
        return ""
    head = NO_DATA if "recipe" not in model.config.method and "calibration" not in recipe else ""
    return head + yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=100, default_flow_style=None)


def _from_settings(method: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The settings of a call of `merge` under the keys of a recipe."""
    config = MergeConfig.from_dict(method)
    plain = config.to_dict()
    found = {
        **{key: plain[key] for key in SETTINGS},
        "name": name,
        "method": config.name,
        "depth": config.depth,
        "options": {config.name: plain["options"]} if config.options else None,
        "refit": plain["refit"],
        "seed": config.seed,
    }
    default = MergeConfig(method=config.method).to_dict()
    same = {key for key in SETTINGS if found[key] == default[key]}
    return {key: value for key, value in found.items() if value is not None and key not in same}
