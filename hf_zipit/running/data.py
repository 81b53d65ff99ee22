"""The data that a recipe names, divided by task and ready for the models."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedConfig, PreTrainedModel

from hf_zipit.data.inputs import renumbered
from hf_zipit.data.labels import LABEL_COLUMNS
from hf_zipit.errors import DataError, ExpertError
from hf_zipit.hub.processors import load_processor
from hf_zipit.modeling import ZipItForCausalLM, ZipItForMaskedLM, ZipItModel, ZipItPreTrainedModel, merged_class
from hf_zipit.planning.compatible import class_names
from hf_zipit.recipe.sections import Data, Recipe
from hf_zipit.recipe.sources import (
    choose_classes,
    guessed_column,
    is_ready,
    load_source,
    match_labels,
    matching_labels,
    part_of,
    ready,
    some_of,
)  # fmt: skip
from hf_zipit.running.experts import Say, entry_of

if TYPE_CHECKING:
    from datasets import Dataset


HELD_OUT = 256
"""So many samples of each task, which no merge has read, tell how often a merged model answers as its experts do."""


def calibration_data(
    recipe: Recipe, experts: Mapping[str, PreTrainedModel], say: Say = lambda _: None, *, held_out: bool = False
) -> dict[str, Dataset] | Dataset:
    """The calibration data by task; one collection for all tasks where nothing tells whose the samples are.

    Labels only tell the task. Where a data set has none, or they are not an expert's classes, all of its samples are
    taken for that expert, which is said. With `held_out` it is other samples of the same data, at most `HELD_OUT` of
    each task. Raises DataError as `recipe_data` does, and where nothing is left to hold out.
    """
    section, found = recipe.calibration, {}
    for task, expert in experts.items():
        entry, labels = entry_of(recipe, task), labels_of(expert)
        data = section.of(entry)
        whole = load_source(
            data.dataset, data.split, folder=data.folder, config=data.config, columns=data.columns,
            streaming=data.streaming, labelled=None if labels else False,
        )  # fmt: skip
        ids = None
        if labels and hasattr((whole.features or {}).get("labels"), "names"):
            ids = choose_classes(whole, entry.classes, task) if entry.classes else matching_labels(whole, labels)
        found[task] = data, whole, labels, ids
    samples = HELD_OUT if held_out else section.samples
    skip = (section.samples or sys.maxsize) if held_out else 0
    lost = [task for task, (_, _, labels, ids) in found.items() if labels and ids is None]
    together = lost == list(experts) and all(data == found[lost[0]][0] for data, *_ in found.values())
    if lost and not held_out:
        name = " and ".join(dict.fromkeys(str(found[task][0].dataset) for task in lost))
        say(f"{name} does not tell which samples are of {' or '.join(lost)}: all are taken")
    count = len(experts) if together else 1
    parts = {}
    for task in lost[:1] if together else experts:
        data, whole, labels, ids = found[task]
        drawn = {"samples": samples and samples * count, "seed": recipe.seed, "skip": skip * count}
        part = some_of(whole, **drawn) if ids is None else part_of(whole, ids, _names(labels, ids, task), **drawn)
        if not len(part):
            raise DataError(f"{data.dataset} (split {data.split!r}) has no samples for the task {task!r}.")
        parts[task] = _ready(part, _processor(recipe, task, experts[task]), experts[task].config, say)
    return parts[lost[0]] if together else parts


def recipe_data(
    recipe: Recipe, data: Data, experts: Mapping[str, PreTrainedModel], say: Say = lambda _: None
) -> dict[str, Dataset]:
    """For every task its own part of its data, with the expert's own label ids, ready for the experts.

    Experts without classes of their own (features, a vocabulary) take whatever samples their task's data has.
    """
    parts = {}
    for task, expert in experts.items():
        entry = entry_of(recipe, task)
        processor = _processor(recipe, task, expert)
        parts[task] = _part(
            data.of(entry), task, labels_of(expert), entry.classes, processor, expert.config, recipe.seed, say
        )
    return parts


def merged_task_data(
    model: ZipItPreTrainedModel, source: str, data: Data, tasks: Sequence[str] | None = None,
    classes: Mapping[str, Sequence[int | str]] | None = None, say: Say = lambda _: None,
) -> dict[str, Dataset]:  # fmt: skip
    """For every task (or those that are named) of a merged model its own part of a data set, classes matched by name.

    `classes` are what the data calls a task's classes, in the order of its labels, where it names them otherwise.

    Models without classes of their own (features, a vocabulary) take all of it for every task. The processor is the
    one beside the model, in `source`.
    """
    parts = {}
    for task in [model.known(task) for task in tasks or model.config.tasks]:
        labels = list(model.config.labels_of(task).values()) or None
        processor = partial(load_processor, source, model.branch_names[task])
        own = (classes or {}).get(task, ())
        parts[task] = _part(data, task, labels, own, processor, model.config.source_config, say=say)
    return parts


def _part(
    data: Data, task: str, labels: list[str] | None, classes: Sequence[int | str], processor: Callable[[], Any] | None,
    config: PreTrainedConfig, seed: int = 0, say: Say = lambda _: None,
) -> Dataset:  # fmt: skip
    """The rows of a task's classes with the expert's own label ids (all rows without `labels`), ready for it.

    Args:
        labels: the names of the expert's classes, by its label ids.
        classes: what the data calls them, where it names them otherwise.
        processor: loads what prepares raw images or texts.
        config: the expert's.
    """
    whole = load_source(
        data.dataset, data.split, folder=data.folder, config=data.config, columns=data.columns,
        streaming=data.streaming, labelled=labels is not None,
    )  # fmt: skip
    if labels is None:
        part = some_of(whole, data.samples, seed)
    else:
        ids = choose_classes(whole, classes, task) if classes else match_labels(whole, labels, task)
        part = part_of(whole, ids, _names(labels, ids, task), samples=data.samples, seed=seed)
    if not len(part):
        raise DataError(f"{data.dataset} (split {data.split!r}) has no samples of the classes of {task!r}.")
    return _ready(part, processor, config, say)


def _names(labels: list[str], ids: Sequence[int], task: str) -> list[str]:
    """An expert's labels; raises ExpertError where the data's classes are not as many."""
    if len(ids) != len(labels):
        raise ExpertError(f"The expert {task!r} has {len(labels)} labels, but {len(ids)} classes are named for it.")
    return labels


def _processor(recipe: Recipe, task: str, expert: PreTrainedModel) -> Callable[[], Any] | None:
    """Loads what prepares data for an expert; None for one that reads texts with a tokenizer that it alone has."""
    if renumbered(expert):
        return None
    entry = entry_of(recipe, task)
    return partial(load_processor, expert.name_or_path if entry.subfolder or "@" in str(entry.model) else entry.model)


def _ready(part: Dataset, processor: Callable[[], Any] | None, config: PreTrainedConfig, say: Say) -> Dataset:
    """What the expert reads; a column that can only be the images or texts is taken for them, which is said."""
    if (guess := guessed_column(part)) is not None:
        say(f"the column {guess[0]!r} is read as {guess[1]}")
        part = part.rename_column(*guess)
    if processor is None:
        return part
    return ready(part, None if is_ready(part) else processor(), getattr(config, "num_channels", None))


def labels_of(expert: PreTrainedModel) -> list[str] | None:
    """The names of an expert's classes, by its label ids; None for one without classes."""
    return [name for _, name in sorted(class_names(expert.config).items())] if has_classes(expert) else None


def has_classes(expert: PreTrainedModel) -> bool:
    """Whether an expert is a classifier, so that data have to be matched to its labels."""
    return not issubclass(merged_class(type(expert).__name__), (ZipItModel, ZipItForMaskedLM, ZipItForCausalLM))


def unlabelled(data: Mapping[str, Dataset] | Dataset) -> dict[str, Dataset] | Dataset:
    """The data without the labels, by task or as one collection."""
    if isinstance(data, Mapping):
        return {task: unlabelled(part) for task, part in data.items()}
    return data.remove_columns([name for name in LABEL_COLUMNS if name in data.column_names])
