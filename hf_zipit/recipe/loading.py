"""Reading a recipe, and checking everything that can be known before work starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from hf_zipit.align.align import override_choice
from hf_zipit.config import AUTO, SEEDS, MergeConfig
from hf_zipit.errors import DataError, RecipeError
from hf_zipit.files import check_result_folder, check_writable
from hf_zipit.files.checks import unfit, unprintable
from hf_zipit.files.places import folder_of
from hf_zipit.hub.cache import looks_local
from hf_zipit.recipe.sections import REFIT, Data, Recipe
from hf_zipit.recipe.sources import BUILT_IN, check_source
from hf_zipit.registry import METHODS, suggestion
from hf_zipit.schema import read_yaml

MOST_THREADS = 1024


def load_recipe(path: str | Path) -> Recipe:
    """Read and check a recipe.

    Raises:
        RecipeError: if it is no YAML, or anything in it is unknown, missing or of a wrong type.
        DataError: if a data set or folder does not exist.
        OutputError: if the output folder cannot be written.
    """
    recipe = Recipe.from_dict(read_yaml(path))
    check_recipe(recipe)
    return recipe


def check_recipe(recipe: Recipe, results: Sequence[Path] = ()) -> None:
    """Everything that can be known before work starts; raises as `load_recipe` does.

    `results` are the folders that models are written to, by default those of `hf-zipit run`.
    """
    if wrong := unfit(recipe.name):
        raise RecipeError(f"name should be a word that can name a folder, but {recipe.name[:80]!r} {wrong}.")
    if recipe.threads is not None and not 1 <= recipe.threads <= MOST_THREADS:
        raise RecipeError(f"threads should be a number from 1 to {MOST_THREADS}, but is {recipe.threads}.")
    _check_experts(recipe)
    _check_merging(recipe)
    _check_data(recipe)
    if recipe.push is not None:
        _check_repo(recipe.push.repo_id)
    check_writable(recipe.folder)
    trained = [recipe.folder / "experts" / task for task, entry in recipe.experts.items() if entry.model is None]
    for folder in results or [recipe.folder / "model", *trained]:
        check_result_folder(folder, _inputs(recipe))


def _inputs(recipe: Recipe) -> list[str | Path]:
    """Whatever a recipe reads that may be a folder."""
    bases = recipe.base.values() if isinstance(recipe.base, Mapping) else [recipe.base]
    sections = [s for s in (recipe.calibration, recipe.evaluation, recipe.train) if s is not None]
    data = [each for s in sections for each in (s.dataset, s.folder)]
    data += [entry.data.dataset for entry in recipe.experts.values() if entry.data]
    return [each for each in (*(e.model for e in recipe.experts.values()), *bases, *data) if each]


def _check_experts(recipe: Recipe) -> None:
    tasks = list(recipe.experts)
    if len(tasks) < 2:
        raise RecipeError(
            f"experts names {'only ' + repr(tasks[0]) if tasks else 'none'}; merging needs at least two experts."
        )
    for task, expert in recipe.experts.items():
        if not task.strip():
            raise RecipeError(f"The task name {task!r} in experts is empty; give every expert the name of its task.")
        if wrong := (unfit if expert.model is None else unprintable)(task):  # a trained one is saved under its name
            raise RecipeError(f"The task name {task[:80]!r} in experts {wrong}; give the expert another name.")
        if expert.model is None and recipe.train is None:
            raise RecipeError(f"experts.{task} has no model and the recipe no train section; give one of them.")
        if expert.model is None and not expert.classes:
            raise RecipeError(f"experts.{task} is to be trained here; give the classes it learns.")
        if expert.model is not None:
            _check_model(expert.model, task)


def _check_model(source: str, task: str) -> None:
    """A model given as a folder must be there; a repo id is taken on trust."""
    folder = folder_of(source)
    if not source.strip():
        raise RecipeError(f"experts.{task}.model is empty; give a repo id or a folder.")
    if looks_local(source) and folder is None:
        raise RecipeError(f"The expert {task!r} is to come from the folder {source}, which does not exist.")
    if folder and not (folder / "config.json").is_file():
        raise RecipeError(
            f"The folder {source} of the expert {task!r} has no config.json; name the folder of a saved model."
        )


def _check_merging(recipe: Recipe) -> None:
    for key in ("method", "depth"):
        values = getattr(recipe, key)
        if not values:
            raise RecipeError(f"{key} is an empty list; give at least one.")
        if len(set(values)) < len(values):
            raise RecipeError(f"{key} holds a value twice in {list(values)}.")
    for method in recipe.options:
        if method not in recipe.method:
            raise RecipeError(f"options.{method} is for no method of this recipe; {suggestion(method, recipe.method)}")
    if recipe.refit is False and any(method.endswith(REFIT) for method in recipe.method):
        raise RecipeError(f"refit is false, but method asks for it with {REFIT}; leave out one of them.")
    for config in recipe.configs.values():
        for pattern, override in config.overrides.items():
            override_choice(pattern, override)
    for task, expert in recipe.experts.items():
        if expert.seed is not None and not 0 <= expert.seed < SEEDS:
            raise RecipeError(f"experts.{task}.seed should be from 0 to {SEEDS - 1}, but is {expert.seed}.")
    kept = recipe.kept
    if (kept.method, kept.depth) not in recipe.configs:
        raise RecipeError(
            f"save asks for {kept.method} at depth {kept.depth}, which this recipe does not make; choose one of the "
            f"methods {list(recipe.method)} and depths {list(recipe.depth)}."
        )


def _check_data(recipe: Recipe) -> None:
    if recipe.calibration is None and any(map(_reads_data, recipe.configs.values())):
        raise RecipeError(
            "calibration is missing; name a data set on which the experts can be observed (`--calibration` of merge)."
        )
    if recipe.evaluation and recipe.evaluation.metrics:
        from hf_zipit.evaluation.metrics import find_metrics  # imports `evaluate`, which takes seconds

        find_metrics(recipe.evaluation.metrics)
    if recipe.train and recipe.train.dataset not in BUILT_IN:
        raise RecipeError(f"train.dataset should be one of {', '.join(BUILT_IN)}, but is {recipe.train.dataset!r}.")
    for name in ("calibration", "evaluation", "train"):
        section = getattr(recipe, name)
        for number in ("samples", "batch_size", "epochs"):
            value = getattr(section, number, None)
            if value is not None and value < 1:
                raise RecipeError(f"{name}.{number} should be at least 1, but is {value}.")
        if isinstance(section, Data):
            _check_section(recipe, name, section)
        elif section is not None:
            _check_source(name, section.dataset, section.folder)


def _reads_data(config: MergeConfig) -> bool:
    """Whether a merge cannot do without calibration data."""
    method = METHODS.find(config.method)
    explicit = config.refit not in (None, AUTO) or (config.corrections != AUTO and bool(config.corrections))
    return explicit or (method is not None and bool(method.needs & {"moments", "covariances"}))


def _check_repo(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise RecipeError(f"push.repo_id should be user/name, but is {repo_id!r}: {error}") from error


def _check_section(recipe: Recipe, name: str, section: Data) -> None:
    """Every task must have data that can be found."""
    if section.streaming and section.samples is None:
        raise RecipeError(f"{name}.streaming reads only what is asked for; say how many samples with {name}.samples.")
    for task, expert in recipe.experts.items():
        data = section.of(expert)
        if data.dataset is None:
            raise RecipeError(f"{name}.dataset is missing; give it, or experts.{task}.data.dataset.")
        _check_source(name, data.dataset, data.folder)


def _check_source(name: str, dataset: str, folder: Path | None) -> None:
    try:
        check_source(dataset, folder)
    except DataError as error:
        raise DataError(f"{name}: {error}") from error
