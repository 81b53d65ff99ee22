"""The experts that a recipe names, loaded or trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from transformers import PreTrainedModel

from hf_zipit.errors import ExpertError
from hf_zipit.experts.fingerprint import fingerprint_experts
from hf_zipit.experts.loading import load_expert, load_experts
from hf_zipit.experts.vocabulary import united
from hf_zipit.modeling import ZipItPreTrainedModel
from hf_zipit.planning.compatible import check_classes
from hf_zipit.recipe.sections import ExpertEntry, Recipe
from hf_zipit.recipe.sources import choose_classes, class_names, load_source, part_of
from hf_zipit.recipe.training import new_classifier, train_classifier

Say = Callable[[str], None]
"""Is told in a few words what is being done."""


def recipe_experts(recipe: Recipe, say: Say, *, train: bool, as_stored: bool = False) -> dict[str, PreTrainedModel]:
    """The experts, loaded (`as_stored` as for `load_experts`) or trained; without `train` those are as initialised."""
    given = {task: entry for task, entry in recipe.experts.items() if entry.model is not None}
    made = {}
    for position, (task, entry) in enumerate(recipe.experts.items()):
        if task in given:
            continue
        data = load_source(recipe.train.dataset, recipe.train.split, folder=recipe.train.folder)
        ids = choose_classes(data, entry.classes, task)
        labels = [class_names(data)[i] for i in ids]
        seed = recipe.seed + position if entry.seed is None else entry.seed
        if train:
            say(f"training the expert {task!r}")
            made[task] = train_classifier(recipe.train, part_of(data, ids), labels, seed=seed)
        else:
            made[task] = new_classifier(recipe.train.model, labels, seed)
    sources: dict[str, Any] = {task: made.get(task, place_of(entry)) for task, entry in recipe.experts.items()}
    for task, entry in given.items():
        if entry.task is None:
            continue
        merged = load_expert(task, place_of(entry), entry.revision)
        if not isinstance(merged, ZipItPreTrainedModel):
            raise ExpertError(f"experts.{task} asks for the task {entry.task!r}, but its model is not a merged one.")
        sources[task] = merged.expert(entry.task)
    revisions = {task: entry.revision for task, entry in given.items() if entry.revision}
    loaded = load_experts(sources, revisions=revisions, as_stored=as_stored)
    check_classes(loaded)  # before anybody asks what their labels have to do with the data
    _check_weights({task: entry.sha256 for task, entry in given.items() if entry.sha256}, loaded)
    return united(loaded) if recipe.settings.get("vocabulary") == "union" else loaded


def place_of(entry: ExpertEntry) -> str | None:
    """The model of an entry as `load_expert` takes it."""
    return f"{entry.model}@{entry.revision or 'main'}/{entry.subfolder}" if entry.subfolder else entry.model


def _check_weights(wanted: Mapping[str, str], experts: Mapping[str, PreTrainedModel]) -> None:
    """Experts whose weights a recipe pins must have those."""
    for task, found in fingerprint_experts({task: experts[task] for task in wanted if task in experts}).items():
        if found != wanted[task]:
            raise ExpertError(
                f"The weights of the expert {task!r} have the sha256 {found[:12]}..., but the recipe asks for "
                f"{wanted[task][:12]}...; give the revision that was merged, or leave sha256 out."
            )


def entry_of(recipe: Recipe, task: str) -> ExpertEntry:
    """The recipe's entry of a task; that of a merged model stands for each of its tasks."""
    return recipe.experts.get(task) or recipe.experts[task.rpartition("/")[0]]
