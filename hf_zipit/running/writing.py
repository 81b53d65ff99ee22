"""What a run leaves behind: its results, the picture, the trained experts, and the kept model with its card."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

from transformers import PreTrainedModel

from hf_zipit.extras import installed
from hf_zipit.files import adding_to, write_json
from hf_zipit.recipe.sections import Data, Recipe
from hf_zipit.refit import RefitReport
from hf_zipit.report.card import Result, remember
from hf_zipit.report.plots import accuracy_over_depth, save_picture
from hf_zipit.running.experts import Say
from hf_zipit.running.results import RunResult
from hf_zipit.running.saved import push_saved

RESULTS = "results.json"


def write_all(
    result: RunResult, model: PreTrainedModel, experts: Mapping[str, PreTrainedModel], say: Say
) -> RunResult:
    """Save the results, the trained experts, the picture and the kept model with its card; push it, if asked to."""
    recipe, folder = result.recipe, result.recipe.folder
    write_json(folder / RESULTS, result.to_dict())  # first: measuring is what takes long
    for task, entry in recipe.experts.items():
        if entry.model is None:
            with adding_to(folder / "experts" / task) as beside:
                experts[task].save_pretrained(beside)
    if installed("matplotlib") and result.experts is not None and len({row.depth for row in result.rows}) > 1:
        picture = accuracy_over_depth(result.rows, result.experts, title=recipe.name)
        result = replace(result, plot=save_picture(picture, folder / "accuracy.png"))
    result = write_model(result, model, folder / "model")
    write_json(folder / RESULTS, result.to_dict())  # again, with the paths of what was written
    if recipe.push is not None:
        say(f"pushing to {recipe.push.repo_id}")
        commit = push_saved(result.model, **asdict(recipe.push))
        result = replace(result, pushed=str(commit.pr_url or commit.repo_url))
        write_json(folder / RESULTS, result.to_dict())
    return result


def write_model(result: RunResult, model: PreTrainedModel, folder: Path) -> RunResult:
    """Save the kept model with its card and recipe."""
    model.config.method["recipe"] = replace(result.recipe, output=None, push=None).to_dict()
    remember(model, _card_result(result))
    if result.recipe.runs_nothing:  # it was merged into the folder
        model.save_about(folder)
    else:
        model.save_pretrained(folder)
    return replace(result, model=folder, refit=RefitReport.of(model))


def _data_names(recipe: Recipe, data: Data | None) -> str | None:
    """The data set of a section, or those of its tasks."""
    if data is None:
        return None
    return ", ".join(dict.fromkeys(str(data.of(entry).dataset) for entry in recipe.experts.values()))


def _card_result(result: RunResult) -> Result:
    recipe = result.recipe
    return Result(
        name=recipe.name,
        base_models={task: entry.model for task, entry in recipe.experts.items()},
        dataset=_data_names(recipe, recipe.evaluation),
        split=recipe.evaluation.split if recipe.evaluation else None,
        calibration=_data_names(recipe, recipe.calibration),
        merged=result.kept.accuracy if result.kept else None,
        experts=result.experts,
        scores=result.kept.scores if result.kept else {},
        expert_scores=result.expert_scores,
        curve=result.rows,
        agreement=result.kept.agreement if result.kept else None,
    )
