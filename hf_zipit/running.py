"""Running a recipe: experts, one look at the data, every method at every depth, the measurements, the kept model.

What must hold: nothing is written over an earlier result until the new one is complete, and the experts are observed
once, however many merges follow.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers import PreTrainedModel

from hf_zipit.align.registry import METHODS
from hf_zipit.errors import ExpertError
from hf_zipit.evaluation import Accuracy, accuracy
from hf_zipit.experts import load_experts
from hf_zipit.files import replacing, replacing_folder, write_json
from hf_zipit.merging import merge, plan
from hf_zipit.observe import Moments, observe
from hf_zipit.planning import Plan
from hf_zipit.recipe import Data, Recipe, real_method, refit_settings
from hf_zipit.refit import RefitReport
from hf_zipit.report.card import Result, write_card
from hf_zipit.sources import choose_classes, class_names, load_source, match_labels, part_of, ready
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
    """

    recipe: Recipe
    experts: Accuracy | None
    expert_parameters: int
    rows: tuple[Row, ...]
    kept: Row | None = None
    model: Path | None = None
    plot: Path | None = None
    refit: RefitReport | None = None

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
        }


def plan_recipe(recipe: Recipe, say: Say = lambda _: None) -> dict[tuple[str, float | str], Plan]:
    """What a run would do, for every method and depth. Experts that it would train are made, but not trained."""
    experts = _experts(recipe, say, train=False)
    plans: dict[tuple[str, float | str], Plan] = {}
    for method in recipe.method:
        for depth in recipe.depth:
            options = recipe.options.get(method)
            plans[method, depth] = plan(experts, method=real_method(method), options=options, depth=depth)
    return plans


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
    experts = _experts(recipe, say, train=True)
    calibration = _task_data(recipe, recipe.calibration, experts) if recipe.calibration else None
    if calibration:  # nothing after this can learn from labels
        calibration = {task: data.remove_columns("labels") for task, data in calibration.items()}
    evaluation = _task_data(recipe, recipe.evaluation, experts) if recipe.evaluation else None
    first = next(iter(recipe.method))
    planned = plan(experts, method=real_method(first), options=recipe.options.get(first), depth=recipe.depth[0])
    moments = _moments(recipe, experts, calibration, planned, progress, say)
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
                batch_size=recipe.calibration.batch_size if recipe.calibration else 32,
                residual=recipe.residual,
                overrides=recipe.overrides or None,
                moments=moments,
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
    if save == "nothing":
        return result
    say(f"writing to {recipe.folder}")
    if save == "model":
        return _write_model(result, kept_model, recipe.folder)
    return _write_all(result, kept_model, experts)


def _experts(recipe: Recipe, say: Say, *, train: bool) -> dict[str, PreTrainedModel]:
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
    sources = {task: made.get(task, entry.model) for task, entry in recipe.experts.items()}
    return load_experts(sources, revisions={task: entry.revision for task, entry in given.items() if entry.revision})


def _task_data(recipe: Recipe, data: Data, experts: Mapping[str, PreTrainedModel]) -> dict[str, Dataset]:
    """For every task its own part of a data set, with the expert's own label ids, ready for the experts."""
    whole = load_source(data.dataset, data.split, folder=data.folder, config=data.config)
    parts = {}
    for task, expert in experts.items():
        labels = [expert.config.id2label[i] for i in range(expert.config.num_labels)]
        classes = recipe.experts[task].classes
        ids = choose_classes(whole, classes, task) if classes else match_labels(whole, labels, task)
        if len(ids) != len(labels):
            raise ExpertError(
                f"The expert {task!r} has {len(labels)} labels, but experts.{task}.classes names {len(ids)}."
            )
        part = part_of(whole, ids, labels, samples=data.samples, seed=recipe.seed)
        raw = not {"pixel_values", "input_ids"} & set(part.column_names)
        parts[task] = ready(part, load_processor(recipe.experts[task].model) if raw else None)
    return parts


def load_processor(source: str | None) -> Any:
    """The image processor or tokenizer that was saved with a model; None if there is none."""
    from transformers import AutoImageProcessor, AutoTokenizer

    for auto in (AutoImageProcessor, AutoTokenizer):
        try:
            return auto.from_pretrained(source)
        except (OSError, ValueError, KeyError, TypeError, ImportError):  # each family fails in its own way
            continue
    return None


def _moments(
    recipe: Recipe, experts: Mapping[str, PreTrainedModel], calibration: Any, planned: Plan, progress: bool, say: Say
) -> Moments | None:
    """Moments for all merges of the run, if one of its methods looks at them."""
    if not any("moments" in METHODS.get(real_method(method)).needs for method in recipe.method):
        return None
    say("observing the experts on the calibration data")
    size = recipe.calibration.batch_size
    return observe(planned.spec, experts, calibration, batch_size=size, seed=recipe.seed, progress=progress)


def _write_all(result: RunResult, model: PreTrainedModel, experts: Mapping[str, PreTrainedModel]) -> RunResult:
    """Save the results, the trained experts, the picture and the kept model with its card."""
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
    return result


def _write_model(result: RunResult, model: PreTrainedModel, folder: Path) -> RunResult:
    """Save the kept model with its card and recipe."""
    with replacing_folder(folder) as beside:
        model.save_pretrained(beside)
        write_card(beside, model, _card_result(result), recipe=replace(result.recipe, output=None).to_yaml())
    return replace(result, model=folder, refit=RefitReport.of(model))


def _card_result(result: RunResult) -> Result:
    recipe = result.recipe
    return Result(
        name=recipe.name,
        base_models={task: entry.model for task, entry in recipe.experts.items()},
        dataset=recipe.evaluation.dataset if recipe.evaluation else None,
        split=recipe.evaluation.split if recipe.evaluation else None,
        merged=result.kept.accuracy if result.kept else None,
        experts=result.experts,
        parameters=result.kept.parameters if result.kept else 0,
        expert_parameters=result.expert_parameters,
    )


def load_merged(source: str) -> PreTrainedModel:
    """A merged model from a repo id or folder, with the class that its configuration names.

    Raises:
        ExpertError: if it cannot be loaded, or is no merged model.
    """
    from transformers import AutoConfig

    from hf_zipit import modeling

    try:
        config = AutoConfig.from_pretrained(source)
        if not isinstance(config, modeling.ZipItConfig):
            raise ExpertError(
                f"{source} holds a model of type {config.model_type!r}, but no merged model; merge some first."
            )
        return getattr(modeling, config.architectures[0]).from_pretrained(source, config=config).eval()
    except (OSError, ValueError) as error:
        if isinstance(error, ExpertError):
            raise
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ExpertError(f"The merged model {source} cannot be loaded: {first}") from error


def merged_task_data(model: PreTrainedModel, source: str, dataset: str, split: str) -> dict[str, Dataset]:
    """For every task of a merged model its own part of a data set, classes matched by name."""
    whole = load_source(dataset, split)
    raw = not {"pixel_values", "input_ids"} & set(whole.column_names)
    processor = load_processor(source) if raw else None
    parts = {}
    for task in model.config.tasks:
        labels = list(model.config.labels_of(task).values())
        parts[task] = ready(part_of(whole, match_labels(whole, labels, task), labels), processor)
    return parts
