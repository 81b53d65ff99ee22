"""A recipe: a YAML file that says what to merge, how, and how to measure it. Checked as a whole before work starts.

    name: clothes-and-shoes
    experts:
      clothes: {model: me/vit-clothes}
      shoes: {model: me/vit-shoes}
    calibration: {dataset: me/pictures, samples: 512}      # unlabelled: labels only tell which task a sample is of
    method: [average, permute, zip]
    depth: [1, 0.5, 0]
    evaluation: {dataset: me/pictures, split: test}
    save: {method: zip, depth: 0.5}
    push: {repo_id: me/vit-clothes-shoes}                  # to the Hub, when everything else is done

Every method is run at every depth; the one under `save` is kept. A method that ends in `+refit` is followed by the
closed-form regression of `hf_zipit.refit`; with `refit: true`, or settings of it, and no such name, every method is.
Paths are taken from the folder that the command runs in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from hf_zipit.errors import DataError, RecipeError
from hf_zipit.files import check_result_folder, check_writable
from hf_zipit.refit import RefitConfig
from hf_zipit.registry import check_options, suggestion
from hf_zipit.schema import build, read_yaml
from hf_zipit.sources import BUILT_IN, check_source, looks_local
from hf_zipit.training import Training

ALIASES = {"average": "identity"}
"""Names that recipes may use for methods: averaging is what merging with identity maps is."""

REFIT = "+refit"
"""The end of a method's name in a recipe that asks for the refit after it."""


@dataclass(frozen=True)
class TaskData:
    """Where the data of one task is, where that is not the same for all.

    Attributes:
        dataset, config: as in `Data`; together they replace those of the section.
        splits: what this data set calls a section's split, `{"test": "validation"}`.
        columns: beside those of the section.
    """

    dataset: str | None = None
    config: str | None = None
    splits: Mapping[str, str] = field(default_factory=dict)
    columns: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ExpertEntry:
    """One expert of a recipe.

    Attributes:
        model: a repo id or folder; left out for an expert that the recipe's `train` section trains.
        revision: of a repo.
        task: of a merged model the one task that is meant; without it all of them are, as `NAME/TASK`.
        sha256: of its weights (see `hf_zipit.origins`); a model with others is refused.
        classes: the data's classes of its task, by id or name, in the order of the expert's labels. Not needed
            where the expert's label names are those of the data.
        seed: of an expert that is trained here; the recipe's seed plus the expert's position by default.
        data: where the data of its task is, if not where the sections say.
    """

    model: str | None = None
    revision: str | None = None
    task: str | None = None
    sha256: str | None = None
    classes: tuple[int | str, ...] = ()
    seed: int | None = None
    data: TaskData | None = None


@dataclass(frozen=True)
class Data:
    """A labelled data set: see `hf_zipit.sources.load_source`.

    Attributes:
        dataset: a built-in name, a folder or a data set of the Hub; left out where every expert has its own `data`.
        split: of the data set.
        folder: where the files of `fashion-mnist` are.
        config: the configuration of a data set of the Hub.
        columns: names in the data -> `image`, `text`, `labels` or names of the model's inputs.
        streaming: read from the Hub only as many samples as are asked for.
        samples: at most so many of each task.
        batch_size: samples per forward pass.
    """

    dataset: str | None = None
    split: str = "test"
    folder: Path | None = None
    config: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    streaming: bool = False
    samples: int | None = None
    batch_size: int = 64

    def of(self, expert: ExpertEntry) -> Data:
        """The data of one expert's task."""
        own = expert.data
        if own is None:
            return self
        split = own.splits.get(self.split, self.split)
        columns = {**self.columns, **own.columns}
        if own.dataset is None:
            return replace(self, split=split, columns=columns)
        return replace(self, dataset=own.dataset, config=own.config, folder=None, split=split, columns=columns)


@dataclass(frozen=True)
class Calibration(Data):
    """The data that the experts are observed on. Its labels only say which task a sample belongs to."""

    split: str = "train"
    samples: int | None = 512
    batch_size: int = 32


@dataclass(frozen=True)
class Train(Training):
    """How the experts that have no `model` are trained, and on what: for demonstrations."""

    dataset: str = "sklearn-digits"
    split: str = "train"
    folder: Path | None = None


@dataclass(frozen=True)
class Save:
    """Which of the merges is kept."""

    method: str
    depth: float | str


@dataclass(frozen=True)
class Push:
    """Where on the Hub the kept model goes, when everything else is done.

    Attributes:
        repo_id: `user/name`, or `name` for the one who is logged in; made where there is none.
        private: whether a new repo is private.
        revision: the branch; made where there is none.
        create_pr: open a pull request instead of writing to the branch.
        commit_message: of the commit.
    """

    repo_id: str
    private: bool | None = None
    revision: str | None = None
    create_pr: bool = False
    commit_message: str | None = None


@dataclass(frozen=True)
class Search:
    """What `hf-zipit search` tries, and how: see `hf_zipit.search`.

    Attributes:
        space: as in `hf_zipit.searching.space`; the recipe's own methods, depths and settings by default.
        sampler: `grid` or `tpe`.
        trials: at most so many merges.
        hold_out: the share of the calibration samples that only scores.
        validation: data to score on, in place of a part of the calibration data.
        score: `mean` or `joint`.
        answers: who says what is right: `labels`, the `experts`, or `auto`.
        max_size: the best merge has at most so many times the parameters of one expert.
    """

    space: Mapping[str, Any] = field(default_factory=dict)
    sampler: str = "grid"
    trials: int | None = None
    hold_out: float = 0.25
    validation: Data | None = None
    score: str = "mean"
    answers: str = "auto"
    max_size: float | None = None


@dataclass(frozen=True)
class Recipe:
    """A checked recipe; the fields are the keys of the file. See the module's docstring.

    Attributes:
        name: of the merged model.
        experts: by task, in the order of their classes in the joint logits.
        calibration, evaluation: the data; without evaluation nothing is measured.
        method: one or several of `hf_zipit.align`'s methods, or `average`; with `+refit` behind it, refitted.
        depth: one or several shares of the blocks that are merged, or paths of blocks.
        options: by method, that method's own options.
        refit: true, or settings of the refit: for the methods with `+refit` behind their names; where none has it, for
            all.
        corrections: `hf_zipit.correct`'s corrections of every merge, in order, by name or as `{name: options}`.
        residual: `match`, `identity` or `orthogonal`: what happens to the residual stream.
        overrides: methods for spaces whose name fits a pattern.
        save: which merge is kept; the first method at the first depth by default.
        push: where the kept model is pushed to.
        train: how experts without a model are trained.
        search: what `hf-zipit search` tries; the other commands do without.
        output: where results go; `out/NAME` by default.
        seed: of everything that is drawn.
        threads: CPU threads; small models are faster with one. The same number gives the same file, bit by bit.
        versions: of the packages that a merge was made with, a record that nothing depends on.
    """

    name: str
    experts: Mapping[str, ExpertEntry]
    calibration: Calibration | None = None
    evaluation: Data | None = None
    method: tuple[str, ...] = ("zip",)
    depth: tuple[float | str, ...] = (1.0,)
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    refit: RefitConfig | bool | None = None
    corrections: tuple[str, ...] | Mapping[str, Mapping[str, Any]] = ()
    residual: str = "match"
    overrides: Mapping[str, Any] = field(default_factory=dict)
    save: Save | None = None
    push: Push | None = None
    train: Train | None = None
    search: Search | None = None
    output: Path | None = None
    seed: int = 0
    threads: int | None = None
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """Where results go."""
        return self.output or Path("out") / self.name

    @property
    def kept(self) -> Save:
        """Which merge is kept."""
        return self.save or Save(self.method[0], self.depth[0])

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain values that `load_recipe` reads again; what is not set is left out."""
        plain = _plain(asdict(self))
        if isinstance(self.corrections, Mapping):  # one without options is wanted all the same
            plain["corrections"] = {name: dict(options) for name, options in self.corrections.items()}
        return plain

    def to_yaml(self) -> str:
        """The recipe as a YAML file."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True, width=100, default_flow_style=None)


def load_recipe(path: str | Path) -> Recipe:
    """Read and check a recipe.

    Raises:
        RecipeError: if it is no YAML, or anything in it is unknown, missing or of a wrong type.
        DataError: if a data set or folder does not exist.
        OutputError: if the output folder cannot be written.
    """
    recipe = build(Recipe, read_yaml(path))
    check_recipe(recipe)
    return recipe


def real_method(method: str) -> str:
    """The registered name of a method that a recipe names."""
    plain = method.removesuffix(REFIT)
    return ALIASES.get(plain, plain)


def is_refitted(recipe: Recipe, method: str) -> bool:
    """Whether the refit follows a method: it is named with `+refit`, or `refit` is set and none is named so."""
    return method.endswith(REFIT) or (bool(recipe.refit) and not any(m.endswith(REFIT) for m in recipe.method))


def refit_settings(recipe: Recipe, method: str) -> RefitConfig | bool:
    """What `merge` is to be told about the refit after `method`."""
    return (recipe.refit or True) if is_refitted(recipe, method) else False


def check_recipe(recipe: Recipe) -> None:
    """Everything that can be known before work starts; raises as `load_recipe` does."""
    if not recipe.name.strip() or Path(recipe.name).name != recipe.name:
        raise RecipeError(f"name should be a word that can name a folder, but is {recipe.name!r}.")
    _check_experts(recipe)
    _check_merging(recipe)
    _check_data(recipe)
    if recipe.push is not None:
        _check_push(recipe.push)
    check_writable(recipe.folder)
    check_result_folder(recipe.folder / "model")


def _check_experts(recipe: Recipe) -> None:
    tasks = list(recipe.experts)
    if len(tasks) < 2:
        raise RecipeError(
            f"experts names {'only ' + repr(tasks[0]) if tasks else 'none'}; merging needs at least two experts."
        )
    for task, expert in recipe.experts.items():
        if not task.strip():
            raise RecipeError(f"The task name {task!r} in experts is empty; give every expert the name of its task.")
        if expert.model is None and recipe.train is None:
            raise RecipeError(f"experts.{task} has no model and the recipe no train section; give one of them.")
        if expert.model is None and not expert.classes:
            raise RecipeError(f"experts.{task} is to be trained here; give the classes it learns.")
        if expert.model is not None:
            check_model_source(expert.model, task)


def check_model_source(source: str, task: str) -> None:
    """A model given as a folder must be there; a repo id is taken on trust.

    Raises:
        RecipeError: if a folder does not exist or holds no model.
    """
    folder = Path(source).expanduser()
    if looks_local(source) and not folder.is_dir():
        raise RecipeError(f"The expert {task!r} is to come from the folder {source}, which does not exist.")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise RecipeError(
            f"The folder {source} of the expert {task!r} has no config.json; name the folder of a saved model."
        )


def _check_merging(recipe: Recipe) -> None:
    from hf_zipit.align.align import override_choice  # imports torch
    from hf_zipit.align.registry import METHODS
    from hf_zipit.correct.registry import check_corrections

    for key in ("method", "depth"):
        values = getattr(recipe, key)
        if not values:
            raise RecipeError(f"{key} is an empty list; give at least one.")
        if len(set(values)) < len(values):
            raise RecipeError(f"{key} holds a value twice in {list(values)}.")
    for method in recipe.method:
        if real_method(method) not in METHODS:
            raise RecipeError(f"There is no method {method!r}; {suggestion(method, (*METHODS.names(), *ALIASES))}")
    for depth in recipe.depth:
        if isinstance(depth, float) and not 0 <= depth <= 1:
            raise RecipeError(f"depth should be a share from 0 to 1 or the path of a block, but is {depth!r}.")
    for method, options in recipe.options.items():
        if method not in recipe.method:
            raise RecipeError(f"options.{method} is for no method of this recipe; {suggestion(method, recipe.method)}")
        check_options(method, METHODS.get(real_method(method)).function, options)
    for pattern, override in recipe.overrides.items():
        override_choice(pattern, override)
    if recipe.refit is False and any(method.endswith(REFIT) for method in recipe.method):
        raise RecipeError(f"refit is false, but method asks for it with {REFIT}; leave out one of them.")
    check_corrections(recipe.corrections)
    if recipe.threads is not None and recipe.threads < 1:
        raise RecipeError(f"threads should be at least 1, but is {recipe.threads}.")
    if recipe.residual not in ("match", "identity", "orthogonal"):
        raise RecipeError(f"residual should be 'match', 'identity' or 'orthogonal', but is {recipe.residual!r}.")
    kept = recipe.kept
    if kept.method not in recipe.method or kept.depth not in recipe.depth:
        raise RecipeError(
            f"save asks for {kept.method} at depth {kept.depth}, which this recipe does not make; choose one of the "
            f"methods {list(recipe.method)} and depths {list(recipe.depth)}."
        )


def _check_data(recipe: Recipe) -> None:
    needs_none = all(real_method(m) == "identity" and not is_refitted(recipe, m) for m in recipe.method)
    if recipe.calibration is None and (not needs_none or recipe.corrections):
        raise RecipeError("calibration is missing; name a data set on which the experts can be observed.")
    sections = {"calibration": recipe.calibration, "evaluation": recipe.evaluation, "train": recipe.train}
    for name, section in sections.items():
        if section is None:
            continue
        if name == "train" and section.dataset not in BUILT_IN:
            raise RecipeError(f"train.dataset should be one of {', '.join(BUILT_IN)}, but is {section.dataset!r}.")
        for number in ("samples", "batch_size", "epochs"):
            value = getattr(section, number, None)
            if value is not None and value < 1:
                raise RecipeError(f"{name}.{number} should be at least 1, but is {value}.")
        if isinstance(section, Data):
            _check_section(recipe, name, section)
        else:
            _check_source(name, section.dataset, section.folder)


def _check_push(push: Push) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(push.repo_id)
    except HFValidationError as error:
        raise RecipeError(f"push.repo_id should be user/name, but is {push.repo_id!r}: {error}") from error


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


def _plain(value: Any) -> Any:
    """Nested values as YAML knows them; a tuple of one becomes the one, and what is not set is left out."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items() if item is not None and item != () and item != {}}
    if isinstance(value, tuple):
        return _plain(value[0]) if len(value) == 1 else [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


__all__ = [
    "Calibration",
    "Data",
    "ExpertEntry",
    "Push",
    "Recipe",
    "Save",
    "Search",
    "TaskData",
    "Train",
    "check_recipe",
    "load_recipe",
]
