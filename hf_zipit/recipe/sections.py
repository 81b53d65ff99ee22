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
regression of `hf_zipit.refit`; with `refit: true`, or settings of it, and no such name, every method is.
All other fields of `MergeConfig` (`residual`, `overrides`, `combine`, `corrections`, ...) are keys, too. Paths are
taken from the folder that the command runs in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from hf_zipit.config import AUTO, REFIT, MergeConfig, RefitConfig
from hf_zipit.errors import RecipeError
from hf_zipit.recipe.training import Training
from hf_zipit.registry import suggestion
from hf_zipit.schema import build

ALIASES = {"average": "identity"}
"""Names that recipes may use for methods: averaging is what merging with identity maps is."""

LISTED = ("method", "depth", "options", "refit", "seed")
"""Settings of a merge that a recipe has in its own form: several of them, by method, or for more than the merge."""

SETTINGS = tuple(f.name for f in fields(MergeConfig) if f.name not in LISTED)
"""Settings of a merge that are keys of a recipe as they are, for all its merges."""


@dataclass(frozen=True)
class TaskData:
    """Where the data of one task is, where that is not the same for all.

    Attributes:
        dataset, config: as in `Data`, in place of the section's.
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
        subfolder: where in the repo the model is, if not at the top.
        task: of a merged model the one task that is meant; without it all of them are, as `NAME/TASK`.
        sha256: of its weights (see `hf_zipit.experts.origins`); a model with others is refused.
        classes: the data's classes of its task, by id or name, in the order of the expert's labels. Not needed
            where the expert's label names are those of the data.
        seed: of an expert that is trained here; the recipe's seed plus the expert's position by default.
        data: where the data of its task is, if not where the sections say.
    """

    model: str | None = None
    revision: str | None = None
    subfolder: str | None = None
    task: str | None = None
    sha256: str | None = None
    classes: tuple[int | str, ...] = ()
    seed: int | None = None
    data: TaskData | None = None


@dataclass(frozen=True)
class Data:
    """A labelled data set: arguments of `hf_zipit.recipe.sources.load_source`, and how much of it.

    Attributes:
        dataset: left out where every expert has its own `data`.
        samples: at most this many of each task.
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
        elsewhere = {"dataset": own.dataset, "config": own.config, "folder": None} if own.dataset else {}
        split = own.splits.get(self.split, self.split)
        return replace(self, split=split, columns={**self.columns, **own.columns}, **elsewhere)


@dataclass(frozen=True)
class CalibrationData(Data):
    """The data that the experts are observed on. Its labels only say which task a sample belongs to."""

    split: str = "train"
    samples: int | None = 512
    batch_size: int = 32
    memory_gb: float = 4.0


@dataclass(frozen=True)
class Measured(Data):
    """The data that experts and merges are measured on.

    Attributes:
        metrics: of `hf_zipit.metrics`, by name, beside the accuracy; models without classes, such as CLIP, need one.
    """

    metrics: tuple[str, ...] = ()


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

    The fields are arguments of `hf_zipit.modeling.hub.open_repo` and `push_folder`.
    """

    repo_id: str
    private: bool | None = None
    revision: str | None = None
    create_pr: bool = False
    commit_message: str | None = None


@dataclass(frozen=True)
class Search:
    """What `hf-zipit search` tries, and how: arguments of `hf_zipit.search`.

    The space is that of `hf_zipit.searching.space`, with the recipe's own methods, depths and settings by default.
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
        base: the model that the experts started from, or one for each by task, for `combine` rules that need it.
        calibration, evaluation: the data; without evaluation nothing is measured.
        method: one or several of `hf_zipit.align.methods`, `average` or `auto`; with `+refit` behind it, refitted.
        depth: one or several shares of the blocks that are merged, or paths of blocks.
        options: by method, that method's own options.
        refit: true, or settings of the refit: for the methods with `+refit` behind their names; where none has it, for
            all.
        settings: the other fields of `MergeConfig`, for every merge; in the file they are keys of their own.
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
    base: str | Mapping[str, str] | None = None
    calibration: CalibrationData | None = None
    method: tuple[str, ...] = (AUTO,)
    depth: tuple[float | str, ...] = (1.0,)
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    refit: RefitConfig | bool | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    evaluation: Measured | None = None
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

    @property
    def runs_nothing(self) -> bool:
        """Whether no model is run, neither for calibration nor to be measured: weights may stay in their files."""
        return self.calibration is None and self.evaluation is None

    @classmethod
    def from_dict(cls, content: Any) -> Recipe:
        """The recipe of plain values, as a YAML file holds them.

        Raises RecipeError for an unknown key, a missing one or a value of a wrong type.
        """
        if not isinstance(content, Mapping):
            return build(cls, content)
        known = [*(f.name for f in fields(cls) if f.name != "settings"), *SETTINGS]
        for key in content:
            if key not in known:
                raise RecipeError(f"{key} is not a known key; {suggestion(str(key), known)}")
        rest = dict(content)
        return build(cls, {"settings": {key: rest.pop(key) for key in SETTINGS if key in rest}, **rest})

    def config(self, method: str, depth: float | str) -> MergeConfig:
        """The settings of the merge by one of the methods at one of the depths. Raises RecipeError if one is wrong."""
        plain = real_method(method)
        refit = (self.refit or True) if is_refitted(self, method) else False
        if plain == AUTO and self.refit is None and not method.endswith(REFIT):
            refit = AUTO
        return MergeConfig.of(
            self.settings, method=plain, depth=depth, options=self.options.get(method, {}), refit=refit, seed=self.seed
        )

    @property
    def configs(self) -> dict[tuple[str, float | str], MergeConfig]:
        """The settings of every merge, by method and depth; raises as `config` does."""
        return {(method, depth): self.config(method, depth) for method in self.method for depth in self.depth}

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain values that `from_dict` reads again; what is not set is left out."""
        plain = _plain(asdict(replace(self, settings={})))
        # As they are: a correction without options is wanted all the same.
        return {**plain, **{key: _listed(key, value) for key, value in self.settings.items()}}

    def to_yaml(self) -> str:
        """The recipe as a YAML file."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True, width=100, default_flow_style=None)


def real_method(method: str) -> str:
    """The registered name of a method that a recipe names."""
    plain = method.removesuffix(REFIT)
    return ALIASES.get(plain, plain)


def is_refitted(recipe: Recipe, method: str) -> bool:
    """Whether the refit follows a method: it is named with `+refit`, or `refit` is set and none is named so."""
    return method.endswith(REFIT) or (bool(recipe.refit) and not any(m.endswith(REFIT) for m in recipe.method))


def _listed(key: str, value: Any) -> Any:
    """A setting as YAML knows it; a list where its order means something, for files sort the keys of mappings."""
    if isinstance(value, Mapping):
        in_order = key in ("corrections", "overrides")
        return [{name: item} for name, item in value.items()] if in_order else dict(value)
    return list(value) if isinstance(value, tuple) else value


def _plain(value: Any) -> Any:
    """Nested values as YAML knows them; a tuple of one becomes the one, and what is not set is left out."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items() if item is not None and item != () and item != {}}
    if isinstance(value, tuple):
        return _plain(value[0]) if len(value) == 1 else [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
