"""Exploring with a recipe's experts and calibration data: which settings merge best, which experts with which, and
what the loss looks like.

The recipe's evaluation data is never read here: settings that were chosen on test data would make its numbers useless.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from typing import Any

from hf_zipit.config import RefitConfig
from hf_zipit.errors import RecipeError
from hf_zipit.grouping.grouping import Grouping, check_groups, group
from hf_zipit.landscapes.landscape import landscape
from hf_zipit.landscapes.results import Landscape
from hf_zipit.recipe.sections import Recipe, Search, is_refitted
from hf_zipit.running.data import calibration_data, recipe_data
from hf_zipit.running.experts import Say, recipe_experts
from hf_zipit.running.run import cpu_threads
from hf_zipit.searching import SearchResult, SearchSpace, Trial, search

SEARCHED = ("residual",)
"""Settings that a search space has, beside method, depth, options and refit."""


def search_recipe(
    recipe: Recipe, *, say: Say = lambda _: None, watch: Callable[[Trial], None] = lambda _: None
) -> SearchResult:
    """Search the space of a recipe's `search` section, or else what the recipe lists.

    `say` is told in a few words what is being done, `watch` is given every trial when it is done. Raises as
    `hf_zipit.search` does, and a RecipeError if the recipe has no calibration data.
    """
    settings = recipe.search or Search()
    space = recipe_space(recipe)
    if recipe.calibration is None:
        raise RecipeError("calibration is missing; a search holds out a part of it to score on.")
    with cpu_threads(recipe.threads):
        experts = recipe_experts(recipe, say, train=True)
        calibration = calibration_data(recipe, experts, say)
        validation = recipe_data(recipe, settings.validation, experts, say) if settings.validation else None
        say("searching")
        how = {f.name: getattr(settings, f.name) for f in fields(settings) if f.name not in ("space", "validation")}
        how |= {name: value for name, value in recipe.settings.items() if name not in SEARCHED}
        batch_size = recipe.calibration.batch_size
        return search(
            experts, calibration, base=recipe.base, validation=validation, space=space, watch=watch,
            batch_size=batch_size,
            seed=recipe.seed, **how,
        )  # fmt: skip


def recipe_space(recipe: Recipe) -> SearchSpace:
    """The space of a recipe: its `search.space`, with the recipe's own values for everything that is not in there."""
    own: dict[str, Any] = {"method": recipe.method, "depth": recipe.depth}
    own |= {name: value for name, value in recipe.settings.items() if name in SEARCHED}
    given = dict(recipe.search.space) if recipe.search else {}
    methods = given.get("method", recipe.method)
    methods = {methods} if isinstance(methods, str) else set(methods)
    options = {method: dict(values) for method, values in recipe.options.items() if method in methods}
    for method, values in (given.get("options") or {}).items():
        options[method] = {**options.get(method, {}), **values} if isinstance(values, Mapping) else values
    if any(is_refitted(recipe, method) for method in recipe.method):
        given_settings = asdict(recipe.refit) if isinstance(recipe.refit, RefitConfig) else {}
        defaults = asdict(RefitConfig())
        own["refit"] = {name: value for name, value in given_settings.items() if value != defaults[name]} or True
    return SearchSpace.of({**own, **given, **({"options": options} if options else {})})


def landscape_recipe(
    recipe: Recipe,
    *,
    method: str | None = None,
    depth: float | str | None = None,
    grid: int = 13,
    steps: int = 11,
    samples: int = 128,
    say: Say = lambda _: None,
) -> Landscape:
    """The loss around a recipe's experts and one of its merges, on calibration data that the merge does not read.

    Method and depth are those under the recipe's `save` by default; `grid`, `steps` and `samples` as for
    `hf_zipit.landscape`, which also says what is raised; without calibration data it is a RecipeError.
    """
    if recipe.calibration is None:
        raise RecipeError("calibration is missing; a part of it is held out to measure the losses on.")
    method = method or recipe.kept.method
    depth = recipe.kept.depth if depth is None else depth
    with cpu_threads(recipe.threads):
        experts = recipe_experts(recipe, say, train=True)
        data = calibration_data(recipe, experts, say)
        say(f"measuring around {method}, depth {depth}")
        return landscape(
            experts, data, recipe.config(method, depth), grid=grid, steps=steps, samples=samples,
            batch_size=recipe.calibration.batch_size,
        )  # fmt: skip


def group_recipe(recipe: Recipe, groups: int, *, say: Say = lambda _: None) -> Grouping:
    """Which of a recipe's experts to merge with which, by its first method and depth; see `hf_zipit.group`.

    A quarter of its calibration data is held out to measure on; without calibration data it is a RecipeError.
    """
    check_groups(len(recipe.experts), groups)
    if recipe.calibration is None:
        raise RecipeError("calibration is missing; a part of it is held out to measure on.")
    with cpu_threads(recipe.threads):
        experts = recipe_experts(recipe, say, train=True)
        data = calibration_data(recipe, experts, say)
        say("merging pairs")
        config = recipe.config(recipe.method[0], recipe.depth[0])
        return group(experts, data, config, groups=groups, batch_size=recipe.calibration.batch_size)
