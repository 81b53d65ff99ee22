"""Running a recipe: experts, one look at the data, every method at every depth, the measurements, the kept model.

What must hold: nothing is written over an earlier result until the new one is complete, and the experts are observed
once, however many merges follow.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from accelerate import PartialState
from transformers import PreTrainedModel

from hf_zipit.errors import ExpertError
from hf_zipit.evaluation import Accuracy, accuracy
from hf_zipit.experts import load_expert, load_experts
from hf_zipit.files import replacing, replacing_folder, write_json
from hf_zipit.merging import merge, plan
from hf_zipit.modeling import ZipItForMaskedLM, ZipItModel, ZipItPreTrainedModel, merged_class
from hf_zipit.observe import fingerprint_experts
from hf_zipit.observing import Observed
from hf_zipit.planning import Plan
from hf_zipit.processors import FOLDER as PROCESSORS
from hf_zipit.processors import processor_files
from hf_zipit.recipe import Data, ExpertEntry, Recipe, real_method, refit_settings
from hf_zipit.refit import RefitReport
from hf_zipit.report.card import Point, Result, remember
from hf_zipit.saved import push_saved
from hf_zipit.sources import (
    LABEL_COLUMNS,
    choose_classes,
    class_names,
    load_source,
    match_labels,
    part_of,
    ready,
    some_of,
)
from hf_zipit.training import new_classifier, train_classifier

if TYPE_CHECKING:
    from datasets import Dataset

Say = Callable[[str], None]
Save = Literal["all", "model", "nothing"]


@dataclass(frozen=True)
class Row:
    """One merge of a run.

    Attributes:
        method: as the recipe calls it.
        depth: the share of the blocks that was merged.
        parameters: of the merged model.
        seconds: that merging took, the observation not counted.
        accuracy: None where the recipe evaluates nothing.
    """

    method: str
    depth: float
    parameters: int
    seconds: float
    accuracy: Accuracy | None

    def to_dict(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "depth": self.depth,
            "parameters": self.parameters,
            "seconds": round(self.seconds, 3),
            "accuracy": self.accuracy.to_dict() if self.accuracy else None,
        }


@dataclass(frozen=True)
class RunResult:
    """What a recipe made.

    Attributes:
        recipe: what was run.
        experts: the accuracies of the experts side by side; None where nothing was evaluated.
        expert_parameters: of all experts together.
        rows: one for every method and depth.
        kept: the row of the model that was saved, if one was.
        model: its folder.
        plot: the picture of accuracy over depth, if there was something to draw.
        refit: the errors of the kept model's refit, if it had one.
        pushed: the address of the repo or pull request that it was pushed to.
    """

    recipe: Recipe
    experts: Accuracy | None
    expert_parameters: int
    rows: tuple[Row, ...]
    kept: Row | None = None
    model: Path | None = None
    plot: Path | None = None
    refit: RefitReport | None = None
    pushed: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            "recipe": self.recipe.to_dict(),
            "experts": self.experts.to_dict() if self.experts else None,
            "expert_parameters": self.expert_parameters,
            "results": [row.to_dict() for row in self.rows],
            "kept": self.kept.to_dict() if self.kept else None,
            "model": str(self.model) if self.model else None,
            "plot": str(self.plot) if self.plot else None,
            "refit_errors": self.refit.to_dict() if self.refit else None,
            "pushed": self.pushed,
        }


def plan_recipe(recipe: Recipe, say: Say = lambda _: None) -> dict[tuple[str, float | str], Plan]:
    """What a run would do, for every method and depth. Experts that it would train are made, but not trained."""
    return _plans(recipe, recipe_experts(recipe, say, train=False))


def _plans(recipe: Recipe, experts: Mapping[str, PreTrainedModel]) -> dict[tuple[str, float | str], Plan]:
    """What every merge of a recipe would do, by method and depth."""
    settings = {"residual": recipe.residual, "overrides": recipe.overrides or None}
    return {
        (method, depth): plan(
            experts, method=real_method(method), options=recipe.options.get(method), depth=depth, **settings
        )
        for method in recipe.method
        for depth in recipe.depth
    }


def run_recipe(recipe: Recipe, *, save: Save = "all", progress: bool = True, say: Say = lambda _: None) -> RunResult:
    """Run a recipe.

    Args:
        recipe: what to do, from `load_recipe`.
        save: `"all"` writes the results, the picture, the trained experts and the kept model with its card into the
            recipe's folder; `"model"` only the model, as that folder.
        progress: whether to show progress bars on stderr.
        say: is told in a few words what is being done.

    Raises:
        ZipItError: its subclasses say what is wrong with the experts, the data, the recipe or the output folder.
    """
    with cpu_threads(recipe.threads):
        return _run(recipe, save, progress, say)


@contextmanager
def cpu_threads(count: int | None) -> Iterator[None]:
    """Run with `count` CPU threads; None leaves them as they are."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _run(recipe: Recipe, save: Save, progress: bool, say: Say) -> RunResult:
    experts = recipe_experts(recipe, say, train=True)
    calibration = recipe_data(recipe, recipe.calibration, experts) if recipe.calibration else None
    if calibration:  # nothing after this can learn from labels
        calibration = {task: without_labels(data) for task, data in calibration.items()}
    evaluation = recipe_data(recipe, recipe.evaluation, experts) if recipe.evaluation else None
    plans = _plans(recipe, experts)
    size = recipe.calibration.batch_size if recipe.calibration else 32
    observed = Observed(experts, calibration, recipe.depth, batch_size=size, seed=recipe.seed, progress=progress)
    if any(planned.passes for planned in plans.values()):
        say("observing the experts on the calibration data")
    moments = {point: observed.moments(planned) for point, planned in plans.items()}
    beside = None
    if evaluation:
        say("measuring the experts")
        beside = accuracy(experts, evaluation, batch_size=recipe.evaluation.batch_size)
    rows, kept_row, kept_model = [], None, None
    for method in recipe.method:
        for depth in recipe.depth:
            say(f"merging: {method}, depth {depth}")
            started = time.perf_counter()
            merged = merge(
                experts,
                calibration,
                method=real_method(method),
                options=recipe.options.get(method),
                depth=depth,
                refit=refit_settings(recipe, method),
                corrections=recipe.corrections,
                batch_size=size,
                residual=recipe.residual,
                overrides=recipe.overrides or None,
                moments=moments[method, depth],
                seed=recipe.seed,
                progress=progress,
            )
            seconds = time.perf_counter() - started
            found = accuracy(merged, evaluation, batch_size=recipe.evaluation.batch_size) if evaluation else None
            share = depth if merged.config.depth is None else merged.config.depth
            row = Row(method, share, merged.num_parameters(), seconds, found)
            rows.append(row)
            if (method, depth) == (recipe.kept.method, recipe.kept.depth):
                kept_row, kept_model = row, merged
    total = sum(expert.num_parameters() for expert in experts.values())
    result = RunResult(recipe, beside, total, tuple(rows), kept_row)
    if save == "nothing" or not PartialState().is_main_process:  # all processes have the same result
        return result
    say(f"writing to {recipe.folder}")
    if save == "model":
        return _write_model(result, kept_model, recipe.folder)
    return _write_all(result, kept_model, experts, say)


def recipe_experts(recipe: Recipe, say: Say, *, train: bool) -> dict[str, PreTrainedModel]:
    """The experts, loaded or trained; without `train` those to be trained are as initialised."""
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
    sources: dict[str, Any] = {task: made.get(task, entry.model) for task, entry in recipe.experts.items()}
    for task, entry in given.items():
        if entry.task is not None:
            sources[task] = _task_of(load_expert(task, entry.model, entry.revision), entry.task, task)
    revisions = {task: entry.revision for task, entry in given.items() if entry.revision}
    loaded = load_experts(sources, revisions=revisions)
    _check_weights({task: entry.sha256 for task, entry in given.items() if entry.sha256}, loaded)
    return loaded


def _task_of(model: PreTrainedModel, part: str, task: str) -> PreTrainedModel:
    if not isinstance(model, ZipItPreTrainedModel):
        raise ExpertError(f"experts.{task} asks for the task {part!r}, but its model is no merged one.")
    return model.expert(part)


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


def recipe_data(recipe: Recipe, data: Data, experts: Mapping[str, PreTrainedModel]) -> dict[str, Dataset]:
    """For every task its own part of its data, with the expert's own label ids, ready for the experts.

    Experts without classes of their own (features, a vocabulary) take whatever samples their task's data has.
    """
    parts = {}
    for task, expert in experts.items():
        entry, labelled = entry_of(recipe, task), has_classes(expert)
        own = data.of(entry)
        whole = load_source(
            own.dataset, own.split, folder=own.folder, config=own.config, columns=own.columns,
            streaming=own.streaming, labelled=labelled,
        )  # fmt: skip
        if labelled:
            part = _own_classes(whole, entry.classes, expert, task, own.samples, recipe.seed)
        else:
            part = some_of(whole, own.samples, recipe.seed)
        raw = not {"pixel_values", "input_ids"} & set(part.column_names)
        channels = getattr(expert.config, "num_channels", None)
        parts[task] = ready(part, load_processor(entry.model) if raw else None, channels)
    return parts


def has_classes(expert: PreTrainedModel) -> bool:
    """Whether an expert is a classifier, so that data have to be matched to its labels."""
    return merged_class(type(expert).__name__) not in (ZipItModel, ZipItForMaskedLM)


def _own_classes(
    whole: Dataset, classes: Sequence[int | str], expert: PreTrainedModel, task: str, samples: int | None, seed: int
) -> Dataset:
    """The rows of an expert's classes, with its own label ids."""
    labels = [expert.config.id2label[i] for i in range(expert.config.num_labels)]
    ids = choose_classes(whole, classes, task) if classes else match_labels(whole, labels, task)
    if len(ids) != len(labels):
        raise ExpertError(
            f"The expert {task!r} has {len(labels)} labels, but experts.{task}.classes names {len(ids)}."
        )
    return part_of(whole, ids, labels, samples=samples, seed=seed)


def without_labels(data: Dataset) -> Dataset:
    return data.remove_columns([name for name in LABEL_COLUMNS if name in data.column_names])


def load_processor(source: str | None, task: str | None = None) -> Any:
    """The processor, image processor or tokenizer that was saved with a model; None if there is none.

    Args:
        source: a folder or a repo id.
        task: the module name of a task of a merged model whose tasks have processors of their own.
    """
    from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer

    files = processor_files(source, fetch=True)
    if not files:  # without this, a tokenizer would be made of a configuration alone
        return None
    own = f"{PROCESSORS}/{task}"
    where = {"subfolder": own} if any(name.startswith(f"{own}/") for name in files) else {}
    for auto in (AutoProcessor, AutoImageProcessor, AutoTokenizer):
        try:
            return auto.from_pretrained(source, **where)
        except (OSError, ValueError, KeyError, TypeError, ImportError, AttributeError):  # each family in its own way
            continue
    return None


def _write_all(
    result: RunResult, model: PreTrainedModel, experts: Mapping[str, PreTrainedModel], say: Say
) -> RunResult:
    """Save the results, the trained experts, the picture and the kept model with its card; push it, if asked to."""
    recipe, folder = result.recipe, result.recipe.folder
    write_json(folder / "results.json", result.to_dict())  # first: measuring is what takes long
    for task, entry in recipe.experts.items():
        if entry.model is None:
            with replacing_folder(folder / "experts" / task) as beside:
                experts[task].save_pretrained(beside)
    if result.experts is not None and len({row.depth for row in result.rows}) > 1:
        from hf_zipit.report.plots import accuracy_over_depth

        with replacing(folder / "accuracy.png") as beside:
            accuracy_over_depth(result.rows, result.experts, title=recipe.name).savefig(beside, dpi=160)
        result = replace(result, plot=folder / "accuracy.png")
    result = _write_model(result, model, folder / "model")
    write_json(folder / "results.json", result.to_dict())  # again, with the paths of what was written
    if recipe.push is None:
        return result
    say(f"pushing to {recipe.push.repo_id}")
    commit = push_saved(result.model, **asdict(recipe.push))
    result = replace(result, pushed=str(commit.pr_url or commit.repo_url))
    write_json(folder / "results.json", result.to_dict())
    return result


def _write_model(result: RunResult, model: PreTrainedModel, folder: Path) -> RunResult:
    """Save the kept model with its card and recipe."""
    model.config.method["recipe"] = replace(result.recipe, output=None, push=None).to_dict()
    remember(model, _card_result(result))
    with replacing_folder(folder) as beside:
        model.save_pretrained(beside)
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
        curve=[Point(row.method, row.depth, row.parameters, row.accuracy) for row in result.rows],
    )


def merged_task_data(
    model: ZipItPreTrainedModel, source: str, data: Data, tasks: Sequence[str] | None = None
) -> dict[str, Dataset]:
    """For every task of a merged model its own part of a data set, classes matched by name.

    Models without classes of their own (features, a vocabulary) take all of it for every task.

    Args:
        model: loaded from `source`, where its processor is.
        data: where the data is.
        tasks: only these; all of them for None.
    """
    chosen = [model.known(task) for task in tasks or model.config.tasks]
    labelled = bool(model.config.task_labels)
    whole = load_source(
        data.dataset, data.split, folder=data.folder, config=data.config, columns=data.columns,
        streaming=data.streaming, labelled=labelled,
    )  # fmt: skip
    channels = getattr(model.config.source_config, "num_channels", None)
    parts = {}
    for task in chosen:
        labels = list(model.config.labels_of(task).values())
        if labelled:
            part = part_of(whole, match_labels(whole, labels, task), labels, samples=data.samples)
        else:
            part = some_of(whole, data.samples)
        raw = not {"pixel_values", "input_ids"} & set(part.column_names)
        parts[task] = ready(part, load_processor(source, model.branch_names[task]) if raw else None, channels)
    return parts
